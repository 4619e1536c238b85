"""One vectorised sampling graph over all rows of a batch, for any array library.

Every function takes ``xp`` (``mlx.core`` or ``numpy``), so both back ends draw by the same formulas. A row's draw
depends on its own logits, its own ``Sampling`` and noise keyed by (seed, position, token), and on nothing else in the
batch. Nothing here reads a device array back: the graph stays lazy. Called by the back ends, once a step.

Whatever the logits and the parameters are, nothing raises: a row draws one of the vocabulary's ids or is ``bad``.
Numbers that float32 cannot work with are brought to the nearest that it can.

Order: penalties and bias, temperature, min-p, top-k, top-p (as vLLM). The draw is the Gumbel-max trick, with noise
from an integer hash (1.8 ms for 8 rows of 49,152 on the CPU). Inverting the cumulative
distribution needs one random number a row, but the last bits of the logits, which differ between batch shapes, move
every boundary of that distribution, and with them now and then a draw (seen in a test: one token of 24); here only
near ties flip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmx.protocol import Sampling

TOP_LOGPROBS = 20
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
# Up to this top_k a partial selection is cheaper than sorting the vocabulary (0.3 against 3 ms a row of 49,152 on the
# CPU).
_SELECT_LIMIT = 1024
# Below the likeliest by this much (in nats, after the temperature) a token cannot be drawn: noise lies in (-2.9, 16.7).
# Nor do all such tokens together change a sum of probabilities in float32 (262,144 · e^-30 is 2^-25).
_SPAN = 30.0
# Parameters are kept within these: their products with any logit of a model are finite in float32, and neither they nor
# their reciprocals are flushed to zero on a GPU. A smaller temperature draws as this one does.
_LEAST, _MOST = 1e-20, 1e20

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


class SamplingBatch:
    """The parameters of B rows as arrays; made again only when the batch's membership changes."""

    def __init__(self, xp: Any, rows: Sequence[Sampling], vocab_size: int) -> None:
        self.xp = xp
        self.rows = tuple(rows)
        self.greedy = all(row.temperature == 0 for row in rows)
        self.penalised = any(penalised(row) for row in rows)
        self.wants_logprobs = any(row.logprobs >= 0 for row in rows)
        self._ids = xp.arange(vocab_size, dtype=xp.uint32)[None]
        self._narrow = xp is np and len(rows) == 1
        """Shapes may depend on values, so only the tokens that can win need noise and order."""
        self._temperature = self._column([row.temperature or 1.0 for row in rows], low=_LEAST)
        self._is_greedy = xp.array([row.temperature == 0 for row in rows])
        self._log_min_p = None
        if any(row.min_p > 0 for row in rows):
            self._log_min_p = self._column([np.log(min(row.min_p, 1.0)) if row.min_p > 0 else -_MOST for row in rows])
        if self.penalised:
            self._repetition = self._column([row.repetition_penalty for row in rows], low=_LEAST)
            self._presence = self._column([row.presence_penalty for row in rows])
            self._frequency = self._column([row.frequency_penalty for row in rows])
        self._bias = None
        if any(row.logit_bias for row in rows):
            bias = np.zeros((len(rows), vocab_size), np.float32)
            for index, row in enumerate(rows):
                for token, value in (row.logit_bias or {}).items():
                    bias[index, token] = _bounded(value)
            self._bias = xp.array(bias)
        self._nucleus(rows, vocab_size)

    def _column(self, values: Sequence[float], low: float = -_MOST) -> Array:
        return self.xp.array(np.asarray([_bounded(value, low) for value in values], np.float32)[:, None])

    def _nucleus(self, rows: Sequence[Sampling], vocab_size: int) -> None:
        """Rows that need their logits ordered (top-k, top-p): only those pay for it."""
        chosen = [
            i for i, row in enumerate(rows) if row.temperature > 0 and (0 < row.top_k < vocab_size or row.top_p < 1)
        ]
        self._nucleus_rows = None
        if not chosen:
            return
        xp = self.xp
        ks = [rows[i].top_k if 0 < rows[i].top_k < vocab_size else vocab_size for i in chosen]
        self._select = max(ks) if max(ks) <= _SELECT_LIMIT else 0
        self._nucleus_rows = xp.array(np.asarray(chosen, np.int32))
        self._top_k = xp.array(np.asarray(ks, np.int32)[:, None])
        self._top_p = self._column([rows[i].top_p for i in chosen])
        back = np.full(len(rows), len(chosen), np.int32)
        back[chosen] = np.arange(len(chosen), dtype=np.int32)
        self._nucleus_back = xp.array(back)

    def draw(self, logits: Array, keys: Sequence[int], counts: Sequence[Array] | None = None) -> Drawn:
        """Draw one token a row.

        ``logits``: (B, V) of any float type. ``keys``: one a row, see ``draw_key``. ``counts``: seen and generated,
        each (B, V), when ``penalised``: how often a token stands in prompt and answer, and in the answer.
        """
        with np.errstate(all="ignore"):
            return self._draw(logits, keys, counts)

    def _draw(self, logits: Array, keys: Sequence[int], counts: Sequence[Array] | None) -> Drawn:
        xp = self.xp
        raw = logits if logits.dtype == xp.float32 else logits.astype(xp.float32)
        top = xp.max(raw, axis=-1, keepdims=True)
        bad = ~xp.isfinite(top[:, 0])
        x = raw
        if self.penalised:
            assert counts is not None
            x = self._penalise(x, *counts)
        if self._bias is not None:
            x = x + self._bias
        tokens = xp.argmax(x, axis=-1).astype(xp.int32)
        if not self.greedy:
            sampled = self._sample(x, xp.array(np.asarray(keys, np.uint32)[:, None]))
            tokens = xp.where(self._is_greedy, tokens, sampled)
        if not self.wants_logprobs:
            return Drawn(tokens, bad)
        logprobs = raw - (top + xp.log(xp.sum(xp.exp(raw - top), axis=-1, keepdims=True)))
        n = min(TOP_LOGPROBS, raw.shape[-1])
        ids = xp.argpartition(-logprobs, n - 1, axis=-1)[:, :n]
        values = xp.take_along_axis(logprobs, ids, axis=-1)
        order = xp.argsort(-values, axis=-1)
        return Drawn(
            tokens,
            bad,
            xp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0],
            xp.take_along_axis(ids, order, axis=-1).astype(xp.int32),
            xp.take_along_axis(values, order, axis=-1),
        )

    def _penalise(self, x: Array, seen: Array, generated: Array) -> Array:
        xp = self.xp
        scaled = xp.where(x > 0, x / self._repetition, x * self._repetition)
        x = xp.where(seen > 0, scaled, x)
        return x - self._presence * (generated > 0) - self._frequency * generated

    def _sample(self, x: Array, keys: Array) -> Array:
        xp = self.xp
        # Shifted before it is scaled: the likeliest stays 0, and finite, at any temperature.
        x = (x - xp.max(x, axis=-1, keepdims=True)) / self._temperature
        if self._log_min_p is not None:
            x = xp.where(x < self._log_min_p, -xp.inf, x)
        ids = self._ids
        if self._narrow:
            # NaN counts as near, so that a row of nothing else keeps something.
            keep = np.flatnonzero(~(x[0] < -_SPAN))
            x, ids = x[:, keep], ids[:, keep]
        if self._nucleus_rows is not None:
            x = xp.where(x >= self._threshold(x), x, -xp.inf)
        chosen = xp.argmax(x + self._gumbel(keys, ids), axis=-1)
        return (ids[0, chosen] if self._narrow else chosen).astype(xp.int32)

    def _gumbel(self, keys: Array, ids: Array) -> Array:
        """(B, V) standard Gumbel noise, keyed by row and token.

        The hash is Wellons' "lowbias32" (2018); 23 bits become a number in (0, 1) that float32 holds exactly.
        """
        xp = self.xp

        def word(value: int) -> Array:
            return xp.array(value, dtype=xp.uint32)

        h = (ids * word(_GAMMA & 0xFFFFFFFF)) ^ keys
        h = (h ^ (h >> word(16))) * word(0x21F0AAAD)
        h = (h ^ (h >> word(15))) * word(0xD35A2D97)
        h = h ^ (h >> word(15))
        u = ((h >> word(9)).astype(xp.float32) + 0.5) * 2.0**-23
        return -xp.log(-xp.log(u))

    def _threshold(self, x: Array) -> Array:
        """(B, 1): the smallest logit that top-k and top-p keep in each row, -inf where neither is asked for.

        Exact, but for entries equal to the threshold, which are all kept.
        """
        xp = self.xp
        x = x[self._nucleus_rows]
        if self._select and self._select < x.shape[-1]:
            x = -xp.partition(-x, self._select - 1, axis=-1)[:, : self._select]
        x = -xp.sort(-x, axis=-1)
        mass = xp.where(xp.arange(x.shape[-1])[None] < self._top_k, xp.exp(x), 0)
        before = xp.cumsum(mass, axis=-1) - mass
        kept = (mass > 0) & (before < self._top_p * xp.sum(mass, axis=-1, keepdims=True))
        last = xp.maximum(xp.sum(kept, axis=-1, keepdims=True), 1) - 1
        threshold = xp.take_along_axis(x, last, axis=-1)
        none = xp.full((1, 1), -xp.inf, dtype=xp.float32)
        return xp.concatenate([threshold, none])[self._nucleus_back]


def _bounded(value: float, low: float = -_MOST) -> float:
    """The nearest value in [low, _MOST]; NaN gives ``low``."""
    return min(max(low, value), _MOST)


def penalised(row: Sampling) -> bool:
    """Whether the row needs counts of its tokens."""
    return row.repetition_penalty != 1 or row.presence_penalty != 0 or row.frequency_penalty != 0
