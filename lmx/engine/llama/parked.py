"""Rows that ended, in slots that nobody needed since: what they hold, and which goes first. Pure bookkeeping; called by
``lmx.engine.llama.backend``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The loop asks for the same few prompts before each step.
_MOST_ASKED = 64


@dataclass(frozen=True, slots=True)
class ParkedRow:
    slot: int
    tokens: list[int]
    salt: str


class Parked:
    def __init__(self, cuts: Callable[[int, int], bool] | None) -> None:
        """``cuts``: whether the slot can go back to so many first tokens; None: always."""
        self._cuts = cuts
        self._rows: dict[int, ParkedRow] = {}
        """The one used longest ago first."""
        self._asked: dict[tuple[int, str], tuple[Sequence[int], int, int]] = {}
        """Answers of ``longest`` since the rows changed: the tokens, how many they were then, the answer."""
        self.tokens = 0
        """All rows together."""

    def __contains__(self, slot: int) -> bool:
        return slot in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, slot: int) -> ParkedRow:
        return self._rows[slot]

    def put(self, row: ParkedRow) -> None:
        self._rows[row.slot] = row
        self.tokens += len(row.tokens)
        self._asked.clear()

    def remove(self, slot: int) -> ParkedRow:
        row = self._rows.pop(slot)
        self.tokens -= len(row.tokens)
        self._asked.clear()
        return row

    @property
    def oldest(self) -> int:
        """The slot of the row used longest ago."""
        return next(iter(self._rows))

    def longest(self, tokens: Sequence[int], salt: str) -> int:
        """How many of these tokens can be had from one of the rows."""
        if not self._rows:
            return 0
        key = (id(tokens), salt)
        known = self._asked.get(key)
        if known is None or known[0] is not tokens or known[1] != len(tokens):
            if len(self._asked) >= _MOST_ASKED:
                self._asked.clear()
            most = max((self._held(row, tokens) for row in self._rows.values() if row.salt == salt), default=0)
            known = self._asked[key] = (tokens, len(tokens), most)
        return known[2]

    def find(self, tokens: list[int], salt: str) -> ParkedRow:
        """The row to go on with after all these tokens: of those that can, the one that loses least. Raises
        LookupError."""
        rows = [row for row in self._rows.values() if row.salt == salt and _common(row.tokens, tokens) == len(tokens)]
        rows = [row for row in rows if self._cuts is None or self._cuts(row.slot, len(tokens))]
        if not rows:
            raise LookupError(f"no parked row holds these {len(tokens)} tokens")
        return min(rows, key=lambda row: len(row.tokens))

    def _held(self, row: ParkedRow, tokens: Sequence[int]) -> int:
        common = _common(row.tokens, tokens)
        if self._cuts is None:
            return common
        # A prefill has at least one token, and where a row may be of no use with fewer, these are too many.
        common = min(common, len(tokens) - 1)
        return common if common > 0 and self._cuts(row.slot, common) else 0


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are equal."""
    start, size, most = 0, 64, min(len(one), len(other))
    while start < most and size:
        end = min(start + size, most)
        if one[start:end] == other[start:end]:
            start, size = end, 2 * size
        else:
            most, size = end, (end - start) // 2
    return start
