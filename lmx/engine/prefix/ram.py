"""Blocks in memory: a tree of what sequences left, found by content, given up by use (DESIGN §5).

A node holds a block of 256 tokens, or at a sequence's end a part of one (a *tail*); its parent holds what comes before,
so a node is only there while all before it is. Three kinds of records: keys and values (each node's block), the sliding
layers' part of it (needed only in the last window of a prefix), and checkpoints of recurrent states (at a node's end).
``match`` is the planner: the longest prefix that all kinds can serve; it changes nothing.

What gives way first, as memory runs short: window parts that only a branch in the middle of a conversation would need;
then leaves, the least recently used of the lowest class: 0 nobody's newest, or short; 1 the newest of a long
conversation, which side requests must not push out; 2 anchors, which several sessions used (system prompts). Never in
the way of a sequence that runs: those hold rows, not nodes.

Pure: knows no back end and no clock, does no I/O. Called by ``store``.
"""

import heapq
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from lmx.engine.backend import Block
from lmx.engine.prefix.chain import BLOCK_TOKENS, Chain, common, next_key

# A conversation this long is not pushed out by what was used once and is short.
LONG_TOKENS = 4 * BLOCK_TOKENS
# Of the nodes that follow one and begin with the same token, the newest so many are compared with a prompt that ends,
# or goes another way, inside a block.
_COMPARED = 64
# A prompt goes on with a conversation if it begins with that one's last prompt, but for so many tokens: of the opening
# of an answer, which histories may write in another way.
_REPHRASED = 16


@dataclass(eq=False, slots=True)
class Node:
    key: bytes
    parent: "Node | None"
    start: int
    """Position of its first token."""
    tokens: "array[int]"
    block: Block | None = None
    checkpoint: Block | None = None
    children: "dict[bytes, Node]" = field(default_factory=dict)
    by_first: "dict[int, dict[bytes, Node]]" = field(default_factory=dict)
    """The same by their first token."""
    windowless: bool = False
    """Its block's window part is gone."""
    used: int = 0
    """When, on the tree's count."""
    sessions: set[str] = field(default_factory=set)
    """Two of those that used it."""
    uses: int = 0
    """By how many sessions, one after another."""
    session: str = ""
    """Whose newest leaf it is; "": nobody's."""
    prompt_tokens: int = 0
    """Of the sequence that made it the newest."""
    nbytes: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def anchor(self) -> bool:
        return len(self.sessions) > 1

    def path(self) -> "list[Node]":
        """From the first block to this one."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


class Found(NamedTuple):
    """A prefix that can be restored."""

    tokens: int = 0
    node: Node | None = None
    """Holds the last of them."""
    why: str = ""
    """What ended it: "tokens", "window" or "checkpoint"; "": the prompt, or what is kept."""
    broke_at: int = -1
    """For "tokens": where the prompt first differs from what is kept of another way to go on."""


class RamStatistics(NamedTuple):
    blocks: int
    evictions: int


class RamTier:
    def __init__(self, *, window: int = 0, checkpoints: bool = False) -> None:
        """As ``Facts.window``, and whether ``Facts.prefixes`` is "checkpoints"."""
        self._window = window
        self._checkpoints = checkpoints
        self._nodes: dict[bytes, Node] = {}
        """Roots too."""
        self._heap: list[tuple[int, int, int, Node]] = []
        """Leaves by class and use; entries that are no longer true are passed over."""
        self._out_of_window: deque[Node] = deque()
        self._newest: dict[str, Node] = {}
        self._ticks = count(1)
        self._order = count()
        self._names = count()
        self._evictions = 0
        self._blocks = 0
        self.nbytes = 0

    # --- the planner --------------------------------------------------------------------------------------------------

    def match(self, chain: Chain, most: int) -> Found:
        """The longest prefix, of at most ``most`` tokens, that can be restored."""
        blocks = self._stored(chain, most // BLOCK_TOKENS)
        node = self._nodes.get(chain.key(blocks))
        if node is None:
            return Found()
        rest = array("I", chain.tokens[node.end : min(node.end + BLOCK_TOKENS, most)])
        beside, shared = self._longest(node, rest)
        why, broke_at = "", -1
        if beside is not None and shared < min(len(rest), len(beside.tokens)):
            why, broke_at = "tokens", node.end + shared
        if self._checkpoints:
            found = self._at_checkpoint(chain, node, most)
            missing = "checkpoint" if found.tokens < node.end + shared and found.tokens < most else why
            return found._replace(why=missing, broke_at=broke_at)
        found = Found(node.end + shared, beside) if beside is not None and shared else Found(node.end, node)
        if self._window:
            whole, found = found, self._in_window(found)
            if found.tokens < whole.tokens:
                why = "window"
        return found._replace(why=why, broke_at=broke_at)

    def blocks(self, chain: Chain, most: int) -> int:
        """How many whole blocks of its first ``most`` tokens are here."""
        return self._stored(chain, most // BLOCK_TOKENS)

    def _stored(self, chain: Chain, most: int) -> int:
        """How many first blocks of it are here, of at most ``most``. (Nothing is here without all before it.)"""
        low, high = 0, most
        if chain.key(0) not in self._nodes:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            if chain.key(middle) in self._nodes:
                low = middle
            else:
                high = middle - 1
        return low

    def _longest(self, node: Node, rest: "array[int]") -> tuple[Node | None, int]:
        """Of those that follow ``node`` the one that has most of the tokens ``rest`` first, and how many."""
        if not rest or not node.children:
            return None, 0
        alike = node.by_first.get(rest[0])
        if not alike:
            return next(reversed(node.children.values())), 0
        best, most = None, -1
        for _, child in zip(range(_COMPARED), reversed(alike.values()), strict=False):
            shared = common(child.tokens, rest)
            if shared > most:
                best, most = child, shared
        return best, most

    def _at_checkpoint(self, chain: Chain, node: Node, most: int) -> Found:
        """The last checkpoint on the way: at a block's end, or in a tail beside the next block."""
        way: Node | None = node
        while way is not None:
            rest = array("I", chain.tokens[way.end : min(way.end + BLOCK_TOKENS, most)])
            tails = way.by_first.get(rest[0], {}).values() if rest else ()
            fitting = [tail for tail in tails if tail.checkpoint and tail.tokens == rest[: len(tail.tokens)]]
            if fitting:
                best = max(fitting, key=lambda tail: len(tail.tokens))
                return Found(best.end, best)
            if way.checkpoint is not None:
                return Found(way.end, way)
            way = way.parent
        return Found()

    def _in_window(self, found: Found) -> Found:
        """The longest part of it that has the sliding layers' keys and values of its last window."""
        tokens, node = found.tokens, found.node
        last = node
        while node is not None and node.parent is not None and node.end > tokens - self._window:
            if node.windowless:
                tokens, last = node.start, node.parent
            node = node.parent
        return Found(tokens, last if last is not None and last.parent is not None else None)

    # --- use ----------------------------------------------------------------------------------------------------------

    def take(self, found: Found, chain: Chain) -> tuple[list[Block], Block | None]:
        """The blocks of a prefix that ``match`` just found, and the checkpoint at its end. The sequence goes on with
        the conversation that left them, if it names none of its own."""
        assert found.node is not None
        path = found.node.path()
        if not chain.session:
            leaf = next((node for node in self._below(found.node) if node.session), None)
            if leaf is not None and found.tokens >= leaf.prompt_tokens - _REPHRASED:
                chain.session = leaf.session
        self._use(path, chain)
        blocks = [node.block for node in path if node.block is not None]
        return blocks, found.node.checkpoint if self._checkpoints else None

    @staticmethod
    def _below(node: Node) -> Iterator[Node]:
        """It, and what alone follows it."""
        while True:
            yield node
            if len(node.children) != 1:
                return
            (node,) = node.children.values()

    def missing(self, chain: Chain, end: int, *, tail: bool) -> list[tuple[int, int]]:
        """The spans of [0, end) that ``put`` would keep: blocks that are not here, with ``tail`` the part of one at the
        end; and blocks here whose window part is gone, where the sequence leaves the way they are on."""
        whole = end // BLOCK_TOKENS
        here = self._stored(chain, whole)
        spans = [(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS) for block in range(here, whole)]
        if tail and end > whole * BLOCK_TOKENS and not self._has_tail(chain, whole, end):
            spans.append((whole * BLOCK_TOKENS, end))
        if self._window and spans and (node := self._nodes.get(chain.key(here))) is not None and node.children:
            lost: list[tuple[int, int]] = []
            least = node.end - self._window
            while node is not None and node.parent is not None and node.end > least:
                if node.windowless:
                    lost.append((node.start, node.end))
                node = node.parent
            spans = lost[::-1] + spans
        return spans

    def _has_tail(self, chain: Chain, whole: int, end: int) -> bool:
        node = self._nodes.get(chain.key(whole))
        if node is None:
            return False
        rest = array("I", chain.tokens[node.end : end])
        if self._checkpoints:
            return next_key(node.key, rest) in node.children
        return self._longest(node, rest)[1] == len(rest)

    def put(
        self,
        chain: Chain,
        end: int,
        spans: Sequence[tuple[int, int]],
        blocks: Sequence[Block],
        checkpoint: Block | None = None,
    ) -> list[Node]:
        """Keep the blocks of the ``spans`` that ``missing`` just named for [0, end), and a checkpoint made there; the
        new nodes."""
        made: list[Node] = []
        for (start, stop), block in zip(spans, blocks, strict=True):
            parent = self._node(chain, start // BLOCK_TOKENS)
            tokens = array("I", chain.tokens[start:stop])
            whole = stop - start == BLOCK_TOKENS
            key = chain.key(stop // BLOCK_TOKENS) if whole else next_key(parent.key, tokens)
            if (node := self._nodes.get(key)) is not None:
                node.block, node.windowless = block, False
                self._weigh(node)
                continue
            made.append(self._add(Node(key, parent, start, tokens, block)))
        last = self._last(chain, end)
        if last is None or last.parent is None:
            return made
        if checkpoint is not None:
            last.checkpoint = checkpoint
            self._weigh(last)
        chain.session = chain.session or f"#{next(self._names)}"
        self._use(last.path(), chain)
        self._lead(last, chain)
        if self._window:
            self._pass_windows(last)
        return made

    def adopt(
        self,
        parent: bytes,
        root: bytes,
        key: bytes,
        tokens: "array[int]",
        block: Block,
        checkpoint: Block | None,
        uses: int,
    ) -> Node | None:
        """Keep a node that comes from elsewhere. None: its parent is not here."""
        if (known := self._nodes.get(key)) is not None:
            return known
        if parent == root:
            self.root(root)
        if (above := self._nodes.get(parent)) is None:
            return None
        node = self._add(Node(key, above, above.end, tokens, block, checkpoint))
        node.uses, node.used = uses, next(self._ticks)
        if uses > 1:
            node.sessions = {"#", "##"}
        self._offer(node)
        return node

    def root(self, key: bytes) -> Node:
        return self._nodes.setdefault(key, Node(key, None, 0, array("I")))

    def _node(self, chain: Chain, blocks: int) -> Node:
        return self._nodes[chain.key(blocks)] if blocks else self.root(chain.key(0))

    def _last(self, chain: Chain, end: int) -> Node | None:
        """The node that holds the last of the first ``end`` tokens."""
        node = self._nodes.get(chain.key(self._stored(chain, end // BLOCK_TOKENS)))
        if node is not None and (rest := array("I", chain.tokens[node.end : end])):
            exact = node.children.get(next_key(node.key, rest))
            beside, shared = (exact, len(rest)) if exact else self._longest(node, rest)
            if beside is not None and shared == len(rest):
                return beside
        return node

    def _add(self, node: Node) -> Node:
        parent = node.parent
        assert parent is not None
        self._nodes[node.key] = parent.children[node.key] = node
        alike = parent.by_first.setdefault(node.tokens[0], {})
        # A part of it that is kept by itself is of no more use.
        for other in [other for other in alike.values() if len(other.tokens) < len(node.tokens)]:
            if other.checkpoint is None and not other.children and node.tokens[: len(other.tokens)] == other.tokens:
                node.sessions |= other.sessions
                self._remove(other)
        parent.by_first.setdefault(node.tokens[0], {})[node.key] = node
        self._blocks += 1
        self._weigh(node)
        return node

    def _weigh(self, node: Node) -> None:
        nbytes = sum(record.nbytes for record in (node.block, node.checkpoint) if record is not None)
        self.nbytes += nbytes - node.nbytes
        node.nbytes = nbytes

    def _use(self, path: Sequence[Node], chain: Chain) -> None:
        tick = next(self._ticks)
        for node in path:
            node.used = tick
            if chain.session and chain.session not in node.sessions:
                node.uses += 1
                if len(node.sessions) < 2:
                    node.sessions.add(chain.session)
        if path:
            self._offer(path[-1])

    def _lead(self, node: Node, chain: Chain) -> None:
        """It is the session's newest; the one before it stands for nobody any more."""
        session = chain.session
        node.prompt_tokens = chain.prompt_tokens
        before = self._newest.get(session)
        if before is not None and before is not node:
            before.session = ""
            self._offer(before)
        if node.session and node.session != session:
            self._newest.pop(node.session, None)
        node.session = session
        self._newest[session] = node
        self._offer(node)

    def _pass_windows(self, last: Node) -> None:
        """Note the nodes that lie a window behind; mostly those before them were noted already."""
        node, new = last.parent, True
        while node is not None and node.parent is not None and new:
            if node.end <= last.end - self._window:
                new = not node.windowless and not (self._out_of_window and self._out_of_window[-1] is node)
                if new:
                    self._out_of_window.append(node)
                new = new and node.end > last.end - self._window - 2 * BLOCK_TOKENS
            node = node.parent

    # --- giving way ---------------------------------------------------------------------------------------------------

    def shrink(self, budget_bytes: int) -> int:
        """Give up nodes until they hold at most so many bytes; the bytes given back."""
        before = self.nbytes
        while self.nbytes > budget_bytes and self._out_of_window:
            node = self._out_of_window.popleft()
            if node.block is not None and not node.windowless and len(node.children) == 1 and not node.anchor:
                node.block.drop_window()
                node.windowless = True
                self._weigh(node)
        while self.nbytes > budget_bytes and self._heap:
            kind, used, _, node = heapq.heappop(self._heap)
            if self._nodes.get(node.key) is node and not node.children and (kind, used) == self._rank(node):
                self._evictions += 1
                self._remove(node)
        return before - self.nbytes

    def _rank(self, node: Node) -> tuple[int, int]:
        kind = 2 if node.anchor else int(bool(node.session) and node.end >= LONG_TOKENS)
        return kind, node.used

    def _offer(self, node: Node) -> None:
        """A leaf may go; what it is worth may have changed."""
        if not node.children and node.parent is not None:
            heapq.heappush(self._heap, (*self._rank(node), next(self._order), node))
            if len(self._heap) > 64 + 4 * self._blocks:
                true = [(*self._rank(n), next(self._order), n) for n in self._nodes.values() if n.parent]
                self._heap = [entry for entry in true if not entry[3].children]
                heapq.heapify(self._heap)

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        assert not node.children
        del self._nodes[node.key], parent.children[node.key]
        alike = parent.by_first[node.tokens[0]]
        del alike[node.key]
        if not alike:
            del parent.by_first[node.tokens[0]]
        self.nbytes -= node.nbytes
        self._blocks -= 1
        node.block = node.checkpoint = None
        if node.session and self._newest.get(node.session) is node:
            del self._newest[node.session]
            # What is left of the conversation is its newest now.
            if parent.parent is not None and not parent.session and not parent.children:
                parent.session = node.session
                self._newest[node.session] = parent
        if parent.parent is None and not parent.children:
            del self._nodes[parent.key]
        else:
            self._offer(parent)

    def statistics(self) -> RamStatistics:
        return RamStatistics(self._blocks, self._evictions)
