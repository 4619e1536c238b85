"""The step loop on simulated devices (``tests/sim.py``): the same figures on every machine, held to their targets.

``python -m tests.sim`` shows more devices; ``--all`` there, the loops that were not chosen.
"""

from bench.result import Result, Row
from tests.sim import DEVICES, SCENARIOS, Outcome, Scenario, bursts, cold, one_row, throttled

ITL_TARGET_MS = 250.0
# A burst leaves the device idle until the next one; a single row, while Python answers one request and starts the next.
MAY_IDLE: tuple[Scenario, ...] = (bursts, one_row)
CHANGES: tuple[Scenario, ...] = (cold, throttled)


def run(quick: bool) -> Result:
    rows: list[Row] = []
    for scenario in SCENARIOS:
        for device in ("apart", "blocks"):
            outcome = scenario(DEVICES[device], "auto")
            row: Row = {"scenario": scenario.__name__, "device": device, **outcome.summary}
            rows.append({**row, "ok": _ok(scenario, outcome)})
    return Result("simulated device, 30B-A3B-like; idle ≤ 5 %, late ≤ 5 ms, gap ≤ 1.5 × target, TTFT ≤ 1.15 ×", rows)


def _ok(scenario: Scenario, outcome: Outcome) -> bool:
    report = outcome.report
    # What was predicted from cold steps, or before the device changed its speed, is wrong for a step or two.
    late_ms = report.late_ms.p99 if scenario in CHANGES else report.late_ms.worst
    return (
        (scenario in MAY_IDLE or report.idle_share <= 0.05)
        and late_ms <= 5.0
        and report.worst_gap_ms(outcome.streams) <= 1.5 * ITL_TARGET_MS
        and (outcome.long is None or outcome.ttft_ratio <= 1.15)
    )
