"""When a dead engine may be started again: exponential back-off, and a circuit breaker for one that keeps dying.

Pure: the time is an argument. Owned by one ``lmx.serving.engine.Engine``.
"""

import math

MOST_EXCUSED = 16


class Breaker:
    """Closed: restarts wait ``backoff_s``, doubled each time up to ``backoff_max_s``. After ``max_restarts`` restarts
    in a row without a success it opens for ``cooldown_s``; then one more try is allowed, and its failure opens it
    again."""

    def __init__(self, *, backoff_s: float, backoff_max_s: float, max_restarts: int, cooldown_s: float) -> None:
        self._backoff_s = backoff_s
        self._backoff_max_s = backoff_max_s
        self._max_restarts = max_restarts
        self._cooldown_s = cooldown_s
        self._failures = 0
        self._excused = 0
        self._closes_at = -math.inf

    def succeed(self) -> None:
        """The engine served something: what went before is forgiven."""
        self._failures = self._excused = 0

    def excuse(self, now: float) -> float | None:
        """As ``fail``, for the second death over one request that is proven to be the cause: neither counts.

        So many different ones in a row, and nobody served between, are the model's fault nevertheless.
        """
        self._excused += 1
        if self._excused > MOST_EXCUSED:
            return self.fail(now)
        self._failures = max(0, self._failures - 1)
        return self._backoff_s

    def fail(self, now: float, *, permanent: bool = False) -> float | None:
        """The engine ended: seconds until it may be started again, or None when the breaker opens.

        ``permanent``: trying again soon cannot help, open at once.
        """
        self._failures += 1
        if permanent or self._failures > self._max_restarts:
            self._closes_at = now + self._cooldown_s
            return None
        return min(self._backoff_max_s, self._backoff_s * 2.0 ** min(self._failures - 1, 30))

    def remaining_s(self, now: float) -> float:
        """Seconds until an open breaker allows a try."""
        return max(0.0, self._closes_at - now)
