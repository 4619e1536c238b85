"""Where each sequence lives: which lane, which row (DESIGN §4).

Two things must hold. **Padding** (free rows, and slots beyond the sequences' own): no lane is larger than one and a
half times the KV in use in it, but for what all of them together may hold beyond that, 2 % of the weights.
**Lateness**: rows live together only if all of them can be copied without making a step late; a longer row has a lane
of its own. So whatever one sequence does, its own lane changes and no other, and what is copied is its row and a
bounded rest, however long the others are.

Within that, lanes, slots that are read for nothing (a step reads each row as far as the lane's longest) and copies are
weighed as they were measured at load (``device.LaneCosts``): on a device where a lane is dear there are few. A sequence
that joins copies nothing. One that outgrows its lane must, and takes what costs least until the next one is likely.
A copy that nobody is forced to make, to join lanes or to part one, is made when what the present lanes cost has paid
for it. All copies are made between steps. The MLX back end is the only caller.
"""

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter

import mlx.core as mx

from lmx.engine.backend import Facts, Sequence
from lmx.engine.mlx.adapter import LoadedModel
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.device import LaneCosts
from lmx.engine.mlx.layers import DUMMY_SLOTS, SLOT_QUANTUM, round_slots
from lmx.engine.mlx.probe import ProbeResult

# The padding that may be: in each lane, of the KV in use there; in all of them beside that, of the weights; and in all
# never more than this share of the KV budget.
_HELD_SHARE = 0.5
_WEIGHTS_SHARE = 0.02
_BUDGET_SHARE = 0.25
# The share of that which may be made, so that it is not unmade by the next small change.
_MAKE_SHARE = 0.9
# A lane that grows is given so much more than it needs, if the limit allows.
_GENEROUS = 1.125
# So many steps a shape is taken to last: then a row has grown by a quantum.
_STEPS = SLOT_QUANTUM
# Rows that grow at the same time would all be copied between two steps. Where several lanes are full after so many
# tokens, one of them grows before each step until then.
_AHEAD_TOKENS = 64
# How often it is looked at whether lanes are worth joining or parting when nobody came or went.
_LOOK_STEPS = 64


@dataclass(slots=True, eq=False)
class Place:
    sequence: Sequence
    lane: Lane
    row: int
    tokens: int
    """That it must hold: its prompt and one more, then what it has and the next step's."""

    @property
    def written(self) -> int:
        """Tokens that a move copies."""
        return int(self.lane.lengths[self.row])


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a lane may become."""

    lane: Lane | None
    """None: a new one."""
    rows: int
    slots: int
    tokens: tuple[int, ...]
    """That its sequences must hold."""
    moves: tuple[Place, ...] = ()
    """Those of them that come from other lanes."""


_Change = tuple[_Shape, ...]
"""The lanes that change, those that are left by some of their sequences among them. One that all leave is no more."""


@dataclass(frozen=True, slots=True)
class _Limit:
    share: float
    """Padding by KV in use, of each lane."""
    spare: float
    """Bytes beyond that, of all lanes."""


@dataclass(slots=True)
class _Wish:
    """A change that nobody is forced to make."""

    change: _Change
    saved_ms: float
    """In each step."""
    cost_ms: float


class Placement:
    def __init__(self, loaded: LoadedModel, probe: ProbeResult, facts: Facts, costs: LaneCosts) -> None:
        self._loaded = loaded
        self._probe = probe
        self.facts = facts
        self.costs = costs
        self._places: dict[int, Place] = {}
        self._members: dict[Lane, list[Place]] = {}
        self._unsettled = False
        self._wish: _Wish | None = None
        self._lost_ms = 0.0
        """What the present lanes cost more than wished ones, since that was last mended."""
        self._steps = 0
        self.copied_bytes = 0
        """KV that changed its place since the start."""

    def __getitem__(self, sequence: Sequence) -> Place:
        return self._places[sequence.seq]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def lanes(self) -> list[Lane]:
        return list(self._members)

    def of_lane(self, lane: Lane) -> list[Place]:
        return self._members[lane]

    def enter(self, sequence: Sequence) -> None:
        """Give the sequence an empty row that holds its tokens and one more. Copies nothing."""
        tokens = len(sequence.tokens) + 1
        limit = self._limit(tokens, _MAKE_SHARE)
        found = [(shape,) for shape in self._homes(tokens) if self._allowed((shape,), limit)]
        alone = (_Shape(None, 1, round_slots(tokens), (tokens,)),)
        # Of equals the first.
        (shape,) = min(found, key=self._added_ms, default=alone)
        lane = self._shape(shape)
        place = Place(sequence, lane, lane.acquire(sequence.seq), tokens)
        self._places[sequence.seq] = place
        self._members[lane].append(place)
        self._unsettled = True

    def leave(self, sequence: Sequence) -> None:
        """Free the sequence's row, and its lane if it was the last there. Unknown sequences are ignored."""
        place = self._places.pop(sequence.seq, None)
        if place is not None:
            self._release(place, place.lane, place.row)
            self._unsettled = True

    def make_room(self, place: Place, tokens: int) -> None:
        """Let the row hold ``tokens`` more: its lane grows, or the sequence moves to a wider one."""
        place.tokens = max(place.tokens, place.written + tokens)
        if place.tokens <= place.lane.capacity:
            return
        limit = self._limit(0, _MAKE_SHARE)
        options = list(self._growths(place))
        found = [change for change in options if self._allowed(change, limit)]
        if found:
            self._apply(min(found, key=self._total_ms))
        else:
            self._apply(min(options, key=lambda change: (self._late(change), self._excess_after(change, limit))))
        self._unsettled = True

    def settle(self, *, decodes: bool = True) -> None:
        """Before a step: give padding back that is beyond its limit, join lanes and part them, see above. ``decodes``:
        the step reads the lanes."""
        self._steps += decodes
        if self._unsettled or self._steps % _LOOK_STEPS == 0:
            self._keep_within_limit()
            self._wish = self._best_wish()
        self._unsettled = False
        if decodes:
            self._grow_ahead()
        if self._wish is None or not decodes:
            return
        self._lost_ms += self._wish.saved_ms
        if self._lost_ms >= self._wish.cost_ms:
            # The rows are longer by now than when it was wished for.
            self._wish = self._best_wish()
            if self._wish and self._lost_ms >= self._wish.cost_ms:
                self._apply(self._wish.change)
                self._lost_ms = 0.0
                self._wish = self._best_wish()

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

    def _held(self, tokens: Seq[int]) -> int:
        """The KV in use as the scheduler counts it."""
        return sum(self._bytes(1, round_slots(each) - DUMMY_SLOTS) for each in tokens)

    def _limit(self, joining: int = 0, share: float = 1.0) -> _Limit:
        """``joining``: tokens of a sequence that is about to; ``share``: of what may be."""
        held = self._held([place.tokens for place in self._places.values()] + [joining] * (joining > 0))
        most = _BUDGET_SHARE * self.facts.kv_budget_bytes
        of_held = min(_HELD_SHARE, most / max(held, 1))
        spare = min(_WEIGHTS_SHARE * self.facts.weights_bytes, most - of_held * held)
        return _Limit(share * of_held, share * spare)

    def _now(self, lane: Lane) -> _Shape:
        return _Shape(lane, lane.rows, lane.slots, tuple(place.tokens for place in self.of_lane(lane)))

    def _excess(self, shape: _Shape, limit: _Limit) -> float:
        """Padding beyond the lane's own limit."""
        return max(0.0, self._bytes(shape.rows, shape.slots) - (1 + limit.share) * self._held(shape.tokens))

    def _excess_after(self, change: _Change, limit: _Limit) -> float:
        changed = _changed(change)
        kept = sum(self._excess(self._now(lane), limit) for lane in self.lanes if lane not in changed)
        return kept + sum(self._excess(shape, limit) for shape in change)

    def _late(self, change: _Change) -> bool:
        """Whether rows would live together that take too long to copy."""
        costs = self.costs
        return any(
            len(shape.tokens) > 1
            and costs.copy_ms + costs.byte_ms * self._bytes(len(shape.tokens), shape.slots) > costs.late_ms
            for shape in change
        )

    def _allowed(self, change: _Change, limit: _Limit) -> bool:
        if self._late(change):
            return False
        excess = self._excess_after(change, limit)
        return excess <= limit.spare or excess <= self._excess_after((), limit)

    def _step_ms(self, tokens: Seq[int]) -> float:
        """What a lane adds to a step."""
        return self.costs.lane_ms + self.costs.slot_ms * len(tokens) * max(tokens) if tokens else 0.0

    def _added_ms(self, change: _Change) -> float:
        """To each step."""
        before = sum(self._step_ms([place.tokens for place in self.of_lane(lane)]) for lane in _changed(change))
        return sum(self._step_ms(shape.tokens) for shape in change) - before

    def _copied_ms(self, change: _Change) -> float:
        moved = [place for shape in change for place in shape.moves]
        copies, copied = 0, 0
        for shape in change:
            copying = list(shape.moves)
            if shape.lane and (shape.rows, shape.slots) != (shape.lane.rows, shape.lane.slots):
                copying += [place for place in self.of_lane(shape.lane) if place not in moved]
                copies += 1
            copies += len(shape.moves)
            copied += sum(self._bytes(1, place.written) for place in copying if place.written)
        return self.costs.copy_ms * copies + self.costs.byte_ms * copied

    def _total_ms(self, change: _Change) -> float:
        """Of the change, and of the steps until the next one is likely."""
        return self._copied_ms(change) + _STEPS * self._added_ms(change)

    # --- joining and growing ----------------------------------------------------------------------------------------

    def _homes(self, tokens: int) -> Iterator[_Shape]:
        """For a sequence that joins: lanes with a free row, and lanes in which nothing is written yet, larger, and new
        ones."""
        need, most = round_slots(tokens), self.facts.max_rows
        for lane in sorted(self.lanes, key=attrgetter("slots")):
            now = self._now(lane)
            free = None in lane.owners
            if free and lane.capacity >= tokens:
                yield _Shape(lane, lane.rows, lane.slots, (*now.tokens, tokens))
            elif not any(lane.lengths):
                for rows in [lane.rows] if free else [min(lane.rows * 2, most), lane.rows + 1]:
                    yield _Shape(lane, rows, max(lane.slots, need), (*now.tokens, tokens))
        for rows in sorted({1, min(4, most), most}, reverse=True):
            yield _Shape(None, rows, need, (tokens,))

    def _growths(self, place: Place) -> Iterator[_Change]:
        """For a row that outgrew its lane: that lane grows, or it goes to another, or to a new one."""
        lane, tokens = place.lane, place.tokens
        need = round_slots(tokens)
        sizes = [need]
        ahead = min(int(tokens * _GENEROUS), self._end(place))
        if round_slots(ahead) > need:
            sizes.insert(0, round_slots(ahead))
        for slots in sizes:
            for rows in dict.fromkeys((lane.rows, len(lane.in_use))):
                yield (_Shape(lane, rows, slots, self._now(lane).tokens),)
        others = [other for other in self.of_lane(lane) if other is not place]
        for left in self._left(lane, others):
            for wide in self.lanes:
                if wide is not lane and wide.capacity >= tokens:
                    rows = max(wide.rows, len(wide.in_use) + 1)
                    yield *left, _Shape(wide, rows, wide.slots, (*self._now(wide).tokens, tokens), (place,))
            if others:
                for slots in sizes:
                    yield *left, _Shape(None, 1, slots, (tokens,), (place,))

    def _grow_ahead(self) -> None:
        full = []
        for lane, members in self._members.items():
            longest = max(members, key=attrgetter("tokens"))
            room = lane.capacity - longest.tokens
            if room < _AHEAD_TOKENS and self._end(longest) > lane.capacity:
                full.append((room, lane, longest))
        if len(full) < 2:
            return
        limit = self._limit(share=_MAKE_SHARE)
        for _, lane, longest in sorted(full, key=lambda found: found[0]):
            tokens = max(lane.capacity + 1, min(int(longest.tokens * _GENEROUS), self._end(longest)))
            change = (_Shape(lane, lane.rows, round_slots(tokens), self._now(lane).tokens),)
            if self._allowed(change, limit):
                self._apply(change)
                return

    def _end(self, place: Place) -> int:
        """Tokens that it will not grow beyond."""
        sequence = place.sequence
        return max(place.tokens, min(sequence.prompt_tokens + sequence.max_tokens, self.facts.context_length))

    def _left(self, lane: Lane, members: Seq[Place]) -> list[_Change]:
        """What becomes of a lane in which these stay: it keeps its shape, or is made to fit."""
        if not members:
            return [()]
        tokens = tuple(place.tokens for place in members)
        fitting = (len(members), min(round_slots(max(tokens)), lane.slots))
        return [(_Shape(lane, *shape, tokens),) for shape in dict.fromkeys(((lane.rows, lane.slots), fitting))]

    # --- settling ---------------------------------------------------------------------------------------------------

    def _keep_within_limit(self) -> None:
        limit = self._limit()
        while (excess := self._excess_after((), limit)) > limit.spare:
            made = self._limit(share=_MAKE_SHARE)
            found = [
                change
                for lane in self.lanes
                if self._excess(self._now(lane), limit)
                for change in self._partings(lane)
                if not self._late(change) and self._excess_after(change, limit) < excess
            ]
            enough = [change for change in found if self._excess_after(change, made) <= made.spare]
            if enough:
                change = min(enough, key=self._total_ms)
            elif found:
                change = min(found, key=lambda change: self._excess_after(change, limit))
            else:
                return
            self._apply(change)

    def _partings(self, lane: Lane) -> Iterator[_Change]:
        """The lane made to fit; and without its shortest rows, or all, which go to another one, or to a new one."""
        members = sorted(self.of_lane(lane), key=attrgetter("tokens"))
        yield from self._left(lane, members)[1:]
        for cut in range(1, len(members) + 1):
            moves = tuple(members[:cut])
            tokens = tuple(place.tokens for place in moves)
            need = round_slots(tokens[-1])
            for left in self._left(lane, members[cut:]):
                if left and need < lane.slots:
                    yield *left, _Shape(None, cut, need, tokens, moves)
                for other in self.lanes:
                    if other is not lane and other.capacity >= tokens[-1]:
                        rows = max(len(other.in_use) + cut, other.rows)
                        yield *left, _Shape(other, rows, other.slots, (*self._now(other).tokens, *tokens), moves)

    def _best_wish(self) -> _Wish | None:
        limit = self._limit(share=_MAKE_SHARE)
        best, most = None, 0.0
        for saved_ms, change in itertools.chain(self._joins(), self._splits()):
            if saved_ms * _STEPS <= most:
                continue
            cost_ms = self._copied_ms(change)
            if saved_ms * _STEPS - cost_ms > most and self._allowed(change, limit):
                best, most = _Wish(change, saved_ms, cost_ms), saved_ms * _STEPS - cost_ms
        if best is None:
            self._lost_ms = 0.0
        return best

    def _joins(self) -> Iterator[tuple[float, _Change]]:
        """Several lanes of neighbouring sizes made one, where that saves something in a step, and how much: their rows
        go to the widest."""
        lanes = sorted(self.lanes, key=attrgetter("slots"))
        sizes = [[place.tokens for place in self.of_lane(lane)] for lane in lanes]
        costs = [self._step_ms(tokens) for tokens in sizes]
        for last, wide in enumerate(lanes):
            count, longest, before_ms = len(sizes[last]), max(sizes[last]), costs[last]
            for first in range(last - 1, -1, -1):
                count, longest = count + len(sizes[first]), max(longest, *sizes[first])
                before_ms += costs[first]
                saved_ms = before_ms - self.costs.lane_ms - self.costs.slot_ms * count * longest
                if saved_ms <= 0:
                    continue
                moves = tuple(place for lane in lanes[first:last] for place in self.of_lane(lane))
                tokens = (*sizes[last], *(place.tokens for place in moves))
                most = self.facts.max_rows
                for rows in dict.fromkeys((count + count // 4, count)):
                    shape = _Shape(wide, max(min(rows, most), wide.rows), wide.slots, tokens, moves)
                    yield saved_ms, (shape,)

    def _splits(self) -> Iterator[tuple[float, _Change]]:
        """A lane without its shortest rows, which go to a new one, where that saves something, and how much."""
        for lane in self.lanes:
            members = sorted(self.of_lane(lane), key=attrgetter("tokens"))
            for cut in range(1, len(members)):
                unread = cut * (members[-1].tokens - members[cut - 1].tokens)
                saved_ms = self.costs.slot_ms * unread - self.costs.lane_ms
                if saved_ms > 0:
                    moves = tuple(members[:cut])
                    tokens = tuple(place.tokens for place in moves)
                    new = _Shape(None, cut, round_slots(tokens[-1]), tokens, moves)
                    for left in self._left(lane, members[cut:]):
                        yield saved_ms, (*left, new)

    # --- the lanes themselves ---------------------------------------------------------------------------------------

    def _apply(self, change: _Change) -> None:
        for shape in change:
            if shape.moves:
                lane = self._shape(shape)
                for place in shape.moves:
                    self._move(place, lane)
        for shape in change:
            if not shape.moves:
                self._shape(shape)

    def _shape(self, shape: _Shape) -> Lane:
        """Make or resize the lane."""
        lane = shape.lane
        if lane is None:
            lane = Lane(self._loaded, self._probe.kinds, shape.rows, shape.slots, self._probe.write)
            self._members[lane] = []
        elif (shape.rows, shape.slots) != (lane.rows, lane.slots):
            for row in lane.in_use:
                self._count_copy(lane, row)
            lane.resize(shape.rows, shape.slots)
            for place in self.of_lane(lane):
                place.row = lane.owners.index(place.sequence.seq)
            mx.clear_cache()
        return lane

    def _move(self, place: Place, lane: Lane) -> None:
        old, row = place.lane, place.row
        self._count_copy(old, row)
        place.lane, place.row = lane, lane.acquire(place.sequence.seq)
        lane.adopt(place.row, old, row)
        self._members[lane].append(place)
        self._release(place, old, row)

    def _release(self, place: Place, lane: Lane, row: int) -> None:
        lane.release(row)
        self._members[lane].remove(place)
        if not self._members[lane]:
            del self._members[lane]
            # Whoever still refers to the lane must not keep its buffers; without that the pool would.
            lane.drop()
            mx.clear_cache()

    def _count_copy(self, lane: Lane, row: int) -> None:
        if lane.lengths[row]:
            self.copied_bytes += self._bytes(1, int(lane.lengths[row]))


def _changed(change: _Change) -> list[Lane]:
    """The lanes as they are, that it changes."""
    found = [shape.lane for shape in change if shape.lane]
    return list(dict.fromkeys([*found, *(place.lane for shape in change for place in shape.moves)]))
