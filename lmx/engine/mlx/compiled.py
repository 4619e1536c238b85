"""Decode steps of one lane as compiled graphs: Python runs a model's code once for each shape, not in every step.

A graph takes all that changes from step to step as arrays (the lane's buffers, which it writes in place as an eager
step does, last tokens, lengths, slots) and is good for one shape: the lane's buffers, how many rows are computed, and
which slots are read. So the slots that are read are rounded up to a quantum, and what lies beyond a row's length is
masked. Shapes are many where traffic is mixed. A graph is made for one that has come so often that it would have paid
by then; few are kept; all other steps, those of several tokens a row or of several lanes among them, are eager.

``choose`` decides at load, by running both: compiled steps are used where they say the same and are faster. It never
fails a load, and a graph that cannot be made later ends compilation, not the step. The MLX back end is the only caller.
"""

import math
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from lmx.engine.mlx.adapter import LoadedModel, whole
from lmx.engine.mlx.arena import Lane, decode_caches, keep_states, mask_heads
from lmx.engine.mlx.layers import SLOT_QUANTUM, make_layer
from lmx.engine.mlx.probe import ProbeResult
from lmx.engine.mlx.views import DecodeView
from lmx.engine.sampling import compiles

# The share of a step's rows, and of the slots that it reads beyond some quanta, that may be there for the shape only:
# one of so many. 128 more masked keys a row are nothing beside what a graph gains, on a CPU too (SmolLM2, 4 rows: 0.1
# of 118 ms); rows are not (9 ms each there), so up to 8 of them are computed as they are.
_ROW_PARTS, _SLOT_PARTS = 4, 8
# Graphs that are kept (one of SmolLM2 takes 1 MB), and shapes whose steps are counted.
_KEPT_GRAPHS, _KEPT_SHAPES = 32, 256
# A shape is run eagerly until what a graph would have saved is what making it costs, and so many steps at most; where
# one has to go for it, at least so many.
_MOST_PATIENCE = 256
# Faster by less is noise.
_MARGIN = 1.03
# As in ``probe``: other shapes round otherwise. What a mask must hide holds large numbers, all else NaN.
_TOLERANCE = 0.05
_FOREIGN = 100.0
_PROMPTS = (5, 11, 2)
_COMPARED_STEPS = 2
# Runs of some steps each, eager and compiled in turn: no fewer and no more than this, and no more for so long. On a GPU
# a run's steps are given to the device ahead, so that Python's time counts only where the device waits for it.
_FEWEST_RUNS, _MOST_RUNS, _RUNS_S = 3, 7, 0.1
_STEPS_AHEAD = 4

_Buffers = list[list[mx.array]]
_Graph = Callable[[mx.array, mx.array, mx.array, _Buffers], tuple[mx.array, _Buffers]]
_traced = 0


def traces() -> int:
    """How many graphs were made in this process."""
    return _traced


class _Shape(NamedTuple):
    """What a graph is good for."""

    lane: tuple[int, int]
    """Rows and slots of its buffers."""
    rows: int
    """Of them, so many are computed."""
    span: int
    """Slots before this one are read."""
    firsts: tuple[int, ...]
    """Sliding layers read from this one on, for each window."""


@dataclass(slots=True)
class _Known:
    steps: int = 0
    graph: _Graph | None = None


class CompiledSteps:
    """The graphs of one model. Make it with ``choose``."""

    def __init__(self, loaded: LoadedModel, probe: ProbeResult) -> None:
        self._loaded = loaded
        self._kinds = probe.kinds
        self._write = probe.write
        self._windows = sorted({kind.window for kind in self._kinds if kind.kind == "kv" and kind.window is not None})
        self._keeps_slots = any(kind.kind == "kv" for kind in self._kinds)
        self._known: OrderedDict[_Shape, _Known] = OrderedDict()
        self.one_row = self.several_rows = True
        """For which steps graphs are used."""
        self.patience = 0
        """So often a shape comes before a graph is made for it."""
        self.failure = ""
        """Why none is used any more."""

    @property
    def kept(self) -> int:
        """Graphs."""
        return sum(known.graph is not None for known in self._known.values())

    def decode(self, lane: Lane, active: Sequence[int]) -> mx.array:
        """As ``lane.decode(active)``."""
        if self.failure or not (self.several_rows if max(active) else self.one_row):
            return lane.decode(active)
        try:
            logits = self.step(lane, active)
        except Exception as error:  # of model code, which runs while its graph is made; the lane is as it was
            self.failure = _line(error)
            print(f"decode steps are not compiled any more: {self.failure}", file=sys.stderr)
            self._known.clear()
            logits = None
        return lane.decode(active) if logits is None else logits

    def step(self, lane: Lane, active: Sequence[int]) -> mx.array | None:
        """The same, compiled; None where there is no graph for it yet, and nothing was done."""
        count = min(_rounded(max(active) + 1, 1, _ROW_PARTS), lane.rows)
        lengths, _, slots = lane.places(active, count, 1, [1] * len(active))
        span = min(_rounded(int(lengths.max()) + 1, SLOT_QUANTUM, _SLOT_PARTS), lane.capacity)
        firsts = tuple(
            max(0, int(lengths.min()) - window + 1) // SLOT_QUANTUM * SLOT_QUANTUM for window in self._windows
        )
        shape = _Shape((lane.rows, lane.slots), count, span if self._keeps_slots else 0, firsts)
        known = self._known.get(shape)
        if known is None:
            known = self._known[shape] = _Known()
            if len(self._known) > _KEPT_SHAPES:
                self._known.popitem(last=False)
        self._known.move_to_end(shape)
        known.steps += 1
        inputs = lane.last_tokens, mx.array(lengths), mx.array(slots[:, 0].astype(np.uint32))
        if known.graph is not None:
            logits, written = known.graph(*inputs, lane.lend())
        elif self._pays(known):
            graph = self._graph(shape)
            with _restored(self._loaded.model.state):
                logits, written = graph(*inputs, lane.lend())
            known.graph = graph
        else:
            return None
        lane.take_back(active, written)
        return logits[: max(active) + 1]

    def _pays(self, known: _Known) -> bool:
        """Whether to make a graph; if it takes the place of another, that one is gone then."""
        if known.steps <= self.patience:
            return False
        if self.kept >= _KEPT_GRAPHS:
            if known.steps <= _MOST_PATIENCE:
                return False
            del self._known[next(shape for shape, known in self._known.items() if known.graph is not None)]
        return True

    def _graph(self, shape: _Shape) -> _Graph:
        loaded, kinds, write = self._loaded, self._kinds, self._write
        firsts = dict(zip(self._windows, shape.firsts, strict=True))
        heads = mask_heads(loaded, kinds)

        def step(
            last_tokens: mx.array, lengths: mx.array, slots: mx.array, buffers: _Buffers
        ) -> tuple[mx.array, _Buffers]:
            global _traced
            _traced += 1
            layers = [make_layer(kind, 1, 1) for kind in kinds]
            for layer, arrays in zip(layers, buffers, strict=True):
                layer.arrays = arrays  # type: ignore[misc]
            view = partial(
                DecodeView,
                offset=lengths,
                slots=_Places(slots),
                write=write,
                masks=_Masks(lengths, shape.span, firsts, heads),
                span=shape.span,
            )
            caches = decode_caches(layers, shape.rows, view)
            tokens = last_tokens[: shape.rows, None]
            logits = loaded.logits(loaded.hidden(tokens, whole(kinds, caches)))
            keep_states(layers, caches)
            return logits, [layer.arrays for layer in layers]

        # What is not named as an input is a part of the graph, numbers of one element even of its kernels' source.
        graph: _Graph = mx.compile(step, inputs=loaded.model.state)
        return graph


class _Places:
    """As ``layers.Slots`` of one token a row, in a graph."""

    def __init__(self, slots: mx.array) -> None:
        """(B,), uint32."""
        self._slots = slots
        self.counts: Sequence[int] = [1] * slots.shape[0]

    def along(self, shape: tuple[int, ...]) -> mx.array:
        return mx.broadcast_to(self._slots[:, None, None, None], shape)

    def of_heads(self, heads: int) -> tuple[mx.array, ...]:
        rows = mx.arange(self._slots.shape[0], dtype=mx.uint32)[:, None, None]
        index = mx.broadcast_arrays(rows, mx.arange(heads, dtype=mx.uint32)[:, None], self._slots[:, None, None])
        return tuple(index)

    def starts(self) -> list[mx.array]:
        rows = mx.arange(self._slots.shape[0], dtype=mx.uint32)
        return list(mx.stack([rows, self._slots], axis=1))


class _Masks:
    """As ``views.Masks`` of one token a row, in a graph; also where all that is read is seen, since that is a matter of
    lengths."""

    def __init__(self, lengths: mx.array, span: int, firsts: dict[int, int], heads: int) -> None:
        rows = lengths.shape[0]
        # Of all heads where there are several rows, see there.
        self._queries = mx.broadcast_to(lengths[:, None, None, None], (rows, heads if rows > 1 else 1, 1, 1))
        self._span = span
        self._firsts = firsts
        self._made: dict[tuple[int, int | None], mx.array] = {}

    def first_slot(self, window: int | None) -> int:
        return 0 if window is None else self._firsts[window]

    def get(self, fetched: int | None, window: int | None) -> mx.array:
        first = self.first_slot(fetched)
        if (first, window) not in self._made:
            slots = mx.arange(first, self._span)
            mask = slots <= self._queries
            if window is not None:
                mask = mask & (slots > self._queries - window)
            self._made[first, window] = mask
        return self._made[first, window]


def choose(loaded: LoadedModel, probe: ProbeResult, asked: str) -> tuple[CompiledSteps | None, str]:
    """What decodes this model's lanes, None: they do it themselves; and why, in words. ``asked``: "off"; "on": compiled
    where that says the same; "auto": and where it is faster, too. Does not raise."""
    if asked == "off":
        return None, "eager, as [engine] compile says"
    if probe.path == "single":
        return None, "eager: one sequence at a time runs on mlx-lm's caches"
    if asked == "auto" and not compiles(mx):
        return None, (
            "eager: not tried, because MLX's CPU kernels come from g++, which takes seconds for those of a model, once "
            'a machine; [engine] compile = "on" takes them'
        )
    steps = CompiledSteps(loaded, probe)
    try:
        trials = _Trial(steps, loaded, probe, _PROMPTS[:1]), _Trial(steps, loaded, probe, _PROMPTS)
        for trial in trials:
            if off := trial.difference():
                return None, f"eager: compiled, a row's logits differ by {off:.1%} of the largest"
        if asked == "on":
            return steps, "compiled, as [engine] compile says"
        one, several = (trial.measure() for trial in trials)
    except Exception as error:  # of model code or MLX
        return None, f"eager: compiled, it fails: {_line(error)}"
    steps.one_row, steps.several_rows = one.faster, several.faster
    steps.patience = max((measured.patience for measured in (one, several) if measured.faster), default=0)
    words = f"one row {one.words}; several rows {several.words}"
    return (steps if one.faster or several.faster else None), words


@dataclass(frozen=True, slots=True)
class _Measured:
    eager_ms: float
    compiled_ms: float
    trace_ms: float

    @property
    def faster(self) -> bool:
        return self.eager_ms >= _MARGIN * self.compiled_ms

    @property
    def words(self) -> str:
        used = "compiled" if self.faster else "eager"
        return f"{used} ({self.compiled_ms:.2f} ms compiled, {self.eager_ms:.2f} eager)"

    @property
    def patience(self) -> int:
        """Steps after which a graph would have saved what making it costs."""
        return min(math.ceil(self.trace_ms / (self.eager_ms - self.compiled_ms)), _MOST_PATIENCE)


class _Trial:
    """The same rows in two lanes: one decodes eagerly, the other by graphs."""

    def __init__(self, steps: CompiledSteps, loaded: LoadedModel, probe: ProbeResult, lengths: Sequence[int]) -> None:
        self._steps = steps
        rng = np.random.default_rng(0)
        # A hole between several rows: it is computed as a dummy, on NaN.
        self._active = [0, *range(2, len(lengths) + 1)]
        rows = max(self._active) + 1
        self._eager, self._compiled = (Lane(loaded, probe.kinds, rows, SLOT_QUANTUM, probe.write) for _ in range(2))
        for lane in (self._eager, self._compiled):
            for row in range(rows):
                lane.acquire(row)
        for row, length in zip(self._active, lengths, strict=True):
            self._eager.prefill(row, rng.integers(0, loaded.vocab_size, length).tolist(), last=True)
        for row in set(range(rows)) - set(self._active):
            self._eager.release(row)
            self._compiled.release(row)
        self._eager.last_tokens[:] = mx.array(rng.integers(0, loaded.vocab_size, rows).astype(np.int32))
        for row in self._active:
            self._compiled.adopt(row, self._eager, row)
        for lane in (self._eager, self._compiled):
            lane.poison(inside=_FOREIGN, outside=float("nan"), span=lane.capacity)
        mx.eval(self._eager.arrays, self._compiled.arrays)
        self._trace_ms = 0.0

    def _by_graph(self, active: Sequence[int]) -> mx.array:
        logits = self._steps.step(self._compiled, active)
        assert logits is not None, "a trial has no patience"
        return logits

    def difference(self) -> float:
        """How much a row's logits differ at most, of the largest; 0: no more than rounding. Raises whatever model code
        raises when it is compiled."""
        parts = [self._active, self._active[:-1]] if len(self._active) > 1 else [self._active]
        before = traces()
        for active in parts:
            for _ in range(_COMPARED_STEPS):
                started = time.perf_counter()
                compiled = self._by_graph(active)
                self._trace_ms = max(self._trace_ms, (time.perf_counter() - started) * 1e3)
                eager = self._eager.decode(active)
                mx.eval(compiled, eager, self._compiled.arrays, self._eager.arrays)
                right, found = (np.array(logits[mx.array(active)].astype(mx.float32)) for logits in (eager, compiled))
                off = float(np.max(np.abs(right - found)) / max(np.max(np.abs(right)), 1e-6))
                if not off <= _TOLERANCE:  # NaN, too
                    return off if off < np.inf else np.inf
        if traces() - before != len(parts):
            raise RuntimeError("MLX makes no graphs here (MLX_DISABLE_COMPILE is set, or there is no g++)")
        return 0.0

    def measure(self) -> _Measured:
        """A step's milliseconds, in either lane."""
        steps = 1 if mx.default_device() == mx.cpu else _STEPS_AHEAD
        found: list[tuple[float, float]] = []
        begun = time.perf_counter()
        while len(found) < _FEWEST_RUNS or (len(found) < _MOST_RUNS and time.perf_counter() - begun < _RUNS_S):
            found.append(
                (
                    self._run_ms(self._eager, self._eager.decode, steps),
                    self._run_ms(self._compiled, self._by_graph, steps),
                )
            )
        eager_ms, compiled_ms = map(statistics.median, zip(*found, strict=True))
        return _Measured(eager_ms, compiled_ms, self._trace_ms)

    def _run_ms(self, lane: Lane, decode: Callable[[Sequence[int]], mx.array], steps: int) -> float:
        """Of a step, each fed by the one before and given to the device before that one is read."""
        started = time.perf_counter()
        before: mx.array | None = None
        for _ in range(steps):
            drawn = mx.argmax(decode(self._active)[:, 0], axis=-1).astype(mx.int32)
            lane.last_tokens[: lane.rows] = drawn
            mx.async_eval(drawn, lane.arrays)  # type: ignore[no-untyped-call]
            if before is not None:
                mx.eval(before)
            before = drawn
        mx.eval(before, lane.arrays)
        return (time.perf_counter() - started) * 1e3 / steps


def _rounded(number: int, quantum: int, parts: int) -> int:
    """Up to a multiple of a quantum that grows with the number: at most one of ``parts`` is added, or the least
    quantum."""
    quantum = max(quantum, (1 << (number.bit_length() - 1)) // parts)
    return -(-number // quantum) * quantum


@contextmanager
def _restored(state: Any) -> Iterator[None]:
    """What the block does to a model's state is undone: while MLX traces a graph the state holds placeholders, which an
    error, or model code that keeps what it computed, would leave there."""

    def contents(tree: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(tree, dict | list):
            # (Modules are dicts whose ``update`` is another.)
            yield tree, dict(tree) if isinstance(tree, dict) else list(tree)
            for child in tree.values() if isinstance(tree, dict) else tree:
                yield from contents(child)

    before = list(contents(state))
    try:
        yield
    finally:
        for tree, content in before:
            if isinstance(tree, dict):
                dict.clear(tree)
                dict.update(tree, content)
            else:
                tree[:] = content


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
