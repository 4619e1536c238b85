"""Lives of four models where two fit: requests, loads, unloads, crashes and people who give up, many at once.

Every request is answered, or refused with a reason; and at the end nothing is held: no lease, no process, no byte.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import trio
import trio.testing

from lmx.errors import EngineDied, InsufficientMemory, ModelNotFound, ModelOverloaded, RequestCrashesEngine
from lmx.serving.models import Models
from lmx.serving.models.options import LoadOptions
from tests.models_zoo import NAMES, ask, engines, limit_for, managing

AT_ONCE = 12
ALLOWED = (EngineDied, InsufficientMemory, ModelNotFound, ModelOverloaded, RequestCrashesEngine)
"""What a request may hear when its model is unloaded or killed under it, or nothing has room."""

What = Literal["ask", "give up", "load", "unload", "kill", "settle"]


@dataclass(frozen=True)
class Act:
    what: What
    name: str = NAMES[0]
    number: int = 0
    """Tokens of an answer; turns of the event loop before giving up, or milliseconds to drain; rows to load with."""


def acts(seed: int, count: int) -> Iterator[Act]:
    """At random; most are requests."""
    choose = random.Random(seed)
    for _ in range(count):
        what: What = choose.choices(("ask", "give up", "load", "unload", "kill"), (10, 3, 2, 2, 1))[0]
        numbers = {"ask": (1, 3, 300), "give up": (1, 10, 100, 1000), "load": (4, 8)}.get(what, (0, 50))
        yield Act(what, choose.choice(NAMES), choose.choice(numbers))


async def live(zoo: Path, data: Path, wanted: Sequence[Act], **memory: Any) -> Counter[str]:
    """Do them all, up to AT_ONCE at a time; what came of each."""
    told: Counter[str] = Counter()
    free = trio.Semaphore(AT_ONCE)
    limits = {"limit_bytes": limit_for(zoo, 2), "wait_s": 60.0, "drain_s": 0.0, **memory}
    engine = {"max_restarts": 1000, "restart_backoff_s": 0.01, "restart_backoff_max_s": 0.01}
    async with managing(zoo, data, memory=limits, engine=engine, model={"jit_ttl_s": 0.2}) as models:
        async with trio.open_nursery() as nursery:
            for act in wanted:
                await free.acquire()
                if act.what == "settle":
                    free.release()
                    with trio.move_on_after(0.05):
                        await models.changes.wait()
                else:
                    nursery.start_soon(_do, models, act, told, free)
        await _emptied(models)
    return told


async def _emptied(models: Models) -> None:
    """Whatever it was, it can be unloaded, and then nothing is left."""
    for name in list(models.states()):
        with suppress(ModelNotFound):  # its time was up
            await models.unload(name, 0.0)
    assert models.states() == {}
    assert models.memory.report().models == ()
    assert engines() == []


async def _do(models: Models, act: Act, told: Counter[str], free: trio.Semaphore) -> None:
    try:
        match act.what:
            case "ask":
                assert len(await ask(models, act.name, act.number)) == act.number
            case "give up":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask, models, act.name, 10**6)
                    for _ in range(act.number):
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()
            case "load":
                await models.load(act.name, LoadOptions(max_rows=act.number or None, ttl_s=0.2))
            case "unload":
                await models.unload(act.name, act.number / 1000)
            case "kill":
                for process in engines()[:1]:
                    process.kill()
        told[act.what] += 1
    except ALLOWED as error:
        told[type(error).__name__] += 1
    except BaseExceptionGroup as group:
        match, rest = group.split(ALLOWED)
        told[type(match).__name__] += 1
        if rest is not None:
            raise rest from None
    finally:
        free.release()
