"""What the step loop asks of a model, whatever runs it (DESIGN §7).

A back end knows rows, KV and logits; it decides nothing. The scheduler decides what runs, the step loop (the only
caller, on the one thread that owns the device) says so. ``launch`` may be called again before the last launch was read
(one-step lookahead): the device runs launches in their order, each once it is started, and ``free`` counts from the
next launch on.
"""

from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lmx.protocol import Logprobs, Sampling

if TYPE_CHECKING:
    from lmx.engine.grammar import Constraint

# Where starting a step blocks for more of it than this, it is started after the last one's tokens are told: they would
# be late by that share of it (of a step with a chunk: of 250 ms). Where it blocks for nearly all of it, nothing runs
# beside Python, and a step made before would only delay them.
BLOCKS_SHARE = 0.2
BLOCKS_ALL_SHARE = 0.95


@dataclass(slots=True)
class Sequence:
    """One sequence in the engine, from submit to freed."""

    seq: int
    tokens: list[int]
    """Prompt and answer so far."""
    prompt_tokens: int
    max_tokens: int
    sampling: Sampling
    ignore_eos: bool
    request_id: str = ""
    """For the log."""
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    constraint: "Constraint | None" = None
    """How far the answer has come in its grammar."""
    prompt_logprobs: int = -1
    scored_tokens: int = 0
    """Prompt tokens whose log-probabilities were told."""
    computed_tokens: int = 0
    """Prompt positions prefilled, over all prefills."""
    ended: bool = False
    salt: str | None = ""
    """Only sequences of the same one share KV; None: with nobody."""
    session: str = ""
    """Which conversation it belongs to; "": not said."""
    parent: int = -1
    """One of the same prompt, whose KV of it this one takes over."""
    stops: tuple[int, ...] = ()
    """Where its prefill's chunks end, for checkpoints."""
    kv_tokens: int = 0
    """Tokens whose KV its row holds, by the steps that were read."""
    whole_from: int = 0
    """Its row can give its first tokens to others from so many on: what sliding layers held before is not there."""
    cached_tokens: int = -1
    """Prompt tokens that were not computed when it first started; -1: it has not."""

    @property
    def generated_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def masked(self) -> bool:
        """Which token comes next depends on those before, in a way that only Python knows."""
        return self.constraint is not None or self.generated_tokens < self.min_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill positions [start, start + tokens) of ``sequence``; ``last``: and draw the token that follows."""

    sequence: Sequence
    start: int
    tokens: int
    last: bool


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row drew in one step: a token, and after each of its drafts that were right another one."""

    sequence: Sequence
    tokens: tuple[int, ...]
    bad: bool
    """The row's logits were not finite."""
    logprobs: tuple[Logprobs, ...] = ()
    """Of each token, where they are wanted."""


def verified(drafts: Seq[int], drawn: Seq[int]) -> int:
    """How many of a row's drafts count: each that is what was drawn in its place, as all before it were."""
    count = 0
    while count < len(drafts) and drafts[count] == drawn[count]:
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of a sequence's prompt tokens from ``start`` on, each given those before it."""

    sequence: Sequence
    start: int
    logprobs: tuple[Logprobs, ...]


class Block(Protocol):
    """A copy of what a sequence left in the layers, in the form that its back end restores fastest. It refers to no
    row, and no row to it."""

    @property
    def nbytes(self) -> int:
        """Memory that it holds, ``window_bytes`` included."""

    @property
    def window_bytes(self) -> int:
        """Of that, the part of sliding layers, which ``drop_window`` gives back."""

    def drop_window(self) -> None:
        """Forget the part of sliding layers: a prefix that ends a window later does not need it. For ever."""

    def to_bytes(self) -> bytes:
        """For ``Backend.from_bytes``, perhaps in a later process. On the engine's thread; may wait for the device."""


class Launch(Protocol):
    """A step: made by ``Backend.launch``, then started, its masked rows drawn, then read."""

    def start(self) -> None:
        """Give it to the device, behind the steps started before, but for the draws of rows that are ``masked``. Blocks
        until the device has done a share of it (``Facts.launch_share``), and so everything before."""

    def draw(self) -> None:
        """Now that the tokens of the step before are known: give the device the masks and what was left of the step.
        Nothing where no row is masked."""

    def scores(self) -> list[Scores]:
        """Once the step is read: of its chunks' tokens, for sequences that want ``prompt_logprobs``."""

    def wait(self) -> list[Draw]:
        """Block until the step is done (what was not given to the device before is now); the decoding rows' draws in
        their order, then those of the chunks that are ``last``, in their order."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a model once it is loaded; see ``protocol.Ready`` for most fields."""

    architecture: str
    context_length: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int
    """Beside the tokens' own: recurrent state."""
    kv_budget_bytes: int
    max_rows: int
    """Sequences that may run at once."""
    max_chunk_tokens: int
    """Longest prefill chunk of one sequence in a step."""
    launch_share: float
    """The share of a step that starting it blocks: 0 where the device runs apart from Python, 1 where that lasts as
    long as the step, so that lookahead gains nothing."""
    weights_bytes: int
    device: str
    dtype: str
    path: str
    path_reason: str
    probes: dict[str, str]
    """What was measured of the device and the model at load, in words: name → result."""
    forks: bool = False
    """Whether ``Backend.fork`` works: not where a state stands for all tokens, or a window has moved on."""
    prefixes: str = ""
    """What can be restored of a sequence's KV. "": nothing. "kv": any first tokens, from blocks. "checkpoints": only as
    many as a checkpoint was made at."""
    window: int = 0
    """The longest of the sliding layers' windows whose part a ``Block`` can do without: a prefix needs it in the blocks
    that reach into its last ``window`` tokens. 0: there are none."""
    publishes: str = "chunks"
    """When ``copy_out`` costs no more than the tokens that it copies: "chunks", any time; "end": it costs all of the
    sequence's tokens each time, so once, when it ends."""
    max_depth: int = 0
    """Most drafts of a row that a step verifies; 0: none, and ``probes["speculation"]`` says why."""
    draft_model: str = ""
    """The draft model's folder or file; "": there is none."""
    max_chunk_area: int = 0
    """Most tokens times context that prefill may compute in a step, for the memory that attention takes; 0: any
    number."""


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    rows: int
    """Rows in use."""
    arena_bytes: int
    active_bytes: int
    peak_bytes: int
    cache_bytes: int
    live_arrays: int
    traces: int = 0
    """Graphs compiled since the start."""
    handles: int = 0
    """GPU buffers, by an estimate; see ``protocol.Stats``."""
    most_handles: int = 0


class Backend(Protocol):
    facts: Facts

    def start(self, sequence: Sequence) -> None:
        """Give the sequence a row; its prefill begins with the next launch."""

    def fork(self, sequence: Sequence, parent: Sequence, tokens: int) -> None:
        """The same, with a copy of the parent's KV of its first ``tokens``: the prefill begins after those. (What they
        are is given to the device already.) Only where ``Facts.forks``."""

    def copy_out(self, sequence: Sequence, spans: Seq[tuple[int, int]]) -> list[Block]:
        """Copies of the KV of those spans of positions, each of a step that was read. What later steps write does not
        change them. Does not wait for the device where that runs apart. Raises ValueError where a position holds
        nothing (a row that failed)."""

    def checkpoint(self, sequence: Sequence) -> tuple[int, Block] | None:
        """Where ``Facts.prefixes`` is "checkpoints": a copy of what stands for all the tokens that the row holds now
        (recurrent states), and how many these are. None: a step that is not read yet is changing it."""

    def copy_in(self, sequence: Sequence, blocks: Seq[Block], tokens: int, checkpoint: Block | None) -> None:
        """``start``, with the KV of its first ``tokens``: that of the blocks, which follow each other from position 0
        on (the last may hold more tokens than are wanted), and a checkpoint made at ``tokens``. Its prefill goes on
        from there."""

    def from_bytes(self, data: bytes) -> Block:
        """Raises ValueError for bytes that are no block of this model's."""

    def parked(self, tokens: Seq[int], salt: str, claimed: Collection[int]) -> tuple[int, int]:
        """Of the rows that ended sequences of the same ``salt`` left and nobody ``claimed``, the one that holds most of
        these tokens, and how many it does; (-1, 0): none. (They are kept until their room is needed, where that costs
        nothing.)"""

    def resume(self, sequence: Sequence, row: int, tokens: int) -> None:
        """``start``, on such a row, with the KV of its first ``tokens``, at most as many as ``parked`` said."""

    def launch(self, decode: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[Seq[int]] = ()) -> Launch:
        """Prepare one step, as far as that needs no device: every sequence of ``decode`` gets one token, and the
        ``chunks`` (of other sequences, each of another one) are prefilled, in one forward pass or several.

        ``drafts``: none, or for each sequence of ``decode`` what its next tokens may be, at most ``Facts.max_depth`` of
        them. It draws a token, and after each draft that is what was drawn before it another one, each with its own
        position's key, penalties and mask; what its row holds of the others is forgotten when the launch is read. Such
        a launch is made when the one before was read, and read before the next is made."""

    def draft(self, sequences: Seq[Sequence], depths: Seq[int]) -> list[list[int]]:
        """What the draft model says comes next, at most so many tokens for each; [] where it cannot say. Only where
        ``Facts.draft_model``."""

    def free(self, sequence: Sequence) -> None:
        """Drop the sequence's KV. Whatever it holds, non-finite values too, reaches no other sequence. Unknown
        sequences are ignored."""

    def rewind(self, sequence: Sequence, tokens: int) -> int:
        """Forget the KV of positions ``tokens`` and later; how many are left. 0: the cache cannot go back so far (a
        recurrent state, a window that moved on) and is empty. The sequence goes on with a prefill from there."""

    def canary(self) -> None:
        """One small forward pass outside the batch, read back: raises if the device no longer works."""

    def limit_kv(self, budget_bytes: int) -> None:
        """From now on ``facts.kv_budget_bytes`` is this, and what is free is the system's; where the KV is one buffer,
        made at load, nothing changes."""

    def memory(self) -> MemoryFacts: ...
