"""What is assumed of a device, measured on it at load, with the loaded model's own decode steps.

Four things decide how the engine runs: whether a launch returns before its step is done (lookahead gains nothing where
it does not), whether a write into a lane stays in place while an earlier step that reads the lane is still in flight
(else lookahead copies what it should only touch), which write costs the same in every buffer, and what memory a chunk's
attention takes (the scores of all its queries, where MLX has no fused kernel). None is a matter of the device's name:
MLX takes only so many operations ahead on every back end, and its kernels cover some widths and not others. A
measurement that fails is told in words and never fails the load. Called once, by the back end's load.
"""

import functools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from lmx.engine.backend import BLOCKS_ALL_SHARE, BLOCKS_SHARE
from lmx.engine.mlx.adapter import AttentionShape, LayerKind, LoadedModel
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.layers import SLOT_QUANTUM, Slots, Write, scatter_write, slice_write
from lmx.engine.sampling import SamplingBatch
from lmx.protocol import Sampling

# Steps that are timed after one that warms up: no fewer and no more than this, and no more for so long. Three, because
# on a busy machine one of them may be off by anything.
_FEWEST_STEPS, _MOST_STEPS = 3, 7
_STEPS_S = 0.05
# Attention is measured with so many tokens and so much context. MLX's kernels for up to 8 queries are others.
_ATTENTION_AREA = (16, 1024)
# Where a model computes its attention itself: float32 scores, their softmax and one copy, for 32 heads.
_OWN_ATTENTION_BYTES = 3.0 * 4 * 32
# What is said of a device that copies: that steps are made ahead there, but started one after the other.
_ONE_BY_ONE_SHARE = (BLOCKS_SHARE + BLOCKS_ALL_SHARE) / 2
# How far into a step the step loop launches the next one at the latest.
_HOLD = 0.75


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    launch_share: float
    """See ``backend.Facts``."""
    attention_bytes: float
    """What attention takes beside its results for each token of a chunk times each of its context; 0: next to
    nothing."""
    words: dict[str, str]
    """What was measured: name → result."""


def measure(loaded: LoadedModel, kinds: Sequence[LayerKind], write: Write) -> DeviceFacts:
    """Run a few decode steps in a lane of such ``kinds``. Does not raise."""
    computes_itself = mx.default_device() == mx.cpu
    share, words = float(computes_itself), {}
    try:
        steps = _Steps(loaded, kinds, write)
        share, words["launch"] = _launch_share(steps, 1 if computes_itself else _FEWEST_STEPS)
        if computes_itself:
            # Its stream takes ten operations ahead: what a launch leaves over is a large head's product, on the cores
            # that Python runs on (0.77 of a step of SmolLM2 is blocked, less where the vocabulary is larger).
            share = 1.0
            words["launch"] += "; the rest runs on the same cores"
        if share > BLOCKS_SHARE:
            words["writes in flight"] = "not measured: no step is started while another one runs"
        else:
            copied, words["writes in flight"] = _donation(steps)
            share = _ONE_BY_ONE_SHARE if copied else share
    except Exception as error:  # MLX is outside our hands, and a model that loads must be served
        words["launch"] = f"not measured ({type(error).__name__}: {error}); taken to block for {share:.0%} of its step"
    if limits := _buffer_limits():
        words["command buffers"] = limits
    attention_bytes, words["attention"] = _attention(loaded, kinds)
    return DeviceFacts(share, attention_bytes, words)


class _Steps:
    """Decode steps, each fed by the one before, launched as the back end launches them."""

    def __init__(self, loaded: LoadedModel, kinds: Sequence[LayerKind], write: Write) -> None:
        rows = 1 if any(kind.kind == "own" for kind in kinds) else 2
        self._lane = Lane(loaded, kinds, rows, SLOT_QUANTUM, write)
        self._sampling = SamplingBatch(mx, [Sampling(seed=0)] * rows, loaded.vocab_size)
        for row in range(rows):
            self._lane.prefill(self._lane.acquire(row), [0], last=True)
        self.wait()

    def launch(self) -> float:
        """How many seconds it blocked."""
        lane = self._lane
        logits = lane.decode(range(lane.rows))[:, 0]
        drawn = self._sampling.draw(logits, [0] * lane.rows, None)
        lane.last_tokens[:] = drawn.tokens
        started = time.perf_counter()
        mx.async_eval(drawn.tokens, drawn.bad, lane.arrays)  # type: ignore[no-untyped-call]
        return time.perf_counter() - started

    def wait(self) -> None:
        mx.eval(self._lane.arrays)

    def buffers(self) -> list[int]:
        """Where the keys and values of each layer are in memory."""
        return [_address(array) for array in self._lane.keys_and_values]


def _launch_share(steps: _Steps, fewest: int) -> tuple[float, str]:
    found: list[tuple[float, float]] = []
    steps.launch()
    steps.wait()
    begun = time.perf_counter()
    while len(found) < fewest or (len(found) < _MOST_STEPS and time.perf_counter() - begun < _STEPS_S):
        blocked_s = steps.launch()
        returned = time.perf_counter()
        steps.wait()
        found.append((blocked_s, blocked_s + time.perf_counter() - returned))
    blocked_s, step_s = sorted(found, key=lambda pair: pair[0] / pair[1])[len(found) // 2]
    share = blocked_s / step_s
    return share, f"a launch blocks for {share:.0%} of its step ({blocked_s * 1e3:.2f} of {step_s * 1e3:.2f} ms)"


def _donation(steps: _Steps) -> tuple[bool, str]:
    """Whether a step that is launched while the one before is in flight copies most of the buffers that it writes into.

    MLX writes in place only into a buffer that nobody else holds, and a GPU command in flight holds what it reads. A
    step's first layers are done when the next one is launched, its last ones are not: that those are copied costs a
    part of a lane. All of a lane is what a model with few commands a step would copy, in every step.
    """
    started = time.perf_counter()
    total, alone = _copied(steps, None)
    step_s = (time.perf_counter() - started) / 2
    if not total:
        return False, "no layer keeps keys and values"
    _, at_once = _copied(steps, 0.0)
    if not alone and not at_once:
        return False, "stay in place"
    _, held = _copied(steps, _HOLD * step_s)
    words = (
        f"of {total} buffers {alone} are copied by a step launched when the last one is done, {at_once} by one "
        f"launched at once, {held} by one launched at {_HOLD:.0%} of it"
    )
    much = held - alone > total // 2
    return much, words + ("; so steps are started one after the other" if much else "")


def _copied(steps: _Steps, hold_s: float | None) -> tuple[int, int]:
    """How many buffers there are, and how many the second of two steps replaced instead of writing into them.
    ``hold_s``: launched so long after the first one; None: when that was done."""
    before = steps.buffers()
    steps.launch()
    if hold_s is None:
        steps.wait()
        before = steps.buffers()
    elif hold_s:
        time.sleep(hold_s)
    steps.launch()
    steps.wait()
    return len(before), sum(map(int.__ne__, before, steps.buffers()))


def _attention(loaded: LoadedModel, kinds: Sequence[LayerKind]) -> tuple[float, str]:
    """Bytes for each token of a chunk times each of its context, of the layer that takes most."""
    if not any(kind.kind in ("kv", "own") for kind in kinds):
        return 0.0, "the model has none"
    if not loaded.attention:
        return _OWN_ATTENTION_BYTES, f"the model's own code, taken to need {_OWN_ATTENTION_BYTES:.0f} bytes a score"
    try:
        needed = max(_attention_bytes(shape) for shape in loaded.attention)
    except Exception as error:
        return 0.0, f"not measured ({type(error).__name__}: {error})"
    if not needed:
        return 0.0, "a fused kernel"
    return needed, f"{needed:.0f} bytes for each token of a chunk and each of its context"


def _attention_bytes(shape: AttentionShape) -> float:
    tokens, context = _ATTENTION_AREA
    queries = mx.zeros((1, shape.heads, tokens, shape.width), shape.dtype)
    keys = mx.zeros((1, shape.kv_heads, context, shape.width), shape.dtype)
    values = mx.zeros((1, shape.kv_heads, context, shape.value_width), shape.dtype)
    mx.eval(queries, keys, values)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask="causal")
    mx.eval(found)
    taken = (mx.get_peak_memory() - before - found.nbytes) / (tokens * context)
    # One score a head is the least that is kept without a fused kernel.
    return taken if taken > shape.heads * shape.dtype.size / 2 else 0.0


def _address(array: mx.array) -> int:
    """Through a view of bytes: NumPy has no bfloat16."""
    seen = np.array(array.view(mx.uint8), copy=False)
    address: int = seen.__array_interface__["data"][0]
    return address


def _buffer_limits() -> str:
    """The limits of a Metal command buffer, where they were set (``lmx.serving.metal``)."""
    names = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
    return ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


@functools.cache
def choose_write() -> tuple[Write, str]:
    """The scatter, unless its cost grows with the buffer on this device."""

    def cost_ms(slots: int) -> float:
        buffer = mx.zeros((4, 8, slots, 64), mx.float16)
        new, place = mx.ones((4, 8, 1, 64), mx.float16), Slots(np.full((4, 1), 3, np.int32))
        mx.eval(buffer, new)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            buffer = scatter_write(buffer, place, new)
            mx.eval(buffer)
            times.append(time.perf_counter() - start)
        return sorted(times)[2] * 1e3

    try:
        small, large = cost_ms(SLOT_QUANTUM), cost_ms(SLOT_QUANTUM * 64)
    except Exception as error:
        return scatter_write, f"slots are written by one scatter (not measured: {type(error).__name__}: {error})"
    if large > 3 * small + 0.2:
        return (
            slice_write,
            f"slots are written row by row (one scatter: {small:.2f} ms, in a 64× buffer {large:.2f} ms)",
        )
    return scatter_write, f"slots are written by one scatter ({small:.2f} ms, in a 64× buffer {large:.2f} ms)"
