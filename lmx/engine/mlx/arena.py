"""KV arenas: one buffer for many sequences, under mlx-lm's unmodified model code (DESIGN §4).

A lane holds rows × slots for every layer. A row is one sequence, left-aligned: slot index = token position. A decode
step runs the rows [0, B) in one forward pass and writes one slot of each in place; a prefill chunk runs one row by
itself, or the whole prompts of several, in place too, so that joining and leaving move nothing. A recurrent layer keeps
one state a row instead of slots.

The model sees ``DecodeView`` and ``PrefillView``: the duck type of mlx-lm's KVCache (``offset``, ``make_mask``,
``update_and_fetch``, ``state``). A row in [0, B) that does not decode now (free, or in prefill) is computed all the
same and writes to the lane's last slots, which no sequence may use and no mask shows.

Lengths are kept by the host. Slots beyond a row's length hold finite left-overs or zeros and are masked: a NaN in a
*masked* V slot makes the whole row NaN (measured). So what a sequence leaves behind is wiped wherever it was not seen
to be finite (``Seen``), and copied out only where it was. No I/O, no decisions: the MLX back end is the only caller.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from lmx.engine.mlx.adapter import ArraysCache, LayerKind, LoadedModel, make_prompt_cache, parts, whole
from lmx.engine.mlx.blocks import MLXBlock
from lmx.engine.mlx.layers import (
    DUMMY_SLOTS,
    KVLayer,
    Layer,
    OwnLayer,
    Slots,
    StateLayer,
    Write,
    copied,
    make_layer,
    with_front,
)
from lmx.engine.mlx.views import DecodeView, Masks, PrefillView


@dataclass(slots=True)
class Seen:
    """What is known of a row's slots.

    A NaN or an infinity in any layer's keys or values of a position is in the hidden state after it, since a position
    attends to itself: in the logits of that position, and in the keys and values of the last layer. So a finite draw
    vouches for its own position, and the last layer's largest number for all of a chunk (``Lane.written``). For what a
    step that was never read has written, nobody vouches.
    """

    finite: int = 0
    """So many first positions are known to be finite, in all layers."""
    windows_from: int = 0
    """Sliding layers hold nothing before that position, where its owner looks no more."""

    def found(self, start: int, end: int) -> None:
        """Those of [start, end) are finite."""
        if start <= self.finite < end:
            self.finite = end

    def back_to(self, length: int) -> None:
        self.finite = min(self.finite, length)


class Lane:
    """Rows × slots for every layer, for sequences of one length class."""

    def __init__(self, loaded: LoadedModel, kinds: Sequence[LayerKind], rows: int, slots: int, write: Write) -> None:
        self._loaded = loaded
        self.kinds = kinds
        self._write = write
        self.slots = slots
        self.lengths = np.zeros(rows, np.int32)
        """Tokens of each row whose KV is written."""
        self.owners: list[int | None] = [None] * rows
        """The sequence of each row."""
        self.seen = [Seen() for _ in range(rows)]
        """What was seen of each row to be finite. A row's next owner gets an object of its own."""
        self._private: dict[int, list[Any]] = {}
        """Recurrent states of rows in prefill: they take part in no decode step, so their state must not be stepped."""
        self._largest: dict[int, mx.array] = {}
        """Of what the newest prefill pass wrote into its rows."""
        self._layers = [make_layer(kind, rows, slots) for kind in kinds]
        self.last_tokens = mx.zeros((rows,), mx.int32)
        """The token that each row decodes next; lazy."""
        self.counts: StateLayer | None = None
        """(rows, V) each: how often a token stands in prompt and answer, and in the answer; while a row has
        penalties."""

    @property
    def rows(self) -> int:
        return len(self.owners)

    @property
    def in_use(self) -> list[int]:
        """The rows that sequences own, lowest first."""
        return [row for row, owner in enumerate(self.owners) if owner is not None]

    @property
    def arrays(self) -> list[mx.array]:
        """All device state, for evaluation."""
        states = [array for layer in self._layers for array in layer.arrays]
        private = [a for caches in self._private.values() for cache in caches for a in cache.cache if a is not None]
        counts = self.counts.arrays if self.counts else []
        return [self.last_tokens, *counts, *states, *private]

    @property
    def keys_and_values(self) -> list[mx.array]:
        """The buffers that decode steps write into."""
        return [array for layer in self._layers if isinstance(layer, KVLayer) for array in layer.arrays]

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.slots - DUMMY_SLOTS if any(isinstance(layer, KVLayer) for layer in self._layers) else sys.maxsize

    @property
    def _per_row(self) -> list[Layer]:
        return [*self._layers, *([self.counts] if self.counts else [])]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def acquire(self, owner: int) -> int:
        """The lowest free row; there must be one."""
        row = self.owners.index(None)
        self.owners[row] = owner
        self.lengths[row] = 0
        self.seen[row] = Seen()
        return row

    def release(self, row: int) -> None:
        """Forget the row. What may not be finite in it is wiped, for its next owner's masks cannot hide that; a
        recurrent state need not be, since its next owner's replaces it as a whole."""
        self._wipe(row)
        self.owners[row] = None
        self.lengths[row] = 0
        self._private.pop(row, None)

    def drop(self) -> None:
        """Let go of all buffers; the lane is of no use after that."""
        self._layers, self.counts = [], None
        self._private, self._largest = {}, {}
        self.last_tokens = mx.zeros((0,), mx.int32)

    def _wipe(self, row: int, keep: int = 0) -> None:
        """Zero the slots from ``keep`` on that nobody vouches for."""
        for layer in self._layers:
            if isinstance(layer, KVLayer):
                layer.wipe(row, max(self.seen[row].finite, keep), int(self.lengths[row]))

    def resize(self, rows: int, slots: int) -> None:
        """New buffers with the rows in use at the front. Costs a copy of those; one buffer at a time is held twice."""
        order = self.in_use
        kept = [(row, int(self.lengths[row])) for row in order]
        assert len(order) <= rows, (order, rows)
        most = slots - DUMMY_SLOTS if self.capacity < sys.maxsize else sys.maxsize
        assert max((length for _, length in kept), default=0) <= most, (kept, slots)
        for layer in self._per_row:
            layer.resize(kept, rows, slots)
        last = mx.zeros((rows,), mx.int32)
        if order:
            last[: len(order)] = self.last_tokens[mx.array(order)]
        self.last_tokens = last
        lengths = np.zeros(rows, np.int32)
        lengths[: len(order)] = self.lengths[order]
        self.lengths = lengths
        self.owners = [self.owners[row] for row in order] + [None] * (rows - len(order))
        self.seen = [self.seen[row] for row in order] + [Seen() for _ in range(rows - len(order))]
        self._private = {order.index(row): caches for row, caches in self._private.items()}
        self.slots = slots

    def move(self, source: int, target: int) -> None:
        """Move a row into a free one. Costs that row's copy, in memory that of one layer."""
        assert self.owners[target] is None
        self._copy_row(target, self, source)
        self._wipe(source)
        self.seen[target], self.seen[source] = self.seen[source], Seen()
        self.owners[target], self.owners[source] = self.owners[source], None
        self.lengths[target], self.lengths[source] = self.lengths[source], 0
        if source in self._private:
            self._private[target] = self._private.pop(source)

    def count_tokens(self, row: int, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Start to keep counts for a row with penalties."""
        if self.counts is None:
            self._make_counts()
        assert self.counts is not None
        size = self._loaded.vocab_size
        of_answer = np.bincount(np.asarray(answer, np.int64), minlength=size)
        seen = np.bincount(np.asarray(prompt, np.int64), minlength=size) + of_answer
        self.counts.put(row, [mx.array(counts[None].astype(np.int32)) for counts in (seen, of_answer)])

    def _make_counts(self) -> None:
        vocab = (self._loaded.vocab_size,)
        kind = LayerKind("state", None, (vocab, vocab), (mx.int32, mx.int32))
        self.counts = StateLayer(kind, self.rows)

    def add_counts(self, rows: Sequence[int], tokens: mx.array) -> None:
        """Count the (lazy) tokens that these rows just drew."""
        if self.counts is not None:
            index = mx.array(list(rows))
            self.counts.arrays = [array.at[index, tokens].add(1) for array in self.counts.arrays]

    def adopt(self, row: int, other: "Lane", source: int) -> None:
        """Copy all that ``other`` keeps of its row ``source``, to be released then, into a row of this lane. Costs
        that row's copy, in memory that of one layer."""
        if other.counts is not None and self.counts is None:
            self._make_counts()
        self._copy_row(row, other, source)
        self.lengths[row] = other.lengths[source]
        self.seen[row] = other.seen[source]
        if source in other._private:
            self._private[row] = other._private[source]

    def _copy_row(self, row: int, other: "Lane", source: int) -> None:
        length = int(other.lengths[source])
        for mine, theirs in zip(self._per_row, other._per_row, strict=False):
            if length or not isinstance(mine, KVLayer):
                mine.put(row, theirs.take(source, length))
            mx.eval(mine.arrays)
        self.last_tokens[row] = other.last_tokens[source]

    def fork(self, row: int, other: "Lane", source: int, tokens: int) -> None:
        """Copy the keys and values of the first ``tokens`` of a row of ``other`` (or of this lane) into an empty row;
        its prefill goes on from there. For models without recurrent states. Costs as ``move``."""
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            assert isinstance(mine, KVLayer)
            mine.put(row, theirs.take(source, tokens))
            mx.eval(mine.arrays)
        self.lengths[row] = tokens
        known = other.seen[source]
        self.seen[row] = Seen(min(known.finite, tokens), known.windows_from)

    def prefill(
        self, row: int, tokens: Sequence[int], *, last: bool, see: Callable[[mx.array], None] | None = None
    ) -> mx.array | None:
        """Run a chunk of one row's prompt; after the ``last`` chunk, its logits (1, V), else None. ``see`` is shown the
        hidden states (1, L, D)."""
        start = int(self.lengths[row])
        caches: list[Any] = []
        states: list[Any] = []
        fresh = parts(make_prompt_cache(self._loaded.model)) if start == 0 else None
        private = self._private.get(row, [])
        end = start + len(tokens)
        masks = Masks(np.arange(start, end, dtype=np.int32)[None], end)
        for index, layer in enumerate(self._layers):
            if isinstance(layer, KVLayer):
                caches.append(PrefillView(layer, [(row, len(tokens))], masks, start, end))
                continue
            if isinstance(layer, OwnLayer):
                layer.cache = fresh[index] if fresh else layer.cache
                caches.append(layer.cache)
                continue
            cache = fresh[index] if fresh else private[len(states)]
            states.append(cache)
            caches.append(cache)
        hidden = self._loaded.hidden(mx.array([list(tokens)], mx.int32), whole(self.kinds, caches))
        self.lengths[row] = end
        self._largest = {row: _largest(_newest(caches))}
        if see:
            see(hidden)
        if not last:
            if states:
                self._private[row] = states
            return None
        self._private.pop(row, None)
        for layer, cache in zip((x for x in self._layers if isinstance(x, StateLayer)), states, strict=True):
            layer.put(row, cache.cache)
        return self._loaded.logits(hidden[:, -1:])[:, 0]

    def written(self, row: int) -> mx.array:
        """The largest numbers of what a prefill pass just wrote into the row: whether it is finite, and for a step that
        draws nothing, whose end could not be seen otherwise, that it is there. (Arrays of their own: while somebody
        holds a lane's buffer or a view of it, the next write copies the buffer.)"""
        return self._largest.pop(row)

    @property
    def prefills_together(self) -> bool:
        """Whether ``prefill_whole`` takes several rows: a recurrent state would run on into a row's padding."""
        return all(isinstance(layer, KVLayer) for layer in self._layers)

    def prefill_whole(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> mx.array:
        """Run the whole prompts of empty rows in one forward pass; their logits (B, V).

        Costs B × the longest; best given prompts of like lengths.
        """
        longest = max(map(len, prompts))
        # Padded with the row's own tokens: a foreign one whose embedding is not finite would spoil the row.
        tokens = mx.array([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts], mx.int32)
        lengths = [len(prompt) for prompt in prompts]
        places = list(zip(rows, lengths, strict=True))
        masks = Masks(np.arange(longest, dtype=np.int32)[None], longest)
        caches = [PrefillView(layer, places, masks, 0, longest) for layer in self._layers if isinstance(layer, KVLayer)]
        assert len(caches) == len(self._layers)
        hidden = self._loaded.hidden(tokens, whole(self.kinds, caches))
        self.lengths[list(rows)] = lengths
        newest = _newest(caches)
        self._largest = {
            row: _largest([array[index, :, :count] for array in newest]) for index, (row, count) in enumerate(places)
        }
        return self._loaded.logits(hidden[mx.arange(len(rows)), mx.array(lengths) - 1][:, None])[:, 0]

    def decode(self, active: Sequence[int], tokens: mx.array | None = None) -> mx.array:
        """Run one step of the rows in ``active``: L tokens each, written at [length, length + L).

        ``tokens``: (B, L), B = 1 + the highest active row; by default ``last_tokens``, L = 1. Returns logits (B, L,
        V); rows that are not active hold nonsense. Every active row must have L free slots before the lane's last.
        """
        count = max(active) + 1
        if tokens is None:
            tokens = self.last_tokens[:count, None]
        return self._loaded.logits(self._decoded(active, tokens, [tokens.shape[1]] * len(active)))

    def decode_each(self, active: Sequence[int], tokens: Sequence[Sequence[int]]) -> mx.array:
        """One step of the rows in ``active`` with as many tokens as each is given, in one pass: rows with fewer are
        padded, which writes nothing. Returns the logits after each token, (N, V), row by row."""
        counts = [len(own) for own in tokens]
        width = max(counts)
        padded = np.zeros((max(active) + 1, width), np.int32)
        for row, own in zip(active, tokens, strict=True):
            padded[row] = [*own, *[own[-1]] * (width - len(own))]
        hidden = self._decoded(active, mx.array(padded), counts)
        rows = np.repeat(np.asarray(active, np.int32), counts)
        steps = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        return self._loaded.logits(hidden[mx.array(rows), mx.array(steps)][:, None])[:, 0]

    def _decoded(self, active: Sequence[int], tokens: mx.array, counts: Sequence[int]) -> mx.array:
        """What such a step gives before the output head."""
        width = tokens.shape[1]
        assert width <= DUMMY_SLOTS, width  # nor does a GPU check where it writes
        caches = self.begin_decode(active, width, counts)
        hidden = self._loaded.hidden(tokens, whole(self.kinds, caches))
        self.end_decode(active, caches, counts)
        return hidden

    def begin_decode(self, active: Sequence[int], width: int, counts: Sequence[int]) -> list[Any]:
        """What model code sees of each layer in a step of ``width`` tokens a row, ``counts`` of them each row's own."""
        count = max(active) + 1
        lengths, own, slots = self.places(active, count, width, counts)
        positions = lengths[:, None] + np.minimum(np.arange(width, dtype=np.int32), own[:, None] - 1)
        span = int((lengths + own).max())
        masks = Masks(positions, span, mask_heads(self._loaded, self.kinds))
        offset = mx.array(lengths)
        written = np.where(slots[:, 0] == lengths, own, width).tolist()
        return decode_caches(
            self._layers,
            count,
            partial(DecodeView, offset=offset, slots=Slots(slots, written), write=self._write, masks=masks, span=span),
        )

    def places(
        self, active: Sequence[int], count: int, width: int, counts: Sequence[int]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Of the first ``count`` rows in such a step: the position of each one's first token, how many it has (both
        (count,)), and the slots that it writes (count, width)."""
        steps = np.arange(width, dtype=np.int32)
        # The others stand where an active row stands, so that they change neither the span nor its first slot.
        lengths = np.full(count, self.lengths[active[0]], np.int32)
        lengths[list(active)] = self.lengths[list(active)]
        own = np.full(count, counts[0], np.int32)
        own[list(active)] = counts
        # What is written beside a row's own tokens goes where rows that do not decode write.
        kept = np.zeros((count, width), bool)
        kept[list(active)] = steps < own[list(active), None]
        slots = np.where(kept, lengths[:, None] + steps, self.slots - DUMMY_SLOTS + steps)
        return lengths, own, slots.astype(np.int32)

    def lend(self) -> list[list[mx.array]]:
        """The buffers of each layer, for a compiled step of one token a row, which ends with ``take_back``."""
        return [layer.arrays for layer in self._layers]

    def take_back(self, active: Sequence[int], written: Sequence[Sequence[mx.array]]) -> None:
        """What that step made of the buffers."""
        for layer, arrays in zip(self._layers, written, strict=True):
            assert not isinstance(layer, OwnLayer)
            layer.arrays = list(arrays)
        self.lengths[list(active)] += 1

    def end_decode(self, active: Sequence[int], caches: Sequence[Any], counts: Sequence[int]) -> None:
        """Keep what the step wrote."""
        keep_states(self._layers, caches)
        self.lengths[list(active)] += np.asarray(counts, np.int32)

    def rewind(self, row: int, length: int) -> int:
        """Take back the row's tokens from position ``length`` on (rejected drafts); how many are left: none where a
        layer has a state instead of positions, or no more of its window there, which cannot go back."""
        if not self.forks_at(row, length) or not all(isinstance(layer, KVLayer) for layer in self._layers):
            self._private.pop(row, None)
            length = 0
        self._wipe(row, length)
        self.seen[row].back_to(length)
        self.lengths[row] = length
        return length

    def copy_out(self, row: int, start: int, end: int) -> MLXBlock:
        """A copy of the row's keys and values of positions [start, end); given to the device at once, since a view of
        a buffer that waits in a graph makes the next write copy it whole. Raises ValueError where nobody vouches for
        them."""
        seen = self.seen[row]
        if end > seen.finite:
            raise ValueError(f"positions {start} to {end}: {seen.finite} are known to be finite")

        def copies(windowed: bool) -> list[mx.array]:
            found = [[array[row, :, start:end][None] for array in group] for group in self._alike(windowed)]
            # Stacked alone, an array would stay a view of the lane.
            return [mx.concatenate([*views, views[0][:0]]) for views in found]

        block = MLXBlock(end - start, copies(False), copies(True))
        if start < seen.windows_from:
            block.drop_window()
        mx.async_eval(block.arrays, block.windowed or [])  # type: ignore[no-untyped-call]
        return block

    def copy_in(self, row: int, blocks: Sequence[MLXBlock], tokens: int, states: MLXBlock | None) -> None:
        """Fill an empty row that has room with the first ``tokens`` of the blocks, which follow each other, and a
        sequence's recurrent states at that length; its prefill goes on from there."""
        starts = [0, *accumulate(block.tokens for block in blocks)]
        lost = max((index + 1 for index, block in enumerate(blocks) if block.windowed is None), default=0)
        first = starts[lost] if self._window else 0
        assert first <= max(tokens - self._window + 1, 0), (first, tokens)
        for index, group in enumerate(self._alike(False)):
            _fill(group, row, 0, tokens, [block.arrays[index] for block in blocks])
        for index, group in enumerate(self._alike(True)):
            _fill(group, row, first, tokens, [(block.windowed or [])[index] for block in blocks[lost:]])
        if states is not None:
            self._private[row] = self._caches(states)
        self.lengths[row] = tokens
        # It was vouched for when it was copied out.
        self.seen[row] = Seen(tokens, first)

    def forks_at(self, row: int, tokens: int) -> bool:
        """Whether all layers hold what a sequence of the row's first ``tokens`` looks at."""
        return self.seen[row].windows_from <= max(tokens - self._window + 1, 0)

    @property
    def _window(self) -> int:
        """The longest of the sliding layers'; 0: there are none."""
        return max((layer.window or 0 for layer in self._layers if isinstance(layer, KVLayer)), default=0)

    def _alike(self, windowed: bool) -> list[list[mx.array]]:
        """The buffers of the layers that slide, or do not, those of one shape together: as ``blocks.kv_forms``."""
        groups: dict[object, list[mx.array]] = {}
        for layer in self._layers:
            if isinstance(layer, KVLayer) and (layer.window is not None) == windowed:
                for array in layer.arrays:
                    groups.setdefault((array.shape[1], array.shape[3], array.dtype), []).append(array)
        return list(groups.values())

    def states(self, row: int) -> MLXBlock:
        """A copy of the row's recurrent states."""
        private = iter(self._private.get(row, ()))
        found: list[mx.array] = []
        for layer in self._layers:
            if isinstance(layer, StateLayer):
                in_prefill = row in self._private
                found += copied(next(private).cache if in_prefill else [a[row : row + 1] for a in layer.arrays])
        mx.async_eval(found)  # type: ignore[no-untyped-call]
        return MLXBlock(0, found)

    def _caches(self, states: MLXBlock) -> list[Any]:
        """What a prefill goes on with: mlx-lm's own caches, with these states in them."""
        given = iter(states.arrays)
        caches: list[Any] = []
        for layer, cache in zip(self._layers, parts(make_prompt_cache(self._loaded.model)), strict=True):
            if isinstance(layer, StateLayer):
                cache.cache = [next(given) for _ in layer.arrays]
                caches.append(cache)
        return caches

    def restore(self, row: int, length: int, arrays: Sequence[mx.array]) -> None:
        """For the load probe: fill an empty row with each layer's keys and values (as the model gave them), or states,
        in turn."""
        given = iter(arrays)
        states: list[mx.array] = []
        for layer in self._layers:
            if isinstance(layer, KVLayer):
                layer.put(row, [part for _ in range(2) for part in layer.packed(next(given))])
            else:
                states += [next(given) for _ in layer.arrays]
        if states:
            self._private[row] = self._caches(MLXBlock(0, states))
        self.lengths[row] = length

    def poison(self, *, inside: float, outside: float, span: int) -> None:
        """For the load probe: fill what a mask must hide, slots [length, span) of used rows, with ``inside``, and what
        may reach no used row at all, later slots and free rows, with ``outside``."""
        slots = mx.arange(self.slots)
        written = (slots < mx.array(self.lengths)[:, None])[:, None, :, None]
        used = mx.array([owner is not None for owner in self.owners])[:, None]
        hidden = (used & (slots < span))[:, None, :, None]
        for layer in self._layers:
            if isinstance(layer, KVLayer):
                for arrays in (layer.keys, layer.values):
                    for index, array in enumerate(arrays):
                        if array.dtype != mx.uint32:  # packed values are numbers, whatever they are; scales are not
                            foreign = mx.where(hidden, inside, outside).astype(array.dtype)
                            arrays[index] = mx.where(written, array, foreign)
            else:
                free = mx.array([row for row, owner in enumerate(self.owners) if owner is None], dtype=mx.int32)
                for array in layer.arrays:
                    array[free] = outside


def mask_heads(loaded: LoadedModel, kinds: Sequence[LayerKind]) -> int:
    """For so many heads decode steps make a mask."""
    # mlx-lm's attention over packed KV broadcasts one mask over all heads.
    return 1 if any(kind.bits < 16 for kind in kinds) else loaded.query_heads


def decode_caches(layers: Sequence[Layer], count: int, view: Callable[[KVLayer], DecodeView]) -> list[Any]:
    """What model code sees of the first ``count`` rows of these layers in a decode step."""
    caches: list[Any] = []
    for layer in layers:
        if isinstance(layer, KVLayer):
            caches.append(view(layer))
        elif isinstance(layer, OwnLayer):
            caches.append(layer.cache)
        else:
            cache = ArraysCache(len(layer.arrays))
            cache.cache = [array[:count] for array in layer.arrays]
            caches.append(cache)
    return caches


def keep_states(layers: Sequence[Layer], caches: Sequence[Any]) -> None:
    """Recurrent states that a step left in its caches, back into their layers. (Views write into theirs.)"""
    for layer, cache in zip(layers, caches, strict=True):
        if isinstance(layer, StateLayer):
            layer.arrays = [with_front(old, new) for old, new in zip(layer.arrays, cache.cache, strict=True)]


def _newest(caches: Sequence[Any]) -> list[mx.array]:
    """What a prefill pass wrote as the last layer's keys and values, and all states."""
    written = [cache.written for cache in caches if isinstance(cache, PrefillView) and cache.written]
    # Of width 0 where the model makes a cache that it does not need (nemotron-nas).
    found = list(next((pair for pair in reversed(written) if any(array.size for array in pair)), ()))
    for cache in caches:
        if isinstance(cache, ArraysCache):
            found += [array for array in cache.cache if array is not None]
        elif not isinstance(cache, PrefillView):
            arrays = [array for _, array in tree_flatten(cache.state) if isinstance(array, mx.array)]
            found += [array[(slice(0, 1),) * array.ndim] for array in arrays]
    return found


def _largest(arrays: Sequence[mx.array]) -> mx.array:
    # MLX's maximum is NaN where one of the numbers is.
    return mx.stack([mx.max(mx.abs(array)).astype(mx.float32) for array in arrays if array.size])


def _fill(buffers: Sequence[mx.array], row: int, start: int, end: int, parts: Sequence[mx.array]) -> None:
    """Write what the ``parts`` (buffers, heads, tokens, width) hold, one after the other, into slots [start, end)."""
    if not buffers[0].size:
        return
    # Each by itself: joined first, 1,500 tokens of SmolLM2 take 107 instead of 19 ms on a CPU.
    for part in parts:
        tokens = min(part.shape[2], end - start)
        for buffer, new in zip(buffers, part, strict=True):
            buffer[row, :, start : start + tokens] = new[:, :tokens]
        start += tokens
    mx.async_eval(buffers)  # type: ignore[no-untyped-call]
