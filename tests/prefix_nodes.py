"""Conversations as nodes of the prefix store, and a process that keeps some on the disk: ``python -m tests.prefix_nodes
FOLDER FIRST LAST``."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmx.engine.prefix.disk import Disk, Hit
from lmx.protocol import pack_tokens

BLOCK = 8
"""Tokens of a whole block here: the tier takes any number."""
PATIENCE_S = 60
FINGERPRINT = "0123456789abcdef" * 2
ROOT = b"\x07" * 16
Tokens = Sequence[int]


def next_key(parent: bytes, tokens: Tokens) -> bytes:
    return hashlib.blake2b(parent + pack_tokens(tokens), digest_size=16).digest()


def kv(key: bytes, size: int = 400) -> bytes:
    """What is kept for a node: nobody else's."""
    return hashlib.shake_128(b"kv" + key).digest(size)


def state(key: bytes) -> bytes:
    return hashlib.shake_128(b"checkpoint" + key).digest(50)


def nodes(tokens: Tokens) -> Iterator[tuple[bytes, bytes, int, Tokens]]:
    """Key, parent, start and tokens of each node, the last perhaps a tail."""
    parent = ROOT
    for start in range(0, len(tokens), BLOCK):
        key = next_key(parent, tokens[start : start + BLOCK])
        yield key, parent, start, tokens[start : start + BLOCK]
        parent = key


def whole_keys(tokens: Tokens) -> list[bytes]:
    return [key for key, _, _, ids in nodes(tokens) if len(ids) == BLOCK]


def keep(disk: Disk, tokens: Tokens, *, uses: int = 1, checkpoints: Sequence[int] = (), size: int = 400) -> bool:
    """Offer all of a conversation; ``checkpoints``: positions with one. Whether all was taken."""
    taken = True
    for key, parent, start, ids in nodes(tokens):
        checkpoint = state(key) if start + len(ids) in checkpoints else None
        taken &= disk.offer(key, parent, ROOT, start, ids, kv(key, size), checkpoint, uses)
    return taken


def find(disk: Disk, tokens: Tokens, **more: Any) -> Hit:
    return disk.find(ROOT, whole_keys(tokens), tokens, **more)


def ready(disk: Disk) -> None:
    assert list(disk.warm(0)) == []


def main() -> None:
    """Each conversation's number is told when it is kept."""
    folder, first, last = sys.argv[1:]
    disk = Disk(Path(folder), FINGERPRINT, 10**9, 10**8)
    ready(disk)
    for number in range(int(first), int(last)):
        keep(disk, [number] * 20, size=30_000)
        assert disk.drain(PATIENCE_S)
        print(number, flush=True)
    disk.close()
    sys.exit(disk.statistics().off or 0)


if __name__ == "__main__":
    main()
