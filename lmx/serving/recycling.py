"""When an engine process is replaced by a fresh one, before what it gathers over days becomes a failure: by its age, by
memory that lmx does not account for, by compiled graphs, by GPU buffers, or because somebody asks for it.

A limit that is reached makes a replacement due; it then begins in a moment without requests, which costs nobody
anything, or after ``recycle_wait_s`` beside them. Pure: figures and time are arguments. One for each process; asked
about once a second by ``lmx.serving.engine``, which does it. Must never replace one process after the other for what
the model needs from the start: growth counts from what the process had settled at.
"""

import math
from dataclasses import dataclass
from typing import Literal

from lmx.config import EngineSettings

Reason = Literal["asked", "age", "growth", "traces", "handles"]

SETTLE_S = 60.0
"""What it takes without an account so long after its load is its own, and no growth."""
STAYS_S = 60.0
"""Growth that lasts so long is no passing peak."""
QUIET_S = 5.0
"""Without a request so long, the next one is likely not to come in the next moment either."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a process at a moment."""

    unaccounted_bytes: int | None = None
    """What the system measures beyond what lmx accounts for; None: not known."""
    traces: int = 0
    handles: int = 0
    most_handles: int = 0
    """0: any number."""


class Recycling:
    """Of a process that became ready at ``born``."""

    def __init__(self, born: float) -> None:
        self.reason: Reason | None = None
        """Why it is due."""
        self.growth_bytes = 0
        self._born = born
        self._due_at = math.inf
        self._least: int | None = None
        """What it took without an account while it settled, or the least it ever took since."""
        self._grown_at = math.inf
        """Since when growth is beyond the limit."""

    def age_s(self, now: float) -> float:
        return now - self._born

    def ask(self, now: float) -> None:
        """At once, whoever runs."""
        self.reason, self._due_at = "asked", now

    def look(self, figures: Figures, settings: EngineSettings, now: float) -> None:
        """Take note of the figures; ``reason`` tells what came of it, and changes with the settings."""
        self._note_growth(figures, settings, now)
        if self.reason == "asked":
            return
        reason = self._judge(figures, settings, now)
        if reason is None:
            self.reason, self._due_at = None, math.inf
        elif self.reason is None:
            self.reason, self._due_at = reason, now

    def begins(self, settings: EngineSettings, now: float, idle_since: float) -> bool:
        """Whether it is to be replaced now. ``idle_since``: when the last request was gone; infinity: one is there."""
        if self.reason is None:
            return False
        quiet = now - idle_since >= QUIET_S
        return quiet or self.reason == "asked" or now - self._due_at >= settings.recycle_wait_s

    def _judge(self, figures: Figures, settings: EngineSettings, now: float) -> Reason | None:
        if settings.recycle_hours and self.age_s(now) >= settings.recycle_hours * 3600:
            return "age"
        if now - self._grown_at >= STAYS_S:
            return "growth"
        if settings.recycle_traces and figures.traces >= settings.recycle_traces:
            return "traces"
        share = settings.recycle_handles
        if share and figures.most_handles and figures.handles >= share * figures.most_handles:
            return "handles"
        return None

    def _note_growth(self, figures: Figures, settings: EngineSettings, now: float) -> None:
        found = figures.unaccounted_bytes
        if found is None:
            return
        if self.age_s(now) < SETTLE_S:
            self._least = max(found, self._least or 0, 0)
            return
        self._least = max(min(found, found if self._least is None else self._least), 0)
        self.growth_bytes = max(found - self._least, 0)
        limit = settings.recycle_growth_bytes
        grown = limit > 0 and self.growth_bytes >= limit
        self._grown_at = min(self._grown_at, now) if grown else math.inf
