"""Steps that verify drafts: the decoding rows of one lane run their last token and their drafts in one forward pass,
draw at each position as single steps would, and keep what counts (DESIGN §6).

Padding, of rows with fewer drafts than others, writes nowhere. What a row drew after a wrong draft is nobody's token,
and the KV of that draft is taken back. A draft can also be a token that the model does not bear: its NaN would spoil
the whole row, behind any mask. So where a row's first position is not finite, the row is computed again without its
drafts; it is bad only if that is. Made, drawn and read by the MLX back end; decides nothing.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from lmx.engine.backend import Draw, verified
from lmx.engine.grammar import Masker, Masks
from lmx.engine.mlx import draws
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.draws import Batches, Read
from lmx.engine.mlx.placement import Place
from lmx.engine.sampling import Drawn, compiles, draw_key


@dataclass(frozen=True, slots=True)
class Row:
    place: Place
    drafts: Seq[int]
    start: int
    """Tokens that it held before."""

    @property
    def count(self) -> int:
        return 1 + len(self.drafts)


class Verification:
    """One lane's part of such a step."""

    def __init__(self, lane: Lane, places: Seq[Place], drafts: Seq[Seq[int]], batches: Batches, masker: Masker) -> None:
        self._lane = lane
        self._rows = [
            Row(place, tuple(guess), int(lane.lengths[place.row])) for place, guess in zip(places, drafts, strict=True)
        ]
        self._batches = batches
        self._masker = masker
        self._drawn: Drawn | None = None
        tokens = [[row.place.sequence.tokens[-1], *row.drafts] for row in self._rows]
        self.logits = lane.decode_each([place.row for place in places], tokens)
        """(N, V), of each row's positions; lazy, as all until ``settle``."""

    @property
    def masked(self) -> bool:
        return any(row.place.sequence.masked for row in self._rows)

    def draw(self) -> None:
        """At each position of each row."""
        flat = [(row, j) for row in self._rows for j in range(row.count)]
        logits = self.logits
        if compiles(mx):  # a graph for each number of draws
            own = len(flat)
            flat += flat[-1:] * ((1 << (own - 1).bit_length()) - own)
            logits = logits[mx.minimum(mx.arange(len(flat)), own - 1)]
        batch = self._batches.get(self._lane, [row.place.sequence for row, _ in flat])
        keys = [draw_key(row.place.sequence.sampling.seed, row.start + 1 + j) for row, j in flat]
        counts = self._counts(flat) if batch.penalised else None
        self._drawn = batch.draw(logits, keys, counts, self._masks(len(flat)))

    def _counts(self, flat: Seq[tuple[Row, int]]) -> list[mx.array]:
        """As if the drafts before each position had been drawn."""
        assert self._lane.counts is not None
        rows = mx.array([row.place.row for row, _ in flat])
        counts = [array[rows] for array in self._lane.counts.arrays]
        before = [(at, draft) for at, (row, j) in enumerate(flat) for draft in row.drafts[:j]]
        if not before:
            return counts
        at, drafts = (mx.array(numbers) for numbers in zip(*before, strict=True))
        return [array.at[at, drafts].add(1) for array in counts]

    def _masks(self, count: int) -> Masks | None:
        """Of so many draws."""
        found: Masks | None = None
        first = 0
        for row in self._rows:
            sequence = row.place.sequence
            if sequence.masked and not sequence.ended:
                masks = self._masker.along(sequence, row.drafts)
                if found is None:
                    found = np.full((count, masks.shape[1]), ~np.uint32(0), np.uint32)
                found[first : first + row.count] = masks
            first += row.count
        return found

    @property
    def results(self) -> list[mx.array]:
        """What there is when it is done."""
        return [self.logits] if self._drawn is None else draws.arrays(self._drawn)

    def settle(self) -> list[Draw]:
        """Once that is so: what each row drew, and back to that with it."""
        assert self._drawn is not None
        read = Read(self._drawn)
        self._drawn = None
        found: list[Draw] = []
        spoilt: list[Row] = []
        first = 0
        for row in self._rows:
            bad = read.bad[first : first + row.count]
            # Only finite draws vouch for their positions, and for the draws before them.
            finite = bad.index(True) if True in bad else row.count
            if row.drafts and not finite:
                spoilt.append(row)
            else:
                found.append(self._keep(row, read, first, finite))
            first += row.count
        self._give_out([draw for draw in found if not draw.bad])
        return found + self._again(spoilt)

    def _keep(self, row: Row, read: Read, first: int, finite: int) -> Draw:
        lane, at, sequence = self._lane, row.place.row, row.place.sequence
        drawn = read.tokens[first : first + max(finite, 1)]
        count = 1 + verified(row.drafts[: len(drawn) - 1], drawn)
        if finite:
            lane.seen[at].found(row.start, row.start + finite)
        if count < row.count:
            left = lane.rewind(at, row.start + count)
            assert left == row.start + count, (left, row.start, count)
        return Draw(sequence, tuple(drawn[:count]), not finite, read.logprobs(range(first, first + count), sequence))

    def _give_out(self, draws: Seq[Draw]) -> None:
        """The lane goes on from what its rows drew."""
        rows = {row.place.sequence.seq: row.place.row for row in self._rows}
        if draws:
            last = mx.array([draw.tokens[-1] for draw in draws], mx.int32)
            self._lane.last_tokens[mx.array([rows[draw.sequence.seq] for draw in draws])] = last
            self._lane.add_counts(
                [rows[draw.sequence.seq] for draw in draws for _ in draw.tokens],
                mx.array([token for draw in draws for token in draw.tokens]),
            )

    def _again(self, rows: Seq[Row]) -> list[Draw]:
        """Without their drafts."""
        if not rows:
            return []
        for row in rows:
            left = self._lane.rewind(row.place.row, row.start)
            assert left == row.start, (left, row.start)
        alone = Verification(self._lane, [row.place for row in rows], [()] * len(rows), self._batches, self._masker)
        alone.draw()
        mx.eval(alone.results)
        return alone.settle()
