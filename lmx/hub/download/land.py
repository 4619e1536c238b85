"""How a download becomes a model's folder: by renaming its staging folder, so that nothing half-done is ever seen.

A folder of tensors appears, or is replaced, as a whole; a GGUF file joins the folder that has other quantisations of
the same model. ``RECORD`` in the folder says what it was made of, so that asking again for the same finds it there.
Called by the fetching child, which holds the staging folder's lock.
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmx.hub.download.request import Chosen, File

RECORD = ".lmx.json"


def is_there(folder: Path, chosen: Chosen) -> bool:
    """Whether the folder has these very files, as far as sizes and the record tell."""
    recorded = _read(folder).get("files", {})
    return all(
        recorded.get(file.path) == _content(file) and _size(folder / file.path) == file.size for file in chosen.files
    )


def land(staging: Path, folder: Path, chosen: Chosen, *, joins: bool) -> None:
    """``staging`` holds the chosen files, all whole. ``joins``: they are put beside what the folder has; otherwise they
    replace it, but for GGUF files, which are models of their own. Raises OSError; may then be done again."""
    for extra in (*staging.glob(".xet-*"), *staging.rglob("*.part")):
        if extra.is_dir():
            shutil.rmtree(extra)
        else:
            extra.unlink(missing_ok=True)
    kept = {path: content for path, content in _read(folder).get("files", {}).items() if joins or _is_gguf(path)}
    files = {**kept, **{file.path: _content(file) for file in chosen.files}}
    record = {"repo": chosen.repo, "revision": chosen.revision, "files": files}
    (staging / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        staging.rename(folder)
    elif joins:
        # The first part of a split file last: a loader begins with it, and finds the others.
        for file in sorted(chosen.files, key=lambda file: file.path, reverse=True):
            _place(staging / file.path, folder / file.path)
        _place(staging / RECORD, folder / RECORD)
        shutil.rmtree(staging)
    else:
        for path in sorted(folder.rglob("*.gguf")):
            _place(path, staging / path.relative_to(folder))
        replaced = staging.with_name(staging.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        try:
            staging.rename(folder)
        except OSError:
            replaced.rename(folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def _place(source: Path, target: Path) -> None:
    """Give the file its second name, so that the one or the other folder has all its files at any moment."""
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    second = target.with_name(f".{target.name}.new")
    second.unlink(missing_ok=True)
    try:
        os.link(source, second)
    except OSError:  # a file system without hard links
        source.replace(target)
    else:
        second.replace(target)


def _is_gguf(path: str) -> bool:
    return path.lower().endswith(".gguf")


def _content(file: File) -> str:
    return file.sha256 or file.blob


def _read(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict) and isinstance(record.get("files"), dict):
            return record
    return {}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
