"""The prefix store as the step loop sees it: where a sequence's first tokens can be had without computing them, how
they get into its row, and what of a row is kept (DESIGN §5).

It joins what knows nothing of each other: rows that live or were left (the back end), blocks in memory (``ram``), and
files (``disk``). All on the engine's thread; nothing is pinned, because what ``find`` found is used before anything
else happens. Only the step loop calls it.
"""

import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

from lmx.engine.backend import Backend, Sequence
from lmx.engine.prefix.chain import BLOCK_TOKENS, Chain, root_key
from lmx.engine.prefix.ram import Found, RamTier
from lmx.protocol import PrefixStats

# Fewer are computed rather than copied: a row that starts with tokens of its own is a forward of its own.
LEAST_TOKENS = 64
# To wait for another's prefill pays where that saves most of the prompt, and not only a few tokens.
LEAST_LEADER_TOKENS = BLOCK_TOKENS
LEAST_LEADER_SHARE = 0.5


class Source(NamedTuple):
    """Where the first tokens of a sequence can be had now."""

    tokens: int = 0
    row: int = -1
    """The live sequence whose row holds them."""
    parked: int = -1
    """The row that an ended one left."""
    found: Found | None = None
    """The blocks in memory."""


NOTHING = Source()


class PrefixStore:
    def __init__(self, backend: Backend, fingerprint: str, budget_bytes: int) -> None:
        """``budget_bytes``: most memory for blocks; 0: what the live sequences leave of the KV budget."""
        facts = backend.facts
        self._backend = backend
        self._fingerprint = fingerprint
        self._budget_bytes = budget_bytes
        self._checkpoints = facts.prefixes == "checkpoints"
        self._ram = RamTier(window=facts.window, checkpoints=self._checkpoints)
        self._roots: dict[str, bytes] = {}
        self._chains: dict[int, Chain] = {}
        self._published: dict[int, int] = {}
        self._row_hit_tokens = self._ram_hit_tokens = 0
        self._restore_s = self._publish_s = 0.0

    def enter(self, sequence: Sequence) -> None:
        """A sequence that may share its KV."""
        if sequence.salt is not None:
            self._chains[sequence.seq] = Chain(
                root_key(self._fingerprint, sequence.salt), sequence.tokens, sequence.session
            )
            self._published[sequence.seq] = 0

    def leave(self, sequence: Sequence) -> None:
        self._chains.pop(sequence.seq, None)
        self._published.pop(sequence.seq, None)

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
                    if tokens > max(best.tokens, LEAST_TOKENS - 1):
                        best = Source(tokens, row=row.seq)
        found = self._ram.match(chain, most)
        if found.tokens > max(best.tokens, LEAST_TOKENS - 1):
            best = Source(found.tokens, found=found)
        return best

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
        else:
            assert source.found is not None
            blocks, checkpoint = self._ram.take(source.found, self._chains[sequence.seq])
            self._backend.copy_in(sequence, blocks, tokens, checkpoint)
            self._ram_hit_tokens += tokens
        self._restore_s += time.perf_counter() - since

    def publish(self, sequence: Sequence, *, end: bool = False) -> None:
        """Keep what the steps that were read have added to the sequence's row; at its ``end`` also the part of a block
        that is left."""
        chain = self._chains.get(sequence.seq)
        if chain is None or (not end and self._backend.facts.publishes == "end"):
            return
        tokens = sequence.kv_tokens
        tail = end or (self._checkpoints and tokens in sequence.stops)
        if not tail:
            tokens = tokens // BLOCK_TOKENS * BLOCK_TOKENS
        if tokens <= self._published[sequence.seq]:
            return
        since = time.perf_counter()
        self._published[sequence.seq] = tokens
        checkpoint = None
        try:
            if tail and self._checkpoints:
                if (made := self._backend.checkpoint(sequence)) is None:
                    return
                tokens, checkpoint = made
            spans = self._ram.missing(chain, tokens, tail=tail)
            blocks = self._backend.copy_out(sequence, spans) if spans else []
        except ValueError:
            return  # nobody vouches for what the row holds
        self._ram.put(chain, tokens, spans, blocks, checkpoint)
        self._publish_s += time.perf_counter() - since

    def make_room(self, kv_used_bytes: int, sources: Iterable[Source]) -> None:
        """Before sequences take what they were given of the KV budget: it is theirs first. ``sources``: what was found
        and is to be restored yet; it can be, whatever goes."""
        left = self._backend.facts.kv_budget_bytes - kv_used_bytes
        spare = [source.found for source in sources if source.found is not None]
        self._ram.shrink(self._budget_bytes or max(left, 0), spare)

    def statistics(self) -> PrefixStats:
        ram = self._ram.statistics()
        return PrefixStats(
            ram_bytes=self._ram.nbytes,
            ram_blocks=ram.blocks,
            evicted_blocks=ram.evictions,
            row_hit_tokens=self._row_hit_tokens,
            ram_hit_tokens=self._ram_hit_tokens,
            restore_s=self._restore_s,
            publish_s=self._publish_s,
        )
