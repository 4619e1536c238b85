"""One node of the prefix store as a file: what its KV belongs to, the KV's bytes, and a checksum over all of it.

A file is written under another name and renamed when it is whole, and it is believed only when its checksum, its name
and its model's fingerprint agree, so that nothing that happens to a disk can become somebody's KV. Called by the disk
tier's thread and by ``folders``; knows neither index nor engine.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

VERSION = 1
"""Raise it when the form of files or of the index changes; the others are deleted when they are met."""
KEY_BYTES = 16
SUFFIX = ".kv"
UNFINISHED = "unfinished"
"""The folder of files that are being written."""
_MAGIC = b"lmx KV\r\n"  # a transfer as text would show
_HEAD = struct.Struct("<8sHH16s16s16s16sIIQQ")
_CHECKPOINT, _WINDOW = 1, 2
_DIGEST_BYTES = 32
# SHA-256: both x86 and Apple's cores have instructions for it (Apple's do twice what BLAKE2b does there).
_Digest = hashlib.sha256


class BadFile(Exception):
    """It is not what its name says."""


class Head(NamedTuple):
    """What a file says of itself."""

    key: bytes
    """Of this node; the keys are those of ``lmx.engine.prefix.chain``."""
    parent: bytes
    root: bytes
    start: int
    """Position of its first token."""
    ids: bytes
    """Its tokens, packed."""
    window: bool
    """It holds the part of sliding layers, if the model has such."""
    checkpoint: bool
    nbytes: int
    """Of the file."""


class Node(NamedTuple):
    """One node with its KV."""

    head: Head
    block: bytes
    checkpoint: bytes | None
    uses: int = 1
    """How many used it, as the index says; not part of the file."""


def file_bytes(ids: bytes, block_bytes: int, checkpoint_bytes: int) -> int:
    """How large a node's file is."""
    return _HEAD.size + len(ids) + block_bytes + checkpoint_bytes + _DIGEST_BYTES


def path_of(folder: Path, key: bytes) -> Path:
    """A node's file in the folder of its model."""
    name = key.hex()
    return folder / name[:2] / f"{name}{SUFFIX}"


def files(folder: Path) -> Iterator[Path]:
    """All node files of a model's folder."""
    for inner in sorted(folder.iterdir()):
        if len(inner.name) == 2 and inner.is_dir():
            yield from inner.glob(f"*{SUFFIX}")


def write(folder: Path, fingerprint: str, node: Node) -> None:
    """Put the node's file where it belongs, whole or not at all. Raises OSError."""
    head, path = node.head, path_of(folder, node.head.key)
    flags = _CHECKPOINT * (node.checkpoint is not None) | _WINDOW * head.window
    checkpoint = node.checkpoint or b""
    packed = _HEAD.pack(
        _MAGIC,
        VERSION,
        flags,
        _mark(fingerprint),
        head.key,
        head.parent,
        head.root,
        head.start,
        len(head.ids) // 4,
        len(node.block),
        len(checkpoint),
    )
    unfinished = folder / UNFINISHED / f"{path.name}.{os.getpid()}"
    digest = _Digest()
    try:
        with open(unfinished, "wb", buffering=0) as file:
            for part in (packed + head.ids, node.block, checkpoint):
                digest.update(part)
                _write_all(file, part)
            _write_all(file, digest.digest())
            os.fsync(file.fileno())
        path.parent.mkdir(exist_ok=True)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def _write_all(file: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def read_head(path: Path, fingerprint: str) -> Head:
    """What the file says of itself, unproven: its checksum is not looked at. Raises BadFile or OSError."""
    with path.open("rb", buffering=0) as file:
        return _read_head(file, path, fingerprint)[0]


def read(path: Path, fingerprint: str) -> Node:
    """Raises BadFile, or OSError where the disk does not answer."""
    with path.open("rb", buffering=0) as file:
        head, packed, block_bytes, checkpoint_bytes = _read_head(file, path, fingerprint)
        digest = _Digest(packed + head.ids)
        block = _read_exactly(file, block_bytes)
        digest.update(block)
        checkpoint = _read_exactly(file, checkpoint_bytes)
        digest.update(checkpoint)
        if _read_exactly(file, _DIGEST_BYTES) != digest.digest():
            raise BadFile("its checksum is another one")
    return Node(head, block, checkpoint if head.checkpoint else None)


def _read_head(file: BinaryIO, path: Path, fingerprint: str) -> tuple[Head, bytes, int, int]:
    packed = _read_exactly(file, _HEAD.size)
    magic, version, flags, mark, key, parent, root, start, tokens, block_bytes, checkpoint_bytes = _HEAD.unpack(packed)
    if magic != _MAGIC or version != VERSION:
        raise BadFile("it has another form")
    if mark != _mark(fingerprint):
        raise BadFile("it is another model's")
    if f"{key.hex()}{SUFFIX}" != path.name:
        raise BadFile("it has another key")
    size = os.fstat(file.fileno()).st_size
    # Before anything is allocated for what a broken header asks.
    if size != _HEAD.size + 4 * tokens + block_bytes + checkpoint_bytes + _DIGEST_BYTES:
        raise BadFile("it has another length")
    ids = _read_exactly(file, 4 * tokens)
    head = Head(key, parent, root, start, ids, bool(flags & _WINDOW), bool(flags & _CHECKPOINT), size)
    return head, packed, block_bytes, checkpoint_bytes


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    """In one piece: the data is megabytes, and a copy of it would be most of the time."""
    data = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise BadFile("it is cut off")
        data += more
    return data


def _mark(fingerprint: str) -> bytes:
    return hashlib.blake2b(fingerprint.encode(), digest_size=16).digest()
