"""What mlx-lm's unmodified model code sees instead of its own KV cache: views of rows in one forward pass.

The duck type of mlx-lm's KVCache (``offset``, ``make_mask``, ``update_and_fetch``, ``state``). A view lives for one
forward pass; it writes into its layer and shows the model no slot beyond that pass's span, and of a sliding layer none
before the first query's window (8,192 positions, window 512, on the CPU: 52 instead of 620 ms a prefill chunk, 0.26
instead of 3.2 ms a decoding row). Made by ``arena.Lane``.
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from lmx.engine.mlx.layers import KVLayer, Write, WritePlaces

Seen = mx.array | tuple[mx.array, ...]
"""Keys or values as a model's attention takes them: an array, or packed values, scales and biases."""


class StepMasks(Protocol):
    """What a view asks of the masks: ``Masks``, or the same as arrays of a compiled graph."""

    def first_slot(self, window: int | None) -> int:
        """Before it no query sees anything: what a layer of that window need not fetch."""

    def get(self, fetched: int | None, window: int | None) -> mx.array | None:
        """The mask over slots [``first_slot(fetched)``, span) for queries that see ``window`` positions, their own
        included; None where all see everything."""


class Masks:
    """The masks of one forward pass, one for all layers that show the same slots."""

    def __init__(self, positions: npt.NDArray[np.int32], span: int, heads: int = 1) -> None:
        """``positions``: (B, L), of each query; ``span``: one beyond the last slot that any may see."""
        self._positions = positions
        self._least, self._most = int(positions.min()), int(positions.max())
        self._span = span
        # With several rows MLX's fused kernel on Metal wants a mask for each head, and copies one with less in every
        # layer (``mask_copy_unless`` in its scaled_dot_product_attention.cpp).
        self._heads = heads if len(positions) > 1 else 1
        self._made: dict[tuple[int, int | None], mx.array] = {}

    def first_slot(self, window: int | None) -> int:
        return 0 if window is None else max(0, self._least - window + 1)

    def get(self, fetched: int | None, window: int | None) -> mx.array | None:
        first = self.first_slot(fetched)
        if window is not None and self._most - window < first:
            window = None
        if window is None and self._least == self._span - 1:
            return None
        if (first, window) not in self._made:
            rows, tokens = self._positions.shape
            query = np.broadcast_to(self._positions[:, None, :, None], (rows, self._heads, tokens, 1))
            slots = mx.arange(first, self._span)
            mask = slots <= mx.array(query)
            if window is not None:
                mask = mask & (slots > mx.array(query - window))
            self._made[first, window] = mask
        return self._made[first, window]


class _View:
    """What the decode and the prefill view share of the cache duck type."""

    def __init__(self, layer: KVLayer) -> None:
        self._layer = layer
        self.keys: Seen | None = None
        self.values: Seen | None = None

    @property
    def state(self) -> tuple[Seen | None, Seen | None]:
        """Only what this forward pass may see."""
        return self.keys, self.values

    def keys_and_values(self) -> tuple[Seen | None, Seen | None]:
        """What later layers read that share this one's (Gemma 3n)."""
        return self.keys, self.values

    def empty(self) -> bool:
        return False

    def is_trimmable(self) -> bool:
        return False


class DecodeView(_View):
    """Rows [0, B) of a layer in a forward pass of L tokens each.

    Packed keys and values are shown as they are, under the names by which mlx-lm's attention knows its own packed
    cache: a decode step is as fast as what it reads is small.
    """

    def __init__(
        self, layer: KVLayer, offset: mx.array, slots: WritePlaces, write: Write, masks: StepMasks, span: int
    ) -> None:
        super().__init__(layer)
        self.offset = offset
        """(B,): position of each row's first token, what RoPE takes."""
        self._slots = slots
        self._write = write
        self._masks = masks
        self._span = span
        if layer.bits < 16:
            self.bits = layer.bits
            self.group_size = layer.group_size

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        window = self._layer.window
        mask = self._masks.get(window, window_size or window)
        return mask[:, :, None] if mask is not None and self._layer.grouped else mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Seen, Seen]:
        rows, seen = keys.shape[0], slice(self._masks.first_slot(self._layer.window), self._span)

        def shown(buffers: list[mx.array], new: mx.array) -> Seen:
            for index, part in enumerate(self._layer.packed(new)):
                buffers[index] = self._write(buffers[index], self._slots, part)
            found = tuple(buffer[:rows, :, seen] for buffer in buffers)
            return found if len(found) > 1 else found[0]

        self.keys, self.values = shown(self._layer.keys, keys), shown(self._layer.values, values)
        return self.keys, self.values


class PrefillView(_View):
    """One row of a layer while it prefills positions [start, start + n); or several, all from 0 on.

    Several rows are padded at their end to the longest. No query of a row's own comes after its padding, so the causal
    mask hides it, and only the row's own tokens are written.

    Packed keys and values are shown unpacked: MLX's fused attention takes no others, and beside it a chunk's unpacking
    costs nothing. The chunk's own are too, so that an answer does not depend on where its prompt was cut.
    """

    def __init__(self, layer: KVLayer, rows: Sequence[tuple[int, int]], masks: Masks, start: int, end: int) -> None:
        """``rows``: the row and the count of its own tokens, for each row of the pass."""
        super().__init__(layer)
        assert start == 0 or len(rows) == 1
        self.written: tuple[mx.array, mx.array] | None = None
        """What the pass wrote, (B, H, L, D) each."""
        self.offset = start
        self._end = end
        self._rows = rows
        self._masks = masks

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        fetched = self._layer.window
        window = window_size or fetched
        if N > 1 and not return_array and (window is None or window >= self._end):
            return "causal"
        return self._masks.get(fetched, window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        layer, start = self._layer, self.offset
        self.written = keys, values

        def shown(buffers: list[mx.array], new: mx.array) -> mx.array:
            parts = layer.packed(new)
            for buffer, part in zip(buffers, parts, strict=True):
                for index, (row, tokens) in enumerate(self._rows):
                    buffer[row, :, start : start + tokens] = part[index, :, :tokens]
            if start:
                [(row, _)] = self._rows
                seen = slice(self._masks.first_slot(layer.window), self._end)
                parts = [buffer[row : row + 1, :, seen] for buffer in buffers]
            return layer.unpacked(parts)

        keys, values = shown(layer.keys, keys), shown(layer.values, values)
        self.keys, self.values = keys, values
        return keys, values
