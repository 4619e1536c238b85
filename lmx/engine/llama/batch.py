"""What goes through llama.cpp together: runs of tokens, one a slot, and the tokens of no use that save forwards.

Shared cells are computed in one forward whatever is in the batch. Slots with cells of their own are computed in equal
parts: each forward takes of slots that follow each other as many tokens as the shortest of these still has. So a gap
between two slots, or one run that is longer than the others, costs a further forward, and tokens of no use in the gap,
or behind the shorter runs, may cost less. Knows no sequence; called by ``backend`` and ``draft``.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmx.engine.llama.native import Context

# Free slots between two rows that are computed with a token of no use, to have both rows in one forward: on two cores a
# further forward of SmolLM2 costs 10 ms, a row 6.5; in larger models and on GPUs forwards cost more, rows less.
_FILLED_GAP = 2
# So many tokens cost as much as a further forward: on those two cores, where runs of 1, 2, 3 and 4 tokens take 108 ms
# and four of 4 tokens 116; on a GPU, whose forward is bound by the weights that it reads.
_FORWARD_TOKENS = 1.5
_GPU_FORWARD_TOKENS = 16.0
# Longer runs are prompts, which nothing is made equal to.
_LONGEST = 16


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens that follow each other in one slot."""

    slot: int
    start: int
    """The first one's position."""
    tokens: Seq[int]
    wanted: int = 1
    """The logits after so many of the last ones are."""


class Batches:
    """The batches of one context."""

    def __init__(
        self,
        context: Context,
        *,
        equal_parts: bool,
        pads: bool,
        slot_cells: int,
        on_gpu: bool,
        free_from: Callable[[int, int], int],
    ) -> None:
        """``equal_parts``: its slots are computed so. ``pads``: and they can forget what they computed last.
        ``free_from``: the position from which so many tokens of no use may be computed in a slot that has no run; -1:
        none may."""
        self._context = context
        self._equal_parts = equal_parts
        self._pads = pads and equal_parts
        self._slot_cells = slot_cells
        self._forward_tokens = _GPU_FORWARD_TOKENS if on_gpu else _FORWARD_TOKENS
        self._free_from = free_from

    def compute(self, runs: Seq[Run]) -> Iterator[tuple[Run, npt.NDArray[np.float32]]]:
        """In as few calls as llama.cpp's batch allows; after each token whose logits (V,) are wanted these, good until
        the next ones are asked for. Slots ascend, and so do a run's tokens. Exhaust it: what is of no use is forgotten
        at its end."""
        runs = sorted(runs, key=lambda run: run.slot)
        width = self._width(runs)
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[bool] = []
        unused: list[tuple[int, int]] = []

        def add(slot: int, start: int, added: Seq[int], outputs: int) -> None:
            tokens.extend(added)
            positions.extend(range(start, start + len(added)))
            slots.extend([slot] * len(added))
            wanted.extend([False] * (len(added) - outputs) + [True] * outputs)

        for run in runs:
            if slots and self._equal_parts:
                for slot, start in self._fillers(slots[-1], run.slot, max(width, 1)):
                    add(slot, start, [0] * max(width, 1), 0)
                    unused.append((slot, start))
            add(run.slot, run.start, run.tokens, run.wanted)
            end = run.start + len(run.tokens)
            padding = self._padded(run, width) - len(run.tokens)
            if padding:
                add(run.slot, end, [run.tokens[-1]] * padding, 0)
                unused.append((run.slot, end))
        computed = (run for run in runs for _ in range(run.wanted))
        for span in self._spans(wanted):
            for logits in self._context.decode(tokens[span], positions[span], slots[span], wanted[span]):
                yield next(computed), logits
        for slot, start in unused:
            self._context.forget(slot, start)

    def _spans(self, wanted: Seq[bool]) -> Iterator[slice]:
        """Of no more tokens, and no more logits, than one call takes."""
        start = outputs = 0
        for place, each in enumerate(wanted):
            if place - start == self._context.batch_tokens or outputs + each > self._context.outputs:
                yield slice(start, place)
                start, outputs = place, 0
            outputs += each
        if start < len(wanted):
            yield slice(start, len(wanted))

    def _fillers(self, before: int, after: int, tokens: int) -> list[tuple[int, int]]:
        """The slots between two that so many tokens of no use go into, and from which positions on."""
        gap = range(before + 1, after)
        if len(gap) > _FILLED_GAP:
            return []
        starts = [self._free_from(slot, tokens) for slot in gap]
        return [] if -1 in starts else list(zip(gap, starts, strict=True))

    def _padded(self, run: Run, width: int) -> int:
        """Tokens of a run that is made so long, if its slot has room for that."""
        longer = max(len(run.tokens), width)
        return longer if run.start + longer <= self._slot_cells else len(run.tokens)

    def _width(self, runs: Seq[Run]) -> int:
        """How long to make the shorter runs: what costs least; 0: as they are."""
        if not self._pads:
            return 0
        widths = sorted({len(run.tokens) for run in runs if len(run.tokens) <= _LONGEST})
        if not widths or widths[-1] == 1:
            return 0
        return min([0, *widths], key=lambda width: self._cost(runs, width))

    def _cost(self, runs: Seq[Run], width: int) -> float:
        lengths: dict[int, int] = {}
        last = -1
        for run in runs:
            if lengths:
                filled = max(width, 1)
                lengths |= {slot: filled for slot, _ in self._fillers(last, run.slot, filled)}
            last = run.slot
            lengths[last] = self._padded(run, width)
        return forwards(lengths) * self._forward_tokens + sum(lengths.values())


def forwards(lengths: dict[int, int]) -> int:
    """How many forwards llama.cpp makes of so many tokens in each of these slots, which ascend."""
    count = 0
    left = dict(lengths)
    while left:
        taken: list[int] = []
        for slot in left:
            if not taken or slot == taken[-1] + 1:
                taken.append(slot)
        shortest = min(left[slot] for slot in taken)
        for slot in taken:
            left[slot] -= shortest
            if not left[slot]:
                del left[slot]
        count += 1
    return count
