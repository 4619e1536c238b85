"""What mlx-lm's unmodified model code sees instead of its own KV cache: views of rows in one forward pass.

The duck type of mlx-lm's KVCache (``offset``, ``make_mask``, ``update_and_fetch``, ``state``). A view lives for one
forward pass; it writes into its layer and shows the model no slot beyond that pass's span. Made by ``arena.Lane``.
"""

from collections.abc import Sequence

import mlx.core as mx

from lmx.engine.mlx.layers import KVLayer, Write


class Masks:
    """The masks of one forward pass: one for all layers of a window, made when the first layer asks."""

    def __init__(self, positions: mx.array, span: int, full: bool) -> None:
        self._positions = positions
        """(B, L): the position of each query."""
        self._slots = mx.arange(span)
        self._full = full
        """Every row sees every slot, unless a window says otherwise."""
        self._made: dict[int | None, mx.array] = {}
        self._span = span

    def get(self, window: int | None) -> mx.array | None:
        if window is not None and window >= self._span:
            window = None
        if window is None and self._full:
            return None
        if window not in self._made:
            query = self._positions[:, None, :, None]
            mask = self._slots <= query
            if window is not None:
                mask = mask & (self._slots > query - window)
            self._made[window] = mask
        return self._made[window]


class _View:
    """What the decode and the prefill view share of the cache duck type."""

    def __init__(self, layer: KVLayer) -> None:
        self._layer = layer
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        """Only what this forward pass may see."""
        return self.keys, self.values

    def keys_and_values(self) -> tuple[mx.array | None, mx.array | None]:
        """What later layers read that share this one's (Gemma 3n)."""
        return self.keys, self.values

    def empty(self) -> bool:
        return False

    def is_trimmable(self) -> bool:
        return False


class DecodeView(_View):
    """Rows [0, B) of a layer in a forward pass of L tokens each."""

    def __init__(
        self, layer: KVLayer, offset: mx.array, positions: mx.array, write: Write, masks: Masks, span: int
    ) -> None:
        super().__init__(layer)
        self.offset = offset
        """(B,): position of each row's first token, what RoPE takes."""
        self._positions = positions
        """(B, L): the slots to write."""
        self._write = write
        self._masks = masks
        self._span = span

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        return self._masks.get(window_size or self._layer.window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        layer, rows = self._layer, keys.shape[0]
        layer.keys = self._write(layer.keys, self._positions, keys)
        layer.values = self._write(layer.values, self._positions, values)
        self.keys = layer.keys[:rows, :, : self._span]
        self.values = layer.values[:rows, :, : self._span]
        return self.keys, self.values


class PrefillView(_View):
    """One row of a layer while it prefills positions [start, start + n); or several, all from 0 on.

    Several rows are padded at their end to the longest. No query of a row's own comes after its padding, so the causal
    mask hides it, and only the row's own tokens are written.
    """

    def __init__(self, layer: KVLayer, rows: Sequence[tuple[int, int]], start: int) -> None:
        """``rows``: the row and the count of its own tokens, for each row of the pass."""
        super().__init__(layer)
        assert start == 0 or len(rows) == 1
        self.offset = start
        self._rows = rows

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        window = window_size or self._layer.window
        end = self.offset + N
        if window is not None and window >= end:
            window = None
        if window is None and N == 1:
            return None
        if window is None and not return_array:
            return "causal"
        return Masks(mx.arange(self.offset, end)[None], end, full=False).get(window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        layer, start = self._layer, self.offset
        for index, (row, tokens) in enumerate(self._rows):
            layer.keys[row, :, start : start + tokens] = keys[index, :, :tokens]
            layer.values[row, :, start : start + tokens] = values[index, :, :tokens]
        self.keys, self.values = keys, values
        if start:
            [(row, tokens)] = self._rows
            end = start + tokens
            self.keys, self.values = layer.keys[row : row + 1, :, :end], layer.values[row : row + 1, :, :end]
        return self.keys, self.values
