"""Shows figures: a table for people, JSON for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from lmx.bench.figures import Figures, Spread

_COLUMNS = ("prompt", "answer", "streams", "prompt tok/s", "gen. tok/s", "decode tok/s", "TTFT ms", "ITL ms")


def table(results: Sequence[Figures], title: str) -> Table:
    """One line for each load; TTFT and ITL as p50 / p95 / p99 / worst."""
    shown = Table(title=title, caption="TTFT and ITL: p50/p95/p99/worst. Decode: while all streams decode.")
    for name in _COLUMNS:
        shown.add_column(name, justify="right")
    for result in results:
        shown.add_row(
            f"{result.prompt_tokens:.0f}",
            f"{result.completion_tokens:.0f}",
            str(result.concurrency),
            f"{result.prompt_tokens_per_s:.1f}",
            f"{result.generation_tokens_per_s:.1f}",
            "-" if result.decode_tokens_per_s is None else f"{result.decode_tokens_per_s:.1f}",
            _spread(result.ttft_ms),
            "-" if result.itl_ms is None else _spread(result.itl_ms),
        )
    return shown


def _spread(spread: Spread) -> str:
    return "/".join(f"{value:.0f}" for value in (spread.p50, spread.p95, spread.p99, spread.max))


def document(results: Sequence[Figures], facts: dict[str, Any]) -> str:
    """``facts`` (what was measured, how) and ``results``, a list of ``Figures``."""
    return json.dumps(facts | {"results": [asdict(result) for result in results]}, indent=1)
