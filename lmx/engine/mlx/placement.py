"""Where each sequence lives: which lane, which row (DESIGN §4).

A decode step costs a pass through attention for each lane with decoding rows, and where model code does not let lanes
decode together (``together``) one over the weights, so there are as few lanes as the padding (free rows, and slots
beyond the sequences' own) allows. It may take, at most, half of the KV in use, or 2 % of the
weights if that is more (less is not worth a lane), and never more than a quarter of the KV budget.
What is *made* keeps to nine tenths of that, so that what is made now is not unmade by the next small change.

Sequences that join take a free row, else a lane grows for them, else they get a lane of their own. Whenever somebody
joined or left, ``settle`` joins lanes where that keeps within the limit, and gives rows and slots back, or parts the
short rows of a lane from the long ones, where the limit is passed. Growing, joining and parting copy the rows
concerned, no others, between steps. The MLX back end is the only caller.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import mlx.core as mx

from lmx.engine.backend import Facts, Sequence
from lmx.engine.mlx.adapter import LoadedModel
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.layers import DUMMY_SLOTS, round_slots
from lmx.engine.mlx.probe import ProbeResult

# The padding that may be, as shares of the KV in use, of the weights and of the KV budget.
_HELD_SHARE = 0.5
_WEIGHTS_SHARE = 0.02
_BUDGET_SHARE = 0.25
# The share of that which may be made. At 0.75 a mix of 100- to 8,000-token sequences in 8 rows needs 3.1 lanes, at 0.9
# 2.7; what is copied rises from 2.5 to 3 tokens for each token computed, of the 2,000 that each reads.
_MAKE_SHARE = 0.9
# A lane that grows is given so much more than it needs, if the limit allows. Rows are read as a whole in every step, so
# that growing by a quantum, every 256 steps, costs less than a hundredth of that.
_GENEROUS = 1.125


@dataclass(slots=True)
class Place:
    sequence: Sequence
    lane: Lane
    row: int
    tokens: int
    """That it must hold: its prompt and one more, then what it has and the next step's."""


@dataclass(frozen=True, slots=True)
class _Change:
    """Another shape for one lane (rows 0: none is left of it), or a new one, and who moves there."""

    lane: Lane | None
    rows: int
    slots: int
    moves: tuple[Place, ...] = ()
    """From other lanes."""


class Placement:
    def __init__(self, loaded: LoadedModel, probe: ProbeResult, facts: Facts) -> None:
        self._loaded = loaded
        self._probe = probe
        self.facts = facts
        self._places: dict[int, Place] = {}
        self._unsettled = False
        self.lanes: list[Lane] = []
        self.copied_bytes = 0
        """KV that changed its place since the start."""

    def __getitem__(self, sequence: Sequence) -> Place:
        return self._places[sequence.seq]

    def __len__(self) -> int:
        return len(self._places)

    def of_lane(self, lane: Lane) -> list[Place]:
        return [place for place in self._places.values() if place.lane is lane]

    def enter(self, sequence: Sequence) -> None:
        """Give the sequence an empty row that holds its tokens and one more."""
        tokens = len(sequence.tokens) + 1
        lane = self._room_for(tokens, None)
        self._places[sequence.seq] = Place(sequence, lane, lane.acquire(sequence.seq), tokens)
        self._unsettled = True

    def leave(self, sequence: Sequence) -> None:
        """Free the sequence's row, and its lane if it was the last there. Unknown sequences are ignored."""
        place = self._places.pop(sequence.seq, None)
        if place is not None:
            self._release(place.lane, place.row)
            self._unsettled = True

    def make_room(self, place: Place, tokens: int) -> None:
        """Let the row hold ``tokens`` more: its lane grows, or the sequence moves to a wider one."""
        place.tokens = max(place.tokens, int(place.lane.lengths[place.row]) + tokens)
        if place.tokens <= place.lane.capacity:
            return
        lane = self._room_for(place.tokens, place)
        if lane is not place.lane:
            self._move(place, lane)
        self._unsettled = True

    def settle(self) -> None:
        """After joins and leaves, before a step: join lanes and give padding back, see above."""
        while self._unsettled:
            self._unsettled = False
            change = self._worth_joining() or self._worth_parting()
            if change:
                self._apply(change)
                self._unsettled = True

    def compact(self, lane: Lane, members: Seq[Place]) -> None:
        """Fill holes from the top while more than a quarter of the rows computed would be dummies."""
        while True:
            top = max(members, key=lambda place: place.row)
            holes = [row for row in range(top.row) if lane.owners[row] is None]
            if not holes or (top.row + 1 - len(members)) * 4 <= top.row + 1:
                return
            self._count_copy(lane, top.row)
            lane.move(top.row, holes[0])
            top.row = holes[0]

    # --- what it costs ----------------------------------------------------------------------------------------------

    def _bytes(self, rows: int, slots: int) -> int:
        return rows * (slots * self.facts.kv_bytes_per_token + self.facts.kv_bytes_per_sequence)

    def _held(self, tokens: int = 0) -> int:
        """The KV in use as the scheduler counts it; ``tokens``: of a sequence that is about to join."""
        wanted = [place.tokens for place in self._places.values()] + [tokens] * (tokens > 0)
        return sum(self._bytes(1, round_slots(tokens) - DUMMY_SLOTS) for tokens in wanted)

    def _padding(self, changes: Seq[_Change], held: int) -> int:
        changed = [change.lane for change in changes]
        kept = sum(self._bytes(lane.rows, lane.slots) for lane in self.lanes if lane not in changed)
        return kept + sum(self._bytes(change.rows, change.slots) for change in changes) - held

    def _limit(self, held: int) -> float:
        most = max(_HELD_SHARE * held, _WEIGHTS_SHARE * self.facts.weights_bytes)
        return min(most, _BUDGET_SHARE * self.facts.kv_budget_bytes)

    # --- joining and growing ----------------------------------------------------------------------------------------

    def _room_for(self, tokens: int, place: Place | None) -> Lane:
        """A lane with a free row of that size, for a sequence that joins, or for ``place``, which outgrew its lane;
        or that lane, grown."""
        held = self._held(tokens if place is None else 0)
        options = list(self._options(tokens, place))
        left = [_Change(place.lane, 0, 0)] if place is not None and len(place.lane.in_use) == 1 else []

        def padding(option: _Change) -> int:
            return self._padding([option, *(change for change in left if change.lane is not option.lane)], held)

        limit = _MAKE_SHARE * self._limit(held)
        chosen = next((option for option in options if padding(option) <= limit), None) or min(options, key=padding)
        return self._shape(chosen)

    def _options(self, tokens: int, place: Place | None) -> Iterator[_Change]:
        """From what costs no copy and no further pass to what does."""
        need = round_slots(tokens)
        most = self.facts.max_rows
        others = sorted(
            (lane for lane in self.lanes if not (place and lane is place.lane)), key=lambda lane: lane.slots
        )
        wide = [lane for lane in others if lane.capacity >= tokens]
        for lane in wide:
            if None in lane.owners:
                yield _Change(lane, lane.rows, lane.slots)
        generous = max(need, min(round_slots(int(tokens * _GENEROUS)), round_slots(self.facts.context_length)))
        if place:
            used = len(place.lane.in_use)
            yield _Change(place.lane, place.lane.rows, generous)
            yield _Change(place.lane, used, generous)
            yield _Change(place.lane, used, need)
        for lane in wide:
            if None not in lane.owners:
                yield _Change(lane, min(lane.rows * 2, most), lane.slots)
                yield _Change(lane, lane.rows + 1, lane.slots)
        if not place:
            for lane in reversed(others):
                if lane not in wide:
                    yield _Change(lane, lane.rows + (None not in lane.owners), need)
        for rows in sorted({1, min(4, most), most}, reverse=True):
            yield _Change(None, rows, generous if place else need)
        yield _Change(None, 1, need)

    # --- settling ---------------------------------------------------------------------------------------------------

    def _worth_joining(self) -> tuple[_Change, ...]:
        """Two lanes that can be one: the rows of one move to the other."""
        held = self._held()
        limit = _MAKE_SHARE * self._limit(held)
        lanes = sorted(self.lanes, key=lambda lane: lane.slots)
        for index, short in enumerate(lanes):
            for long in lanes[index + 1 :]:
                rows = len(short.in_use) + len(long.in_use)
                into = _Change(long, max(rows, long.rows), long.slots, tuple(self.of_lane(short)))
                change = (_Change(short, 0, 0), into)
                if self._padding(change, held) <= limit:
                    return change
        return ()

    def _worth_parting(self) -> tuple[_Change, ...]:
        """Where the padding is over its limit: the change that brings it back within what may be made, with the least
        lanes and copies; or else the one that gives most back."""
        held = self._held()
        now = self._padding([], held)
        if now <= self._limit(held):
            return ()
        found = [change for lane in self.lanes for change in self._partings(lane)]
        found = [change for change in found if self._padding(change, held) < now]
        limit = _MAKE_SHARE * self._limit(held)

        def order(change: tuple[_Change, ...]) -> tuple[float, ...]:
            padding = self._padding(change, held)
            lanes = sum(part.lane is None for part in change)
            copied = sum(
                place.lane.lengths[place.row] for part in change if part.lane for place in self.of_lane(part.lane)
            )
            return (max(padding, limit), lanes, copied)

        return min(found, key=order, default=())

    def _partings(self, lane: Lane) -> Iterator[tuple[_Change, ...]]:
        """The lane without what it does not use; and without its shortest rows, which go elsewhere."""
        members = sorted(self.of_lane(lane), key=lambda place: place.tokens)
        sizes = [round_slots(place.tokens) for place in members]
        yield (_Change(lane, len(members), min(sizes[-1], lane.slots)),)
        for cut in range(1, len(members)):
            if sizes[cut - 1] == sizes[cut]:
                continue
            rest = _Change(lane, len(members) - cut, min(sizes[-1], lane.slots))
            moves, slots = tuple(members[:cut]), sizes[cut - 1]
            yield rest, _Change(None, cut, slots, moves)
            for other in self.lanes:
                if other is not lane:
                    rows = max(len(other.in_use) + cut, other.rows)
                    yield rest, _Change(other, rows, max(other.slots, slots), moves)

    def _apply(self, changes: Seq[_Change]) -> None:
        for change in changes:
            if change.moves:
                lane = self._shape(change)
                for place in change.moves:
                    self._move(place, lane)
        for change in changes:
            if change.rows and not change.moves:
                self._shape(change)

    # --- the lanes themselves ---------------------------------------------------------------------------------------

    def _shape(self, change: _Change) -> Lane:
        """Make or resize the lane."""
        lane = change.lane
        if lane is None:
            lane = Lane(self._loaded, self._probe.kinds, change.rows, change.slots, self._probe.write)
            self.lanes.append(lane)
        elif (change.rows, change.slots) != (lane.rows, lane.slots):
            for row in lane.in_use:
                self._count_copy(lane, row)
            lane.resize(change.rows, change.slots)
            for place in self.of_lane(lane):
                place.row = lane.owners.index(place.sequence.seq)
            mx.clear_cache()
        return lane

    def _move(self, place: Place, lane: Lane) -> None:
        old, row = place.lane, place.row
        self._count_copy(old, row)
        place.lane, place.row = lane, lane.acquire(place.sequence.seq)
        lane.adopt(place.row, old, row)
        self._release(old, row)

    def _release(self, lane: Lane, row: int) -> None:
        lane.release(row)
        if not lane.in_use:
            self.lanes.remove(lane)
            # Whoever still refers to the lane must not keep its buffers; without that the pool would.
            lane.drop()
            mx.clear_cache()

    def _count_copy(self, lane: Lane, row: int) -> None:
        if lane.lengths[row]:
            self.copied_bytes += self._bytes(1, int(lane.lengths[row]))
