"""The folders of kept prefixes, one for each model's fingerprint: opened and mended, listed, and emptied.

No server need run for it, and any number may: the disk tier of an engine opens its own folder here, ``lmx cache`` and
the admin face look at all of them. Every call may wait for the disk.
"""

import fcntl
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lmx.prefix_disk import block_file
from lmx.prefix_disk.index import NAME, Entry, Index, Summary, broken, put_aside, summary

DEFAULT_BYTES = 16 * 2**30
DEFAULT_SHARE = 0.1
"""And no more than so much of the disk's free space, the kept prefixes counted as free."""
UNFINISHED_S = 600.0
"""A file that is being written for longer has no writer any more."""
SUPERSEDED_S = 7 * 86400.0
"""What was kept for a model as it was before (other weights, another version of a library, another type of KV) goes
when it was not used for so long."""


@dataclass(frozen=True, slots=True)
class ModelPrefixes:
    """What is kept for one fingerprint of a model."""

    fingerprint: str
    summary: Summary | None
    """None: its index cannot be read."""
    problem: str = ""
    """Why."""


def open_index(folder: Path, fingerprint: str) -> tuple[Index, list[Entry], str]:
    """The index of a model's folder, what it holds, and what was wrong with it, if anything was; both are made where
    they are not there. Index and files are brought to agree: a broken index is put aside and made anew from the files,
    and files of another form or model are deleted. Raises OSError or sqlite3.Error."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts can be read from KV
    with _opening(folder):
        index, entries, problem = _open_or_remake(folder)
        try:
            _agree(folder, fingerprint, index, {entry.head.key for entry in entries})
            return index, entries + index.fresh(), problem
        except BaseException:
            index.close()
            raise


def _open_or_remake(folder: Path) -> tuple[Index, list[Entry], str]:
    try:
        index = Index(folder)
        try:
            return index, index.fresh(), ""
        except BaseException:
            index.close()
            raise
    except sqlite3.Error as error:
        if not broken(error):
            raise
        put_aside(folder)
        return Index(folder), [], str(error)


def _agree(folder: Path, fingerprint: str, index: Index, known: set[bytes]) -> None:
    (folder / block_file.UNFINISHED).mkdir(exist_ok=True)
    for left in (folder / block_file.UNFINISHED).iterdir():
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > UNFINISHED_S:
                left.unlink()
    found: list[Entry] = []
    for path in block_file.files(folder):
        try:
            key = bytes.fromhex(path.stem)
            if key in known:
                known.discard(key)
                continue
            head = block_file.read_head(path, fingerprint)
            found.append(Entry(head, 1, path.stat().st_mtime))
        except (ValueError, block_file.BadFile):
            with suppress(OSError):
                path.unlink()
        except OSError:  # gone meanwhile; or it will say so again when it is wanted
            continue
    index.put(found)
    if known:
        index.delete(known, lambda key: None)


@contextmanager
def _opening(folder: Path) -> Iterator[None]:
    """One process at a time looks whether the index is whole, and mends it."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def unlink(folder: Path, key: bytes) -> None:
    """Delete a node's file, if it is there. Raises OSError."""
    block_file.path_of(folder, key).unlink(missing_ok=True)


def inventory(folder: Path) -> list[ModelPrefixes]:
    """All that is kept, whether or not an engine uses it; the latest used first."""
    found = []
    for inner in _model_folders(folder):
        try:
            found.append(ModelPrefixes(inner.name, summary(inner)))
        except sqlite3.Error as error:
            found.append(ModelPrefixes(inner.name, None, str(error)))
    return sorted(found, key=lambda kept: kept.summary.used if kept.summary else 0.0, reverse=True)


def clear(folder: Path, fingerprints: set[str] | None = None) -> int:
    """Delete what is kept for these models, or for all. The bytes that were freed. An engine that uses the folder
    notices, and goes on with an empty one. Raises OSError or sqlite3.Error."""
    freed = 0
    for inner in _model_folders(folder):
        if fingerprints is None or inner.name in fingerprints:
            freed += _clear(inner)
    return freed


def _clear(folder: Path) -> int:
    with _opening(folder):
        index, entries, _ = _open_or_remake(folder)
        with closing(index):
            index.delete([entry.head.key for entry in entries], lambda key: None)
            # All files, also those that a broken index did not know.
            freed = 0
            for path in block_file.files(folder):
                with suppress(FileNotFoundError):
                    freed += path.stat().st_size
                    path.unlink()
    return freed


def clear_superseded(folder: Path, fingerprint: str, model: str) -> list[str]:
    """Delete what was kept for other fingerprints of the same model and nobody has used for long; which."""
    old = [
        kept.fingerprint
        for kept in inventory(folder)
        if kept.fingerprint != fingerprint
        and kept.summary is not None
        and kept.summary.model == model
        and kept.summary.nodes
        and kept.summary.used < time.time() - SUPERSEDED_S
    ]
    if old:
        clear(folder, set(old))
    return old


def budget(asked_bytes: int, folder: Path) -> int:
    """The bytes that a model's prefixes may take; ``asked_bytes``: the setting, -1 where nobody says it. Raises
    OSError."""
    if asked_bytes >= 0:
        return asked_bytes
    kept = sum(model.summary.bytes for model in inventory(folder) if model.summary)
    return min(DEFAULT_BYTES, int(DEFAULT_SHARE * (free_bytes(folder) + kept)))


def free_bytes(folder: Path) -> int:
    """Of the disk that the folder is on or would be on. Raises OSError."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _model_folders(folder: Path) -> list[Path]:
    try:
        return sorted(inner for inner in folder.iterdir() if (inner / NAME).exists())
    except FileNotFoundError:
        return []
