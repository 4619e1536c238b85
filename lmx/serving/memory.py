"""The memory of all models: what each was promised, what lmx's own accounts say it holds, and what the system says.

Decides by promises: a model may take what was reserved for it, whether it does so now or an hour later, so the promises
of all models together stay within the budget, and a load that would break that is planned (whose prefixes shrink, which
idle models go) or refused, before anything is touched. The other two columns are for showing and for the alarm: where
they part, something takes memory that nobody counts. Pure arithmetic over the numbers that are passed in; never reads a
file, waits, or asks a process. Called by ``lmx.serving.models``; ``lmx.serving.measure`` fills in what is measured.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lmx.config import MemorySettings
from lmx.serving import budget

# The alarm goes on when the columns part by more than this share of what is owned, or these bytes if that is more, and
# off again at half of that. What malloc and a page cache round is far below.
_ALARM_SHARE = 0.25
_ALARM_BYTES = 512 * 1024**2
_ALARM_OFF = 0.5

logger = logging.getLogger("lmx")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that holds memory, as the lifecycle sees it when a plan is wanted."""

    model: str
    last_used: float
    """On any one clock; the smallest goes first."""
    pinned: bool = False
    leases: int = 0
    """Requests that hold it, or wait for it: it is never evicted. Also of one that still loads."""
    shrinkable_bytes: int = 0
    """What a ``Trim`` takes off its promise: the memory for prefixes beyond the least that it needs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a load gets its memory."""

    outcome: Literal["now", "after", "never"]
    """"now": once ``trim`` and ``evict`` are done. "after": not before those of ``after`` are idle; nothing is to be
    done until then. "never": not on this machine, or not while the pinned models are."""
    trim: tuple[tuple[str, int], ...] = ()
    """(model, bytes that it gives up of its prefixes), least recently used first."""
    evict: tuple[str, ...] = ()
    """Least recently used first."""
    after: tuple[str, ...] = ()
    """Busy models whose memory would be needed as well."""
    words: str = ""
    """The same for people, with the numbers; the text of the refusal where it is one."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one model holds at a moment."""

    model: str
    reserved_bytes: int
    """The promise: what decisions count."""
    owned_bytes: int
    """By lmx's own accounts: weights, KV buffers, prefixes, the process itself. 0 until it is loaded."""
    measured_bytes: int
    """By the system: the resident set, on macOS ``phys_footprint``. 0 until it was measured."""
    active_bytes: int
    """By MLX: arrays in use."""
    pool_bytes: int
    """By MLX: freed, and kept for the next arrays."""
    pid: int | None = None

    @property
    def difference_bytes(self) -> int:
        """Measured beyond what is owned (negative: less); 0 until both are known."""
        return self.measured_bytes - self.owned_bytes if self.owned_bytes and self.measured_bytes else 0


@dataclass(frozen=True, slots=True)
class MemoryReport:
    budget_bytes: int
    total_bytes: int
    available_bytes: int
    models: tuple[Held, ...]
    reserved_bytes: int
    owned_bytes: int
    measured_bytes: int
    difference_bytes: int
    """Measured beyond what is owned (negative: less), over the models that are both."""
    alarm: bool
    """That is too much; it stays on until the difference is half of it."""


@dataclass(slots=True)
class _Entry:
    reserved: int
    owned: int = 0
    measured: int = 0
    active: int = 0
    pool: int = 0
    wired: int = 0
    pid: int | None = None
    settled: bool = False


@dataclass(slots=True)
class Memory:
    """One for the server."""

    settings: MemorySettings
    total: Callable[[], int]
    """What the machine has."""
    available: Callable[[], int]
    """What the system could give now."""
    part: Callable[[int], int] = int
    """Of the total that is the budget, where the settings name no limit."""
    alarm: bool = False
    _entries: dict[str, _Entry] = field(default_factory=dict)

    @property
    def budget_bytes(self) -> int:
        """For all models together: the settings' limit, which may be more than the system has, or the system's
        part."""
        return self.settings.limit_bytes or self.part(self.total())

    @classmethod
    def of_system(cls, settings: MemorySettings) -> "Memory":
        """With this machine's numbers."""
        return cls(settings, total=budget.total_bytes, available=budget.available_bytes, part=budget.model_bytes)

    # --- the promises -------------------------------------------------------------------------------

    def reserve(self, model: str, needed: int) -> None:
        """Promise a model that is about to load so many bytes. Only after a ``plan`` said that they are there."""
        self._entries[model] = _Entry(needed)

    def settle(self, model: str, owned: int, reserved: int | None = None) -> None:
        """The model is loaded and owns so much; ``reserved``: what it may take at most, now that it is known better, or
        now that it was trimmed. (None: as before.)"""
        entry = self._entries[model]
        entry.settled, entry.owned = True, owned
        if reserved is not None:
            entry.reserved = reserved

    def trimmed(self, model: str, given: int) -> None:
        """The model was told to do with so many bytes less."""
        entry = self._entries[model]
        entry.reserved = max(entry.reserved - given, 0)

    def release(self, model: str) -> None:
        """Its process is gone. Unknown models are ignored."""
        self._entries.pop(model, None)

    def reserved(self, model: str) -> int:
        return self._entries[model].reserved if model in self._entries else 0

    def room(self) -> int:
        """What a load may still take: what the promises leave of the budget, and the system of its memory."""
        promised = sum(entry.reserved for entry in self._entries.values())
        untaken = sum(max(entry.reserved - entry.measured, 0) for entry in self._entries.values())
        return max(min(self.budget_bytes - promised, self.available() - untaken), 0)

    def wired_share(self, weights_bytes: int) -> int:
        """What a model with these weights may wire (Metal): all of them, as far as the others leave the budget."""
        return max(min(weights_bytes, self.budget_bytes - sum(entry.wired for entry in self._entries.values())), 0)

    def wire(self, model: str, wired_bytes: int) -> None:
        self._entries[model].wired = wired_bytes

    def plan(self, needed: int, loaded: Sequence[Loaded]) -> Plan:
        """How ``needed`` more bytes can be had: prefixes shrink first, then idle models go, least recently used first,
        until it suffices; whom it turns out not to take stays. Touches nothing.

        ``loaded``: the models that hold memory. A pinned one is never evicted, one with leases not now; either may
        shrink.
        """
        room = self.room()
        if needed <= room:
            return Plan("now", words=f"{size(needed)} of the {size(room)} that are free")
        order = sorted(loaded, key=lambda held: held.last_used)
        short = needed - room
        shrinkable = sum(held.shrinkable_bytes for held in order)
        idle = [held for held in order if not held.pinned and not held.leases]
        busy = [held for held in order if not held.pinned and held.leases]
        if shrinkable >= short:
            return self._planned(needed, room, _trims(order, short), ())
        evict = self._fewest(idle, short, order)
        if evict is not None:
            gone = {held.model for held in evict}
            stay = [held for held in order if held.model not in gone]
            left = short - sum(self.reserved(held.model) for held in evict)
            return self._planned(needed, room, _trims(stay, left), tuple(held.model for held in evict))
        text = self._words(needed, room, order)
        both = self._fewest([*idle, *busy], short, order)
        if both is not None:
            after = tuple(held.model for held in both if held.leases)
            return Plan("after", after=after, words=f"{text} It can be had when {_and(after)} {_are(after)} idle.")
        pinned = [held.model for held in order if held.pinned]
        way = (
            f"Unload or unpin {_and(pinned)}, lower its context or rows"
            if pinned
            else "Lower its context_length, max_rows or kv_bits, take a smaller quantisation"
        )
        return Plan("never", words=f"{text} {way}, or raise [memory] limit_bytes if the machine has more.")

    def _fewest(self, idle: Sequence[Loaded], short: int, order: Sequence[Loaded]) -> list[Loaded] | None:
        """The first of ``idle`` that suffice together with what all others can shrink, without those among them that
        turn out not to be needed; None: all are too few."""
        shrinkable = sum(held.shrinkable_bytes for held in order)

        def gain(held: Loaded) -> int:
            """What more there is when it goes than when it shrinks."""
            return self.reserved(held.model) - held.shrinkable_bytes

        chosen: list[Loaded] = []
        found = shrinkable
        for held in idle:
            chosen.append(held)
            found += gain(held)
            if found >= short:
                break
        else:
            return None
        # The one that made it enough may be enough without some of those before it: the latest used of them stay.
        for held in reversed(chosen[:-1]):
            if found - gain(held) >= short:
                chosen.remove(held)
                found -= gain(held)
        return chosen

    def _planned(self, needed: int, room: int, trim: tuple[tuple[str, int], ...], evict: tuple[str, ...]) -> Plan:
        words = [f"prefixes of {model} give up {size(given)}" for model, given in trim]
        words += [f"{model} is unloaded ({size(self.reserved(model))})" for model in evict]
        return Plan("now", trim, evict, words=f"{size(needed)}, of which {size(room)} are free: {', '.join(words)}")

    def _words(self, needed: int, room: int, order: Sequence[Loaded]) -> str:
        def part(what: str, held: Iterable[Loaded]) -> list[str]:
            names = [f"{one.model} {size(self.reserved(one.model))}" for one in held]
            return [f"{what}: {', '.join(names)}"] if names else []

        free = f"{size(room)} are free of a budget of {size(self.budget_bytes)}"
        system = self.available()
        if system < self.budget_bytes - sum(entry.reserved for entry in self._entries.values()):
            free += f" (the system has {size(system)} left)"
        shrinkable = sum(held.shrinkable_bytes for held in order)
        lists = [
            *([f"prefixes could give up {size(shrinkable)}"] if shrinkable else []),
            *part("idle, could go", [held for held in order if not held.pinned and not held.leases]),
            *part("busy", [held for held in order if not held.pinned and held.leases]),
            *part("pinned", [held for held in order if held.pinned]),
        ]
        return f"It needs {size(needed)}; {'; '.join([free, *lists])}."

    # --- what is there ------------------------------------------------------------------------------

    def own(self, model: str, owned: int, active: int = 0, pool: int = 0) -> None:
        """What a loaded model owns now, from its engine's last figures. Unknown models are ignored."""
        if (entry := self._entries.get(model)) is not None and entry.settled:
            entry.owned, entry.active, entry.pool = owned, active, pool

    def measure(self, model: str, pid: int | None, measured: int) -> None:
        """What the system says of its process (None: it has none now). Unknown models are ignored."""
        if (entry := self._entries.get(model)) is not None:
            entry.pid, entry.measured = pid, measured

    def held(self, model: str) -> Held:
        """What one model holds; nothing, if it is unknown."""
        e = self._entries.get(model, _Entry(0))
        return Held(model, e.reserved, e.owned, e.measured, e.active, e.pool, e.pid)

    def report(self) -> MemoryReport:
        """All columns and their sums. Also where the alarm is decided: once on, it is logged and stays until the
        difference has halved."""
        held = tuple(self.held(model) for model in self._entries)
        both = [one for one in held if one.owned_bytes and one.measured_bytes]
        owned = sum(one.owned_bytes for one in both)
        difference = sum(one.measured_bytes for one in both) - owned
        self._judge(owned, difference, both)
        return MemoryReport(
            budget_bytes=self.budget_bytes,
            total_bytes=self.total(),
            available_bytes=self.available(),
            models=held,
            reserved_bytes=sum(one.reserved_bytes for one in held),
            owned_bytes=sum(one.owned_bytes for one in held),
            measured_bytes=sum(one.measured_bytes for one in held),
            difference_bytes=difference,
            alarm=self.alarm,
        )

    def _judge(self, owned: int, difference: int, held: Sequence[Held]) -> None:
        limit = max(_ALARM_SHARE * owned, _ALARM_BYTES)
        if not self.alarm and difference > limit:
            self.alarm = True
            each = ", ".join(f"{one.model} {size(one.owned_bytes)} and {size(one.measured_bytes)}" for one in held)
            logger.warning(
                "memory: the engines take %s more than lmx accounts for (owned and measured: %s)",
                size(difference),
                each,
            )
        elif self.alarm and difference <= _ALARM_OFF * limit:
            self.alarm = False
            logger.info("memory: what the engines take is again what lmx accounts for")


def _trims(order: Sequence[Loaded], short: int) -> tuple[tuple[str, int], ...]:
    """Who gives up how much, so that it is ``short`` in all."""
    trims = []
    for held in order:
        given = min(held.shrinkable_bytes, short)
        if given > 0:
            trims.append((held.model, given))
            short -= given
    return tuple(trims)


def size(count: int) -> str:
    """For people: "1.21 GB", as disks and memory are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if abs(count) >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
