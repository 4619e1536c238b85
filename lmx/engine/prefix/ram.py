"""Blocks in memory: a tree of what sequences left, found by content, given up by use (DESIGN §5).

A node holds a block of 256 tokens, or at a sequence's end a part of one; its parent holds what comes before, so a node
is only there while all before it is. Three kinds of records: keys and values (each node's block), the sliding layers'
part of it (needed only in the last window of a prefix), and checkpoints of recurrent states (at a node's end).
``match`` is the planner: the longest prefix that all kinds can serve; it changes nothing. ``nodes`` is the tree,
``eviction`` says what gives way.

Pure: knows no back end and no clock, does no I/O. Called by ``store``.
"""

from array import array
from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple

from lmx.engine.backend import Block
from lmx.engine.prefix.chain import BLOCK_TOKENS, Chain, next_key
from lmx.engine.prefix.eviction import Eviction
from lmx.engine.prefix.nodes import Conversation, Node, Tree

MOST_USERS = 64
"""So many conversations are told apart at a node: enough to say that it is much shared."""
# A prompt goes on with a conversation if it begins with that one's last prompt, but for so many tokens: of the opening
# of an answer, which histories may write in another way.
_REPHRASED = 16
# The same where the client says that it is the same session: some move their last message, or shorten old ones.
_REPHRASED_SHARE = 0.5


class Found(NamedTuple):
    """A prefix that can be restored. Its records are its own, so that it stays so whatever is evicted; but of their
    window parts ``shrink`` must be told."""

    tokens: int = 0
    node: Node | None = None
    """Holds the last of them."""
    blocks: tuple[Block, ...] = ()
    checkpoint: Block | None = None
    why: str = ""
    """What ended it: "tokens", "window" or "checkpoint"; "": the prompt, or what is kept."""
    broke_at: int = -1
    """Where the prompt first differs from what is kept, if that goes on in another way."""


class RamStatistics(NamedTuple):
    blocks: int
    evictions: int


class RamTier:
    def __init__(self, *, window: int = 0, checkpoints: bool = False) -> None:
        """As ``Facts.window``, and whether ``Facts.prefixes`` is "checkpoints"."""
        self._window = window
        self._checkpoints = checkpoints
        self._tree = Tree()
        self._eviction = Eviction(self._tree, window, checkpoints)
        self._ticks = count(1)
        self._turns = count(1)
        self._numbers = count(1)

    @property
    def nbytes(self) -> int:
        return self._tree.nbytes

    # --- the planner --------------------------------------------------------------------------------------------------

    def match(self, chain: Chain, most: int) -> Found:
        """The longest prefix, of at most ``most`` tokens, that can be restored."""
        node, beside, shared = self._way(chain, most)
        if node is None:
            return Found()
        end = node.end + shared
        differs = beside is not None and end < most and shared < len(beside.tokens)
        found = self._restorable(chain, node, beside if shared else None, end)
        why = "tokens" if differs else ""
        if found.tokens < end:
            why = "checkpoint" if self._checkpoints else "window"
        path = found.node.path() if found.node is not None else []
        blocks = tuple(node.block for node in path if node.block is not None)
        return found._replace(blocks=blocks, why=why, broke_at=end if differs else -1)

    def blocks(self, chain: Chain, most: int) -> int:
        """How many whole blocks of its first ``most`` tokens are here."""
        return self._stored(chain, most // BLOCK_TOKENS)

    def _way(self, chain: Chain, most: int) -> tuple[Node | None, Node | None, int]:
        """As far as its first ``most`` tokens are here: the last whole block; what follows that and has most of the
        tokens that come then; how many."""
        node = self._tree.nodes.get(chain.key(self._stored(chain, most // BLOCK_TOKENS)))
        if node is None:
            return None, None, 0
        return node, *node.nearest(self._rest(chain, node, most))

    def _stored(self, chain: Chain, most: int) -> int:
        """How many first blocks of it are here, of at most ``most``. (Nothing is here without all before it.)"""
        nodes = self._tree.nodes
        if chain.key(0) not in nodes:
            return 0
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if chain.key(middle) in nodes:
                low = middle
            else:
                high = middle - 1
        return low

    @staticmethod
    def _rest(chain: Chain, node: Node, most: int) -> "array[int]":
        """The tokens that come after a block of it, a block's at most."""
        return array("I", chain.tokens[node.end : min(node.end + BLOCK_TOKENS, most)])

    def _restorable(self, chain: Chain, node: Node, beside: Node | None, end: int) -> Found:
        """The longest part of the first ``end`` tokens of which every kind of record is here."""
        if not self._checkpoints:
            return self._in_window(end, beside or node)
        way, first = node, True
        while True:
            # Where one node follows it is the next block, which was looked at before.
            if first or len(way.children) > 1:
                for tail in way.within(self._rest(chain, way, end)):
                    if self._eviction.serves(tail):
                        return Found(tail.end, tail, checkpoint=tail.checkpoint)
            if way.parent is None:
                return Found()
            if self._eviction.serves(way):
                return Found(way.end, way, checkpoint=way.checkpoint)
            way, first = way.parent, False

    def _in_window(self, tokens: int, last: Node) -> Found:
        node = last
        while self._window and node.parent is not None and node.end > tokens - self._window:
            if node.windowless:
                tokens, last = node.start, node.parent
            node = node.parent
        return Found(tokens, last) if tokens else Found()

    # --- use ----------------------------------------------------------------------------------------------------------

    def take(self, found: Found, chain: Chain) -> tuple[Sequence[Block], Block | None]:
        """The blocks of a prefix that ``match`` found, and the checkpoint at its end."""
        assert found.node is not None
        self._use(found.node, found.tokens, self._recognise(chain))
        return found.blocks, found.checkpoint

    def missing(self, chain: Chain, end: int, *, tail: bool) -> list[tuple[int, int]]:
        """The spans of [0, end) that ``put`` would keep: blocks that are not here, with ``tail`` the part of one at the
        end; and blocks here whose window part is gone, where the sequence leaves the way they are on."""
        whole = end // BLOCK_TOKENS
        here = self._stored(chain, whole)
        if here < chain.put_tokens // BLOCK_TOKENS and not tail:
            return []  # what it had put is evicted already: to copy it with each step again would help nobody
        spans = [(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS) for block in range(here, whole)]
        if tail and end > whole * BLOCK_TOKENS and (here < whole or not self._has_tail(chain, whole, end)):
            spans.append((whole * BLOCK_TOKENS, end))
        node = self._tree.nodes.get(chain.key(here))
        if self._window and spans and node is not None and node.children:
            lost: list[tuple[int, int]] = []
            least = node.end - self._window
            while node.parent is not None and node.end > least:
                if node.windowless:
                    lost.append((node.start, node.end))
                node = node.parent
            spans = lost[::-1] + spans
        return spans

    def _has_tail(self, chain: Chain, whole: int, end: int) -> bool:
        node = self._tree.nodes.get(chain.key(whole))
        if node is None:
            return False
        rest = self._rest(chain, node, end)
        if self._checkpoints:
            return next_key(node.key, rest) in self._tree.nodes
        return node.nearest(rest)[1] == len(rest)

    def put(
        self,
        chain: Chain,
        end: int,
        spans: Sequence[tuple[int, int]],
        blocks: Sequence[Block],
        checkpoint: Block | None = None,
    ) -> list[Node]:
        """Keep the blocks of the ``spans`` that ``missing`` just named for [0, end), and a checkpoint made there; the
        nodes that are new, or have a checkpoint now."""
        conversation = self._recognise(chain)
        made: list[Node] = []
        for (start, stop), block in zip(spans, blocks, strict=True):
            above = chain.key(start // BLOCK_TOKENS)
            parent = self._tree.nodes[above] if start else self._tree.root(above)
            tokens = array("I", chain.tokens[start:stop])
            whole = stop - start == BLOCK_TOKENS
            key = chain.key(stop // BLOCK_TOKENS) if whole else next_key(above, tokens)
            if (node := self._tree.nodes.get(key)) is not None:
                node.block, node.windowless = block, self._lacks_window(block)
                self._tree.weigh(node)
            else:
                made.append(self._add(Node(key, parent, start, tokens, block, windowless=self._lacks_window(block))))
        chain.put_tokens = max(chain.put_tokens, end)
        last = self._last(chain, end)
        if last is None:
            return made
        if checkpoint is not None and last.checkpoint is None and last.end == end:
            last.checkpoint = checkpoint
            self._tree.weigh(last)
            if last not in made:
                made.append(last)
        self._use(last, end, conversation)
        self._lead(last, chain, conversation, end)
        self._eviction.offer(last)
        if self._window:
            self._eviction.note_passed(last)
        return made

    def adopt(
        self, parent: bytes, key: bytes, tokens: "array[int]", block: Block, checkpoint: Block | None, uses: int
    ) -> Node | None:
        """Keep a node that comes from elsewhere: it, or what holds the same; None: its parent is not here, which is a
        whole block or a ``root``."""
        above = self._tree.nodes.get(parent)
        if above is None:
            return None
        node = self._tree.nodes.get(key)
        if node is None and checkpoint is None:
            beside, shared = above.nearest(tokens)
            node = beside if shared == len(tokens) else None
        if node is None:
            lacks = self._lacks_window(block)
            node = self._add(Node(key, above, above.end, tokens, block, checkpoint, windowless=lacks))
            node.used, node.age = next(self._ticks), self._eviction.turnover
        elif node.checkpoint is None and checkpoint is not None:
            node.checkpoint = checkpoint
            self._tree.weigh(node)
        if node.key == key:
            node.uses = max(node.uses, uses)
        self._eviction.offer(node)
        return node

    def root(self, key: bytes) -> Node:
        """Where nodes from elsewhere can begin."""
        return self._tree.root(key)

    def _lacks_window(self, block: Block) -> bool:
        """Copied when the window had moved on, or kept without."""
        return self._window > 0 and not block.window_bytes

    def _last(self, chain: Chain, end: int) -> Node | None:
        """The node that holds the last of the first ``end`` tokens, or of those that are here."""
        node, beside, shared = self._way(chain, end)
        if node is None:
            return None
        if rest := self._rest(chain, node, end):
            if (exact := self._tree.nodes.get(next_key(node.key, rest))) is not None:
                return exact
            if beside is not None and shared == len(rest):
                return beside
        return node if node.parent is not None else None

    def _add(self, node: Node) -> Node:
        parent = node.parent
        assert parent is not None
        parts = [part for part in parent.within(node.tokens) if part.checkpoint is None]
        self._tree.add(node)
        for part in parts:  # it holds all that they do
            node.users |= part.users
            node.uses = max(node.uses, part.uses)
            node.used, node.age = max(node.used, part.used), max(node.age, part.age)
            if part.conversation is not None and node.conversation is None:
                ends = part.conversation.ends
                ends[ends.index(part)] = node
                node.conversation, part.conversation = part.conversation, None
            self._eviction.remove(part)
        return node

    def _use(self, last: Node, tokens: int, conversation: Conversation) -> None:
        last.used, last.age = next(self._ticks), self._eviction.turnover
        # To begin with a part of a node is not to share it: of a system prompt the nodes before have to tell.
        node = last if last.end <= tokens else last.parent
        while node is not None and node.parent is not None and conversation.number not in node.users:
            if len(node.users) < MOST_USERS:
                node.users.add(conversation.number)
                node.uses += 1
            node = node.parent

    # --- conversations ------------------------------------------------------------------------------------------------

    def _recognise(self, chain: Chain) -> Conversation:
        """Which conversation it goes on with, by what is here of its prompt; else a new one."""
        if chain.conversation is None:
            chain.turn = next(self._turns)
            node, beside, shared = self._way(chain, chain.prompt_tokens)
            known = None if node is None else _below(beside if beside is not None and shared else node)
            if node is not None and known is not None and _goes_on(chain, node.end + shared, known):
                chain.conversation = known
            else:
                chain.conversation = Conversation(next(self._numbers), chain.session)
        return chain.conversation

    def _lead(self, last: Node, chain: Chain, conversation: Conversation, end: int) -> None:
        """What its newest sequence has put is where the conversation goes on; what the one before it left stands for
        nobody any more."""
        ends = conversation.ends
        if chain.turn < conversation.turn:
            return
        if chain.turn > conversation.turn:
            conversation.turn, conversation.prompt_tokens = chain.turn, chain.prompt_tokens
            conversation.session = chain.session or conversation.session
            while ends:
                self._let_go(ends.pop())
        if ends and ends[-1] is not last and not self._stays(ends[-1], conversation):
            self._let_go(ends.pop())
        block = max(chain.prompt_tokens - _REPHRASED, 0) // BLOCK_TOKENS
        if self._window and (block + 1) * BLOCK_TOKENS <= end:
            turn = self._tree.nodes.get(chain.key(block + 1))
            if turn is not None and turn.conversation is not conversation:
                self._claim(turn, conversation)
        self._claim(last, conversation)
        for node in ends[:-1]:  # they outlive the end: with an answer less is lost than with its question
            node.used, node.age = next(self._ticks), self._eviction.turnover

    def _stays(self, node: Node, conversation: Conversation) -> bool:
        """Where the newest prompt may be left again, if its answer comes back in other words."""
        if self._checkpoints:
            return node.checkpoint is not None
        return self._window > 0 and node.start <= max(conversation.prompt_tokens - _REPHRASED, 0) < node.end

    @staticmethod
    def _claim(node: Node, conversation: Conversation) -> None:
        if node.conversation is not None:
            node.conversation.ends.remove(node)
        node.conversation = conversation
        conversation.ends.append(node)

    def _let_go(self, node: Node) -> None:
        node.conversation = None
        self._eviction.note(node)
        self._eviction.offer(node)

    # --- giving way ---------------------------------------------------------------------------------------------------

    def shrink(self, budget_bytes: int, spare: Iterable[Found] = ()) -> int:
        """Give up nodes until they hold at most so many bytes; the bytes given back. ``spare``: what was found and is
        to be taken yet."""
        before = self.nbytes
        if before <= budget_bytes:
            return 0
        spared = set()
        for found in spare:
            node = found.node
            while node is not None and node.parent is not None and node.end > found.tokens - self._window:
                spared.add(node.key)
                node = node.parent
        self._eviction.shrink(budget_bytes, spared)
        return before - self.nbytes

    def statistics(self) -> RamStatistics:
        return RamStatistics(self._tree.blocks, self._eviction.evictions)


def _below(node: Node) -> Conversation | None:
    """Whose end it is, or what alone follows it."""
    while node.conversation is None and len(node.children) == 1:
        (node,) = node.children
    return node.conversation


def _goes_on(chain: Chain, shared: int, conversation: Conversation) -> bool:
    """Whether a sequence that has so many first tokens in common with a conversation is its next."""
    if shared < _REPHRASED_SHARE * conversation.prompt_tokens:
        return False
    if chain.session and conversation.session:
        return chain.session == conversation.session
    return shared >= conversation.prompt_tokens - _REPHRASED
