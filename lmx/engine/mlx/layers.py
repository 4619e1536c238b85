"""Device buffers that hold what sequences leave behind in a model's layers, a row for each sequence.

Three kinds: keys and values of each position (``KVLayer``), a recurrent state (``StateLayer``), and a cache that only
mlx-lm understands (``OwnLayer``). They know rows and slots, not lengths, masks or models. ``arena.Lane`` is the only
caller.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from lmx.engine.mlx.adapter import LayerKind

SLOT_QUANTUM = 256
DUMMY_SLOTS = 16
"""The last slots of a lane, where rows that do not decode now write: as many as a step may have tokens a row."""


def round_slots(tokens: int) -> int:
    """Slots to allocate for sequences of that many tokens."""
    return -(-tokens // SLOT_QUANTUM) * SLOT_QUANTUM + DUMMY_SLOTS


class KVLayer:
    """Keys and values of one layer for all rows: a buffer (rows, heads, slots, width) each, or three where they are
    packed (values, scales and biases)."""

    def __init__(self, kind: LayerKind, rows: int, slots: int) -> None:
        self.window = kind.window
        self.grouped = kind.grouped
        self.bits = kind.bits
        self.group_size = kind.group_size
        self.keys, self.values = (
            [mx.zeros((rows, heads, slots, width), dtype) for (heads, width), dtype in kept] for kept in kind.buffers
        )

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.keys, *self.values]

    @arrays.setter
    def arrays(self, arrays: Sequence[mx.array]) -> None:
        cut = len(arrays) // 2
        self.keys, self.values = list(arrays[:cut]), list(arrays[cut:])

    def packed(self, new: mx.array) -> list[mx.array]:
        """Keys or values as its buffers hold them."""
        if self.bits == 16:
            return [new]
        values, scales, biases = mx.quantize(new, group_size=self.group_size, bits=self.bits)
        # MLX packs a NaN as if it were a number, which would hide it from the draws that vouch for the slot.
        return [values, scales, biases + mx.sum(0 * new, axis=-1, keepdims=True)]

    def unpacked(self, arrays: Sequence[mx.array]) -> mx.array:
        """The opposite of ``packed``."""
        if self.bits == 16:
            return arrays[0]
        values, scales, biases = arrays
        return mx.dequantize(values, scales, biases, self.group_size, self.bits)

    def resize(self, kept: Sequence[tuple[int, int]], rows: int, slots: int) -> None:
        """New buffers; the rows named in ``kept``, each with its length, are copied to their front."""

        def moved(old: mx.array) -> mx.array:
            new = mx.zeros((rows, old.shape[1], slots, old.shape[3]), old.dtype)
            for index, (row, length) in enumerate(kept):
                if length:
                    new[index : index + 1, :, :length] = old[row : row + 1, :, :length]
            if any(length for _, length in kept):
                # So that only this buffer is held twice. An empty one is not even made before it is used.
                mx.eval(new)
            return new

        for arrays in (self.keys, self.values):
            for index, array in enumerate(arrays):
                arrays[index] = moved(array)

    def take(self, row: int, length: int) -> list[mx.array]:
        """A copy of the row's first slots. Evaluated: a view of the buffer that waits in a graph would make the next
        write into that buffer copy it as a whole (14 ms and 50 MB instead of 0.04 ms, for 40 tokens of 8 × 8,192)."""
        return _copies([array[row : row + 1, :, :length] for array in self.arrays])

    def put(self, row: int, arrays: Sequence[mx.array]) -> None:
        for mine, given in zip(self.arrays, arrays, strict=True):
            mine[row : row + 1, :, : given.shape[2]] = given

    def wipe(self, row: int, start: int, end: int) -> None:
        if start < end:
            for array in self.arrays:
                array[row, :, start:end] = 0


class StateLayer:
    """The recurrent state of one layer for all rows: (rows, ...) arrays."""

    def __init__(self, kind: LayerKind, rows: int) -> None:
        self.arrays = [mx.zeros((rows, *s), d) for s, d in zip(kind.shapes, kind.dtypes, strict=True)]

    def resize(self, kept: Sequence[tuple[int, int]], rows: int, slots: int) -> None:
        index = mx.array([row for row, _ in kept], dtype=mx.int32)

        def moved(old: mx.array) -> mx.array:
            new = mx.zeros((rows, *old.shape[1:]), old.dtype)
            if len(kept):
                new[: len(kept)] = old[index]
            return new

        self.arrays = [moved(array) for array in self.arrays]
        mx.eval(self.arrays)

    def take(self, row: int, length: int) -> list[mx.array]:
        return _copies([array[row : row + 1] for array in self.arrays])

    def put(self, row: int, arrays: Sequence[mx.array]) -> None:
        for mine, given in zip(self.arrays, arrays, strict=True):
            mine[row : row + 1] = given


class OwnLayer:
    """A layer on the cache that mlx-lm makes for it, for one sequence at a time."""

    def __init__(self) -> None:
        self.cache: Any = None

    @property
    def arrays(self) -> list[mx.array]:
        state = [] if self.cache is None else tree_flatten(self.cache.state)
        return [array for _, array in state if isinstance(array, mx.array)]

    def resize(self, kept: Sequence[tuple[int, int]], rows: int, slots: int) -> None:
        """mlx-lm's caches grow by themselves."""

    def take(self, row: int, length: int) -> list[Any]:
        return [self.cache]

    def put(self, row: int, arrays: Sequence[Any]) -> None:
        (self.cache,) = arrays


Layer = KVLayer | StateLayer | OwnLayer
Write = Callable[[mx.array, "WritePlaces", mx.array], mx.array]


def make_layer(kind: LayerKind, rows: int, slots: int) -> Layer:
    if kind.kind == "kv":
        return KVLayer(kind, rows, slots)
    return StateLayer(kind, rows) if kind.kind == "state" else OwnLayer()


def copied(views: Sequence[mx.array]) -> list[mx.array]:
    """Copies, not evaluated."""
    # Not ``mx.contiguous``, which gives a view of one row and one head back as it is.
    return [mx.concatenate([view, view[:0]]) for view in views]


def _copies(views: Sequence[mx.array]) -> list[mx.array]:
    copies = copied(views)
    mx.eval(copies)
    return copies


class WritePlaces(Protocol):
    """What a ``Write`` asks of where it writes: ``Slots``, or the same as arrays of a compiled graph."""

    counts: Sequence[int]
    """How many of each row's tokens count."""

    def along(self, shape: tuple[int, ...]) -> mx.array:
        """(B, H, L, D): the slot of each element of keys or values of that shape."""

    def of_heads(self, heads: int) -> tuple[mx.array, ...]:
        """Three of (B, H, L): the row, the head and the slot of each vector."""

    def starts(self) -> list[mx.array]:
        """For each row, (row, its first slot)."""


class Slots:
    """Where one forward pass writes: token l of row b into slot ``positions[b, l]``, for rows [0, B). The first
    ``counts[b]`` of them follow each other; the others are padding, and may also stay unwritten.

    The same for all its layers, so what the writes index with is made once a pass for each shape, and as uint32, which
    MLX need not cast (before that a write into some of a lane's rows took 12 operations, most of them for indices).
    """

    def __init__(self, positions: npt.NDArray[np.int32], counts: Sequence[int] | None = None) -> None:
        self._positions = positions.astype(np.uint32)
        self.counts = counts or [positions.shape[1]] * len(positions)
        self._along: dict[tuple[int, ...], mx.array] = {}
        self._of_heads: dict[int, tuple[mx.array, ...]] = {}
        self._starts: list[mx.array] = []

    def along(self, shape: tuple[int, ...]) -> mx.array:
        if shape not in self._along:
            self._along[shape] = mx.broadcast_to(mx.array(self._positions[:, None, :, None]), shape)
        return self._along[shape]

    def of_heads(self, heads: int) -> tuple[mx.array, ...]:
        if heads not in self._of_heads:
            rows = np.arange(len(self._positions), dtype=np.uint32)[:, None, None]
            index = (rows, np.arange(heads, dtype=np.uint32)[:, None], self._positions[:, None, :])
            self._of_heads[heads] = tuple(mx.array(array) for array in np.broadcast_arrays(*index))
        return self._of_heads[heads]

    def starts(self) -> list[mx.array]:
        if not self._starts:
            self._starts = [mx.array([row, slot], mx.uint32) for row, slot in enumerate(self._positions[:, 0].tolist())]
        return self._starts


def scatter_write(buffer: mx.array, slots: WritePlaces, new: mx.array) -> mx.array:
    """Write ``new`` (B, H, L, D) into rows [0, B), in one in-place operation."""
    if buffer.shape[0] == new.shape[0]:
        # With all rows written, the cheaper operation (2 % of a step of SmolLM2, 6 % of one of a very small model).
        return mx.put_along_axis(buffer, slots.along(new.shape), new, axis=2)
    buffer[slots.of_heads(new.shape[1])] = new
    return buffer


def slice_write(buffer: mx.array, slots: WritePlaces, new: mx.array) -> mx.array:
    """The same, row by row: for back ends whose scatter copies the buffer."""
    for row, (start, count) in enumerate(zip(slots.starts(), slots.counts, strict=True)):
        buffer = mx.slice_update(buffer, new[row : row + 1, :, :count], start, axes=(0, 2))
    return buffer


def with_front(old: mx.array, new: mx.array) -> mx.array:
    """``old`` with its first rows replaced by ``new``, in place."""
    if new.shape[0] == old.shape[0]:
        return new
    old[: new.shape[0]] = new
    return old
