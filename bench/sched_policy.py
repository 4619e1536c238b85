"""What the scheduler's policy gives, on a simulated device: no time is measured, the same figures each time.

python -m bench sched_policy
"""

from bench.result import Result, Row
from lmx._sched import Scheduler
from tests.sched_simulation import Request, Simulation, gpu_ms, memory_tight, recomputed_share, torn_wave


def run(quick: bool) -> Result:
    rows: list[Row] = []

    def add(scenario: str, figure: str, value: float, target: float | None, ok: bool | None) -> None:
        rows.append({"scenario": scenario, "figure": figure, "value": value, "target": target, "ok": ok})

    def small() -> Scheduler:
        return Scheduler(max_rows=8, kv_budget_bytes=2**30, kv_bytes_per_token=100, max_chunk_tokens=192)

    at_once, _ = torn_wave(small(), 0.0)
    for apart_ms in (5.0, 20.0, 100.0):
        speed, gap_ms = torn_wave(small(), apart_ms)
        scenario = f"8 requests {apart_ms:.0f} ms apart"
        add(scenario, "tok/s by that of 8 at once", speed / at_once, 0.95, speed >= 0.95 * at_once)
        add(scenario, "worst gap, ms", gap_ms, 2000.0, gap_ms <= 2000.0)
    for seed in range(1, 2 if quick else 4):
        simulation = memory_tight(Scheduler, seed)
        share = recomputed_share(simulation)
        add(f"memory-tight mix {seed}", "share of prefill computed twice", share, 0.1, share <= 0.1)
        done = [run for run in simulation.runs.values() if run.token_times and run.done]
        add(f"memory-tight mix {seed}", "answers done in 10 minutes", len(done), None, None)
        tokens = sum(len(run.token_times) for run in simulation.runs.values())
        add(f"memory-tight mix {seed}", "tokens generated", tokens, None, None)
    for client in ("its own client's", "another client's"):
        simulation = Simulation(
            Scheduler(max_rows=8, kv_budget_bytes=2**30, kv_bytes_per_token=100, max_chunk_tokens=2048), gpu_ms
        )
        simulation.arrive(0.0, Request(62_000, 200, client=client[:3]))
        seq = simulation.arrive(1000.0, Request(300, 50, client="its"))
        simulation.run()
        ttft_ms = simulation.runs[seq].ttft_ms
        add(f"300 tokens behind {client} 62,000", "time to the first token, ms", ttft_ms, 2500.0, ttft_ms <= 2500.0)
    return Result("a policy on a simulated CPU (SmolLM2) and GPU (30B-A3B)", rows)
