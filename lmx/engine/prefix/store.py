"""The prefix store as the step loop sees it: where a sequence's first tokens can be had without computing them, how
they get into its row, and what of a row is kept (DESIGN §5).

It joins what knows nothing of each other: rows that live or were left (the back end), blocks in memory (``ram``), and
files (``disk``). All on the engine's thread; nothing is pinned, because what ``find`` found is used before anything
else happens. Only the step loop calls it.
"""

import time
from array import array
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from lmx.engine.backend import Backend, Sequence
from lmx.engine.prefix.chain import BLOCK_TOKENS, Chain, root_key
from lmx.engine.prefix.disk import Disk, Fetch, Node
from lmx.engine.prefix.nodes import Node as RamNode
from lmx.engine.prefix.ram import Found, RamTier
from lmx.engine.prefix.stops import stops
from lmx.protocol import PrefixStats, unpack_tokens

# Fewer are computed rather than copied: a row that starts with tokens of its own is a forward of its own.
LEAST_TOKENS = 64
# To wait for another's prefill pays where that saves most of the prompt, and not only a few tokens.
LEAST_LEADER_TOKENS = BLOCK_TOKENS
LEAST_LEADER_SHARE = 0.5
# Of the memory for blocks, filled from the disk at load.
_WARM_SHARE = 0.5
# At the end the disk has room for another block so much later, if it had none.
_ROOM_S = 0.005
# A disk from which nothing came for so long is not waited for any more: what it has is computed.
SILENT_S = 10.0


class Source(NamedTuple):
    """Where the first tokens of a sequence can be had now."""

    tokens: int = 0
    row: int = -1
    """The live sequence whose row holds them."""
    parked: int = -1
    """The row that an ended one left."""
    found: Found | None = None
    """The blocks in memory."""
    why: str = ""
    """This and the following as in ``ram.Found``."""
    broke_at: int = -1


NOTHING = Source()


@dataclass(slots=True)
class Fetching:
    """A sequence's first tokens on their way from the disk."""

    fetch: Fetch
    read: deque[Node] = field(default_factory=deque)
    """Not in memory's tree yet."""
    heard: float = field(default_factory=time.monotonic)
    """When the last of it came."""


class PrefixStore:
    def __init__(
        self,
        backend: Backend,
        fingerprint: str,
        budget_bytes: int,
        disk: Disk | None = None,
        marks: frozenset[int] = frozenset(),
    ) -> None:
        """``budget_bytes``: most memory for blocks; 0: what the live sequences leave of the KV budget. ``marks``: the
        tokens that stand around messages."""
        self._marks = marks
        facts = backend.facts
        self._backend = backend
        self._fingerprint = fingerprint
        self._budget_bytes = budget_bytes
        self._checkpoints = facts.prefixes == "checkpoints"
        self._ram = RamTier(window=facts.window, checkpoints=self._checkpoints)
        self._chains: dict[int, Chain] = {}
        self._published: dict[int, int] = {}
        self._disk = disk
        self._silent_at = -1
        """How many nodes the disk had given when somebody had waited for it in vain; -1: nobody has."""
        self._read_tokens: dict[int, int] = {}
        """Of sequences that have not started: tokens that came from the disk for them."""
        self._unsaved: deque[tuple[bytes, RamNode]] = deque()
        """What the disk was not offered yet, each with its root's key."""
        self.row_hit_tokens = 0
        """Prompt tokens that sequences took from other rows."""
        self._ram_hit_tokens = self._disk_hit_tokens = 0
        self._restore_s = self._publish_s = 0.0

    def enter(self, sequence: Sequence) -> None:
        """A sequence that may share its KV."""
        if sequence.salt is not None:
            self._chains[sequence.seq] = Chain(
                root_key(self._fingerprint, sequence.salt), sequence.tokens, sequence.session
            )
            self._published[sequence.seq] = 0
            if self._checkpoints:
                sequence.stops = stops(sequence.tokens, self._marks)

    def leave(self, sequence: Sequence) -> None:
        self._chains.pop(sequence.seq, None)
        self._read_tokens.pop(sequence.seq, None)
        self._published.pop(sequence.seq, None)

    def distrust(self, sequence: Sequence) -> None:
        """Its row turned out not finite: what is kept of it, or was taken for it, nobody else is to get."""
        if (chain := self._chains.get(sequence.seq)) is not None:
            self._ram.forget(chain)
        self.leave(sequence)

    def find(self, sequence: Sequence, rows: Iterable[Sequence], claimed: Collection[int] = ()) -> Source:
        """What gives most tokens; of equals, what costs least. ``rows``: those that have one; ``claimed``: left rows
        that others are about to take."""
        chain = self._chains.get(sequence.seq)
        # Log-probabilities come from the prefill itself.
        if chain is None or sequence.prompt_logprobs >= 0:
            return NOTHING
        most = len(sequence.tokens) - 1
        best = NOTHING
        slot, tokens = self._backend.parked(sequence.tokens[:most], sequence.salt or "", claimed)
        if tokens >= LEAST_TOKENS:
            best = Source(tokens, parked=slot)
        if self._backend.facts.forks:
            for row in rows:
                if (theirs := self._chains.get(row.seq)) is not None:
                    tokens = chain.shared(theirs, min(most, row.kv_tokens))
                    if tokens > max(best.tokens, LEAST_TOKENS - 1) and tokens >= row.whole_from:
                        best = Source(tokens, row=row.seq)
        found = self._ram.match(chain, most)
        if found.tokens > max(best.tokens, LEAST_TOKENS - 1):
            best = Source(found.tokens, found=found)
        if best.found is None and best.tokens > found.tokens:
            return best  # a row has more: where the blocks end tells nothing
        return best._replace(why=found.why, broke_at=found.broke_at)

    def leader(self, sequence: Sequence, others: Iterable[Sequence], least: int) -> tuple[int, int]:
        """Another sequence whose prefill will bring so many of this one's first tokens that it pays to wait for them,
        and how many; (-1, 0): none, or it brings little more than the ``least`` that can be had at once."""
        chain = self._chains.get(sequence.seq)
        if chain is None or sequence.prompt_logprobs >= 0 or not self._backend.facts.forks:
            return -1, 0
        most = len(sequence.tokens) - 1
        best = max(least + LEAST_LEADER_TOKENS, int(LEAST_LEADER_SHARE * most)) - 1
        leader = -1
        for other in others:
            if (theirs := self._chains.get(other.seq)) is not None:
                tokens = chain.shared(theirs, min(most, other.prompt_tokens))
                if tokens > best:
                    leader, best = other.seq, tokens
        return (leader, best) if leader >= 0 else (-1, 0)

    def restore(self, sequence: Sequence, source: Source) -> None:
        """Give the sequence a row with the tokens that ``find`` found just now elsewhere than in a live one."""
        since = time.perf_counter()
        tokens = source.tokens
        if source.parked >= 0:
            self._backend.resume(sequence, source.parked, tokens)
            self.row_hit_tokens += tokens
        else:
            assert source.found is not None
            blocks, checkpoint = self._ram.take(source.found, self._chains[sequence.seq])
            if self._disk is not None and source.found.node is not None:
                self._disk.used((node.key, node.uses) for node in source.found.node.path())
            self._backend.copy_in(sequence, blocks, tokens, checkpoint)
            if self._backend.facts.window and not all(block.window_bytes for block in blocks):
                sequence.whole_from = tokens
            read = min(self._read_tokens.pop(sequence.seq, 0), tokens)
            self._disk_hit_tokens += read
            self._ram_hit_tokens += tokens - read
        self._restore_s += time.perf_counter() - since

    # --- the disk -----------------------------------------------------------------------------------------------------

    def fetch(self, sequence: Sequence) -> Fetching | None:
        """Have what the disk has beyond memory read; None: it has nothing worth waiting for."""
        chain = self._chains.get(sequence.seq)
        if self._disk is None or chain is None or sequence.prompt_logprobs >= 0:
            return None
        if self._silent_at >= 0 and self._disk.statistics().read_nodes == self._silent_at:
            return None  # one has waited in vain, and nothing came since
        self._silent_at = -1
        most = len(sequence.tokens) - 1
        have = self._ram.match(chain, most).tokens
        blocks = self._ram.blocks(chain, most)
        keys = (chain.key(block) for block in range(blocks + 1, most // BLOCK_TOKENS + 1))
        start = blocks * BLOCK_TOKENS
        hit = self._disk.find(chain.key(blocks), keys, sequence.tokens, start, most, checkpoints=self._checkpoints)
        if hit.tokens < have + LEAST_TOKENS:
            return None
        self._read_tokens[sequence.seq] = hit.tokens - have
        return Fetching(self._disk.fetch(hit, sequence.tokens))

    def arrived(self, fetching: Fetching, hold_s: float) -> bool:
        """Whether all that could be read in good time is in memory; puts it there, for at most so long at a time."""
        since = time.perf_counter()
        if came := fetching.fetch.take():
            fetching.heard = time.monotonic()
            fetching.read += came
        elif not fetching.read and not fetching.fetch.done and time.monotonic() - fetching.heard > SILENT_S:
            fetching.fetch.cancel()
            self._silent_at = self._disk.statistics().read_nodes if self._disk else -1
            return True
        while fetching.read and time.perf_counter() - since < hold_s:
            self._adopt(fetching.read.popleft())
        return fetching.fetch.done and not fetching.read

    def give_up(self, fetching: Fetching) -> None:
        fetching.fetch.cancel()
        fetching.read.clear()

    def _adopt(self, node: Node) -> None:
        head = node.head
        try:
            block = self._backend.from_bytes(node.block)
            checkpoint = self._backend.from_bytes(node.checkpoint) if node.checkpoint else None
        except ValueError as error:
            print(f"prefixes on disk: {head.key.hex()} is not of this model: {error}", flush=True)
            return
        if not head.window:
            block.drop_window()
        tokens = array("I", unpack_tokens(head.ids))
        if head.parent == head.root:
            self._ram.root(head.root)
        self._ram.adopt(head.parent, head.key, tokens, block, checkpoint, node.uses)

    def warm(self) -> int:
        """Before the engine is ready: the prefixes that most conversations share; how many bytes they hold."""
        if self._disk is not None:
            most = self._budget_bytes or self._backend.facts.kv_budget_bytes
            for node in self._disk.warm(int(_WARM_SHARE * most)):
                self._adopt(node)
        return self._ram.nbytes

    @property
    def unsaved(self) -> bool:
        """``save`` has something to do."""
        while self._unsaved and self._unsaved[0][1].block is None:
            self._unsaved.popleft()  # given up meanwhile
        return self._disk is not None and bool(self._unsaved) and self._disk.has_room(self._unsaved[0][1].nbytes)

    def save(self) -> None:
        """Offer the disk the next block; takes a copy of it."""
        if not self.unsaved:
            return
        assert self._disk is not None
        root, node = self._unsaved.popleft()
        block, checkpoint, parent = node.block, node.checkpoint, node.parent
        assert block is not None
        assert parent is not None
        if len(node.tokens) < BLOCK_TOKENS and checkpoint is None:
            return  # the end of an answer, which the next turn makes longer
        window = not node.windowless
        names = node.key, parent.key, root
        if self._disk.wants(*names, node.tokens, node.nbytes, checkpoint=checkpoint is not None, window=window):
            states = checkpoint.to_bytes() if checkpoint else None
            self._disk.offer(*names, node.start, node.tokens, block.to_bytes(), states, node.uses, window=window)

    def close(self, save_s: float) -> None:
        """At the engine's end: blocks are offered to the disk, and then written, for so long each."""
        if self._disk is not None:
            until = time.monotonic() + save_s
            while self._unsaved and time.monotonic() < until and not self._disk.statistics().off:
                if self.unsaved:
                    self.save()
                else:
                    time.sleep(_ROOM_S)
            self._disk.close(save_s)

    # --- keeping ------------------------------------------------------------------------------------------------------

    def publish(self, sequence: Sequence, *, end: bool = False) -> None:
        """Keep what the steps that were read have added to the sequence's row; at its ``end`` also the part of a block
        that is left."""
        chain = self._chains.get(sequence.seq)
        if chain is None or (not end and self._backend.facts.publishes == "end"):
            return
        tokens = sequence.kv_tokens
        stops = self._checkpoints and (end or tokens in sequence.stops)
        tail = end or stops
        if not tail:
            tokens = tokens // BLOCK_TOKENS * BLOCK_TOKENS
        if not tokens or (tokens <= self._published[sequence.seq] and not stops):
            return
        since = time.perf_counter()
        self._published[sequence.seq] = tokens
        checkpoint = None
        try:
            if stops:
                if (made := self._backend.checkpoint(sequence)) is None:
                    return
                tokens, checkpoint = made
            spans = self._ram.missing(chain, tokens, tail=tail)
            blocks = self._backend.copy_out(sequence, spans) if spans else []
        except ValueError:
            return  # nobody vouches for what the row holds
        new = self._ram.put(chain, tokens, spans, blocks, checkpoint)
        if self._disk is not None:
            self._unsaved += [(chain.key(0), node) for node in new]
            if end and (found := self._ram.match(chain, tokens)).node is not None:
                self._disk.used((node.key, node.uses) for node in found.node.path())
        self._publish_s += time.perf_counter() - since

    def limit(self, budget_bytes: int, kv_used_bytes: int) -> None:
        """Blocks in memory and KV together may take so much from now on (``Backend.limit_kv``); blocks with a budget of
        their own: at most so much as well."""
        self._budget_bytes = min(self._budget_bytes, budget_bytes)
        self._ram.shrink(self._budget_bytes or max(budget_bytes - kv_used_bytes, 0))

    def make_room(self, kv_used_bytes: int, sources: Iterable[Source] = ()) -> None:
        """Before sequences take what they were given of the KV budget: it is theirs first. ``sources``: what was found
        and is to be restored yet; it can be, whatever goes."""
        left = self._backend.facts.kv_budget_bytes - kv_used_bytes
        spare = [source.found for source in sources if source.found is not None]
        self._ram.shrink(self._budget_bytes or max(left, 0), spare)

    def statistics(self) -> PrefixStats:
        ram, disk = self._ram.statistics(), self._disk.statistics() if self._disk else None
        return PrefixStats(
            ram_bytes=self._ram.nbytes,
            ram_blocks=ram.blocks,
            evicted_blocks=ram.evictions,
            disk_bytes=disk.disk_bytes if disk else 0,
            queued_bytes=disk.queued_bytes if disk else 0,
            bad_files=disk.bad_files if disk else 0,
            disk_off=disk.off if disk else "",
            row_hit_tokens=self.row_hit_tokens,
            ram_hit_tokens=self._ram_hit_tokens,
            disk_hit_tokens=self._disk_hit_tokens,
            restore_s=self._restore_s,
            publish_s=self._publish_s,
        )
