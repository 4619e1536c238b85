"""Who gets memory next: one model at a time, in the order in which they asked, so that two that do not fit together
never throw each other out in turns.

What can go at once goes (prefixes, then idle models); for the rest ``[memory] policy`` decides: refuse, wait until
working models are idle (after a while they take no new requests, which then wait behind us), or give them ``drain_s``
and end them. Called by the owner of each slot.
"""

from collections.abc import Callable, Iterable, Sequence

import trio

from lmx.config import MemorySettings
from lmx.errors import InsufficientMemory
from lmx.serving.memory import Loaded, Memory, Plan
from lmx.serving.metrics import Metrics
from lmx.serving.models.slot import Signal, Slot

Retire = Callable[[Slot, float, str], None]

PATIENCE_SHARE = 0.25
"""Of ``wait_s``: how long working models still take new requests while somebody waits for their memory."""
WIRED_SLACK = 1.05
"""Of the estimated weights: what they are more than that must be wired too, or each step pages some in."""
LATER_S = 10.0
"""When a client that is refused may try again."""


class Admission:
    """``slots``: all that hold or want memory; ``changes`` tells of every change of one."""

    def __init__(
        self,
        settings: Callable[[], MemorySettings],
        memory: Memory,
        slots: Callable[[], Iterable[Slot]],
        changes: Signal,
        retire: Retire,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._memory = memory
        self._slots = slots
        self._changes = changes
        self._retire = retire
        self._turn = trio.Lock()  # Trio's is fair
        self._evictions = metrics.evictions

    def check(self, slot: Slot) -> None:
        """Raises InsufficientMemory for what can never be had, or not now where that is the policy."""
        plan = self._plan(slot)
        refuses = self._settings().policy == "refuse" and not any(one.leaving for one in self._named(plan.after))
        if plan.outcome == "never" or (plan.outcome == "after" and refuses):
            raise InsufficientMemory(f"The model {slot.id!r} cannot be loaded. {plan.words}", retry_after_s=LATER_S)

    async def admit(self, slot: Slot) -> None:
        """Wait until what it needs is free, and reserve it, with as much more for its KV as there is room for
        (``slot.kv_bytes``).

        Raises InsufficientMemory with the numbers. Cancelled: nothing is reserved; what was unloaded stays unloaded.
        """
        slot.enter("waiting", "for other loads")
        async with self._turn:
            plan = self._plan(slot)
            with trio.move_on_after(self._settings().wait_s) as limit:
                asked_at = trio.current_time()
                while not await self._make_room(slot, plan, asked_at):
                    plan = self._plan(slot)
            if limit.cancelled_caught:
                waited = f"It waited {self._settings().wait_s:g} s for them."
                raise InsufficientMemory(
                    f"The model {slot.id!r} cannot be loaded now. {plan.words} {waited}", retry_after_s=LATER_S
                )
            assert slot.demand is not None
            slot.kv_bytes = slot.demand.kv_bytes(self._memory.room())
            self._memory.reserve(slot.id, slot.demand.estimate.total(slot.kv_bytes))
            slot.wired_bytes = self._memory.wired_share(int(WIRED_SLACK * slot.demand.estimate.weights_bytes))
            self._memory.wire(slot.id, slot.wired_bytes)
            slot.reserved = True

    def give_back(self, slot: Slot) -> None:
        """Its process is gone."""
        if slot.reserved:
            self._memory.release(slot.id)

    def settle(self, slot: Slot) -> None:
        """It is loaded: its engine's own numbers hold from now on."""
        assert slot.served is not None
        assert slot.served.engine.ready is not None
        fixed = self.fixed_bytes(slot)
        self._memory.wire(slot.id, min(slot.wired_bytes, slot.served.engine.ready.weights_bytes))
        self._memory.settle(slot.id, fixed, fixed + slot.served.engine.ready.kv_budget_bytes)

    def fixed_bytes(self, slot: Slot) -> int:
        """All but its KV: as estimated, but for the weights once its engine has told of them."""
        assert slot.served is not None
        assert slot.demand is not None
        estimate, ready = slot.demand.estimate, slot.served.engine.ready
        return estimate.fixed_bytes + (ready.weights_bytes - estimate.weights_bytes if ready is not None else 0)

    async def _make_room(self, slot: Slot, plan: Plan, asked_at: float) -> bool:
        """One step of it; whether the memory is there."""
        slot.enter("waiting", plan.words)
        match plan.outcome:
            case "now":
                for model, given in plan.trim:
                    self._trim(self._named([model])[0], given)
                await self._gone(self._named(plan.evict), 0.0, slot)
                return not plan.evict and not plan.trim
            case "after":
                await self._outlast(slot, self._named(plan.after), asked_at)
            case "never":
                self.check(slot)
        return False

    async def _outlast(self, slot: Slot, busy: Sequence[Slot], asked_at: float) -> None:
        """A step towards the memory of models that work, or are on their way out."""
        settings = self._settings()
        leaving = [one for one in busy if one.leaving]
        if leaving:
            await leaving[0].gone.wait()
        elif settings.policy == "preempt":
            await self._gone(busy, settings.drain_s, slot)
        elif settings.policy == "refuse":
            self.check(slot)
        elif trio.current_time() >= asked_at + PATIENCE_SHARE * settings.wait_s:
            await self._gone(busy, settings.wait_s, slot)
        else:
            with trio.move_on_at(asked_at + PATIENCE_SHARE * settings.wait_s):
                await self._changes.wait()

    async def _gone(self, leaving: Sequence[Slot], drain_s: float, slot: Slot) -> None:
        """Unload them all, and wait until they are."""
        for one in leaving:
            self._evictions.labels(one.id).inc()
            self._retire(one, drain_s, f"its memory is needed for {slot.id}")
        for one in leaving:
            await one.gone.wait()

    def _named(self, models: Iterable[str]) -> list[Slot]:
        """Those of ``models`` that hold memory."""
        wanted = set(models)
        return [one for one in self._slots() if one.reserved and one.id in wanted]

    def _trim(self, slot: Slot, given: int) -> None:
        assert slot.served is not None
        slot.kv_bytes -= given
        slot.served.engine.trim(slot.kv_bytes)
        self._memory.trimmed(slot.id, given)

    def _plan(self, slot: Slot) -> Plan:
        assert slot.demand is not None
        holding = [one for one in self._slots() if one.reserved]
        loaded = [
            Loaded(one.id, one.idle_since, one.pinned, one.leases or one.leaving, one.shrinkable_bytes)
            for one in holding
        ]
        return self._memory.plan(slot.demand.least_bytes, loaded)
