"""Typed face of the compiled scheduler (``lmx/_sched.pyx``, DESIGN §3).

Pure decisions: no MLX, no I/O, no clock of its own. The engine's step loop is its only caller:

    plan = scheduler.plan(now)           # decide step k (one more step may still be running)
    ...launch it on the device...
    scheduler.commit(k, elapsed_ms, finished=(seq, ...))   # its outcome, when it is read back
    for seq in scheduler.releasable():   # in no plan that is still to be committed
        ...drop its KV...
        freed_bytes = scheduler.release(seq)

``plan()`` may be called again before the last step is committed (one-step lookahead): planned
tokens count as done at once, and a sequence that finishes or is cancelled meanwhile is simply in no later plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

class NeverFits(ValueError):
    """The prompt's KV alone exceeds the whole budget, so waiting cannot help."""

    needed_bytes: int
    budget_bytes: int

@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    queued: int
    """Sequences waiting for admission, preempted ones included."""
    prefilling: int
    decoding: int
    ending: int
    """Finished or cancelled sequences whose KV is not yet released."""
    kv_used_bytes: int
    """KV held by admitted sequences, in whole quanta."""
    kv_budget_bytes: int
    preemptions: int
    """Sequences preempted since the start."""
    steps: int
    """Steps planned since the start."""

class Plan:
    """One engine step. ``plan()`` returns the same object each time; read it before planning again."""

    @property
    def step(self) -> int: 
        """Number of this step, counting from 1; 0 when there is nothing to run."""
    @property
    def decode(self) -> tuple[int, ...]:
        """Sequences that decode in this step. The same tuple object as in the last plan while nobody joins or leaves."""
    @property
    def draft_depth(self) -> int:
        """Draft tokens to verify for each decoding row (one decision for the batch); 0: plain decode."""
    @property
    def prefill(self) -> int:
        """The sequence that prefills in this step, or -1."""
    @property
    def prefill_start(self) -> int:
        """Position of the chunk's first token; 0 means that the sequence joins now and needs a row."""
    @property
    def prefill_tokens(self) -> int:
        """Tokens in the chunk (a multiple of 32 except at the prompt's end)."""
    @property
    def prefill_last(self) -> bool:
        """True when the chunk ends the prompt, so that this step samples the sequence's next token."""
    @property
    def preempted(self) -> tuple[int, ...]:
        """Sequences whose KV is to be dropped before this step; they prefill again (prompt and answer so far) later."""
    @property
    def expired(self) -> tuple[int, ...]:
        """Sequences whose deadline passed, now cancelled; they show up in ``releasable()``."""

class Scheduler:
    def __init__(
        self,
        *,
        max_rows: int,
        kv_budget_bytes: int,
        kv_bytes_per_token: int,
        kv_bytes_per_sequence: int = 0,
        kv_quantum_tokens: int = 256,
        max_chunk_tokens: int = 512,
        itl_target_ms: float = 250.0,
        max_step_ms: float = 4000.0,
    ) -> None: ...
    def submit(
        self,
        seq: int,
        prompt_tokens: int,
        max_tokens: int,
        *,
        client: str = "",
        priority: int = 0,
        deadline: float = ...,
        now: float,
    ) -> None:
        """Queue a sequence. ``deadline`` is on the clock of ``now`` (seconds; infinity: none); a larger
        ``priority`` goes first. Raises NeverFits, or ValueError for a known ``seq`` or an empty prompt."""
    def cancel(self, seq: int) -> bool:
        """Stop a sequence in any state: it is in no later plan. True if it was live; unknown ids are False."""
    def plan(self, now: float) -> Plan: ...
    def commit(self, step: int, elapsed_ms: float, finished: Sequence[int] = ()) -> None:
        """Take the outcome of a planned step: its measured cost, and the sequences that ended in it (EOS, an
        error). A sequence that reached ``max_tokens`` ends by itself. Steps are committed in their order."""
    def releasable(self) -> tuple[int, ...]:
        """Ended sequences in no uncommitted step; each stays listed until ``release``."""
    def release(self, seq: int) -> int:
        """Forget an ended sequence after its KV was dropped; the bytes given back."""
    def next_deadline(self) -> float:
        """Earliest deadline of a live sequence, infinity if none."""
    def predict_ms(self, decode_rows: int, decode_context: int, chunk_tokens: int, chunk_start: int) -> float:
        """The fitted cost of such a step (``decode_context``: summed over the rows)."""
    def statistics(self) -> SchedulerStatistics: ...
