"""What makes MLX's CPU back end faster on Linux: attention and the logistic function of our own where its exponential
is slow, and a heap that keeps what it frees.

Outside Apple's frameworks and ARM's NEON, MLX computes ``exp`` number by number, 12 ns each: a softmax over 1,300
positions takes ten times as long as both products of its attention. Here NumPy's stands in, in place, for prefill
chunks, and for decode steps, which must stay lazy, a polynomial of MLX's cheap operations (9 heads, 1,300 positions:
137 queries 5 instead of 23 ms, four rows' single ones 0.9 instead of 1.8). ``speed_up`` puts these in the place of
MLX's functions, so that mlx-lm's unmodified models call them; the adapter does it when it is imported, in an engine's
process, and other back ends never see it.
"""

import ctypes
import math
import platform
import sys
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

mlx_attention = mx.fast.scaled_dot_product_attention
# So few scores are over before more operations are dispatched.
_LEAST_SCORES = 4096
# A chunk of at least so many tokens is evaluated layer by layer; decode steps, and drafts, have fewer.
_LEAST_CHUNK_TOKENS = 16
# Scores that NumPy works on at a time, so that they stay in a core's cache.
_BLOCK_SCORES = 128 * 1024
_LOWEST = float(np.finfo(np.float32).min)
# What is smaller than 2 to that power is nothing beside the largest, which is 1; and no denormal number, which would be
# slow.
_LEAST_EXPONENT = -100.0
# 2**x, x in [0, 1], highest first; relative error 1e-7.
_SERIES = np.polynomial.Chebyshev.interpolate(np.exp2, 5, [0, 1]).convert(kind=np.polynomial.Polynomial).coef[::-1]
_FRACTION_BITS, _EXPONENT_BIAS = 23, 127  # of a float32
# Every operation allocates its result. What malloc maps anew, or has given back to the system, comes page by page:
# 14 instead of 4 ms for one of 2 × 6.6 MB. (mallopt's names, and the most that it accepts for the first.)
_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 32 * 1024**2
_M_TRIM_THRESHOLD, _KEPT_BYTES = -1, 256 * 1024**2


def speed_up() -> None:
    """Use these functions on this device, if it gains by them."""
    if mx.default_device() != mx.cpu or sys.platform != "linux":
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # of glibc
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    if platform.machine() == "x86_64":
        mx.fast.scaled_dot_product_attention = attention
        mx.sigmoid = sigmoid
        mx.eval(_weights(mx.zeros((1, 2, 2, 64))))  # a second of g++, once a machine, which no request should wait for


def give_back() -> None:
    """To the system, what malloc keeps of the load, packed weights and probes, or of prefixes that went: steps need far
    less. (glibc keeps what lies below the last piece in use.)"""
    if mx.default_device() == mx.cpu and sys.platform == "linux":
        mx.clear_cache()
        if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
            malloc_trim(0)


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    **others: Any,
) -> mx.array:
    """As ``mx.fast.scaled_dot_product_attention``: queries (B, H, L, D), keys (B, H / R, T, D) and values (B, H / R, T,
    D'); the result is (B, H, L, D'). ``others``: sinks and the like, which are left to MLX."""
    batch, heads, tokens, width = q.shape
    kv_heads, context = k.shape[1:3]
    known = {q.dtype, k.dtype, v.dtype} == {mx.float32} and not any(value is not None for value in others.values())
    if not known or batch * heads * tokens * context < _LEAST_SCORES:
        return mlx_attention(q, k, v, scale=scale, mask=mask, **others)
    # All queries that read the same keys in one product.
    together = (batch, kv_heads, heads // kv_heads * tokens)
    scores = (q * scale).reshape(*together, width) @ k.swapaxes(-1, -2)
    if isinstance(mask, str):
        mask = mx.arange(context) <= mx.arange(context - tokens, context)[:, None]
    if mask is not None:
        apart = scores.reshape(batch, heads, tokens, context)
        masked = mx.where(mask, apart, _LOWEST) if mask.dtype == mx.bool_ else apart + mask
        scores = masked.reshape(*together, context)
    weigh = _weights if tokens < _LEAST_CHUNK_TOKENS else _weights_in_place
    weights, total = weigh(scores)
    return ((weights @ v) / total).reshape(batch, heads, tokens, -1)


def sigmoid(x: mx.array, stream: Any = None) -> mx.array:
    """As ``mx.sigmoid``."""
    return 1 / (1 + mx.power(math.e, -x))


def _weights_in_place(scores: mx.array) -> tuple[mx.array, mx.array]:
    """exp(scores - their largest) in the same memory, and the sums of each query's."""
    mx.eval(scores)
    view = np.array(scores, copy=False).reshape(-1, scores.shape[-1])
    totals = np.empty((len(view), 1), np.float32)
    rows = max(1, _BLOCK_SCORES // view.shape[1])
    with np.errstate(invalid="ignore"):  # what is not finite ends its own request
        for first in range(0, len(view), rows):
            block = view[first : first + rows]
            np.subtract(block, block.max(axis=1, keepdims=True), out=block)
            np.exp(block, out=block)
            np.sum(block, axis=1, keepdims=True, out=totals[first : first + rows])
    return scores, mx.array(totals).reshape(*scores.shape[:-1], 1)


def _weights(scores: mx.array) -> tuple[mx.array, mx.array]:
    """The same, lazily."""
    most = mx.max(scores, axis=-1, keepdims=True)
    weights = _bits_of_exp(scores, most).view(mx.float32)
    # What is not finite among the scores is in the largest, and lost in the bits.
    return weights, mx.sum(weights, axis=-1, keepdims=True) + 0 * most


@partial(mx.compile, shapeless=True)
def _bits_of_exp(x: mx.array, most: mx.array) -> mx.array:
    """exp(x - most), at most 1, as the bits of a float32: an int32. (Schraudolph, 1999, with a polynomial.)"""
    x = mx.maximum((x - most) * math.log2(math.e), _LEAST_EXPONENT)
    whole = (x - 1).astype(mx.int32)
    rest = x - whole.astype(mx.float32)
    found = float(_SERIES[0]) * rest + float(_SERIES[1])
    for coefficient in map(float, _SERIES[2:]):
        found = found * rest + coefficient
    fraction = ((found - 1) * (1 << _FRACTION_BITS)).astype(mx.int32)
    return mx.left_shift(whole + _EXPONENT_BIAS, _FRACTION_BITS) + fraction
