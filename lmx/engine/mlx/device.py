"""What is assumed of a device, measured on it at load, with the loaded model's own decode steps.

Five things decide how the engine runs: whether a launch returns before its step is done (lookahead gains nothing where
it does not), whether a write into a lane stays in place while an earlier step that reads the lane is still in flight
(else lookahead copies what it should only touch), which write costs the same in every buffer, what memory a chunk's
attention takes (the scores of all its queries, where MLX has no fused kernel), and what lanes cost: one more of them,
slots read for nothing, a copy. None is a matter of the device's name:
MLX takes only so many operations ahead on every back end, and its kernels cover some widths and not others. A
measurement that fails is told in words and never fails the load. Called once, by the back end's load; ``LaneCosts`` is
for the placement.
"""

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from lmx.engine.backend import BLOCKS_ALL_SHARE, BLOCKS_SHARE
from lmx.engine.mlx import together
from lmx.engine.mlx.adapter import AttentionShape, LayerKind, LoadedModel
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.layers import SLOT_QUANTUM, Slots, Write, round_slots, scatter_write, slice_write
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
# Lanes are measured with rows of so few tokens, and of as many more as this memory allows, four times.
_SHORT_TOKENS, _MOST_TOKENS = 16, 1024
_LANES_BYTES = 64 * 1024**2
# The least of so many steps of each kind is taken, since whatever disturbs a step makes it longer.
_FEWEST_ROUNDS, _MOST_ROUNDS = 1, 8
_ROUNDS_S = 0.05
_COPIES = 3
# A further lane is never taken to cost less than this share of a step: what is below it is noise.
_LEAST_LANE_SHARE = 0.01
# A copy may take this share of the time that may pass between two tokens.
_COPY_SHARE = 1 / 3


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    launch_share: float
    """See ``backend.Facts``."""
    attention_bytes: float
    """What attention takes beside its results for each token of a chunk times each of its context; 0: next to
    nothing."""
    words: dict[str, str]
    """What was measured: name → result."""


@dataclass(frozen=True, slots=True)
class LaneCosts:
    """What decides how many lanes there are, in milliseconds."""

    lane_ms: float
    """A further lane in a decode step: its attention and its draw, and its pass over the weights where lanes decode one
    by one."""
    slot_ms: float
    """A slot of a row in a decode step, whether anything is in it or not."""
    copy_ms: float
    """Another shape of a lane, or a move from one to another, whatever is in it."""
    byte_ms: float
    """And each byte of that."""
    late_ms: float
    """What a change of rows that live together may take."""

    @property
    def words(self) -> str:
        most = max(self.late_ms - self.copy_ms, 0.0) / self.byte_ms / 2**20 if self.byte_ms else float("inf")
        return (
            f"a further lane takes {self.lane_ms:.2f} ms of a step, 1,000 slots {self.slot_ms * 1000:.2f}, a copy "
            f"{self.copy_ms:.2f} and {self.byte_ms * 2**20:.3f} for each MB; rows of up to {most:.0f} MB live together"
        )


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


def lane_costs(
    loaded: LoadedModel, kinds: Sequence[LayerKind], write: Write, *, at_once: bool, itl_target_ms: float
) -> tuple[LaneCosts, str]:
    """What lanes of such ``kinds`` cost, and how that was found, in words. ``at_once``: they decode together. Does not
    raise."""
    late_ms = _COPY_SHARE * itl_target_ms
    # A copy at 1 GB/s, and a step of which the weights are most.
    assumed = LaneCosts(lane_ms=1.0, slot_ms=0.0, copy_ms=1.0, byte_ms=1e-6, late_ms=late_ms)
    if any(kind.kind == "own" for kind in kinds):
        return assumed, "not measured: there is one row"
    try:
        costs = _lane_costs(loaded, kinds, write, at_once, late_ms)
    except Exception as error:
        return assumed, f"not measured ({type(error).__name__}: {error})"
    return costs, costs.words


def _lane_costs(
    loaded: LoadedModel, kinds: Sequence[LayerKind], write: Write, at_once: bool, late_ms: float
) -> LaneCosts:
    token_bytes = sum(kind.nbytes for kind in kinds if kind.kind == "kv")
    most = _LANES_BYTES // (4 * token_bytes) // SLOT_QUANTUM * SLOT_QUANTUM if token_bytes else SLOT_QUANTUM
    long = min(max(most, SLOT_QUANTUM), _MOST_TOKENS)

    def lane(rows: int) -> Lane:
        made = Lane(loaded, kinds, rows, round_slots(long + 1), write)
        for row in range(rows):
            made.prefill(made.acquire(row), [0], last=True)
        mx.eval(made.arrays)
        return made

    shared, alone = [lane(2)], [lane(1), lane(1)]
    # Slots that nothing was written into hold zeros, which take as long to read.
    shapes = [(shared, (_SHORT_TOKENS, _SHORT_TOKENS)), (alone, (_SHORT_TOKENS,)), (shared, (_SHORT_TOKENS, long))]
    step = _lanes_step(loaded, at_once)
    least = [float("inf")] * len(shapes)
    begun = time.perf_counter()
    for count in range(_MOST_ROUNDS + 1):
        for index, (lanes, lengths) in enumerate(shapes):
            for each in lanes:
                each.lengths[:] = lengths
            started = time.perf_counter()
            step(lanes)
            if count:  # the first one warms up
                least[index] = min(least[index], (time.perf_counter() - started) * 1e3)
        if count >= _FEWEST_ROUNDS and time.perf_counter() - begun > _ROUNDS_S:
            break
    together_ms, apart_ms, padded_ms = least

    def copied_ms(tokens: int) -> float:
        times = []
        for _ in range(_COPIES):
            alone[0].lengths[0] = tokens
            mx.clear_cache()  # as the placement does
            started = time.perf_counter()
            other = Lane(loaded, kinds, 1, round_slots(tokens), write)
            other.adopt(other.acquire(0), alone[0], 0)
            mx.eval(other.arrays)
            times.append((time.perf_counter() - started) * 1e3)
        return min(times)

    copy_ms = copied_ms(_SHORT_TOKENS)
    tokens = long - _SHORT_TOKENS
    return LaneCosts(
        lane_ms=max(apart_ms - together_ms, _LEAST_LANE_SHARE * together_ms),
        slot_ms=max(padded_ms - together_ms, 0.0) / (2 * tokens),
        copy_ms=copy_ms,
        byte_ms=max(copied_ms(long) - copy_ms, 0.0) / (tokens * token_bytes) if token_bytes else 0.0,
        late_ms=late_ms,
    )


def _lanes_step(loaded: LoadedModel, at_once: bool) -> Callable[[Sequence[Lane]], None]:
    """A decode step of all rows of the lanes, with its draws."""
    draws = {rows: SamplingBatch(mx, [Sampling(seed=0)] * rows, loaded.vocab_size) for rows in (1, 2)}

    def step(lanes: Sequence[Lane]) -> None:
        parts = [(lane, lane.in_use) for lane in lanes]
        if at_once and len(parts) > 1:
            logits = together.decode(loaded, parts)
        else:
            logits = [lane.decode(rows) for lane, rows in parts]
        drawn = [
            draws[lane.rows].draw(found[:, 0], [0] * lane.rows, None) for lane, found in zip(lanes, logits, strict=True)
        ]
        mx.eval([each.tokens for each in drawn], [each.bad for each in drawn], [lane.arrays for lane in lanes])

    return step


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
