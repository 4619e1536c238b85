"""What a source of drafts is."""

from typing import Protocol

from lmx.engine.backend import Sequence


class Source(Protocol):
    """Guesses the next tokens of one sequence. It reads what ``sequence.tokens`` gained when it is asked, so nobody
    tells it of each token, and one that is never asked costs nothing."""

    name: str
    """"prediction", "lookup" or "model"."""

    def offer(self, sequence: Sequence) -> int:
        """How many tokens it has for what comes next."""

    def take(self, sequence: Sequence, tokens: int) -> list[int]:
        """So many of them, or fewer; only after ``offer``, with nothing between."""

    def told(self, drafted: int, accepted: int) -> None:
        """So many of what it gave last were verified, and so many were right."""
