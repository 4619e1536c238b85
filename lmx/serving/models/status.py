"""What is told of a model that is loaded, or on its way in or out."""

from collections.abc import Mapping
from dataclasses import dataclass

import trio

from lmx.hub.estimate import Estimate
from lmx.hub.library import Entry
from lmx.serving.memory import Memory
from lmx.serving.models.options import Applied
from lmx.serving.models.slot import Slot


@dataclass(frozen=True, slots=True)
class ModelStatus:
    id: str
    path: str
    """What ``lmx.hub.inventory.find`` finds it by: its folder or file, mostly."""
    state: str
    message: str
    """Why it is in it."""
    since: float
    """Unix time."""
    leases: int
    pinned: bool
    kept: bool
    """Loaded by hand or by the settings, not by a request."""
    ttl_s: float
    expires_in_s: float | None
    """None: it does not go by itself, or is in use."""
    last_used: float
    """Unix time."""
    settings: Mapping[str, Applied]
    """What it was loaded with, and who said so."""
    estimate: Estimate | None
    needed_bytes: int
    """What had to be there before it was loaded."""
    reserved_bytes: int
    """What it may take."""
    owned_bytes: int
    """What lmx's own accounts say that it has."""
    measured_bytes: int
    """What the system says."""
    load_s: float
    error: str | None

    def is_of(self, entry: Entry) -> bool:
        """It is this model on the disk, whatever it was called."""
        return entry.is_called(self.path)


@dataclass(frozen=True, slots=True)
class Unloaded:
    id: str
    freed_bytes: int
    seconds: float


def status_of(slot: Slot, memory: Memory) -> ModelStatus:
    """At this moment."""
    options, expires_at = slot.options, slot.expires_at
    held = memory.held(slot.id)
    return ModelStatus(
        id=slot.id,
        path=slot.path,
        state=slot.state,
        message=slot.message,
        since=slot.since,
        leases=slot.leases,
        pinned=slot.pinned,
        kept=slot.kept,
        ttl_s=options.ttl_s if options is not None else 0.0,
        expires_in_s=None if expires_at == float("inf") else max(expires_at - trio.current_time(), 0.0),
        last_used=slot.last_used,
        settings=options.applied if options is not None else {},
        estimate=slot.demand.estimate if slot.demand is not None else None,
        needed_bytes=slot.demand.least_bytes if slot.demand is not None else 0,
        reserved_bytes=held.reserved_bytes,
        owned_bytes=held.owned_bytes,
        measured_bytes=held.measured_bytes,
        load_s=slot.load_s,
        error=slot.error.message if slot.error is not None else None,
    )
