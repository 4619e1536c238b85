"""Figures over a recent window: events a second, and percentiles. Pure; the time is an argument. For
``/admin/status``."""

from collections import deque
from collections.abc import Sequence

WINDOW_S = 60


class Rate:
    """Counts events in one bucket a second, for the last minute."""

    def __init__(self) -> None:
        self._buckets: deque[list[int]] = deque(maxlen=WINDOW_S + 1)

    def add(self, now: float, count: int = 1) -> None:
        second = int(now)
        if self._buckets and self._buckets[-1][0] == second:
            self._buckets[-1][1] += count
        else:
            self._buckets.append([second, count])

    def per_second(self, now: float, window_s: int) -> float:
        """Mean over the last ``window_s`` whole seconds (at most WINDOW_S), or since the first event if that is later.

        The running second is left out.
        """
        second = int(now)
        inside = [(at, count) for at, count in self._buckets if second - window_s <= at < second]
        return sum(count for _, count in inside) / min(window_s, second - self._buckets[0][0]) if inside else 0.0


def percentiles(values: Sequence[float]) -> tuple[float, float, float] | None:
    """The 50th, 95th and 99th percentile (nearest rank), None without values."""
    if not values:
        return None
    ranked = sorted(values)
    last = len(ranked) - 1
    return ranked[round(last * 0.50)], ranked[round(last * 0.95)], ranked[round(last * 0.99)]
