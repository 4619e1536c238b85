"""Between the step loop, the scheduler and the sources of drafts: offers before a plan, drafts after it, and what came
of them (DESIGN §6).

Also learns at no cost what drafts are worth while none are verified: what a source would have said is kept until the
tokens that came in its place have shown how much of it was right. Only the step loop calls it. It decides nothing: how
many drafts a step verifies the scheduler does, what they are their source.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from lmx._sched import Scheduler
from lmx.engine.backend import Facts, Sequence, verified
from lmx.protocol import Submit

MODEL = 1
"""The scheduler's word for drafts of a model: they are not to be had for nothing."""


class Drafting(Protocol):
    """The sources of drafts, of all sequences."""

    def enter(self, sequence: Sequence, submit: Submit) -> None:
        """One that may get drafts from now on, as far as ``submit`` lets it."""

    def leave(self, sequence: Sequence) -> None:
        """It gets none any more. Unknown sequences are ignored."""

    def wants(self, rows: Iterable[Sequence]) -> bool:
        """Whether ``catch_up`` has something to do for these decoding rows."""

    def catch_up(self, rows: Iterable[Sequence]) -> None:
        """Before the offers for a step of these rows, with nothing in flight: what the device must compute for later
        offers, a bounded piece of it."""

    def offer(self, sequence: Sequence) -> tuple[int, int]:
        """How many tokens there are for what comes after ``sequence.tokens``, and whether they cost nothing (0) or
        passes of a draft model (1)."""

    def take(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        """These tokens, for each sequence at most so many as its offer was."""

    def told(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Of what was taken of the offer before the newest tokens, so many were right, and the next one was wrong."""

    def source_of(self, sequence: Sequence) -> str:
        """Where the drafts that were taken last came from, as in ``protocol.Tokens``."""


@dataclass(frozen=True, slots=True)
class _Foreseen:
    drafts: list[int]
    start: int
    """The position of the first one."""


class Speculation:
    def __init__(self, facts: Facts, scheduler: Scheduler, drafts: Drafting) -> None:
        self._facts = facts
        self._scheduler = scheduler
        self._drafts = drafts
        self._foreseen: dict[int, _Foreseen] = {}

    def enter(self, sequence: Sequence, submit: Submit) -> None:
        self._drafts.enter(sequence, submit)

    def leave(self, sequence: Sequence) -> None:
        self._foreseen.pop(sequence.seq, None)
        self._drafts.leave(sequence)

    def catch_up(self, rows: Iterable[Sequence]) -> None:
        """Before ``offer``: what the sources compute on the device, apart from what a step takes."""
        self._drafts.catch_up(rows)

    def offer(self, rows: Iterable[Sequence]) -> None:
        """Before a plan with nothing in flight."""
        self._offer(rows, 0)

    def expected(self, rows: Seq[Sequence]) -> bool:
        """Whether it is worth it to read the step in flight, in which these rows get their next token, before another
        one is planned: most likely it would verify drafts. (What a source has now is for the token in flight and those
        after it.) Or because a source has to catch up, which nothing may run beside."""
        self._offer(rows, 1)
        return self._scheduler.expected_depth() > 0 or self._drafts.wants(rows)

    def _offer(self, rows: Iterable[Sequence], in_flight: int) -> None:
        for sequence in rows:
            tokens, source = self._drafts.offer(sequence)
            tokens = min(tokens, self._facts.max_depth + in_flight)
            if tokens > in_flight:
                self._scheduler.offer(sequence.seq, tokens - in_flight, source)
            if tokens and source != MODEL and sequence.seq not in self._foreseen:
                [drafts] = self._drafts.take([sequence], [min(tokens, self._facts.max_depth)])
                if drafts:
                    self._foreseen[sequence.seq] = _Foreseen(drafts, len(sequence.tokens))

    def take(self, decode: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        """The drafts that a plan asks for, of each of ``decode``."""
        taken = self._drafts.take(decode, counts)
        for sequence, drafts in zip(decode, taken, strict=True):
            if drafts:
                self._foreseen.pop(sequence.seq, None)
            # A draft model may have outputs that this one has not.
            foreign = next(
                (i for i, token in enumerate(drafts) if not 0 <= token < self._facts.vocab_size), len(drafts)
            )
            del drafts[foreign:]
        return taken

    def told(self, sequence: Sequence, drafted: int, accepted: int) -> str:
        """Of a step that was read: its drafts, and how many count; where these came from."""
        source = self._drafts.source_of(sequence)
        self._drafts.told(sequence, drafted, accepted)
        return source

    def look_back(self, sequence: Sequence) -> None:
        """After it got tokens in a step that verified no drafts of it."""
        foreseen = self._foreseen.get(sequence.seq)
        if foreseen is None:
            return
        came = sequence.tokens[foreseen.start : foreseen.start + len(foreseen.drafts)]
        right = verified(foreseen.drafts[: len(came)], came)
        if right < len(came) or len(came) == len(foreseen.drafts):
            del self._foreseen[sequence.seq]
            self._scheduler.foresaw(sequence.seq, len(foreseen.drafts), right)
            self._drafts.told(sequence, len(foreseen.drafts), right)
