"""One vectorised sampling graph over all rows of a batch, for any array library.

Every function takes ``xp`` (``mlx.core`` or ``numpy``), so both back ends draw by the same formulas. A row's draw
depends on its own logits, its own ``Sampling`` and noise keyed by (seed, position, token), and on nothing else in the
batch. Nothing here reads a device array back: the graph stays lazy. Called by the back ends, once a step.

Whatever the logits and the parameters are, nothing raises: a row draws one of the vocabulary's ids or is ``bad``.
Numbers that float32 cannot work with are brought to the nearest that it can.

Order: penalties and bias, masks, temperature, min-p, top-k, top-p (as vLLM). The draw is the Gumbel-max trick, with
noise from an integer hash (1.8 ms for 8 rows of 49,152 on the CPU). Inverting the cumulative distribution needs one
random number a row, but the last bits of the logits, which differ between batch shapes, move every boundary of that
distribution, and with them now and then a draw (seen in a test: one token of 24); here only near ties flip.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lmx.protocol import Logprobs, Sampling

TOP_LOGPROBS = 20
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
# Up to this top_k candidates are searched for. Beyond it, and for top-p alone, the vocabulary is sorted: one sort is
# about 14 kernels on Metal, bisecting to the last bit of a float32 three for each of some 30 passes.
_SELECT_LIMIT = 1024
# Below the likeliest by this much (in nats, after the temperature) a token cannot be drawn: noise lies in (-2.9, 16.7).
# Nor do all such tokens together change a sum of probabilities in float32 (262,144 · e^-30 is 2^-25).
_SPAN = 30.0
# Parameters are kept within these: their products with any logit of a model are finite in float32, and neither they nor
# their reciprocals are flushed to zero on a GPU. A smaller temperature draws as this one does.
_LEAST, _MOST = 1e-20, 1e20
# Compiled graphs that are kept. There are about 40 kinds of batches for each row count, and usual traffic has a few.
_KEPT_GRAPHS = 128

Array = Any


def _mix(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def draw_key(seed: int, position: int) -> int:
    """32 bits that depend on (seed, position) alone: the key of one row's noise."""
    return _mix((_mix(seed & _MASK) + (position + 1) * _GAMMA) & _MASK) >> 32


@dataclass(frozen=True, slots=True)
class Drawn:
    """Lazy results of one draw over B rows."""

    tokens: Array
    """(B,) int32."""
    bad: Array
    """(B,) bool: the row's logits hold NaN or +inf, or nothing but -inf; its token means nothing."""
    logprobs: Array | None = None
    """(B,) float32, of the drawn tokens under the unscaled distribution; None if no row asked."""
    top_ids: Array | None = None
    """(B, 20) int32, likeliest first."""
    top_logprobs: Array | None = None


@dataclass(frozen=True, slots=True)
class _Signature:
    """What a graph depends on beside the values of its inputs: one is compiled for each."""

    rows: int
    vocab_size: int
    sampled: bool
    """Any row is not greedy."""
    penalised: bool
    biased: int
    """Entries of a row's bias, filled up to a power of two; 0: no row has one."""
    ordered: int
    """Of how many of the likeliest tokens top-k and top-p need the order: 0 of none, ``vocab_size`` of all."""
    min_p: bool
    logprobs: bool
    masked: bool = False


class SamplingBatch:
    """The parameters of B rows as arrays; made again only when the batch's membership changes."""

    def __init__(self, xp: Any, rows: Sequence[Sampling], vocab_size: int, *, compiled: bool | None = None) -> None:
        self.xp = xp
        self.penalised = any(penalised(row) for row in rows)
        self._compiled = compiles(xp) if compiled is None else compiled
        self._ids = xp.arange(vocab_size, dtype=xp.uint32)[None]
        sampled = any(row.temperature != 0 for row in rows)
        self._inputs: dict[str, Array] = {}
        if sampled:
            self._inputs["temperature"] = self._column([row.temperature or 1.0 for row in rows], low=_LEAST)
            self._inputs["greedy"] = xp.array(np.array([[row.temperature == 0] for row in rows]))
        min_p = sampled and any(row.min_p > 0 for row in rows)
        if min_p:
            least = [np.log(min(row.min_p, 1.0)) if row.min_p > 0 else -_MOST for row in rows]
            self._inputs["log_min_p"] = self._column(least)
        if self.penalised:
            self._inputs["repetition"] = self._column([row.repetition_penalty for row in rows], low=_LEAST)
            self._inputs["presence"] = self._column([row.presence_penalty for row in rows])
            self._inputs["frequency"] = self._column([row.frequency_penalty for row in rows])
        self._signature = _Signature(
            rows=len(rows),
            vocab_size=vocab_size,
            sampled=sampled,
            penalised=self.penalised,
            biased=self._bias(rows, vocab_size),
            ordered=self._order(rows, vocab_size),
            min_p=min_p,
            logprobs=any(row.logprobs >= 0 for row in rows),
        )

    def _column(self, values: Sequence[float], low: float = -_MOST) -> Array:
        return self.xp.array(np.asarray([_bounded(value, low) for value in values], np.float32)[:, None])

    def _bias(self, rows: Sequence[Sampling], vocab_size: int) -> int:
        # An id outside the vocabulary is refused before it gets here; a GPU would write there.
        entries = [
            [(token, _bounded(value)) for token, value in (row.logit_bias or {}).items() if 0 <= token < vocab_size]
            for row in rows
        ]
        longest = max(map(len, entries))
        if not longest:
            return 0
        width = 1 << (longest - 1).bit_length()
        for found in entries:
            # With an entry that is there already, which is written twice then, or with one that adds nothing.
            found += [found[-1] if found else (0, 0.0)] * (width - len(found))
        self._inputs["bias_ids"] = self.xp.array(np.array([[token for token, _ in row] for row in entries], np.int32))
        self._inputs["bias"] = self.xp.array(np.array([[value for _, value in row] for row in entries], np.float32))
        return width

    def _order(self, rows: Sequence[Sampling], vocab_size: int) -> int:
        """Rows that need their logits ordered (top-k, top-p): where shapes are free, only those pay for it."""
        limited = [row.temperature != 0 and (0 < row.top_k < vocab_size or row.top_p < 1) for row in rows]
        if not any(limited):
            return 0
        xp = self.xp
        chosen = [i for i in range(len(rows)) if self._compiled or limited[i]]
        ks = [rows[i].top_k if 0 < rows[i].top_k < vocab_size else vocab_size for i in chosen]
        self._inputs["top_k"] = xp.array(np.asarray(ks, np.int32)[:, None])
        self._inputs["top_p"] = self._column([rows[i].top_p for i in chosen])
        if self._compiled:
            self._inputs["limited"] = xp.array(np.array(limited)[:, None])
        else:
            self._inputs["chosen"] = xp.array(np.asarray(chosen, np.int32))
            back = np.full(len(rows), len(chosen), np.int32)
            back[chosen] = np.arange(len(chosen), dtype=np.int32)
            self._inputs["back"] = xp.array(back)
        most = max(k for i, k in zip(chosen, ks, strict=True) if limited[i])
        return vocab_size if most > _SELECT_LIMIT else min(vocab_size, max(32, 1 << (most - 1).bit_length()))

    def draw(
        self, logits: Array, keys: Sequence[int], counts: Sequence[Array] | None = None, masks: Any = None
    ) -> Drawn:
        """Draw one token a row.

        ``logits``: (B, V) of any float type. ``keys``: one a row, see ``draw_key``. ``counts``: seen and generated,
        each (B, V), when ``penalised``: how often a token stands in prompt and answer, and in the answer. ``masks``: a
        NumPy array (B, ⌈V / 32⌉) of uint32, whose bits tell which tokens may be drawn; None: all.
        """
        xp, signature = self.xp, self._signature
        inputs = dict(self._inputs)
        if masks is not None:
            signature = replace(signature, masked=True)
            inputs["masks"] = xp.array(masks if self._compiled else _limits(masks, signature.vocab_size))
        if self._signature.sampled:
            inputs["keys"] = xp.array(np.asarray(keys, np.uint32)[:, None])
            inputs["ids"] = self._ids
        if self.penalised:
            assert counts is not None
            inputs["seen"], inputs["generated"] = counts
        if self._compiled:
            return Drawn(*_compiled(xp, signature)(logits, inputs))
        with np.errstate(all="ignore"):
            return Drawn(*_draw(xp, signature, logits, inputs))


_Graph = Callable[[Array, dict[str, Array]], tuple[Array, ...]]


@functools.lru_cache(_KEPT_GRAPHS)
def _compiled(xp: Any, signature: _Signature) -> _Graph:
    graph: _Graph = xp.compile(functools.partial(_draw, xp, signature))
    return graph


def compiles(xp: Any) -> bool:
    """Whether graphs are compiled: on a GPU, where a draw with Qwen's parameters then takes 20 kernels instead of 59.
    MLX's CPU kernels come from g++, which takes seconds for each new one."""
    return xp is not np and bool(xp.default_device() == xp.gpu)


def traces() -> int:
    """How many graphs were compiled in this process."""
    return _compiled.cache_info().misses


def _draw(xp: Any, signature: _Signature, logits: Array, inputs: dict[str, Array]) -> tuple[Array, ...]:
    """The fields of ``Drawn``."""
    raw = logits if logits.dtype == xp.float32 else logits.astype(xp.float32)
    top = xp.max(raw, axis=-1, keepdims=True)
    bad = ~xp.isfinite(top[:, 0])
    x, peak = raw, top
    if signature.penalised:
        x = _penalise(xp, x, inputs)
    if signature.biased:
        x = _add_bias(xp, x, inputs)
    if signature.masked:
        x = _mask_out(xp, x, inputs["masks"])
    if signature.sampled:
        peak = top if x is raw else xp.max(x, axis=-1, keepdims=True)
        tokens = _sample(xp, signature, x - peak, inputs)
    else:
        tokens = xp.argmax(x, axis=-1).astype(xp.int32)
    if not signature.logprobs:
        return tokens, bad
    return tokens, bad, *_logprobs(xp, raw, top, tokens, TOP_LOGPROBS)


def score(xp: Any, logits: Array, tokens: Array, n: int) -> tuple[Array, Array, Array]:
    """The log-probabilities (N,) of ``tokens`` (N,) under ``logits`` (N, V), each row's ``n`` likeliest tokens (N, n)
    and theirs: of the unscaled distribution, as ``Drawn`` has them."""
    raw = logits.astype(xp.float32)
    with np.errstate(all="ignore"):
        return _logprobs(xp, raw, xp.max(raw, axis=-1, keepdims=True), tokens, n)


def as_logprobs(drawn: Array, ids: Array, values: Array) -> tuple[Logprobs, ...]:
    """What ``score`` gave, read back, for the protocol."""
    rows = zip(drawn.tolist(), ids.tolist(), values.tolist(), strict=True)
    return tuple(Logprobs(logprob, tuple(top), tuple(of_top)) for logprob, top, of_top in rows)


def _logprobs(xp: Any, raw: Array, top: Array, tokens: Array, n: int) -> tuple[Array, Array, Array]:
    logprobs = raw - (top + xp.log(xp.sum(xp.exp(raw - top), axis=-1, keepdims=True)))
    drawn = xp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    n = min(n, raw.shape[-1])
    if not n:
        return drawn, xp.zeros((len(drawn), 0)), xp.zeros((len(drawn), 0))
    values, ids = _candidates(xp, logprobs, n)
    order = xp.argsort(-values, axis=-1)[:, :n]
    return (
        drawn,
        xp.take_along_axis(ids, order, axis=-1).astype(xp.int32),
        xp.take_along_axis(values, order, axis=-1),
    )


def _penalise(xp: Any, x: Array, inputs: dict[str, Array]) -> Array:
    repetition, presence, frequency = inputs["repetition"], inputs["presence"], inputs["frequency"]
    seen, generated = inputs["seen"], inputs["generated"]
    if xp is not np:
        return _penalised(xp, x, seen, generated, repetition, presence, frequency)
    # Only the tokens that were seen: 0.1 instead of 4 ms for a row of 151,936.
    x = x.copy()
    for row in range(len(x)):
        at = row, np.flatnonzero(seen[row] != 0)
        x[at] = _penalised(np, x[at], seen[at], generated[at], repetition[row], presence[row], frequency[row])
    return x


def _penalised(
    xp: Any, x: Array, seen: Array, generated: Array, repetition: Array, presence: Array, frequency: Array
) -> Array:
    scaled = xp.where(x > 0, x / repetition, x * repetition)
    x = xp.where(seen > 0, scaled, x)
    return x - presence * (generated > 0) - frequency * generated.astype(xp.float32)


def _add_bias(xp: Any, x: Array, inputs: dict[str, Array]) -> Array:
    ids = inputs["bias_ids"]
    changed = xp.take_along_axis(x, ids, axis=-1) + inputs["bias"]
    if xp is not np:
        return xp.put_along_axis(x, ids, changed, axis=-1)
    x = x.copy()
    np.put_along_axis(x, ids, changed, axis=-1)
    return x


def _mask_out(xp: Any, x: Array, masks: Array) -> Array:
    """Last, so that no bias can lift what a mask forbids. ``masks``: bits, or limits."""
    if masks.dtype == xp.float32:
        return x + masks
    bits = (masks[:, :, None] >> xp.arange(32, dtype=xp.uint32)) & xp.array(1, dtype=xp.uint32)
    return xp.where(bits.reshape(len(masks), -1)[:, : x.shape[-1]] != 0, x, -xp.inf)


def _limits(masks: Any, vocab_size: int) -> Any:
    """0 for a set bit, -inf for others: on a CPU NumPy makes it and MLX adds it in 0.4 ms for 8 rows of 49,152, where
    MLX's own shifts take 2.1."""
    bits = np.unpackbits(masks.astype("<u4").view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    infinity = np.float32(-np.inf).view(np.int32)
    return ((bits.astype(np.int32) - 1) & infinity).view(np.float32)


def _sample(xp: Any, signature: _Signature, x: Array, inputs: dict[str, Array]) -> Array:
    """``x``: logits less the row's largest. That is done before they are scaled: so the likeliest stays 0, and finite,
    at any temperature."""
    ids = inputs["ids"]
    x = x / inputs["temperature"]
    if signature.min_p:
        x = xp.where(x < inputs["log_min_p"], -xp.inf, x)
    # Where shapes may depend on values, only the tokens that can win need noise and order.
    narrow = xp is np and signature.rows == 1
    if narrow:
        # NaN counts as near, so that a row of nothing else keeps something.
        keep = np.flatnonzero(~(x[0] < -_SPAN))
        x, ids = x[:, keep], ids[:, keep]
    if signature.ordered:
        x = xp.where(x < _threshold(xp, signature, x, inputs), -xp.inf, x)
    noise = xp.where(inputs["greedy"], 0, _gumbel(xp, inputs["keys"], ids))
    chosen = xp.argmax(x + noise, axis=-1)
    return (ids[0, chosen] if narrow else chosen).astype(xp.int32)


def _gumbel(xp: Any, keys: Array, ids: Array) -> Array:
    """(B, V) standard Gumbel noise, keyed by row and token.

    The hash is Wellons' "lowbias32" (2018); 23 bits become a number in (0, 1) that float32 holds exactly.
    """

    def word(value: int) -> Array:
        return xp.array(value, dtype=xp.uint32)

    h = (ids * word(_GAMMA & 0xFFFFFFFF)) ^ keys
    h = (h ^ (h >> word(16))) * word(0x21F0AAAD)
    h = (h ^ (h >> word(15))) * word(0xD35A2D97)
    h = h ^ (h >> word(15))
    u = ((h >> word(9)).astype(xp.float32) + 0.5) * 2.0**-23
    return -xp.log(-xp.log(u))


def _threshold(xp: Any, signature: _Signature, x: Array, inputs: dict[str, Array]) -> Array:
    """(B, 1): the smallest logit that top-k and top-p keep in each row, -inf where neither is asked for.

    Exact, but for entries equal to the threshold, which are all kept.
    """
    if "chosen" in inputs:
        x = x[inputs["chosen"]]
    count = min(signature.ordered, x.shape[-1])
    if count < x.shape[-1]:
        x = -np.partition(-x, count - 1, axis=-1) if xp is np else _candidates(xp, x, count)[0]
    x = -xp.sort(-x[:, :count] if xp is np else -x, axis=-1)[:, :count]
    rank = xp.arange(count)[None]
    mass = xp.where(rank < inputs["top_k"], xp.exp(x), 0)
    total = xp.cumsum(mass, axis=-1)
    kept = (mass > 0) & (total - mass < inputs["top_p"] * total[:, -1:])
    threshold = xp.min(xp.where(kept | (rank == 0), x, xp.inf), axis=-1, keepdims=True)
    if "limited" in inputs:
        return xp.where(inputs["limited"], threshold, -xp.inf)
    none = xp.full((1, 1), -xp.inf, dtype=xp.float32)
    return xp.concatenate([threshold, none])[inputs["back"]]


def _candidates(xp: Any, x: Array, k: int) -> tuple[Array, Array]:
    """(values, ids) of tokens among which are the k largest of each row.

    MLX selects by sorting on Metal: 14 kernels for a vocabulary. But a token of the k largest stands in one of the k
    groups whose best is largest, so with √(V / k) tokens a group two sorts of √(V · k) do, mostly of a kernel each.
    """
    rows, size = x.shape
    width = 1 << max(0, round(math.log2(size / k) / 2))
    groups = size // width
    if xp is np:
        ids = np.argpartition(-x, k - 1, axis=-1)[:, :k] if k < size else np.arange(size)[None]
        return np.take_along_axis(x, ids, axis=-1), ids
    every = xp.arange(size, dtype=xp.uint32)[None]
    if groups <= k or width == 1:
        return x, xp.broadcast_to(every, x.shape)
    parted = x[:, : groups * width].reshape(rows, groups, width)
    best = xp.argpartition(xp.max(parted, axis=-1), groups - k, axis=-1)[:, groups - k :, None]
    values = xp.take_along_axis(parted, best, axis=1).reshape(rows, k * width)
    ids = (best * width + every[:, None, :width]).reshape(rows, k * width)
    if groups * width < size:
        rest = slice(groups * width, None)
        values = xp.concatenate([values, x[:, rest]], axis=-1)
        ids = xp.concatenate([ids, xp.broadcast_to(every, x.shape)[:, rest]], axis=-1)
    return values, ids


def _bounded(value: float, low: float = -_MOST) -> float:
    """The nearest value in [low, _MOST]; NaN gives ``low``."""
    return min(max(low, value), _MOST)


def penalised(row: Sampling) -> bool:
    """Whether the row needs counts of its tokens."""
    return row.repetition_penalty != 1 or row.presence_penalty != 0 or row.frequency_penalty != 0
