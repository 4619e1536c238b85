"""Decode steps as compiled graphs against eager ones, of one lane, by rows: milliseconds of a step that is read before
the next is made, in turn on the same rows. What the choice at load made of it stands beside.

    python -m bench compiled

On a CPU the choice is not to try, for the sake of g++'s seconds (``lmx.engine.mlx.compiled``); what it would gain is
measured all the same.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench.models import folder, with_openblas
from bench.result import Result, Row, alternate, median_ratio

MODELS = ("smollm2", "llama-4x128")
ROWS = (1, 4, 8)
TARGET = 1.0
"""Where graphs are used. (What is measured slower is not.)"""
PROMPT_TOKENS = 100
STEPS = (60, 15)
"""In all and quick: all within 256 tokens, so in one graph."""


def run(quick: bool) -> Result:
    rows: list[Row] = []
    for name in MODELS:
        # A process of its own for each: the graphs of one model are nothing to another.
        told = subprocess.run(
            [sys.executable, "-m", "bench.compiled", str(folder(name)), str(STEPS[quick])],
            check=True,
            capture_output=True,
            text=True,
            env=with_openblas(),
        )
        rows += [{"model": name, **row} for row in json.loads(told.stdout)]
    return Result("milliseconds of a decode step, eager and compiled (ratio: eager by compiled)", rows)


def _measure(path: Path, times: int) -> list[Row]:
    import mlx.core as mx
    import numpy as np

    from lmx.engine.mlx import adapter, compiled, device, probe
    from lmx.engine.mlx.arena import Lane
    from lmx.engine.mlx.layers import SLOT_QUANTUM, round_slots

    loaded = adapter.load(path)
    found = probe.run(loaded, device.choose_write()[0])
    chosen, _ = compiled.choose(loaded, found, "auto")
    steps = compiled.CompiledSteps(loaded, found)
    measured: list[Row] = []
    for count in ROWS:
        lanes = [Lane(loaded, found.kinds, count, round_slots(SLOT_QUANTUM), found.write) for _ in range(2)]
        for row in range(count):
            prompt = np.random.default_rng(row).integers(0, loaded.vocab_size, PROMPT_TOKENS + row).tolist()
            for lane in lanes:
                lane.prefill(lane.acquire(row), prompt, last=True)
                mx.eval(lane.arrays)

        def step_ms(lane: Lane, decode: Callable[[Lane, Sequence[int]], mx.array]) -> float:
            started = time.perf_counter()
            drawn = mx.argmax(decode(lane, lane.in_use)[:, 0], axis=-1).astype(mx.int32)
            lane.last_tokens[:] = drawn
            mx.eval(drawn, lane.arrays)
            return (time.perf_counter() - started) * 1e3

        before = compiled.traces()
        first_ms = step_ms(lanes[1], steps.decode)
        step_ms(lanes[0], Lane.decode)
        by_graph = partial(step_ms, lanes[1], steps.decode)
        eager, graph = alternate(times, partial(step_ms, lanes[0], Lane.decode), by_graph)
        used = chosen is not None and (chosen.several_rows if count > 1 else chosen.one_row)
        ratio = median_ratio(eager, graph)
        measured.append(
            {
                "rows": count,
                "eager ms": statistics.median(eager),
                "compiled ms": statistics.median(graph),
                "first ms": first_ms,
                "traces": compiled.traces() - before,
                "auto": "compiled" if used else "eager",
                "ratio": ratio,
                "target": TARGET if used else None,
                "ok": ratio >= TARGET if used else None,
            }
        )
    return measured


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), int(sys.argv[2]))))
