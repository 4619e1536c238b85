"""Copies of KV by blocks of tokens: what the prefix store keeps for a later row, or a later process (DESIGN §5).

A block holds few arrays, because MLX on Metal has room for half a million of them: all layers' keys (or values) of one
shape are one array, those of sliding layers apart, so that they can be dropped. Its bytes are a header and the arrays'
values as they lie in memory; shapes and types follow from the model. Made and read by ``arena.Lane``.
"""

import json
import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from lmx.engine.mlx.adapter import LayerKind

Shape = tuple[tuple[int, ...], mx.Dtype]


class MLXBlock:
    """Keys and values of some ``tokens``: ``arrays`` (layers, heads, tokens, width) each; or, of 0 tokens, states."""

    def __init__(self, tokens: int, arrays: Sequence[mx.array], windowed: Sequence[mx.array] = ()) -> None:
        self.tokens = tokens
        self.arrays = list(arrays)
        self.windowed: list[mx.array] | None = list(windowed)
        """Of sliding layers; None: dropped."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays) + self.window_bytes

    @property
    def window_bytes(self) -> int:
        return sum(array.nbytes for array in self.windowed or ())

    def drop_window(self) -> None:
        self.windowed = None

    def to_bytes(self) -> bytes:
        arrays = [*self.arrays, *(self.windowed or ())]
        raw = [array.view(mx.uint8) for array in arrays]
        mx.eval(raw)
        header = json.dumps(
            {
                "shapes": [[list(array.shape), _name(array.dtype)] for array in arrays],
                "tokens": self.tokens,
                "windowed": None if self.windowed is None else len(self.windowed),
            }
        ).encode()
        return len(header).to_bytes(4, "little") + header + b"".join(np.array(array).tobytes() for array in raw)

    @classmethod
    def from_bytes(cls, data: bytes) -> "MLXBlock":
        """Raises ValueError for bytes that are none of this form; whether they are a model's ``Forms`` say."""
        size = int.from_bytes(data[:4], "little")
        try:
            header = json.loads(data[4 : 4 + size])
            shapes = [(tuple(map(int, shape)), getattr(mx, name)) for shape, name in header["shapes"]]
            tokens, windowed = int(header["tokens"]), header["windowed"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{len(data)} bytes are no block of KV: {error}") from None
        if len(data) != 4 + size + sum(math.prod(shape) * dtype.size for shape, dtype in shapes):
            raise ValueError(f"{len(data)} bytes are no block of KV: its header tells of other sizes")
        arrays, offset = [], 4 + size
        for shape, dtype in shapes:
            count = math.prod(shape) * dtype.size
            raw = np.frombuffer(data, np.uint8, count, offset)
            arrays.append(mx.array(raw).view(dtype).reshape(shape))
            offset += count
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]
        last = len(arrays) - (windowed or 0)
        block = cls(tokens, arrays[:last], arrays[last:])
        if windowed is None:
            block.drop_window()
        return block


class Forms:
    """What blocks of a model look like."""

    def __init__(self, kinds: Sequence[LayerKind]) -> None:
        self._kv, self._windowed = kv_forms(kinds, windowed=False), kv_forms(kinds, windowed=True)
        states = [kind for kind in kinds if kind.kind == "state"]
        self._states = [((1, *s), d) for kind in states for s, d in zip(kind.shapes, kind.dtypes, strict=True)]

    def check(self, block: MLXBlock) -> None:
        """Raises ValueError for a block of another model."""

        def shapes(arrays: Sequence[mx.array]) -> list[Shape]:
            return [(tuple(array.shape), array.dtype) for array in arrays]

        def of(forms: Sequence[tuple[int, int, int, mx.Dtype]]) -> list[Shape]:
            return [((count, heads, block.tokens, width), dtype) for count, heads, width, dtype in forms]

        expected = of(self._kv) if block.tokens else self._states
        found = shapes(block.arrays)
        if found == expected and block.windowed is not None and block.tokens:
            found, expected = shapes(block.windowed), of(self._windowed)
        if found != expected:
            raise ValueError(f"a block of KV is of another model: its arrays are {found}, this one's {expected}")


def kv_forms(kinds: Sequence[LayerKind], *, windowed: bool) -> list[tuple[int, int, int, mx.Dtype]]:
    """Of the layers that slide, or do not: (arrays, heads, width, type) of each array of a block."""
    counts: dict[tuple[int, int, mx.Dtype], int] = {}
    for kind in kinds:
        if kind.kind == "kv" and (kind.window is not None) == windowed:
            for (heads, width), dtype in (array for kept in kind.buffers for array in kept):
                counts[heads, width, dtype] = counts.get((heads, width, dtype), 0) + 1
    return [(count, heads, width, dtype) for (heads, width, dtype), count in counts.items()]


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
