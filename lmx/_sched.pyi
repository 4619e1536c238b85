"""Typed face of the compiled scheduler (``lmx/_sched.pyx``, DESIGN §3).

Pure decisions: no MLX, no I/O, no clock of its own. The engine's step loop is its only caller:

    for seq in scheduler.upcoming(8):    # with a store of prefixes: what could these start with?
        scheduler.recache(seq, tokens)
    for seq in decoding:                 # with draft sources: what may come next
        scheduler.offer(seq, tokens)
    plan = scheduler.plan(now)           # decide step k (one more step may still be running)
    ...launch it on the device, with plan.drafts...
    scheduler.commit(k, elapsed_ms, finished=(seq, ...), accepted={seq: 2})   # its outcome, when it is read back
    for seq in scheduler.releasable():   # in no plan that is still to be committed
        ...drop its KV...
        freed_bytes = scheduler.release(seq)

``plan()`` may be called again before the last step is committed (one-step lookahead): planned
tokens count as done at once, and a sequence that finishes or is cancelled meanwhile is simply in no later plan. Not
around a step that verifies drafts: it is planned when all before it are committed, and committed before the next.

Every float must be finite and not negative, every count a whole number in its range; else ValueError with the value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

class NeverFits(ValueError):
    """The prompt and one token of answer exceed the whole KV budget, so waiting cannot help."""

    needed_bytes: int
    budget_bytes: int
    def __init__(self, message: str, needed_bytes: int = 0, budget_bytes: int = 0) -> None: ...

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

class Join(NamedTuple):
    """A sequence that joins now and starts with tokens computed."""

    seq: int
    cached_tokens: int
    """Where its first chunk starts."""
    parent: int
    """Whose KV of those it takes over: computed in earlier steps, and neither released nor preempted. -1: they come
    from a store, which had them when ``submit`` or ``recache`` told so, after the plan before this one."""

@dataclass(frozen=True, slots=True)
class Prefill:
    """A chunk of one sequence's prompt."""

    seq: int
    start: int
    """Position of the chunk's first token; 0 means that the sequence joins now and needs a row."""
    tokens: int
    """A multiple of 32, or less than that more, or fewer, up to the prompt's end or a stop."""
    last: bool
    """The chunk ends the prompt, so that this step samples the sequence's next token."""

class Plan:
    """One engine step. ``plan()`` returns the same object each time; read it before planning again."""

    @property
    def step(self) -> int:
        """Number of this step, counting from 1; 0: nothing can run. Sequences may be decoding even so: then they need
        KV that ended sequences still hold. Or the only one that ran has just given way. Commit what is uncommitted,
        release, and plan again."""
    @property
    def decode(self) -> tuple[int, ...]:
        """Those that decode in this step; empty also while rows that were just started wait for others to start with
        them. The same tuple object as in the last step while nobody joins or leaves."""
    @property
    def depth(self) -> int:
        """Most drafts that the step verifies for one of ``decode``; 0: none."""
    @property
    def drafts(self) -> tuple[int, ...]:
        """For each of ``decode``, how many of the drafts that were offered for it the step verifies; () if none."""
    @property
    def joins(self) -> tuple[Join, ...]:
        """Those of ``prefills`` whose first chunk this is although it does not start at 0: they need a row, too."""
    @property
    def prefills(self) -> tuple[Prefill, ...]:
        """The chunks of this step: one, or several that each end a prompt."""
    @property
    def preempted(self) -> tuple[int, ...]:
        """Sequences whose KV is to be dropped before this step; they are queued, and prefill again (prompt and answer
        so far) later, from the start or from where ``recache`` says. They are in no ``prefills`` of this plan."""
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
        max_wave_tokens: int = 2048,
        max_chunk_area: int = 0,
        itl_target_ms: float = 250.0,
        max_step_ms: float = 4000.0,
        max_depth: int = 0,
    ) -> None:
        """
        A sequence takes a row and KV when its prefill begins, and keeps both until ``release``: its prompt's KV and one
        token more, rounded up to whole quanta, plus ``kv_bytes_per_sequence``; then a quantum at a time (with a
        ``kv_bytes_per_token`` of 0 nothing grows, and only the constant part and the rows limit). Beside others it is
        admitted when there is also room for what it and they will grow: to answers as they usually become (smoothed
        mean and spread of those that ended; 256 tokens before any has), or a quantum, whichever is more, and never
        beyond ``max_tokens``. Where growth exceeds the budget all the same, of the lowest priority the one with the
        fewest tokens to compute again is preempted; the first started of the highest priority never is. What is
        computed again is not charged to its client again.

        Beside decoding rows a chunk is sized so that the predicted step stays within ``itl_target_ms`` (a prompt's end
        may stretch it by a tenth, rather than cost a pass of its own); ``max_step_ms`` bounds every step, and
        ``max_chunk_area`` (0: none) its tokens times context, on which the memory for attention depends: summed over
        the chunks, whole prompts as if padded to the longest. A chunk has at least 32 tokens, whatever is predicted, so
        that prompts always go on.

        A prompt that ends in a step is joined by those next in order, a wave: each one to its end, whole ones and the
        rest of begun ones, of the same priority, of at most ``max_chunk_tokens`` in the step; all together at most 64
        prompts, ``max_wave_tokens``, and a predicted ``itl_target_ms`` for the step beside decoding rows, 8 times that
        without. The first that does not fit ends it. While all decoding rows have had only their first token (and none
        a higher priority), they wait for a prompt that fits a step to its end, and its wave, within 8 ×
        ``itl_target_ms`` from their first token to the next: so prompts that come moments after a wave began still
        start with it. Rows that have had more never wait.

        Prompts are taken by priority, then by the client that was served fewest tokens (prefilled and generated; Sheng
        et al., "Fairness in Serving Large Language Models", OSDI 2024), then by turn: arrival, but a prompt of at most
        ``max_chunk_tokens`` goes before those of its own client and priority of which more than that is left to
        prefill. The first in order that waits for KV is overtaken by smaller ones that fit. No sequence is overtaken
        more than 8 times, in these two ways together; then nobody behind it goes before it.

        Where rows or KV are full, and none that ended is about to give them back, running sequences give way to the
        first in order that waits, and keep their turn:
        - to a higher priority at once, as many of the lower ones as it needs, and none if all would not be enough (for
          KV one step later than for a row, for which that is known at once). Priority is strict: under lasting load,
          higher ones starve lower ones.
        - to a client far behind one row at a time: more than 512 served tokens behind a client that has at least two
          rows more; or without any row, all rows being in use, 2,048 behind one that has one; and by half of what the
          sequence that gives way has in its KV. Each gives way so at most twice; and what is computed again for it is
          at most a 16th of what was prefilled and a quarter of what was generated, up to 32,768 tokens, and 4,096 at
          the start.

        A step verifies at most ``max_depth`` drafts (up to 15; 0: never any) for a decoding row, where nothing is in
        flight: as many as promise the most tokens in the time. What is expected of drafts is learnt for each sequence
        and source, by position; what they cost, for rows (in buckets), depth, and whether a draft model was asked, by
        measuring such steps. Depths that were not measured are tried where they would pay if they cost little, the
        deeper ones after the others, and those that lost again after 256 steps, 512 and so on; of the time all that
        costs at most a hundredth, beyond some six steps at the start. KV for drafts is what is left: nobody gives way
        to them.
        """
    def submit(
        self,
        seq: int,
        prompt_tokens: int,
        max_tokens: int,
        *,
        client: str = "",
        priority: int = 0,
        deadline: float = ...,
        cached_tokens: int = 0,
        parent: int = -1,
        stops: Sequence[int] = (),
    ) -> int:
        """Queue a sequence; the number of tokens after which it ends by itself is returned: ``max_tokens``, or what
        the whole KV budget holds after this prompt, if that is less. ``deadline`` is on the clock of ``plan`` (seconds;
        infinity: none); a larger ``priority`` goes first. Raises NeverFits, or ValueError for a known ``seq``, an empty
        prompt, or a value out of range.

        It starts with ``cached_tokens`` of its prompt computed, fewer than all: they are neither planned nor charged,
        and its turn is that of a prompt of what is left. A store's are believed in the next plan only: before each
        later one tell them again, by ``recache``. KV that was computed elsewhere counts as any.

        With a ``parent``, whose prompt begins with the same tokens, it takes them over from that one's row: it waits
        until the parent has computed so many in an earlier plan, its prefill being done or not. It does not wait where
        it could lose by that; then, and where the parent is unknown or has a shorter prompt, it is queued with nothing
        cached. It waits while the parent
        - is of a higher priority; or of the same and, being the same client's, before it in turn; or another client's
          that comes no later: it may be ``cached_tokens``, divided by the clients that have sequences here, behind in
          tokens served (what it has computed of this prompt not counted), or all that others have to prefill may be
          less than it has computed of this prompt;
        - and is not queued for want of KV while this one would find a place.
        These are looked at before each plan; a parent that is preempted may so be waited for until it has prefilled
        again. If it ends, or its row goes (by release or preemption) before this one has started, this one is queued
        with nothing cached as well. Whether waiting saves anything the caller must know: not if a store has as much.

        ``stops``: up to 16 ascending positions inside the prompt where a chunk must end, if it is prefilled across
        them. A prompt takes part in waves, and rows wait for it, once no stop is left before its end."""
    def resize(self, kv_budget_bytes: int) -> tuple[int, ...]:
        """From now on the KV budget is this. Those that were submitted stay: where it is exceeded, running ones are
        preempted until it is not, all but the first started of the highest priority, which goes on alone and may exceed
        it; and so may, alone, those that are queued and need more. Returned are those that have no answer yet and could
        not be submitted now (NeverFits), in ascending order: the caller may cancel them."""
    def upcoming(self, most: int) -> tuple[int, ...]:
        """Those of the queued that the next ``plan`` may start, in about their order: the first of all, even if rows or
        KV would have to be freed for it; then others that fit, not more than rows are free. At most ``most``. Those who
        need not wait for their parent any more are queued by this. If nothing but ``recache`` comes between this and
        ``plan``, and no deadline passes in it, no other one starts than these (all of them, had ``most`` been larger).
        """
    def recache(self, seq: int, tokens: int, parent: int = -1) -> bool:
        """From now on a queued sequence starts with so many tokens computed, as if submitted so: 0 to one fewer than it
        has to prefill (prompt, and after a preemption the answer so far; else ValueError). Instead of what was said
        before, a parent's too. They are a store's, and believed in the next plan only; or those of ``parent``, which
        has a row with so many, planned or computed: these stay until that row goes. Its turn, and what its client was
        charged already, stay.

        False: it does not start so. It is not queued (unknown, waiting for its parent, started, ended), and nothing has
        changed; or the parent does not have so many, and it starts with nothing."""
    def cancel(self, seq: int) -> bool:
        """Stop a sequence in any state: it is in no later plan. True if it was live; False for unknown ids, and for one
        that has ended already (also when its last step is planned and not yet committed)."""
    def plan(self, now: float) -> Plan:
        """Decide the next step. ``now`` (seconds, any zero) only decides which deadlines have passed. Raises
        RuntimeError when two steps are uncommitted."""
    def offer(self, seq: int, tokens: int, source: int = 0) -> None:
        """A draft source has so many tokens for what this sequence gets after its newest one: 0 of no cost, 1 the draft
        model, whose passes are then part of the step that is measured. Believed in the next plan only; the last one
        counts. Passed over for a sequence that is unknown or not decoding."""
    def expected_depth(self) -> int:
        """About the ``depth`` that ``plan`` would choose by what was offered since the last one, were nothing in
        flight; 0: so there is nothing to wait for. Nothing is changed: what is in flight can be committed, offers be
        made anew, and then ``plan`` called."""
    def foresaw(self, seq: int, tokens: int, right: int, source: int = 0) -> None:
        """Of steps that verified none of them: a source would have had so many tokens for this sequence, of which the
        first ``right`` were right, and the next one, if any, wrong. Passed over for an unknown sequence. So acceptance
        is learnt where nothing is verified."""
    def commit(
        self,
        step: int,
        elapsed_ms: float,
        finished: Sequence[int] = (),
        learn: bool = True,
        accepted: Mapping[int, int] | None = None,
    ) -> None:
        """Take the outcome of a planned step: its measured cost, and the sequences that ended in it (EOS, an
        error; one that has ended already is passed over). A sequence that reached ``max_tokens`` ends by itself. Steps
        are committed in their order. ``learn=False``: ``elapsed_ms`` says nothing about the cost (it is only known to
        lie between bounds that hold the prediction). Raises ValueError, with nothing changed, for another step or an
        unknown id.

        ``accepted``: of rows that had drafts, how many of these were right and count, so that the row got so many
        tokens and one (missing: 0); ValueError for more than it had. One that was cancelled meanwhile is passed over.
        ``elapsed_ms`` of a step with drafts counts from when the step before was read, so that what the device waited
        for (the sources, the launch) is in it."""
    def releasable(self) -> tuple[int, ...]:
        """Ended sequences in no uncommitted step, in no particular order; each stays listed until ``release``. One
        whose KV others wait to take over is listed after the next ``plan``, in which they may start."""
    def release(self, seq: int) -> int:
        """Forget an ended sequence after its KV was dropped; the bytes given back (0 if it held none). Raises
        ValueError for one that is not releasable."""
    def next_deadline(self) -> float:
        """Earliest deadline of a live sequence, infinity if none."""
    def predict_ms(
        self, decode_rows: int, decode_context: int, chunks: Sequence[tuple[int, int]] = (), depth: int = 0
    ) -> float:
        """The fitted cost of such a step (``decode_context``: summed over the rows; ``chunks``: start and tokens;
        ``depth``: drafts verified, of a source that costs nothing)."""
    def statistics(self) -> SchedulerStatistics: ...
