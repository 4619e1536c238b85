"""llama.cpp's copy of a sequence's state, taken apart by the token and put together again.

Its format is nowhere promised, so whoever uses this proves it first (``copies``). What is read here is the KV of plain
attention: which cells there are, then each layer's keys, then each layer's values, a row for each cell in the order of
the cells (transposed values: a row for each dimension). Pure NumPy over bytes; called by ``copies``.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

HEAD = struct.pack("<Ii", 0xAF143CD8, 0)
"""A magic number, and a slot that nobody reads."""
_NUMBER = struct.Struct("<I")
_ROWS = struct.Struct("<iQ")  # type, bytes of a row
_TRANSPOSED_ROWS = struct.Struct("<iII")  # type, bytes of an element, rows
# What a cell may have beside its position and its sequence: where it is in an image.
_EXTRAS = (0, 12)


def allocate_bytes(size: int) -> Bytes:
    return np.empty(size, np.uint8)


class Tensor(NamedTuple):
    """A layer's keys or values: ``groups`` × cells × ``width`` bytes. One group, but of transposed values."""

    header: bytes
    """What stands before it."""
    groups: int
    width: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How KV lies in the states of a model, but for how many cells there are."""

    extra: int
    transposed: bool
    layers: int
    tensors: tuple[Tensor, ...]

    @property
    def token_bytes(self) -> int:
        return self.extra + sum(tensor.groups * tensor.width for tensor in self.tensors)

    def columns(self, data: Bytes, count: int) -> list[Bytes]:
        """Views into the copy ``data`` of ``count`` tokens, each (groups, count, width): what cells have beside, if
        anything, then the tensors."""
        shapes = [(tensor.groups, tensor.width) for tensor in self.tensors]
        columns, place = [], 0
        for groups, width in [(1, self.extra), *shapes] if self.extra else shapes:
            columns.append(_view(data, place, groups, count, width))
            place += groups * count * width
        return columns

    def join(
        self,
        parts: Sequence[Sequence[Bytes]],
        tokens: int,
        streams: int,
        rest: Bytes,
        allocate: Callable[[int], Bytes] = allocate_bytes,
    ) -> Bytes:
        """A state of the first ``tokens`` of ``parts`` (columns) that follow each other from position 0 on; ``rest``:
        what the state has behind its KV."""
        cell = _cell(self.extra)
        header_bytes = sum(len(tensor.header) for tensor in self.tensors)
        before = HEAD + _NUMBER.pack(streams) + _NUMBER.pack(tokens)
        behind = bytes(_NUMBER.size * (streams - 1))
        size = len(before) + tokens * (cell.itemsize + self.token_bytes - self.extra) + 2 * _NUMBER.size
        state = allocate(size + header_bytes + len(behind) + len(rest))
        place = _put(state, 0, before)
        cells = state[place : place + tokens * cell.itemsize].view(cell)
        cells["position"], cells["sequences"], cells["sequence"] = np.arange(tokens), 1, 0
        targets = [cells["extra"][None]] if self.extra else []
        place = _put(state, place + cells.nbytes, _NUMBER.pack(self.transposed) + _NUMBER.pack(self.layers))
        for tensor in self.tensors:
            place = _put(state, place, tensor.header)
            targets.append(_view(state, place, tensor.groups, tokens, tensor.width))
            place += tensor.groups * tokens * tensor.width
        place = _put(state, place, behind)
        state[place:] = rest
        start = 0
        for columns in parts:
            end = min(start + columns[0].shape[1], tokens)
            for target, source in zip(targets, columns, strict=True):
                target[:, start:end] = source[:, : end - start]
            start = end
        if start < tokens:
            raise ValueError(f"the copies hold {start} tokens, not {tokens}")
        return state


@dataclass(frozen=True, slots=True)
class Cells:
    """The KV in one state."""

    layout: Layout
    first: int
    """The lowest position; the others follow without gaps."""
    count: int
    order: npt.NDArray[np.intp] | None
    """The cells by their positions, where those do not ascend."""
    columns: list[Bytes]
    """As in ``Layout.columns``."""

    def cut(self, start: int, end: int) -> Bytes:
        """A copy of positions [start, end). Raises ValueError where there are no such cells."""
        start, end = start - self.first, end - self.first
        if not 0 <= start <= end <= self.count:
            raise ValueError(f"a state of {self.count} positions from {self.first} on has no [{start}, {end}) of these")
        data = np.empty((end - start) * self.layout.token_bytes, np.uint8)
        for target, source in zip(self.layout.columns(data, end - start), self.columns, strict=True):
            if self.order is None:
                target[...] = source[:, start:end]
            else:
                np.take(source, self.order[start:end], axis=1, out=target)
        return data


def read(state: Bytes, rest_bytes: int) -> Cells:
    """The KV in a state that has so many bytes behind it. Raises ValueError for any other format."""
    data = state[len(HEAD) : len(state) - rest_bytes]
    for extra in _EXTRAS:
        try:
            return _read(data, extra)
        except (ValueError, struct.error) as error:
            problem = str(error)
    raise ValueError(f"not the state of plain attention's KV: {problem}")


def _read(data: Bytes, extra: int) -> Cells:
    cell = _cell(extra)
    # A sequence's cells are all in one stream.
    [streams] = _NUMBER.unpack_from(data.data)
    counts = data[_NUMBER.size :]
    counts = counts[: len(counts) // _NUMBER.size * _NUMBER.size].view("<u4")[:streams]
    used = np.flatnonzero(counts)
    if not len(used):
        raise ValueError("no cells")
    stream, count = int(used[0]), int(counts[used[0]])
    end = len(data) - _NUMBER.size * (streams - stream - 1)
    place = _NUMBER.size * (stream + 2)
    if data[end:].any() or place + count * cell.itemsize > end:
        raise ValueError(f"{count} cells in {len(data)} bytes")
    cells = data[place : place + count * cell.itemsize].view(cell)
    if (cells["sequences"] != 1).any():
        raise ValueError("cells without a sequence")
    positions = cells["position"]
    order = None if (np.diff(positions) == 1).all() else np.argsort(positions)
    if order is not None and (np.diff(positions[order]) != 1).any():
        raise ValueError("positions are missing")
    first = int(positions[0] if order is None else positions[order[0]])
    place += cells.nbytes
    transposed, layers = struct.unpack_from("<II", data.data, place)
    if transposed > 1:
        raise ValueError("values neither transposed nor not")
    place += 2 * _NUMBER.size
    columns = [cells["extra"][None]] if extra else []
    tensors: list[Tensor] = []
    # Some layers have no values of their own.
    while place < end or len(tensors) < layers:
        if len(tensors) >= layers and transposed:
            _, width, groups = _TRANSPOSED_ROWS.unpack_from(data.data, place)
            header = bytes(data[place : place + _TRANSPOSED_ROWS.size])
        else:
            _, width = _ROWS.unpack_from(data.data, place)
            groups, header = 1, bytes(data[place : place + _ROWS.size])
        place += len(header)
        size = groups * count * width
        if place + size > end or len(tensors) >= 2 * layers:
            raise ValueError(f"a tensor of {size} bytes at {place} of {end}")
        tensors.append(Tensor(header, groups, width))
        columns.append(_view(data, place, groups, count, width))
        place += size
    return Cells(Layout(extra, bool(transposed), layers, tuple(tensors)), first, count, order, columns)


def _cell(extra: int) -> np.dtype[np.void]:
    beside = [("extra", "u1", (extra,))] if extra else []
    return np.dtype([("position", "<i4"), ("sequences", "<u4"), *beside, ("sequence", "<i4")])


def _view(data: Bytes, place: int, groups: int, count: int, width: int) -> Bytes:
    return data[place : place + groups * count * width].reshape(groups, count, width)


def _put(state: Bytes, place: int, data: bytes) -> int:
    """The place behind."""
    state[place : place + len(data)] = np.frombuffer(data, np.uint8)
    return place + len(data)
