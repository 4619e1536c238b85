"""What a benchmark returns, and how it is shown: a table on stderr and ``bench/results/NAME.json``."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
Row = dict[str, str | int | float | bool | None]


@dataclass(slots=True)
class Result:
    title: str
    rows: list[Row]
    """All with the same keys; "ratio" is candidate by baseline, "target" what it must reach, "ok" whether it does."""
    facts: dict[str, Any] = field(default_factory=dict)


def alternate(times: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Each measure ``times`` times, in turn, because the speed of a shared machine drifts; the values of each."""
    values: list[list[float]] = [[] for _ in measures]
    for _ in range(times):
        for taken, measure in zip(values, measures, strict=True):
            taken.append(measure())
    return values


def median_ratio(candidate: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the pairwise ratios of values taken in turn."""
    return statistics.median(c / b for c, b in zip(candidate, baseline, strict=True))


def show(name: str, result: Result, elapsed_s: float) -> None:
    table = Table(title=f"{name}: {result.title}")
    for key in result.rows[0]:
        table.add_column(key, justify="left" if isinstance(result.rows[0][key], str) else "right")
    for row in result.rows:
        table.add_row(*map(_text, row.values()))
    Console(stderr=True, width=None if os.isatty(2) else 160).print(table)
    RESULTS.mkdir(exist_ok=True)
    document = {
        "benchmark": name,
        "title": result.title,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "elapsed_s": round(elapsed_s, 1),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in ("mlx", "mlx-lm", "hypercorn", "trio")},
        **result.facts,
        "rows": result.rows,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _text(value: str | int | float | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
