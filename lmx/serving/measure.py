"""Fills in what the memory's accounts cannot know: once a second, what the system says of each engine's process, and
what the engine last said of itself.

One task for the server, run by ``lmx.serving.models``. Looks at processes in a thread, since that walks their page
tables; a process that goes meanwhile is passed over. Decides nothing;
engines hear what is not accounted for.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

import trio

from lmx.footprint import footprint_bytes
from lmx.serving.engine import Engine
from lmx.serving.memory import Memory

INTERVAL_S = 1.0


class Measured(NamedTuple):
    """A model that is loaded."""

    model: str
    engine: Engine
    fixed_bytes: int
    """What it owns beside KV and prefixes: weights, the process, what steps take for a moment."""


async def measure(memory: Memory, loaded: Callable[[], Iterable[Measured]]) -> None:
    """Until cancelled, which may leave a thread behind that reads /proc."""
    while True:
        await look(memory, loaded)
        await trio.sleep(INTERVAL_S)


async def look(memory: Memory, loaded: Callable[[], Iterable[Measured]]) -> None:
    """Once."""
    pids = {one.model: pid for one in loaded() if (pid := one.engine.pid) is not None}
    found = await trio.to_thread.run_sync(_footprints, pids, abandon_on_cancel=True)
    for one in loaded():
        _note(memory, one, pids.get(one.model), found)


def _footprints(pids: Mapping[str, int]) -> dict[str, int]:
    """Of those processes that are there. Blocking."""
    found = {}
    for model, pid in pids.items():
        with suppress(OSError):
            found[model] = footprint_bytes(pid)
    return found


def _note(memory: Memory, one: Measured, pid: int | None, found: Mapping[str, int]) -> None:
    """Of a model whose process was ``pid`` when it was looked at."""
    if one.engine.pid is None or one.engine.pid != pid:  # it died, and perhaps another one starts
        memory.measure(one.model, one.engine.pid, 0)
        return
    memory.measure(one.model, pid, found.get(one.model, 0))
    if (stats := one.engine.figures) is not None:
        owned = one.fixed_bytes + stats.arena_bytes + stats.prefix.ram_bytes
        memory.own(one.model, owned, stats.mlx_active_bytes, stats.mlx_cache_bytes)
        if measured := found.get(one.model, 0):
            one.engine.note_memory(measured - owned - stats.mlx_cache_bytes)
