"""Rows that ended, in slots that nobody needed since: what they hold, and which goes first. Pure bookkeeping; called by
``lmx.engine.llama.backend``."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Most rows that have nothing to do with a prompt differ this early; the prompt is made an array for the others.
_HEAD_TOKENS = 16


@dataclass(slots=True, eq=False)
class ParkedRow:
    slot: int
    head: list[int]
    tokens: npt.NDArray[np.int32]
    salt: str
    since: int
    """``Parked.computed_tokens`` when it was last used."""


class Parked:
    def __init__(self, *, cuts: bool) -> None:
        """``cuts``: rows can go back to any of their tokens, otherwise only on from their last."""
        self._cuts = cuts
        self._ids = itertools.count()
        self._rows: dict[int, ParkedRow] = {}
        """The one used longest ago first."""
        self._slots: dict[int, ParkedRow] = {}
        self.tokens = 0
        """All rows together."""
        self.computed_tokens = 0
        """By others, ever; the back end counts them."""

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> ParkedRow:
        return self._rows[row]

    @property
    def oldest(self) -> int:
        """The row used longest ago."""
        return next(iter(self._rows))

    def length(self, slot: int) -> int:
        """Tokens of the slot's row; 0: there is none."""
        return len(self._slots[slot].tokens) if slot in self._slots else 0

    def put(self, slot: int, tokens: list[int], salt: str) -> None:
        row = ParkedRow(slot, tokens[:_HEAD_TOKENS], np.array(tokens, np.int32), salt, self.computed_tokens)
        self._rows[next(self._ids)] = self._slots[slot] = row
        self.tokens += len(tokens)

    def remove(self, row: int) -> int:
        """The slot that it had."""
        removed = self._rows.pop(row)
        del self._slots[removed.slot]
        self.tokens -= len(removed.tokens)
        return removed.slot

    def use(self, row: int) -> None:
        """It is the last to go, for now."""
        self._rows[row] = used = self._rows.pop(row)
        used.since = self.computed_tokens

    def move(self, slot: int, target: int) -> None:
        """What a slot held is now in an empty one."""
        self._slots[target] = moved = self._slots.pop(slot)
        moved.slot = target

    def longest(self, tokens: Sequence[int], salt: str, claimed: Collection[int]) -> tuple[int, int]:
        """The row that gives most of these tokens, and how many; (-1, 0): none. Of equals the one that loses least."""
        head = list(tokens[:_HEAD_TOKENS])
        asked: npt.NDArray[np.int32] | None = None
        best, most, lost = -1, 0, 0
        for number, row in self._rows.items():
            if row.salt != salt or number in claimed or row.head[: len(head)] != head[: len(row.head)]:
                continue
            if asked is None:
                asked = np.asarray(tokens, np.int32)
            length = min(len(asked), len(row.tokens))
            differ = asked[:length] != row.tokens[:length]
            held = int(differ.argmax()) if differ.any() else length
            beyond = len(row.tokens) - held
            if (held, -beyond) > (most, -lost) and (self._cuts or not beyond):
                best, most, lost = number, held, beyond
        return best, most
