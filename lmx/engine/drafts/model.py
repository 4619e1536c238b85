"""Drafts from the draft model: of which sequences it is offered, and what it may cost to get it there.

A draft model must have read all of a sequence before it says what comes next, and that pays only if its drafts do. So
nobody is offered before it has caught up, and it catches up by the piece: one row, at most one piece a step, out of a
credit that steps earn, slowly as long as nobody asks for its drafts, and faster while they do. The credit at the start
is so large that the first answers show whether they should. Called by ``drafts`` on the loop's thread.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from lmx.engine.backend import Backend, Sequence

# Pieces: what ``Backend.draft`` computes at most for a row that is behind; about as long as a step or two.
_MOST_CREDIT = 16.0
_EARNED_UNASKED, _EARNED_ASKED = 1 / 128, 1 / 8
# Where more than this share of the steps lately asked for its drafts, they pay.
_ASKED_SHARE = 0.25
_SMOOTHING = 0.1
# A row that misses no more than this is read on in the step that asks for its drafts.
_NEAR_TOKENS = 32
# One that says nothing after a piece for every so many of its tokens never will (its context is at its end, it has a
# token that the draft model does not know).
_LEAST_PIECE_TOKENS = 16


class Model:
    name = "model"

    def __init__(self, backend: Backend, most: int) -> None:
        """``most``: tokens of an offer."""
        self._backend = backend
        self._most = most
        self._read: dict[int, int] = {}
        """Of each sequence: so many tokens were there when it last said something."""
        self._silent: dict[int, int] = {}
        """How often in a row it said nothing then."""
        self._credit = _MOST_CREDIT
        self._asked = False
        self._asked_share = 0.0

    def enter(self, sequence: Sequence) -> None:
        self._read[sequence.seq] = self._silent[sequence.seq] = 0

    def leave(self, sequence: Sequence) -> None:
        """Unknown sequences are ignored."""
        self._read.pop(sequence.seq, None)
        self._silent.pop(sequence.seq, None)

    def offer(self, sequence: Sequence) -> int:
        near = sequence.seq in self._read and self._missing(sequence) <= _NEAR_TOKENS
        return self._most if near and not self._silent[sequence.seq] else 0

    def take(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        self._asked = True
        return self._ask(sequences, counts)

    def _ask(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        found = self._backend.draft(sequences, counts)
        for sequence, tokens in zip(sequences, found, strict=True):
            if sequence.seq not in self._read:
                continue
            if tokens:
                self._read[sequence.seq], self._silent[sequence.seq] = len(sequence.tokens), 0
            else:
                self._silent[sequence.seq] += 1
                if self._silent[sequence.seq] > 2 + len(sequence.tokens) // _LEAST_PIECE_TOKENS:
                    self.leave(sequence)
        return found

    def _missing(self, sequence: Sequence) -> int:
        return len(sequence.tokens) - self._read[sequence.seq]

    def _behind(self, rows: Iterable[Sequence]) -> list[Sequence]:
        return [row for row in rows if row.generated_tokens and row.seq in self._read and not self.offer(row)]

    def wants(self, rows: Iterable[Sequence]) -> bool:
        """Whether ``catch_up`` would compute something for one of these rows."""
        return self._credit >= 1 and bool(self._behind(rows))

    def catch_up(self, rows: Iterable[Sequence]) -> None:
        """Before a step of these decoding rows, with no other one running: read on in one that is behind."""
        self._asked_share += _SMOOTHING * (self._asked - self._asked_share)
        self._asked = False
        earned = _EARNED_ASKED if self._asked_share > _ASKED_SHARE else _EARNED_UNASKED
        self._credit = min(self._credit + earned, _MOST_CREDIT)
        if self._credit < 1:
            return
        behind = self._behind(rows)
        if behind:
            self._credit -= 1
            self._ask([min(behind, key=self._missing)], [1])
