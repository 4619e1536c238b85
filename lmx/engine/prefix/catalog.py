"""What is on the disk, in memory: which nodes there are and which of them a prompt begins with.

Pure: no I/O, and cheap enough for the step loop, however many nodes a parent has. Kept up to date by the disk tier's
thread, asked by the engine's, under that tier's lock.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lmx.prefix_disk.block_file import Head
from lmx.prefix_disk.index import Entry
from lmx.protocol import pack_tokens


class Hit(NamedTuple):
    """Nodes that a prompt can go on with, in their order."""

    nodes: tuple[Head, ...]
    parent: bytes
    """Key of the node before the first one, or the root's."""
    start: int
    """Position where the first one begins."""
    tokens: int
    """Position up to which they serve: in the last one perhaps only up to the first different token."""


class Catalog:
    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.nbytes = 0
        """Of the files."""
        # By parent, sorted by tokens: whoever begins with the same ones stands side by side.
        self._children: dict[bytes, list[tuple[bytes, bytes]]] = {}

    def add(self, entry: Entry) -> None:
        """A node, or another file of one."""
        head = entry.head
        self.remove(head.key)
        self.entries[head.key] = entry
        self.nbytes += head.nbytes
        insort(self._children.setdefault(head.parent, []), (head.ids, head.key))

    def remove(self, key: bytes) -> None:
        """If it is there."""
        entry = self.entries.pop(key, None)
        if entry is None:
            return
        self.nbytes -= entry.head.nbytes
        siblings = self._children[entry.head.parent]
        del siblings[bisect_left(siblings, (entry.head.ids, key))]
        if not siblings:
            del self._children[entry.head.parent]

    def find(
        self,
        parent: bytes,
        keys: Iterable[bytes],
        tokens: Sequence[int],
        start: int,
        most: int,
        *,
        checkpoints: bool,
    ) -> Hit:
        """The nodes after ``parent`` that ``tokens[start:most]`` goes on with; ``keys``: of its whole blocks, as far as
        the caller has them. With ``checkpoints`` they end where one was made."""
        nodes: list[Head] = []
        first, position = parent, start
        last, usable = parent, 0  # nodes that end with a checkpoint
        for key in keys:
            entry = self.entries.get(key)
            if entry is None or entry.head.start != position:
                break
            head = entry.head
            end = position + len(head.ids) // 4
            if end > most:  # a part of it serves, which the tails' way finds
                break
            nodes.append(head)
            position, last = end, key
            if head.checkpoint:
                usable = len(nodes)
        rest = pack_tokens(tokens[position : min(most, position + _LONGEST)])
        if checkpoints:
            if (tail := self._longest_whole(last, rest)) is not None:
                nodes.append(tail)
                usable = len(nodes)
            nodes = nodes[:usable]
            position = nodes[-1].start + len(nodes[-1].ids) // 4 if nodes else start
        else:
            tail, shared = self._longest_common(last, rest)
            if tail is not None:
                nodes.append(tail)
                position += shared
        return Hit(tuple(nodes), first, start, position)

    def _longest_common(self, parent: bytes, ids: bytes) -> tuple[Head | None, int]:
        """The child with the most first tokens in common, and how many."""
        siblings = self._children.get(parent, [])
        place = bisect_left(siblings, (ids, b""))
        best, most = None, 0
        for theirs, key in siblings[max(place - 1, 0) : place + 1]:
            if (shared := _shared(theirs, ids)) > most:
                best, most = self.entries[key].head, shared
        return best, most

    def _longest_whole(self, parent: bytes, ids: bytes) -> Head | None:
        """The longest child that is all there in ``ids`` and ends with a checkpoint."""
        return next((head for head in self._prefixes(parent, ids) if head.checkpoint), None)

    def _prefixes(self, parent: bytes, ids: bytes) -> Iterator[Head]:
        """The children whose tokens ``ids`` begins with, the longest first."""
        siblings = self._children.get(parent, [])
        while ids:
            # The one before it in the order is a prefix, or differs where all others that are prefixes have ended.
            place = bisect_right(siblings, (ids, _LAST_KEY)) - 1
            if place < 0:
                return
            theirs, key = siblings[place]
            shared = 4 * _shared(theirs, ids)
            if shared == len(theirs):
                yield self.entries[key].head
                shared -= 4
            ids = ids[:shared]

    def covers(self, parent: bytes, ids: bytes, *, checkpoint: bool, window: bool) -> bool:
        """Whether a node like this adds nothing: another one has its tokens, and more."""
        siblings = self._children.get(parent, [])
        place = bisect_left(siblings, (ids, b""))
        if checkpoint or place == len(siblings) or not siblings[place][0].startswith(ids):
            return False
        return self.entries[siblings[place][1]].head.window or not window

    def covered(self, head: Head) -> list[Head]:
        """Siblings of a node that it makes superfluous: its first tokens, and nothing of their own."""
        return [
            other
            for other in self._prefixes(head.parent, head.ids)
            if other.key != head.key
            and not (other.checkpoint or other.key in self._children)
            and (head.window or not other.window)
        ]

    def shared(self, most_bytes: int, least_uses: int) -> list[Head]:
        """Nodes that so many used, parents before children: those that most used, then the latest, as far as with all
        that stand before them they fit."""
        chosen: dict[bytes, Head] = {}
        left = most_bytes
        for entry in sorted(self.entries.values(), key=lambda entry: (entry.uses, entry.used), reverse=True):
            if entry.uses < least_uses:
                break
            chain = self._up(entry.head, chosen)
            if chain is not None and (needed := sum(head.nbytes for head in chain)) <= left:
                left -= needed
                chosen.update((head.key, head) for head in reversed(chain))
        return list(chosen.values())

    def _up(self, head: Head, chosen: dict[bytes, Head]) -> list[Head] | None:
        """It and what stands before it, up to what is chosen already; None: something is missing."""
        chain: list[Head] = []
        while head.key not in chosen:
            chain.append(head)
            if head.parent == head.root:
                break
            parent = self.entries.get(head.parent)
            if parent is None or parent.head.start >= head.start:
                return None
            head = parent.head
        return chain


_LONGEST = 256
_LAST_KEY = b"\xff" * 17


def _shared(one: bytes, other: bytes) -> int:
    """How many first tokens are the same."""
    size = min(len(one), len(other))
    different = int.from_bytes(one[:size], "little") ^ int.from_bytes(other[:size], "little")
    return ((different & -different).bit_length() - 1) // 32 if different else size // 4
