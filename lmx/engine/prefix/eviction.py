"""What gives way as memory runs short.

First what only a branch in the middle of a conversation would need: window parts and checkpoints that a sequence has
passed. Then leaves, so that what is left of a conversation is its beginning; and with a leaf all before it that no
sequence could go on from any more. Which leaf: the one used longest ago; but the end of a long conversation counts as
used later than it was, and a node that several share (a system prompt) as later still, by so many *turnovers*: how
often as much was evicted as is held. So short side requests do not push out a conversation, and what nobody comes back
to gives way in the end, however much it was shared.

Never in the way of a sequence that runs: those hold rows, not nodes. Pure; only ``ram`` calls it.
"""

import heapq
from collections import OrderedDict
from collections.abc import Collection

from lmx.engine.prefix.chain import BLOCK_TOKENS
from lmx.engine.prefix.nodes import Node, Tree

LONG_TOKENS = 4 * BLOCK_TOKENS
"""A conversation with so many tokens of its own is long."""
LONG_LEAD = 16.0
ANCHOR_LEAD = 20.0
"""In turnovers."""


class Eviction:
    def __init__(self, tree: Tree, window: int, checkpoints: bool) -> None:
        self._tree = tree
        self._window = window
        self._checkpoints = checkpoints
        # Leaves, the first to go first. A node's place is the one that it remembers; it may since have become worth
        # more, or no leaf, which is seen when its turn comes.
        self._heap: list[tuple[float, int, bytes]] = []
        # Nodes with parts that may be of no more use, the first passed first.
        self._passed: OrderedDict[bytes, None] = OrderedDict()
        self.turnover = 0.0
        self.evictions = 0

    # --- what may be ended on -----------------------------------------------------------------------------------------

    def serves(self, node: Node) -> bool:
        """A sequence can go on from its end."""
        if self._checkpoints and node.checkpoint is None:
            return False
        way, least = node, node.end - self._window
        while self._window and way.parent is not None and way.end > least:
            if way.windowless:
                return False
            way = way.parent
        return True

    @staticmethod
    def _is_stop(node: Node) -> bool:
        """Sequences went on from its end, or are likely to."""
        if len(node.children) != 1 or node.conversation is not None:
            return True
        return node.anchor and not node.children[0].anchor

    def _has_stop_in_window(self, node: Node) -> bool:
        """Who goes on at a stop needs the window parts of the last ``window`` tokens before it."""
        covered = 0
        while not self._is_stop(node):
            (node,) = node.children
            if node.conversation is not None:
                return True  # from its middle too
            covered += len(node.tokens)
            if covered >= self._window:
                return False
        return True

    # --- candidates ---------------------------------------------------------------------------------------------------

    def offer(self, node: Node) -> None:
        """A node that is new, has become a leaf, or is worth less than it was."""
        if node.children or node.parent is None:
            return
        rank = self._rank(node)
        if node.queued is None or rank < node.queued:
            self._push(node, rank)

    def _push(self, node: Node, rank: tuple[float, int, bytes]) -> None:
        node.queued = rank
        heapq.heappush(self._heap, rank)
        if len(self._heap) > 64 + 2 * self._tree.blocks:
            self._heap = [other.queued for other in self._tree.nodes.values() if other.queued is not None]
            heapq.heapify(self._heap)

    def _rank(self, node: Node) -> tuple[float, int, bytes]:
        lead = 0.0
        if node.anchor:
            lead = ANCHOR_LEAD
        elif node.conversation is not None and _is_long(node):
            lead = LONG_LEAD
        return node.age + lead, node.used, node.key

    def note_passed(self, last: Node) -> None:
        """A sequence has come to the end of ``last``: the window parts a window behind are of no more use to it."""
        node, least = last, last.end - self._window
        passed: list[Node] = []
        while node.parent is not None and not (node.end <= least and node.noted):
            if node.end <= least:
                passed.append(node)
            node = node.parent
        for node in reversed(passed):
            node.noted = True
            self._passed[node.key] = None

    def note(self, node: Node) -> None:
        """Its end is no stop any more, perhaps."""
        if self._checkpoints:
            self._passed[node.key] = None
        way, least = node, node.end - self._window
        while self._window and way.parent is not None and way.end > least:
            self._passed[way.key] = None
            way = way.parent

    # --- giving way ---------------------------------------------------------------------------------------------------

    def shrink(self, budget_bytes: int, spared: Collection[bytes]) -> None:
        """``spared``: nodes that keep their parts, because they were just found."""
        tree = self._tree
        for _ in range(len(self._passed)):
            if tree.nbytes <= budget_bytes:
                return
            key, _ = self._passed.popitem(last=False)
            if key in spared:
                self._passed[key] = None
            elif (node := tree.nodes.get(key)) is not None:
                self._give_up_parts(node)
        while tree.nbytes > budget_bytes and self._heap:
            rank = heapq.heappop(self._heap)
            node = tree.nodes.get(rank[2])
            if node is None or node.queued != rank:
                continue
            node.queued = None
            if node.children:
                continue
            if (now := self._rank(node)) > rank:
                self._push(node, now)
            else:
                self._evict(node)

    def _give_up_parts(self, node: Node) -> None:
        if node.checkpoint is not None and not self._is_stop(node):
            node.checkpoint = None
        if self._window and node.block is not None and not node.windowless and not self._has_stop_in_window(node):
            node.block.drop_window()
            node.windowless = True
        self._tree.weigh(node)

    def _evict(self, node: Node) -> None:
        while True:
            parent = node.parent
            assert parent is not None
            self.turnover += node.nbytes / max(self._tree.nbytes, 1)
            self.evictions += 1
            self.remove(node)
            if parent.parent is None or parent.children or self.serves(parent):
                return
            node = parent

    def remove(self, node: Node) -> None:
        """A leaf goes; what is left of the conversation is its end now."""
        parent = node.parent
        assert parent is not None
        self._tree.remove(node)
        self._passed.pop(node.key, None)
        if (conversation := node.conversation) is not None:
            node.conversation = None
            place = conversation.ends.index(node)
            if parent.parent is not None and not parent.children and parent.conversation is None:
                conversation.ends[place] = parent
                parent.conversation = conversation
            else:
                del conversation.ends[place]
        if parent.parent is None:
            return
        parent.used, parent.age = max(parent.used, node.used), max(parent.age, node.age)
        if len(parent.children) == 1:
            self.note(parent)
        self.offer(parent)


def _is_long(node: Node) -> bool:
    """It and what comes before it, up to what is shared, are long."""
    tokens = len(node.tokens)
    while tokens < LONG_TOKENS and node.parent is not None and node.parent.parent is not None:
        node = node.parent
        if node.anchor:
            return False
        tokens += len(node.tokens)
    return tokens >= LONG_TOKENS
