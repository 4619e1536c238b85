"""Every word that passes between the server and an engine process, and nothing else does.

Frames on a Unix socketpair: a 4-byte big-endian length, then a msgpack array ``[tag, field, ...]`` of one of the
dataclasses below, fields in their order. The server sends ``Load`` first, then ``Submit`` (or, to an embedding model,
``Embed``), ``Cancel`` and the controls; the engine answers ``Ready`` (or ``Failed`` with ``seq == -1``), then one
``Step`` for each engine step. Every ``Submit`` and ``Embed`` is answered by exactly one ``Freed``, whatever happens to
it, or by the engine's death. No text and no JSON: token ids only, packed as little-endian uint32 in ``bytes`` where
there are many.
"""

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import msgpack

MAX_FRAME_BYTES = 256 * 1024 * 1024


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32, 4 bytes each."""
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The inverse of ``pack_tokens``."""
    packed = array("I", data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence draws its tokens. Applied in this order: penalties and bias, temperature, min-p, top-k,
    top-p."""

    seed: int
    """64 bits; the draw at position p depends on (seed, p) alone."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and answer (CTRL, Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Over the answer, as OpenAI defines it."""
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    logprobs: int = -1
    """-1: none; 0: of the drawn token; n: of the n likeliest too (at most 20)."""


# --- server to engine ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pooling:
    """How an embedding model's hidden states become one vector, as its files say."""

    mode: str = ""
    """"mean", "cls", "last", "max", "weighted_mean" or "mean_sqrt_len", or several joined by "+", whose vectors follow
    each other; "rank": a cross-encoder's score of a pair; "": what is usual, or what a GGUF file says."""
    dense: tuple[str, ...] = ()
    """Linear layers after the pooling, in their order: folder, "|", activation ("tanh" or "")."""
    normalize: bool = True
    """The last step: to length 1; of a score, into 0 to 1."""


@dataclass(frozen=True, slots=True)
class Load:
    """Load this model; the first frame. Zero means: the engine decides."""

    path: str
    """An MLX model folder (config.json, safetensors), or a GGUF file for llama.cpp."""
    backend: str = "mlx"
    """"mlx" or "llama"."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end an answer, by the tokenizer; the model's own configuration adds to them."""
    context_length: int = 0
    max_rows: int = 8
    kv_budget_bytes: int = 0
    max_chunk_tokens: int = 0
    itl_target_ms: float = 250.0
    lookahead: str = "auto"
    """"auto": where the device runs apart from Python; "on"; "off"."""
    batching: str = "auto"
    """"single": one sequence at a time, even where rows could share a step."""
    openblas: str = "auto"
    """MLX's BLAS on Linux: "auto", "off", or the path of libopenblas.so.0."""
    stats_interval_s: float = 1.0
    log_level: str = "info"
    """"debug": the libraries' own logs too."""
    kv_bits: int = 16
    """Of a KV value: 16, 8 or 4. (llama.cpp: F16, Q8_0, Q4_0.)"""
    gpu_layers: int = -1
    """This and the following two are llama.cpp's: layers on the GPU; -1: all."""
    threads: int = 0
    mmap: bool = True
    words: str = ""
    """The folder with the model's tokenizer.json, for grammars."""
    grammar_compile_s: float = 10.0
    """A grammar that takes longer fails its request."""
    grammar_mask_ms: float = 20.0
    """And one whose masks take longer on average, the first second of them aside."""
    embedding: Pooling | None = None
    """Load it as an embedding model, which takes ``Embed`` instead of ``Submit``."""
    prefix_cache: bool = True
    """Keep the KV of prompts and answers for those who come with the same first tokens."""
    prefix_ram_bytes: int = 0
    """Most memory for that."""
    prefix_disk_bytes: int = 0
    """And most space on the disk; 0: none."""
    prefix_dir: str = ""
    """The folder there."""
    wired_bytes: int = -1
    """On Metal: at most so much of the weights is wired, of what all models together may have wired; -1: all."""
    speculation: str = "auto"
    """"off": no step verifies drafts, whatever a request says; "lookup": only those of the requests' own text; "auto":
    of whatever source there is."""
    draft_path: str = ""
    """A draft model's folder, or GGUF file, with the same tokenizer; "": none."""
    compile_decode: str = "auto"
    """Decode steps as compiled graphs (MLX): "auto": where that is faster; "on": wherever it says the same; "off"."""


@dataclass(frozen=True, slots=True)
class Submit:
    seq: int
    prompt: bytes
    max_tokens: int
    sampling: Sampling
    client: str = ""
    """Whom fairness counts the tokens for."""
    priority: int = 0
    deadline_s: float | None = None
    """Seconds from receipt; the engine then gives the sequence up with ``Failed(code="timeout")``."""
    ignore_eos: bool = False
    """The model's own end tokens do not end the answer. With a grammar: they come only where nothing else can."""
    grammar: str = ""
    """What the answer must match, for llguidance; "": anything. Where it can be complete, end tokens may follow."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end this answer, besides the model's own; with a grammar, where it may end."""
    min_tokens: int = 0
    """No end token is drawn before so many tokens, unless by its grammar the answer is complete."""
    prompt_logprobs: int = -1
    """As ``Sampling.logprobs``, for the prompt's tokens but the first; answered by ``PromptLogprobs``."""
    request_id: str = ""
    """The client's x-request-id or ours, for the engine's own lines in the log."""
    parent: int = -1
    """A sequence submitted before with the same prompt, whose KV of it this one takes over; -1: none."""
    salt: str | None = ""
    """KV is shared with sequences of the same one only; None: with nobody, and kept for nobody."""
    session: str = ""
    """The conversation that it belongs to, as far as the client says."""
    speculation: str = "auto"
    """As in ``Load``, for this request."""
    prediction: bytes = b""
    """What the client says that the answer will be, or much of it; packed tokens."""
    answer: bytes = b""
    """The answer's tokens that another engine process has drawn, packed: it goes on after them, as after a preemption.
    ``max_tokens``, ``min_tokens``, the penalties and the grammar count them. Prompt log-probabilities were told."""


@dataclass(frozen=True, slots=True)
class Embed:
    """Make a vector of each input; one sequence, whatever their number. Answered by ``Embedded``, then ``Freed``."""

    seq: int
    tokens: bytes
    """Of all inputs, one after the other."""
    lengths: bytes
    """How many tokens each has, packed as tokens are."""
    client: str = ""
    """This and the following as in ``Submit``."""
    priority: int = 0
    deadline_s: float | None = None
    pairs: bytes = b""
    """For a cross-encoder: where the second text of each input begins, packed."""
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Cancel:
    seq: int


@dataclass(frozen=True, slots=True)
class Canary:
    """Run one forward pass now, outside the batch, to show that the device still works; answered by ``Stats``."""


@dataclass(frozen=True, slots=True)
class Trim:
    """Do with so much memory for KV and prefixes from now on, because another model needs the rest. Prefixes shrink at
    once, and what waits keeps within it; sequences that run keep what they have, as long as they run alone. Who waits
    and needs more than all of it fails with "never_fits". llama.cpp's KV buffer stays as it is. Answered by
    ``Stats``."""

    kv_budget_bytes: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Free everything and exit 0."""

    save_s: float = 2.0
    """Prefixes that wait to be written to the disk are, as far as this time allows."""


# --- engine to server ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    backend: str
    architecture: str
    context_length: int
    """Longest prompt plus answer: the model's own limit, the request's, or what the KV budget holds."""
    vocab_size: int
    eos_ids: tuple[int, ...]
    kv_bytes_per_token: int
    kv_budget_bytes: int
    weights_bytes: int
    device: str
    """For example "cpu" or "gpu (Apple M3 Ultra)"."""
    dtype: str
    """How the weights are held, for example "float32" or "4-bit, group 64"."""
    path: str
    """How sequences are batched: "arena" (MLX), "unified" (llama.cpp's KV) or "single"."""
    path_reason: str
    probes: dict[str, str]
    """What was measured of the device and the model at load, in words: name → result."""
    load_s: float
    dimension: int = 0
    """Of an embedding model's vectors."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities (natural, of the unscaled distribution) of one drawn token and of the likeliest ones."""

    drawn: float
    top_ids: tuple[int, ...] = ()
    top: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one sequence got in one step."""

    seq: int
    tokens: tuple[int, ...]
    finish: str | None = None
    """None, "stop" (an end token, which is the last of ``tokens``), "complete" (by its grammar nothing can follow) or
    "length"."""
    logprobs: tuple[Logprobs, ...] = ()
    drafted: int = 0
    """Drafts that the step verified for it; all of ``tokens`` but the last were among them (and that, too, where the
    answer ended within them)."""
    source: str = ""
    """Where these came from: "prediction", "lookup" or "model"."""

    @property
    def accepted(self) -> int:
        """How many of them were right, and are among ``tokens``."""
        return min(self.drafted, len(self.tokens) - 1)


@dataclass(frozen=True, slots=True)
class Started:
    """A sequence was admitted and its prefill begins (again, after a preemption)."""

    seq: int
    cached_tokens: int
    """Prompt tokens whose KV was found and not computed; after a preemption, as at the first start."""
    broke_at: int = -1
    """Where the prompt's tokens first differ from those of the conversation that it goes on with; -1: nowhere, or it
    goes on with none."""
    why: str = ""
    """What ended the part that was found: "tokens" (the first different one), or the kind of record that was missing
    ("kv", "window", "checkpoint"); "": nothing did, or nothing was found."""


@dataclass(frozen=True, slots=True)
class Step:
    step: int
    elapsed_ms: float
    rows: tuple[Tokens, ...]
    started: tuple[Started, ...] = ()
    prefills: tuple[tuple[int, int], ...] = ()
    """Each sequence that prefilled in this step, and how many of its prompt's tokens are computed now."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of the prompt's tokens but the first, each given those before it: in their order, each once, in as many messages
    as it took steps; all before the sequence's first token."""

    seq: int
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class Embedded:
    """What one sequence got in one step: some of its vectors."""

    seq: int
    inputs: bytes
    """Which of its inputs, counted from 0; packed as tokens are."""
    vectors: bytes
    """Their vectors in that order, little-endian float32."""


@dataclass(frozen=True, slots=True)
class Running:
    """The sequences whose forward passes are about to run; sent when the set changes, before the launch.

    After a crash the server knows from it which requests may have caused the crash.
    """

    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Freed:
    """The sequence is out of the batch and its KV is free. The last word on it."""

    seq: int
    kv_bytes: int
    """Bytes given back; 0 if it never got KV."""
    prompt_tokens_computed: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """A sequence (``Freed`` follows), or with ``seq == -1`` the load, cannot go on."""

    seq: int
    code: str
    """"never_fits", "invalid_token" (the prompt), "invalid_request", "non_finite", "timeout", "model_invalid",
    "out_of_memory", "grammar_invalid", "grammar_too_complex" or "internal"."""
    message: str


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """The prefix store's figures; the counters since the engine's start."""

    ram_bytes: int = 0
    ram_blocks: int = 0
    evicted_blocks: int = 0
    disk_bytes: int = 0
    queued_bytes: int = 0
    """Waiting to be written."""
    bad_files: int = 0
    """Not what they should have been, and deleted."""
    disk_off: str = ""
    """Why the disk is not used any more."""
    row_hit_tokens: int = 0
    """Prompt tokens that were not computed, by where they came from: rows of other sequences, memory, the disk."""
    ram_hit_tokens: int = 0
    disk_hit_tokens: int = 0
    restore_s: float = 0.0
    """What putting them back took."""
    publish_s: float = 0.0
    """What keeping others took."""


@dataclass(frozen=True, slots=True)
class Stats:
    """The engine's figures, sent about once a second while it works and on ``Canary``."""

    step: int
    queued: int
    prefilling: int
    decoding: int
    ending: int
    kv_used_bytes: int
    """KV of live sequences (the scheduler's account)."""
    kv_budget_bytes: int
    arena_bytes: int
    """KV buffers that exist, padding and free rows included."""
    preemptions: int
    mlx_active_bytes: int
    mlx_peak_bytes: int
    mlx_cache_bytes: int
    rss_bytes: int
    """Resident set; on macOS ``phys_footprint``."""
    live_arrays: int
    """MLX arrays that Python still refers to: flat when nothing leaks."""
    traces: int = 0
    """Graphs compiled since the start."""
    handles: int = 0
    """GPU buffers, by an estimate: all arrays that are alive, the weights' too. What MLX's pool keeps for the next ones
    comes on top."""
    most_handles: int = 0
    """How many the system gives one process (Metal); 0: any number."""
    open_files: int = 0
    threads: int = 0
    prefix: PrefixStats = PrefixStats()


Message = (
    Load
    | Submit
    | Embed
    | Cancel
    | Canary
    | Shutdown
    | Ready
    | Step
    | PromptLogprobs
    | Embedded
    | Running
    | Freed
    | Failed
    | Stats
    | Trim
)

_CLASSES: tuple[type[Any], ...] = (
    Load,
    Submit,
    Embed,
    Cancel,
    Canary,
    Shutdown,
    Ready,
    Step,
    PromptLogprobs,
    Embedded,
    Running,
    Freed,
    Failed,
    Stats,
    Trim,
)
_TAGS = {cls: tag for tag, cls in enumerate(_CLASSES)}
_NAMES = {
    cls: tuple(f.name for f in fields(cls))
    for cls in (*_CLASSES, Pooling, Sampling, Tokens, Started, Logprobs, PrefixStats)
}

_EMBEDDING = _NAMES[Load].index("embedding")


def _values(record: Any) -> list[Any]:
    return [getattr(record, name) for name in _NAMES[type(record)]]


def encode(message: Message) -> bytes:
    """One frame, header included."""
    body: bytes = msgpack.packb([_TAGS[type(message)], *_values(message)], default=_values)
    return len(body).to_bytes(4, "big") + body


def _tokens(fields_: list[Any]) -> Tokens:
    seq, tokens, finish, logprobs, *drafted = fields_
    return Tokens(seq, tuple(tokens), finish, tuple(Logprobs(d, tuple(i), tuple(p)) for d, i, p in logprobs), *drafted)


def _decode(body: bytes) -> Message:
    tag, *values = msgpack.unpackb(body, strict_map_key=False)
    cls = _CLASSES[tag]
    if cls is Step:
        values[2] = tuple(_tokens(row) for row in values[2])
        values[3] = tuple(Started(*started) for started in values[3])
        values[4] = tuple((seq, done) for seq, done in values[4])
    elif cls is Submit:
        values[3] = Sampling(*values[3])
        values[9] = tuple(values[9])
    elif cls is PromptLogprobs:
        values[1] = tuple(Logprobs(d, tuple(i), tuple(p)) for d, i, p in values[1])
    elif cls is Load:
        values[2] = tuple(values[2])
        if (pooling := values[_EMBEDDING]) is not None:
            mode, dense, normalize = pooling
            values[_EMBEDDING] = Pooling(mode, tuple(dense), normalize)
    elif cls is Stats:
        values[-1] = PrefixStats(*values[-1])
    elif cls is Ready:
        values[4] = tuple(values[4])
    elif cls is Running:
        values[0] = tuple(values[0])
    message: Message = cls(*values)
    return message


class Decoder:
    """Bytes in any pieces in, messages out. Raises ValueError on a frame that cannot be one (the peer is broken)."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Every message completed by ``data``, in order."""
        buffer = self._buffer
        buffer += data
        while len(buffer) >= 4:
            size = int.from_bytes(buffer[:4], "big")
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
            if len(buffer) < 4 + size:
                return
            body = bytes(buffer[4 : 4 + size])
            del buffer[: 4 + size]
            yield _decode(body)
