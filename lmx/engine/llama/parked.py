"""Rows that ended, in slots that nobody needed since: what they hold, and which goes first. Pure bookkeeping; called by
``lmx.engine.llama.backend``."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Most rows that have nothing to do with a prompt differ this early; the prompt is made an array for the others.
_HEAD_TOKENS = 16


@dataclass(frozen=True, slots=True, eq=False)
class ParkedRow:
    head: list[int]
    tokens: npt.NDArray[np.int32]
    salt: str


class Parked:
    def __init__(self, cuts: Callable[[int, int], bool] | None) -> None:
        """``cuts``: whether a slot can go back to so many first tokens; None: always."""
        self._cuts = cuts
        self._rows: dict[int, ParkedRow] = {}
        """By slot, the one used longest ago first."""
        self.tokens = 0
        """All rows together."""

    def __contains__(self, slot: int) -> bool:
        return slot in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def oldest(self) -> int:
        """The slot of the row used longest ago."""
        return next(iter(self._rows))

    def length(self, slot: int) -> int:
        """Tokens of the slot's row; 0: there is none."""
        return len(self._rows[slot].tokens) if slot in self._rows else 0

    def put(self, slot: int, tokens: list[int], salt: str) -> None:
        self._rows[slot] = ParkedRow(tokens[:_HEAD_TOKENS], np.array(tokens, np.int32), salt)
        self.tokens += len(tokens)

    def remove(self, slot: int) -> None:
        self.tokens -= len(self._rows.pop(slot).tokens)

    def used(self, slot: int) -> None:
        """The row is the last to go, for now."""
        self._rows[slot] = self._rows.pop(slot)

    def longest(self, tokens: Sequence[int], salt: str, claimed: Collection[int]) -> tuple[int, int]:
        """The slot whose row gives most of these tokens, and how many; (-1, 0): none. Of equals the one that loses
        least."""
        head = list(tokens[:_HEAD_TOKENS])
        asked: npt.NDArray[np.int32] | None = None
        best, most, lost = -1, 0, 0
        for slot, row in self._rows.items():
            if row.salt != salt or slot in claimed or row.head[: len(head)] != head[: len(row.head)]:
                continue
            if asked is None:
                asked = np.asarray(tokens, np.int32)
            length = min(len(asked), len(row.tokens))
            differ = asked[:length] != row.tokens[:length]
            held = int(differ.argmax()) if differ.any() else length
            beyond = len(row.tokens) - held
            if (held, -beyond) > (most, -lost) and (self._cuts is None or self._cuts(slot, held)):
                best, most, lost = slot, held, beyond
        return best, most
