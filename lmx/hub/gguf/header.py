"""Reads the header of one GGUF file: its metadata and its table of tensors, with every length checked.

For the converter process, and for whoever in the server asks what a file is. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package's own reader makes NumPy views of every
string and number: 1.6 s for SmolLM2 and 7.6 s for Gemma 3 with its 262,144 tokens, where this takes 0.03 s and 0.07 s;
a test holds the two together.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx.errors import ModelInvalid
from lmx.hub.folder import file_size
from lmx.hub.gguf.kinds import BLOCKS, Kind

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # ggml's
# A file of zeros behind a few false numbers is otherwise read for hours.
_MOST_TENSORS, _MOST_FIELDS, _MOST_ITEMS = 2**20, 2**16, 2**26
_WORDS = "tokenizer."
_ALIGNMENT = 32
"""Where the file names none."""


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    kind: Kind
    shape: tuple[int, ...]
    """As NumPy has it: rows first."""
    path: Path
    offset: int
    """Of the data, from the start of the file."""
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    fields: dict[str, Any]
    """int, float, bool, str, or a list of one of these."""
    tensors: dict[str, Tensor]


def read_header(path: Path, *, words: bool = True) -> Header:
    """Without ``words`` the lists of the vocabulary are passed over, which are most of a header; they are empty then.

    Raises OSError, or ModelInvalid if the file is no GGUF file, of a version nobody reads any more, or not whole."""
    size = file_size(path)
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise ModelInvalid(f"{path} is no GGUF file: it begins with {magic!r} where b'GGUF' is expected.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            try:
                header = _Cursor(buffer, path).header(words=words)
                end = max((tensor.offset + tensor.nbytes for tensor in header.tensors.values()), default=0)
                if end > size:
                    raise ValueError(f"the tensors end at {end}")
            except (struct.error, ValueError) as error:
                raise ModelInvalid(
                    f"{path} is truncated or damaged: its {size} bytes do not hold the metadata and the tensors that "
                    f"its header announces ({error}). Download the file again."
                ) from None
    return header


class _Cursor:
    """A place in the file. Reading past the end raises struct.error or ValueError."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self._buffer = buffer
        self._path = path
        self._position = len(b"GGUF")

    def header(self, *, words: bool) -> Header:
        version = self._scalar("I")
        if version & 0xFFFF == 0:
            raise ModelInvalid(f"{self._path} is a big-endian GGUF file; lmx and llama.cpp read little-endian ones.")
        if version not in (2, 3):
            raise ModelInvalid(
                f"{self._path} is of GGUF version {version}; 2 and 3 are read. Download a newer file of the model, or "
                "make one with llama.cpp's convert_hf_to_gguf.py."
            )
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        if tensor_count > _MOST_TENSORS or field_count > _MOST_FIELDS:
            raise ValueError(f"{tensor_count} tensors and {field_count} fields")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            [key] = self._strings(1)
            fields[key] = self._value(self._scalar("I"), passed=not words and key.startswith(_WORDS))
        table = [self._tensor() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self._position // alignment) * alignment
        tensors = {}
        for name, kind, shape, offset in table:
            block_elements, block_bytes = BLOCKS[kind]
            blocks, rest = divmod(shape[-1], block_elements)
            for extent in shape[:-1]:
                blocks *= extent
            if rest or name in tensors:
                raise ValueError(f"tensor {name} is there twice, or its {shape[-1]} columns are no {kind.name} blocks")
            tensors[name] = Tensor(name, kind, shape, self._path, start + offset, blocks * block_bytes)
        return Header(fields, tensors)

    def _tensor(self) -> tuple[str, Kind, tuple[int, ...], int]:
        [name] = self._strings(1)
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(reversed(self._scalars("Q", dimensions)))
        if 0 in shape:
            raise ValueError(f"tensor {name} has the shape {shape}")
        kind, offset = self._scalar("I"), self._scalar("Q")
        try:
            return name, Kind(kind), shape, offset
        except ValueError:
            raise ModelInvalid(
                f"{self._path}: the tensor {name} is of the type {kind}, which is unknown here. The file is damaged, "
                "too old, or newer than this lmx."
            ) from None

    def _value(self, kind: int, *, passed: bool) -> Any:
        if kind == _STRING:
            return self._strings(1)[0]
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"metadata of the kind {kind}")
        kind, count = self._scalar("I"), self._scalar("Q")
        if count > _MOST_ITEMS:
            raise ValueError(f"a list of {count}")
        if kind == _STRING:
            return self._pass_strings(count) if passed else self._strings(count)
        if kind in _SCALARS:
            return self._pass_scalars(_SCALARS[kind], count) if passed else list(self._scalars(_SCALARS[kind], count))
        raise ValueError(f"a list of the kind {kind}")

    def _strings(self, count: int) -> list[str]:
        length_of = struct.Struct("<Q").unpack_from
        buffer, position, end = self._buffer, self._position, len(self._buffer)
        strings = []
        for _ in range(count):
            start = position + 8
            position = start + length_of(buffer, position)[0]
            if position > end:
                raise ValueError(f"a string at {start} ends at {position}")
            strings.append(buffer[start:position].decode())
        self._position = position
        return strings

    def _pass_strings(self, count: int) -> list[str]:
        length_of = struct.Struct("<Q").unpack_from
        buffer, position = self._buffer, self._position
        for _ in range(count):
            position += 8 + length_of(buffer, position)[0]
        self._position = position
        return []

    def _pass_scalars(self, code: str, count: int) -> list[Any]:
        self._position += count * struct.calcsize(f"<{code}")
        return []

    def _scalar(self, code: str) -> Any:
        return self._scalars(code, 1)[0]

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}")
        values = layout.unpack_from(self._buffer, self._position)
        self._position += layout.size
        return values
