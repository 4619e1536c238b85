"""What it costs beside seven others when a sequence joins, leaves, outgrows its row, or when a lane gives room back:
with seven rows of 500 tokens, and with seven of 8,000. It should not depend on those.

The placement alone, with real buffers and the costs that were measured at load; the rows hold zeros instead of what a
model wrote. Timed until the device is done with the copies.
"""

import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from bench.models import folder
from bench.result import Result, Row, alternate, median_ratio
from lmx.engine.backend import Sequence
from lmx.engine.mlx import adapter
from lmx.engine.mlx.backend import MLXBackend
from lmx.engine.mlx.placement import Placement
from lmx.protocol import Load, Sampling

MODEL = "llama-8x512"
OTHERS = 7
SHORT, LONG = 500, 8000
SHRINKING = 2000
TARGET = 1.3


def run(quick: bool) -> Result:
    backend = MLXBackend(adapter.load(folder(MODEL)), Load(path="", max_rows=OTHERS + 4))
    costs, facts = backend._placement.costs, backend.facts
    # What a change may cost in any case, a copy of its own row: of two that take less, neither is said to be slower.
    own_ms = costs.copy_ms + costs.byte_ms * SHORT * facts.kv_bytes_per_token
    rows: list[Row] = []
    for name, measure in (("join", _join), ("leave", _leave), ("move", _move), ("shrink", _shrink)):
        beside = [_Beside(backend, tokens) for tokens in (SHORT, LONG)]
        times = alternate(7 if quick else 15, *(partial(measure, each) for each in beside))
        short, long = ([max(ms, own_ms) for ms in found] for found in times)
        ratio = median_ratio(long, short)
        rows.append(
            {
                "change": name,
                f"beside {SHORT} ms": _median(times[0]),
                f"beside {LONG} ms": _median(times[1]),
                "ratio": ratio,
                "target": TARGET,
                "ok": ratio <= TARGET,
            }
        )
    return Result(f"a change of one sequence beside {OTHERS} others; {costs.words}", rows)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


class _Beside:
    """Seven sequences of so many tokens, and others that come and go."""

    def __init__(self, backend: MLXBackend, tokens: int) -> None:
        self.placement = Placement(backend._loaded, backend._probe, backend.facts, backend._placement.costs)
        self._next = 0
        for _ in range(OTHERS):
            self.join(tokens)
        self.rest()

    def join(self, tokens: int) -> Sequence:
        self._next += 1
        sequence = Sequence(self._next, [0] * tokens, tokens, 10**6, Sampling(seed=0), ignore_eos=True)
        self.placement.enter(sequence)
        place = self.placement[sequence]
        mx.eval(place.lane.arrays)
        place.lane.lengths[place.row] = tokens
        return sequence

    def leave(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.placement.leave(sequence)
        self.settle()

    def settle(self) -> None:
        """A step, for the placement."""
        self.placement.settle()
        mx.eval([lane.arrays for lane in self.placement.lanes])

    def rest(self) -> None:
        """So many steps that all has been done that pays."""
        for _ in range(256):
            self.settle()

    def ms(self, change: Callable[[], None]) -> float:
        started = time.perf_counter()
        change()
        self.settle()
        return (time.perf_counter() - started) * 1e3


def _join(beside: _Beside) -> float:
    joined: list[Sequence] = []
    ms = beside.ms(lambda: joined.append(beside.join(SHORT)))
    beside.leave(*joined)
    beside.rest()
    return ms


def _leave(beside: _Beside) -> float:
    sequence = beside.join(SHORT)
    beside.rest()
    ms = beside.ms(lambda: beside.leave(sequence))
    beside.rest()
    return ms


def _move(beside: _Beside) -> float:
    """It grows over a quantum's boundary."""
    sequence = beside.join(SHORT)
    beside.rest()
    place = beside.placement[sequence]
    place.lane.lengths[place.row] = place.lane.capacity
    ms = beside.ms(lambda: beside.placement.make_room(place, 1))
    beside.leave(sequence)
    beside.rest()
    return ms


def _shrink(beside: _Beside) -> float:
    """Three of four that joined leave, of a length that shares no lane with either of the others."""
    sequences = [beside.join(SHRINKING) for _ in range(4)]
    beside.rest()
    ms = beside.ms(lambda: beside.leave(*sequences[:3]))
    beside.leave(sequences[3])
    beside.rest()
    return ms
