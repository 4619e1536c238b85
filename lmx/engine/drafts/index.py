"""Where a text's last tokens stood before: a hash chain over its groups of three tokens.

As deflate finds what repeats (RFC 1951, Gailly and Adler's zlib): a table says where each group stood last, and each
place where it stood before that. A token costs one look into the table, whatever the length of the text; memory is
some 130 bytes a token. Pure. Used by ``lookup`` and ``prediction``.
"""

from array import array
from collections.abc import Iterator, Sequence

GROUP = 3
"""Fewer tokens repeat by chance."""
_NOWHERE = -1


class Index:
    """Of a text that only grows."""

    def __init__(self) -> None:
        self.size = 0
        """Tokens that are in it."""
        self._last: dict[tuple[int, ...], int] = {}
        self._before = array("i")
        """For each place after a group: the one before it after the same group."""

    def extend(self, text: Sequence[int], end: int) -> None:
        """Take in the text's tokens up to ``end``; those before ``size`` are known."""
        last, before = self._last, self._before
        for place in range(self.size + 1, end + 1):
            if place < GROUP:
                before.append(_NOWHERE)
                continue
            group = (text[place - 3], text[place - 2], text[place - 1])
            before.append(last.get(group, _NOWHERE))
            last[group] = place
        self.size = max(self.size, end)

    def places(self, tail: Sequence[int]) -> Iterator[int]:
        """The places in the text after its groups that equal the last ``GROUP`` tokens of ``tail``, the last one
        first."""
        if len(tail) < GROUP:
            return
        place = self._last.get((tail[-3], tail[-2], tail[-1]), _NOWHERE)
        while place != _NOWHERE:
            yield place
            place = self._before[place - 1]


def common(text: Sequence[int], place: int, tail: Sequence[int], most: int) -> int:
    """How many tokens before ``place`` in ``text`` equal the last ones of ``tail``; at most ``most``."""
    length = 0
    while length < min(place, len(tail), most) and text[place - 1 - length] == tail[-1 - length]:
        length += 1
    return length
