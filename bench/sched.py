"""What the scheduler costs: microseconds for plan() + commit() with 10, 1,000 and 10,000 sequences queued.

``steady``: a full batch decodes and nobody can be admitted. ``admit``: all rows are free in every step, so that each
plan searches the whole queue twice and starts as many prompts (of 64 clients) as there are rows. ``expire``: the same,
and in each plan a deadline passes. ``recache``: as ``admit``, but counted is what a store of prefixes asks before each
plan, upcoming() and recache() for as many as there are rows.
The tests' pure-Python reference runs in the same process, for the ratio.

    python -m bench sched
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench.result import Result, Row
from lmx._sched import Scheduler
from tests.sched_reference import ReferenceScheduler

ROWS = 8
QUEUED = (10, 1_000, 10_000)
SCENARIOS = ("steady", "admit", "expire", "recache")
TARGET_US = 100.0


def measure(implementation: Callable[..., Any], scenario: str, queued: int, steps: int) -> list[float]:
    """Microseconds of plan() + commit(), or of what the scenario counts, in each step; nothing else is counted."""
    scheduler = implementation(max_rows=ROWS, kv_budget_bytes=2**40, kv_bytes_per_token=1024)
    ids = itertools.count()
    durations = []

    def submit(max_tokens: int, deadline: float = float("inf")) -> None:
        seq = next(ids)
        scheduler.submit(seq, 100, max_tokens, client=f"bot-{seq % 64}", deadline=deadline)

    if scenario == "steady":
        for _ in range(ROWS):
            submit(1_000_000)
        for _ in range(ROWS):
            scheduler.commit(scheduler.plan(0.0).step, 20.0)
    for _ in range(queued):
        submit(1)
    first = scheduler.statistics().steps + 1
    for step in range(first, first + steps):
        if scenario == "expire":
            submit(1, deadline=float(step))
        started = time.perf_counter()
        if scenario == "recache":
            for seq in scheduler.upcoming(ROWS):
                scheduler.recache(seq, 50)
            durations.append((time.perf_counter() - started) * 1e6)
        planned = scheduler.plan(float(step)).step
        scheduler.commit(planned, 20.0)
        if scenario != "recache":
            durations.append((time.perf_counter() - started) * 1e6)
        assert planned == step
        for seq in scheduler.releasable():
            scheduler.release(seq)
        while scheduler.statistics().queued < queued:
            submit(1)
    return durations


def run(quick: bool) -> Result:
    steps = 500 if quick else 2000
    rows: list[Row] = []
    for scenario, queued in itertools.product(SCENARIOS, QUEUED):
        compiled = sorted(measure(Scheduler, scenario, queued, steps))
        reference = statistics.median(measure(ReferenceScheduler, scenario, queued, 5))
        p50 = statistics.median(compiled)
        rows.append(
            {
                "scenario": scenario,
                "queued": queued,
                "p50_us": p50,
                "p99_us": compiled[int(0.99 * len(compiled))],
                "reference_p50_us": reference,
                "ratio": reference / p50,
                "target": TARGET_US,
                "ok": p50 < TARGET_US,
            }
        )
    return Result(f"microseconds of plan() + commit(), {ROWS} rows (ratio: reference by compiled)", rows)
