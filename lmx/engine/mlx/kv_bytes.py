"""One row's KV as bytes: what leaves the engine's thread, and its process, must be no MLX array (DESIGN §4).

The length in tokens, 8 bytes little-endian, then each array's values as they lie in memory; their shapes and types
follow from the model. Called by the MLX back end.
"""

import math

import mlx.core as mx
import numpy as np

from lmx.engine.mlx.arena import Lane

_HEADER_BYTES = 8


def pack(lane: Lane, row: int) -> bytes:
    """Raises ValueError for a model whose KV cannot be exported."""
    length = int(lane.lengths[row])
    lane.row_shapes(length)
    raw = [array.view(mx.uint8) for array in lane.export(row)]
    mx.eval(raw)
    return length.to_bytes(_HEADER_BYTES, "little") + b"".join(np.array(array).tobytes() for array in raw)


def unpack(lane: Lane, data: bytes) -> tuple[int, list[mx.array]]:
    """(tokens, the arrays for ``Lane.restore``). Raises ValueError for bytes that are none of this model's."""
    length = int.from_bytes(data[:_HEADER_BYTES], "little")
    shapes = lane.row_shapes(length)
    sizes = [math.prod(shape) * dtype.size for shape, dtype in shapes]
    if len(data) != _HEADER_BYTES + sum(sizes):
        raise ValueError(
            f"{len(data)} bytes are no KV of this model: {length} tokens take {_HEADER_BYTES + sum(sizes)}"
        )
    arrays, offset = [], _HEADER_BYTES
    for (shape, dtype), size in zip(shapes, sizes, strict=True):
        raw = np.frombuffer(data, np.uint8, size, offset)
        arrays.append(mx.array(raw).view(dtype).reshape(shape))
        offset += size
    return length, arrays
