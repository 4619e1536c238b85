"""Four models of no weight, and a manager over them in the test's own Trio run."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import psutil
import trio

from lmx import protocol
from lmx.config import Sources
from lmx.config.live import Live
from lmx.hub.inventory import find
from lmx.serving.engine import GenerateRequest
from lmx.serving.metrics import Metrics
from lmx.serving.models import Models, Served
from lmx.serving.models.demand import demand
from lmx.serving.models.options import LoadOptions, options_of

PATIENCE_S = 20  # bounds a failing test only
NAMES = ("ant", "bee", "cat", "dog")


def live_of(zoo: Path, data: Path, **sections: dict[str, Any]) -> Live:
    given = {
        "model": {"default": str(zoo / "ant")},
        "engine": {
            "command": [sys.executable, "-m", "bench.null_engine"],
            "openblas": "off",
            "restart_backoff_s": 0.01,
        },
        "hub": {"data_dir": str(data), "folders": [str(zoo)], "huggingface": False, "lmstudio": False},
    }
    merged = {name: {**given.get(name, {}), **sections.get(name, {})} for name in {*given, *sections}}
    return Live(Sources.read(environ={}, overrides=merged), data / "lmx.toml")


@asynccontextmanager
async def managing(zoo: Path, data: Path, **sections: dict[str, Any]) -> AsyncIterator[Models]:
    """Models that run, and that nothing is left of afterwards."""
    models = Models(live_of(zoo, data, **sections), Metrics())
    async with trio.open_nursery() as nursery:
        await nursery.start(models.run)
        yield models
        nursery.cancel_scope.cancel()
    assert models.listing() == []
    assert models.memory.report().models == ()
    assert engines() == []


def engines() -> list[psutil.Process]:
    """Engine processes of this test."""
    return [child for child in psutil.Process().children() if "null_engine" in " ".join(_command(child))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


Test = Callable[..., Awaitable[None]]


def in_trio(test: Test) -> Callable[..., None]:
    """A test as a Trio task; parameters are pytest's fixtures."""

    @wraps(test)
    def run(**fixtures: Any) -> None:
        async def main() -> None:
            with trio.fail_after(PATIENCE_S):
                await test(**fixtures)

        trio.run(main)

    return run


REQUEST = GenerateRequest(prompt=[5, 6, 7], max_tokens=3, sampling=protocol.Sampling(seed=1))


async def ask(models: Models, name: str, max_tokens: int = 3) -> list[int]:
    """The tokens of an answer, as a face gets them."""
    tokens: list[int] = []
    async with models.use(name) as served:
        assert isinstance(served, Served)
        request = GenerateRequest(prompt=[5, 6, 7], max_tokens=max_tokens, sampling=protocol.Sampling(seed=1))
        async with served.engine.generate(request) as stream:
            while True:
                chunk = await stream.receive()
                tokens += chunk.tokens
                if chunk.finish:
                    return tokens


async def state(models: Models, name: str, *wanted: str) -> None:
    """Wait until a model's state is one of these; "gone": it has none."""
    while models.states().get(name, "gone") not in wanted:
        await models.changes.wait()


@asynccontextmanager
async def answering(models: Models, name: str, nursery: trio.Nursery) -> AsyncIterator[trio.CancelScope]:
    """An answer without end runs in the block."""
    begun, ended, scope = trio.Event(), trio.Event(), trio.CancelScope()

    async def run() -> None:
        with scope:
            async with models.use(name) as served, served.engine.generate(ENDLESS) as stream:
                await stream.receive()
                begun.set()
                while True:
                    await stream.receive()
        ended.set()

    nursery.start_soon(run)
    await begun.wait()
    yield scope
    scope.cancel()
    await ended.wait()


ENDLESS = GenerateRequest(prompt=[5, 6, 7], max_tokens=10**6, sampling=protocol.Sampling(seed=1))


def pid_of(models: Models, name: str) -> int | None:
    served = models.peek(name, Served)
    assert served is not None
    return served.engine.statistics().pid


def limit_for(zoo: Path, models: int) -> int:
    """A budget that so many of the zoo's models fit into, and not one more."""
    settings = live_of(zoo, zoo).now
    options = options_of(settings, ["bee"], LoadOptions(), jit=True)
    need = demand(find(str(zoo / "bee"), settings.model.cache_path), options, settings, embeds=False)
    return int((models + 0.5) * need.least_bytes)
