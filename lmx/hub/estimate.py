"""How much memory a model takes, before it is loaded, and how much of it for keys and values it is granted.

The formulas follow what the engines do (``lmx.engine.mlx.backend``, ``lmx.engine.llama.backend``); what cannot be
derived was measured, and says how. docs/memory.md compares them with what real processes took. Pure; called by the
lifecycle, and by whoever shows what a model would need. Never imports MLX.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lmx.hub.layers import Layer
from lmx.hub.shape import Shape

QUANTUM_TOKENS = 256
"""KV is given out in whole quanta of so many tokens (``lmx.engine.budget``)."""
LEAST_TOKENS = 8192
"""A context of which a model is not loaded without: agents' prompts are tens of thousands of tokens long."""

_NAMELESS_TOKENS = 32768
"""The context of a model that names none, as ``lmx.engine.mlx.adapter`` has it."""
_MB = 1024 * 1024
# The resident set of an engine process with a model of a few kilobytes, on Linux, after a prompt of 2,048 tokens
# (bench/memory_estimates.py): interpreter, libraries, what BLAS and malloc keep. Encoders' steps are shorter.
_MLX_BYTES = 170 * _MB
_MLX_ENCODER_BYTES = 92 * _MB
_LLAMA_BYTES = 102 * _MB
# llama.cpp's bookkeeping of a cell, which it counts as KV: position, number of sequences, sequence.
_CELL_BYTES = 12
# Its copy of a recurrent state begins with a few words, which it counts, too.
_STATE_HEADER_BYTES = 1024
# Scores before and after the softmax.
_SCORES = 2
_FLOAT32_MEMORY_SHARE = 0.6
_CHUNK_TOKENS = {("mlx", False): 192, ("mlx", True): 2048, ("llama", False): 512, ("llama", True): 512}
_POOL_BYTES = 4 * 1024**3
_LLAMA_SCORES_BYTES = 512 * _MB
_LLAMA_OUTPUTS = 32
_KV_SHARE = 0.5
# Of a model that only its files are known of: what is added to their size, and how many positions' KV are as large. (As
# of models of 7 to 30 billion parameters in 4 bits.)
_GUESSED_SHARE = 1.1
_GUESSED_TOKENS = 32768


@dataclass(frozen=True, slots=True)
class Estimate:
    weights_bytes: int
    """As the engine holds them."""
    kv_bytes_per_token: int
    state_bytes: int
    """Of each row, beside its tokens: recurrent states, and on llama.cpp the windows of sliding layers."""
    prefill_bytes: int
    """What a step takes for a moment: attention's scores, hidden states, logits. Kept by the process's allocators."""
    overhead_bytes: int
    """The engine's process: interpreter, libraries, tables."""
    context_length: int
    rows: int
    """What it was asked for; the context: of the model's own, if none was."""
    notes: tuple[str, ...] = ()

    def kv_bytes(self, tokens: int, rows: int = 1) -> int:
        """Of so many rows of so many tokens, in whole quanta."""
        return rows * (_quanta(tokens) * self.kv_bytes_per_token + self.state_bytes)

    def total(self, kv_bytes: int) -> int:
        return self.fixed_bytes + kv_bytes

    def beside(self, draft: "Estimate") -> "Estimate":
        """With a draft model in the same process, whose rows hold the same tokens."""
        return replace(
            self,
            weights_bytes=self.weights_bytes + draft.weights_bytes,
            kv_bytes_per_token=self.kv_bytes_per_token + draft.kv_bytes_per_token,
            prefill_bytes=max(self.prefill_bytes, draft.prefill_bytes),
            notes=self.notes + draft.notes,
        )

    @property
    def fixed_bytes(self) -> int:
        """All but the KV."""
        return self.weights_bytes + self.prefill_bytes + self.overhead_bytes


def _quanta(tokens: int) -> int:
    return -(-tokens // QUANTUM_TOKENS) * QUANTUM_TOKENS


def estimate(
    shape: Shape,
    *,
    backend: str,
    gpu: bool,
    kv_bits: int = 16,
    context: int = 0,
    rows: int = 8,
    chunk: int = 0,
    embedding: bool = False,
    room_bytes: int | None = None,
) -> Estimate:
    """What ``shape`` takes on ``backend`` ("mlx" or "llama").

    ``context``, ``chunk``: 0 as in the settings, the model's own and the engine's. ``room_bytes``: what there is for
    it, on which depends whether MLX makes its weights float32 on a CPU; None: enough.
    """
    limits = [limit for limit in (context, shape.context_length) if limit]
    tokens = min(limits, default=_NAMELESS_TOKENS)
    chunk = chunk or _CHUNK_TOKENS[backend, gpu]
    if backend == "llama":
        return _llama(shape, gpu, kv_bits, tokens, rows, chunk, embedding)
    return _mlx(shape, gpu, kv_bits, tokens, rows, chunk, embedding, room_bytes)


def guess(size_bytes: int, *, backend: str, context: int, rows: int, embedding: bool = False) -> Estimate:
    """Of a model of which nothing is known but the size of its files."""
    per_token = 0 if embedding else max(size_bytes // _GUESSED_TOKENS, 1024)
    overhead = _MLX_BYTES if backend == "mlx" else _LLAMA_BYTES
    note = "guessed from the size of its files: its configuration is like no other's"
    return Estimate(
        int(_GUESSED_SHARE * size_bytes), per_token, 0, 0, overhead, context or _NAMELESS_TOKENS, rows, (note,)
    )


def _mlx(
    shape: Shape, gpu: bool, kv_bits: int, tokens: int, rows: int, chunk: int, embedding: bool, room: int | None
) -> Estimate:
    weights, number = shape.mlx_bytes, 2 if shape.half else 4
    if not gpu and (room is None or 4 * shape.parameters <= _FLOAT32_MEMORY_SHARE * room):
        weights, number = 4 * shape.parameters, 4
    per_token = (
        0
        if embedding
        else sum(_mlx_kv(heads, width, number, kv_bits) for layer in shape.layers for heads, width in layer.kv)
    )
    state = 0 if embedding else 4 * sum(layer.state for layer in shape.layers)
    # Beyond that a chunk of a prompt is as large as there is memory for its scores (``lmx.engine.budget.chunk_area``).
    short = min(tokens, LEAST_TOKENS)
    scores = 0 if gpu else _SCORES * 4 * shape.heads * min(chunk, tokens) * short
    # A row that grows is copied. On a CPU malloc keeps what it had; on a GPU the pool does, which other steps use.
    outgrown = 0 if gpu else short * per_token
    hidden = number * min(chunk, tokens) * (4 * shape.width + 3 * shape.inner_width)
    draws = 4 * 4 * rows * shape.vocab_size
    overhead = _MLX_ENCODER_BYTES if embedding else _MLX_BYTES
    return Estimate(weights, per_token, state, scores + outgrown + hidden + draws, overhead, tokens, rows)


def _mlx_kv(heads: int, width: int, number: int, bits: int) -> int:
    """Of a position, as ``lmx.engine.mlx.adapter.LayerKind`` counts it."""
    group = next((size for size in (64, 32) if width % size == 0), 0)
    if bits == 16 or not group:
        return heads * width * number
    return heads * (width * bits // 8 + width // group * 2 * number)


def _llama(shape: Shape, gpu: bool, kv_bits: int, tokens: int, rows: int, chunk: int, embedding: bool) -> Estimate:
    # Blocks of 32 numbers with a 16-bit scale.
    number = {16: 2.0, 8: 34 / 32, 4: 18 / 32}[kv_bits]
    forward = chunk + rows
    growing = [layer for layer in shape.layers if not layer.window]
    sliding = [layer for layer in shape.layers if layer.window]
    per_token = max(_cell(growing, number), 1)
    state = sum(4 * layer.state for layer in shape.layers)
    state += _STATE_HEADER_BYTES if state else 0
    if sliding:
        state += _cell(sliding, number) * (max(layer.window for layer in sliding) + forward)
    scores = min(4 * shape.heads * forward * _quanta(tokens), _LLAMA_SCORES_BYTES)
    hidden = 4 * forward * (2 * shape.width + 2 * shape.inner_width)
    logits = 4 * shape.vocab_size * max(rows, _LLAMA_OUTPUTS) * 2
    if embedding:
        per_token = state = 0
    # Its buffer holds the rows only: blocks of prefixes come on top, those of a conversation at least.
    prefixes = min(tokens, LEAST_TOKENS) * per_token + state
    taken = scores + hidden + logits + prefixes
    return Estimate(shape.weights_bytes, per_token, state, taken, _LLAMA_BYTES, tokens, rows)


def _cell(kept: Sequence[Layer], number: float) -> int:
    """Of a position in all of these layers, as llama.cpp counts it."""
    values = sum(heads * width for layer in kept for heads, width in layer.kv)
    return int(number * values) + _CELL_BYTES if values else 0


def grant(found: Estimate, *, room_bytes: int, kv_budget_bytes: int = 0, context_asked: bool = False) -> int:
    """How many bytes of KV the engine gets (``Load.kv_budget_bytes``); the model then needs ``found.total`` of it.

    ``kv_budget_bytes``, a setting, is given exactly. Otherwise as much as all rows need at the full context, at most
    half of what ``room_bytes`` leaves beside the rest, and never less than one sequence needs: the whole context if
    somebody asked for it, else ``LEAST_TOKENS`` of it. The result may be more than there is room for, and is then what
    it needs at least: the caller makes room (``Memory.plan``) or refuses.
    """
    if kv_budget_bytes:
        return kv_budget_bytes
    wanted = found.kv_bytes(found.context_length, found.rows)
    least = least_kv(found, context_asked=context_asked)
    return max(min(wanted, int(_KV_SHARE * max(room_bytes - found.fixed_bytes, 0))), least)


def least_kv(found: Estimate, *, context_asked: bool = False) -> int:
    """Without which the model is not loaded."""
    return found.kv_bytes(found.context_length if context_asked else min(found.context_length, LEAST_TOKENS))
