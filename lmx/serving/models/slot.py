"""One model's stay in memory, from the first wish for it until its process is gone: its state, and who uses it.

It decides nothing and awaits only its own events; ``lmx.serving.models.manager`` moves it.
"""

import logging
import time
from dataclasses import replace

import trio

from lmx.errors import LmxError
from lmx.serving.models.demand import Demand
from lmx.serving.models.options import Applied, LoadOptions, Options
from lmx.serving.models.served import AnyServed

logger = logging.getLogger("lmx")


class Signal:
    """Something changed: wakes everybody who waits for that, and can be waited for again."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def send(self) -> None:
        self._event.set()
        self._event = trio.Event()

    async def wait(self) -> None:
        await self._event.wait()


class Slot:
    """``state``: "reading" its files, "converting" them, "waiting" for memory, then its engine's ("loading", "ready",
    "recycling", "restarting", "failed"); "draining" its last requests, "unloading"."""

    def __init__(
        self,
        model_id: str,
        path: str,
        kind: type[AnyServed],
        asked: LoadOptions,
        changes: Signal,
        *,
        kept: bool,
        names: tuple[str, ...] = (),
        before: tuple["Slot", ...] = (),
    ) -> None:
        self.id = model_id
        self.path = path
        """What ``lmx.hub.inventory.find`` takes."""
        self.kind = kind
        self.names = names
        """Others that mean it."""
        self.asked = asked
        self.kept = kept
        """It was asked for by hand or by the settings: it stays, whether anybody waits for it or not."""
        self.before = before
        """Earlier stays of the same model, which must end first."""
        self.options: Options | None = None
        self.served: AnyServed | None = None
        self.demand: Demand | None = None
        self.reserved = False
        """It has its memory."""
        self.kv_bytes = 0
        """What its engine was granted."""
        self.wired_bytes = 0
        """How much of its weights may be wired (Metal)."""
        self.load_s = 0.0
        self.outcome = ""
        """How its load ended, once it has: "ready", "failed" or "cancelled"."""
        self.error: LmxError | None = None
        """Why it could not be served."""
        self.message = ""
        self.since = time.time()
        """Unix time of its last change of state."""
        self.leases = 0
        """Requests, and loads that are waited for."""
        self.idle_since = trio.current_time()
        """On Trio's clock, which no change of the date moves."""
        self.last_used = time.time()
        """Unix time of the last release, to be shown."""
        self.scope = trio.CancelScope()
        """Of the task that owns it."""
        self.gone = trio.Event()
        """Its process is gone, and its memory with it."""
        self.drain = trio.CancelScope()
        """Of the wait for its last requests."""
        self._own_state = "reading"
        self._changed = Signal()
        self._changes = changes
        """Of all slots."""

    @property
    def state(self) -> str:
        if self._own_state == "running":
            assert self.served is not None
            return self.served.engine.state
        return self._own_state

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def leaving(self) -> bool:
        """It takes nobody any more."""
        return self._own_state in ("draining", "unloading") or self.gone.is_set()

    @property
    def pinned(self) -> bool:
        return self.options is not None and self.options.pin

    def is_called(self, name: str) -> bool:
        """In any case; a path is a name, too."""
        return name.casefold() in (self.id.casefold(), self.path.casefold(), *map(str.casefold, self.names))

    @property
    def expires_at(self) -> float:
        """When it goes if nobody comes, on Trio's clock."""
        ttl_s = self.options.ttl_s if self.options is not None else 0.0
        expires = ttl_s and not self.leases and not self.pinned and self.state in ("ready", "failed")
        return self.idle_since + ttl_s if expires else float("inf")

    def enter(self, state: str, message: str = "") -> None:
        """Change the state; "running" is the engine's own."""
        self._own_state, self.message, self.since = state, message, time.time()
        if state != "running":
            logger.info("model %s: %s%s", self.id, state, f": {message}" if message else "")
        self.notify()

    def notify(self) -> None:
        """Wake those who wait for a change."""
        self._changed.send()
        self._changes.send()

    async def change(self) -> None:
        """Wait for the next change of anything here."""
        await self._changed.wait()

    @property
    def shrinkable_bytes(self) -> int:
        """What it can do without: of the KV that it was granted, what is more than the least, and than one sequence of
        its whole context needs. llama.cpp's is one buffer, made whole at load."""
        served, demand = self.served, self.demand
        if demand is None or served is None or served.folder.backend != "mlx" or not self.ready:
            return 0
        estimate = demand.estimate
        least = max(demand.least_bytes, estimate.total(estimate.kv_bytes(served.context_length)))
        return max(estimate.total(self.kv_bytes) - least, 0)

    def reloads_for(self, asked: LoadOptions) -> bool:
        """Whether what is asked for can only be had by loading it anew."""
        options = self.options
        fixed = ("context_length", "max_rows", "kv_bits", "kv_budget_bytes", "draft_model", "speculation")
        given = asked.given()
        return options is not None and any(name in given and given[name] != getattr(options, name) for name in fixed)

    def take_over(self, asked: LoadOptions) -> None:
        """What can change while it is loaded."""
        self.asked = asked.over(self.asked)
        if self.options is not None:
            given = {name: value for name, value in asked.given().items() if name in ("ttl_s", "pin")}
            applied = {**self.options.applied, **{name: Applied(value, "request") for name, value in given.items()}}
            self.options = replace(self.options, **given, applied=applied)
        self.notify()

    def serve(self, served: AnyServed) -> None:
        """Its words are there."""
        self.served = served
        self.notify()

    def refuse(self, error: LmxError) -> None:
        """It will not be served: who waits for it learns why."""
        self.error = self.error or error
        if self.served is not None:
            self.served.engine.close(self.error)
        self.notify()

    def hold(self) -> None:
        self.leases += 1
        self.notify()

    def give_back(self) -> None:
        self.leases -= 1
        self.idle_since, self.last_used = trio.current_time(), time.time()
        self.notify()
