"""Random lives of four models where two fit: requests, loads, unloads, crashes and people who give up, all at once.

Every request is answered or refused with a reason, and at the end nothing is held: no lease, no process, no byte.
"""

import random
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from lmx.errors import EngineDied, InsufficientMemory, LmxError, ModelNotFound, ModelOverloaded, RequestCrashesEngine
from lmx.serving.models import Models
from lmx.serving.models.options import LoadOptions
from tests.models_zoo import NAMES, ask, engines, limit_for, managing

AT_ONCE = 12
ALLOWED = (EngineDied, InsufficientMemory, ModelNotFound, ModelOverloaded, RequestCrashesEngine)
"""What a request may hear when its model is unloaded or killed under it, or nothing has room."""


@dataclass
class Told:
    answered: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    cancelled: int = 0


async def soak(zoo: Path, data: Path, operations: int, seed: int, policy: str) -> Told:
    choose, told = random.Random(seed), Told()
    free = trio.CapacityLimiter(AT_ONCE)
    memory = {"limit_bytes": limit_for(zoo, 2), "policy": policy, "wait_s": 60.0, "drain_s": choose.choice((0.0, 0.05))}
    engine = {"max_restarts": 1000, "restart_backoff_s": 0.01, "restart_backoff_max_s": 0.01}
    async with managing(zoo, data, memory=memory, engine=engine, model={"jit_ttl_s": 0.2}) as models:
        async with trio.open_nursery() as nursery:
            for _ in range(operations):
                await free.acquire_on_behalf_of(token := object())
                nursery.start_soon(_one, models, choose, told, free, token)
        for name in list(models.states()):
            with suppress(ModelNotFound):  # its time was up
                await models.unload(name, 0.0)
        assert told.answered + told.cancelled + sum(told.refused.values()) > 0
        assert models.memory.report().models == ()
        assert engines() == []
    return told


async def _one(models: Models, choose: random.Random, told: Told, free: trio.CapacityLimiter, token: object) -> None:
    name = choose.choice(NAMES)
    try:
        match choose.choices(("ask", "give up", "load", "unload", "kill"), (10, 3, 2, 2, 1))[0]:
            case "ask":
                tokens = choose.choice((1, 3, 300))
                assert len(await ask(models, name, tokens)) == tokens
                told.answered += 1
            case "give up":
                with trio.move_on_after(choose.random() * 0.2) as limit:
                    await ask(models, name, 10**6)
                told.cancelled += limit.cancelled_caught
            case "load":
                await models.load(name, LoadOptions(max_rows=choose.choice((None, 4, 8)), ttl_s=0.2))
            case "unload":
                await models.unload(name, choose.choice((0.0, 0.05)))
            case "kill":
                for process in engines()[:1]:
                    process.kill()
    except ALLOWED as error:
        told.refused[type(error).__name__] = told.refused.get(type(error).__name__, 0) + 1
    except LmxError as error:
        raise AssertionError(f"{name}: {error!r}") from error
    finally:
        free.release_on_behalf_of(token)
