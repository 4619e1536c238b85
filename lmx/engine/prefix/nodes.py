"""The tree of what is in memory: nodes by their keys, children by their tokens, bytes kept as they come and go.

It keeps order and decides nothing: what stays is ``eviction``'s to say, what is looked for and added ``ram``'s. Pure.
"""

from array import array
from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from lmx.engine.backend import Block
from lmx.engine.prefix.chain import common


@dataclass(eq=False, slots=True)
class Conversation:
    """Sequences of which each goes on with what the one before left."""

    number: int
    session: str
    """What its clients called it last; "": nothing."""
    turn: int = 0
    """The newest of its sequences: ``Chain.turn``."""
    prompt_tokens: int = 0
    """Of that one."""
    ends: "list[Node]" = field(default_factory=list)
    """Where its next sequence may go on: how far the newest has come, last; before that, what is left if its answer
    comes back in other words: the checkpoints in its prompt, or the node where that ended."""


@dataclass(eq=False, slots=True)
class Node:
    """A block of 256 tokens, or at a sequence's end a part of one (a *tail*, which nothing follows); the root of a tree
    has no tokens."""

    key: bytes
    parent: "Node | None"
    start: int
    """Position of its first token."""
    tokens: "array[int]"
    block: Block | None = None
    checkpoint: Block | None = None
    children: "list[Node]" = field(default_factory=list)
    """Sorted by their tokens, so that of thousands the most alike stand beside the place where a prompt would."""
    windowless: bool = False
    """Its block's window part is gone."""
    users: set[int] = field(default_factory=set)
    """Conversations that used it: the first few."""
    uses: int = 0
    """By how many conversations, those before a restart too; few are counted (``ram.MOST_USERS``)."""
    used: int = 0
    """When it was used last, in uses; of what follows it, where that is gone."""
    age: float = 0.0
    """The same in turnovers (``eviction``)."""
    conversation: Conversation | None = None
    """Of whose ends it is one."""
    noted: bool = False
    """Was considered for giving up its window part."""
    queued: tuple[float, int, bytes] | None = None
    """Its place among those who may go."""
    nbytes: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def anchor(self) -> bool:
        """Several conversations share it: a system prompt."""
        return self.uses > 1

    def path(self) -> "list[Node]":
        """From the first block to this one."""
        found: list[Node] = []
        node: Node = self
        while node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    def nearest(self, rest: "array[int]") -> "tuple[Node | None, int]":
        """Of its children the one that begins with most of ``rest``, and with how much."""
        best, most = None, -1
        if rest:
            place = bisect_right(self.children, rest, key=_tokens)
            for child in self.children[max(place - 1, 0) : place + 1]:
                if (shared := common(child.tokens, rest)) > most:
                    best, most = child, shared
        return best, max(most, 0)

    def within(self, rest: "array[int]") -> "Iterator[Node]":
        """Its children that ``rest`` begins with, the longest first."""
        while rest:
            place = bisect_right(self.children, rest, key=_tokens)
            if not place:
                return
            child = self.children[place - 1]
            shared = common(child.tokens, rest)
            if shared == len(child.tokens):
                yield child
                shared -= 1
            rest = rest[:shared]  # whatever else fits stands before this


def _tokens(node: Node) -> "array[int]":
    return node.tokens


class Tree:
    def __init__(self) -> None:
        self.nodes: dict[bytes, Node] = {}
        """Roots too. No node is here without its parent."""
        self.blocks = 0
        self.nbytes = 0

    def root(self, key: bytes) -> Node:
        return self.nodes.setdefault(key, Node(key, None, 0, array("I")))

    def holds(self, node: Node) -> bool:
        return self.nodes.get(node.key) is node

    def add(self, node: Node) -> None:
        assert node.parent is not None
        self.nodes[node.key] = node
        insort(node.parent.children, node, key=_tokens)
        self.blocks += 1
        self.weigh(node)

    def weigh(self, node: Node) -> None:
        """Its records have changed."""
        nbytes = sum(record.nbytes for record in (node.block, node.checkpoint) if record is not None)
        self.nbytes += nbytes - node.nbytes
        node.nbytes = nbytes

    def remove(self, node: Node) -> None:
        """A leaf, and its records: others may hold the node longer."""
        parent = node.parent
        assert parent is not None
        assert not node.children
        del self.nodes[node.key]
        place = bisect_right(parent.children, node.tokens, key=_tokens) - 1
        assert parent.children[place] is node
        del parent.children[place]
        self.nbytes -= node.nbytes
        self.blocks -= 1
        node.block = node.checkpoint = None
        if parent.parent is None and not parent.children:
            del self.nodes[parent.key]
