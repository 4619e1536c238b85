"""Where each sequence lives: which lane, which row (DESIGN §4).

A decode step costs one forward pass for each lane with decoding rows, so there is one lane until lengths differ so
much that padding (free rows, and slots beyond the sequences' own) would take more than its share of the KV budget.
Lanes grow by copying themselves, a sequence moves by copying its row; both happen between steps and are rare: slots
grow by half. The MLX back end is the only caller.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import mlx.core as mx

from lmx.engine.backend import Facts, Sequence
from lmx.engine.mlx.adapter import LoadedModel
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.layers import round_slots
from lmx.engine.mlx.probe import ProbeResult

# The share of the KV budget that padding may take.
_PADDING_SHARE = 0.25


@dataclass(slots=True)
class Place:
    sequence: Sequence
    lane: Lane
    row: int


class Placement:
    def __init__(self, loaded: LoadedModel, probe: ProbeResult, facts: Facts) -> None:
        self._loaded = loaded
        self._probe = probe
        self._facts = facts
        self._places: dict[int, Place] = {}
        self.lanes: list[Lane] = []

    def __getitem__(self, sequence: Sequence) -> Place:
        return self._places[sequence.seq]

    def __len__(self) -> int:
        return len(self._places)

    def of_lane(self, lane: Lane) -> list[Place]:
        return [place for place in self._places.values() if place.lane is lane]

    def enter(self, sequence: Sequence) -> None:
        """Give the sequence an empty row that holds its tokens and one more."""
        lane = self._choose_lane(len(sequence.tokens) + 1)
        self._places[sequence.seq] = Place(sequence, lane, lane.acquire(sequence.seq))

    def leave(self, sequence: Sequence, *, wipe: bool) -> None:
        """Free the sequence's row, and its lane if it was the last there. Unknown sequences are ignored."""
        place = self._places.pop(sequence.seq, None)
        if place is not None:
            self._release(place.lane, place.row, wipe=wipe)

    def make_room(self, place: Place, tokens: int) -> None:
        """Let the row hold ``tokens`` more: its lane grows, or the sequence moves to a wider one."""
        length = int(place.lane.lengths[place.row]) + tokens
        if length <= place.lane.capacity:
            return
        old, row = place.lane, place.row
        lane = self._choose_lane(length, old)
        if lane is old:
            return
        target = lane.acquire(place.sequence.seq)
        lane.adopt(target, old, row)
        # Evaluated before the old buffers go, so that no lazy copy keeps them.
        mx.eval(lane.arrays)
        place.lane, place.row = lane, target
        self._release(old, row)

    def compact(self, lane: Lane, members: Seq[Place]) -> None:
        """Fill holes from the top while more than a quarter of the rows computed would be dummies."""
        while True:
            top = max(members, key=lambda place: place.row)
            holes = [row for row in range(top.row) if lane.owners[row] is None]
            if not holes or (top.row + 1 - len(members)) * 4 <= top.row + 1:
                return
            lane.move(top.row, holes[0])
            top.row = holes[0]

    def _choose_lane(self, tokens: int, grows: Lane | None = None) -> Lane:
        """A lane with, or to be given, a row for a sequence of ``tokens``.

        The first of these whose padding stays within its share, else the one with the least: a lane that is wide
        enough, a lane made wider, a lane of its own. ``grows``: the lane where the sequence has a row, and which is
        too narrow.
        """
        need = round_slots(tokens)
        wide = sorted((lane for lane in self.lanes if lane.slots >= need), key=lambda lane: lane.slots)
        options: list[tuple[Lane | None, int, int]] = [(lane, _with_free_row(lane), lane.slots) for lane in wide]
        if self.lanes and not wide:
            lane = grows or max(self.lanes, key=lambda lane: lane.slots)
            # A lane that grows in length gives its free rows back: copying and keeping them would cost most.
            rows = 1 << (len(lane.in_use) - 1).bit_length() if grows else _with_free_row(lane)
            generous = min(round_slots(lane.capacity * 3 // 2), round_slots(self._facts.context_length))
            options += [(lane, rows, max(generous, need)), (lane, rows, need)]
        options += [
            (None, rows, need) for rows in sorted({1, min(4, self._facts.max_rows), self._facts.max_rows}, reverse=True)
        ]
        held = sum(int(lane.lengths.sum()) for lane in self.lanes)

        def padding_bytes(option: tuple[Lane | None, int, int]) -> int:
            lane, rows, slots = option
            leaves = grows if grows is not lane and grows is not None and len(grows.in_use) == 1 else None
            others = sum(other.rows * other.slots for other in self.lanes if other is not lane and other is not leaves)
            return (others + rows * slots - held) * self._facts.kv_bytes_per_token

        share = _PADDING_SHARE * self._facts.kv_budget_bytes
        affordable = (option for option in options if padding_bytes(option) <= share)
        chosen, rows, slots = next(affordable, None) or min(options, key=padding_bytes)
        if chosen is None:
            chosen = Lane(self._loaded, self._probe.kinds, rows, slots, self._probe.write)
            self.lanes.append(chosen)
        elif (rows, slots) != (chosen.rows, chosen.slots):
            chosen.resize(rows, slots)
            for place in self.of_lane(chosen):
                place.row = chosen.owners.index(place.sequence.seq)
        return chosen

    def _release(self, lane: Lane, row: int, *, wipe: bool = False) -> None:
        lane.release(row, wipe=wipe)
        if not lane.in_use:
            self.lanes.remove(lane)
            mx.clear_cache()


def _with_free_row(lane: Lane) -> int:
    return lane.rows if None in lane.owners else lane.rows * 2
