"""What looking for models costs: milliseconds of a scan, for 50 and 500 models of eight files each.

``first``: nothing is known, all headers are read. ``again``: nothing has changed, which is what the server does every
few seconds. ``start``: the list as the state database has it, before any scan. ``misspelt``: a name that is none.
The baseline asks the file system for the same files and nothing else.

    python -m bench library
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bench.result import Result, Row
from lmx.errors import ModelNotFound
from lmx.hub.library import Library
from lmx.hub.state import State
from tests.model_places import settings_in, write_folder

MODELS = (50, 500)
TARGETS = {"again": 6.0, "start": 6.0, "misspelt": 1.0}
"""Times the baseline."""


def run(quick: bool) -> Result:
    rows: list[Row] = []
    for count in MODELS:
        with tempfile.TemporaryDirectory(prefix="lmx-bench-") as name:
            home = Path(name)
            whole = write_folder(home / "whole", shards=4)
            for number in range(count):
                folder = home / "lmx" / "models" / f"org{number % 20}" / f"Model-{number}-Instruct-4bit"
                shutil.copytree(whole, folder, copy_function=os.link)
            rows += _measure(home, count, 5 if quick else 15)
    return Result("looking for models, ms (ratio: by asking the file system for the same files)", rows)


def _measure(home: Path, count: int, times: int) -> list[Row]:
    settings, state = settings_in(home), State(home / "state.sqlite3")
    library = Library(settings, state)
    taken = {"first": [_ms(library.scan)]}

    def misspelt() -> None:
        with suppress(ModelNotFound):
            library.find(f"org3/Model-{count + 7}-Instruct-8bit")

    baseline = [_ms(lambda: _stat_all(settings.hub.models_path)) for _ in range(times)]
    taken["again"] = [_ms(library.scan) for _ in range(times)]
    taken["start"] = [_ms(lambda: Library(settings, state)) for _ in range(times)]
    taken["misspelt"] = [_ms(misspelt) for _ in range(times)]
    state.close()
    bare = statistics.median(baseline)
    rows: list[Row] = []
    for what, values in taken.items():
        value, target = statistics.median(values), TARGETS.get(what)
        rows.append(
            {
                "what": what,
                "models": count,
                "ms": value,
                "bare_ms": bare,
                "ratio": value / bare,
                "target": target,
                "ok": target is None or value <= target * bare,
            }
        )
    return rows


def _stat_all(folder: Path) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                _stat_all(Path(entry.path))
            else:
                entry.stat()


def _ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3
