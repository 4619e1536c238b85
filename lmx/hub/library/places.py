"""Where models lie, and which files make one: folders are listed and files asked for their size, none is opened.

lmx's own folder and LM Studio's are <publisher>/<name>/..., the Hugging Face cache has its own layout, other folders
any. What cannot be read, links in circles, hidden files (AppleDouble's ``._NAME`` among them) and projectors for images
are passed over. Called by ``Library.scan``, every few seconds.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lmx.config import Settings
from lmx.hub.gguf.parts import model_name, part_paths, printable
from lmx.hub.inventory import EMBEDDED_ID, folder_name
from lmx.hub.library.entry import Source

logger = logging.getLogger("lmx")

Layout = Literal["publishers", "hub", "any", "itself"]
_DEPTH: dict[Layout, int] = {"publishers": 4, "hub": 4, "any": 5, "itself": 0}
"""Folders below a place that are looked into."""
_MOST_FOLDERS = 20_000
"""In one place. Who lists / as a folder of models shall get an answer, too."""
_REPOSITORY = re.compile(r"models--(.+)", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".aria2")
"""How programs call what they still write."""
_WORDS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "modules.json", "generation_config.json")
_NEEDED = (".json", ".safetensors", ".jinja", ".model")
_NO_MODELS = ("mmproj", "imatrix")
_IMAGES = "mmproj"


@dataclass(frozen=True, slots=True)
class Place:
    path: Path
    source: Source
    layout: Layout


@dataclass(frozen=True, slots=True)
class Found:
    """Files that seem to be a model."""

    path: Path
    """A folder, or a GGUF file (of a split one the first part)."""
    place: Path
    source: Source
    repository: str
    """The name that it has by where it lies."""
    names: tuple[str, ...]
    """Others."""
    file: str
    """Of a GGUF model in a repository, which may have several: its file's name, without ".gguf"; else ""."""
    is_gguf: bool
    stamp: bytes
    """Another one when a file is another."""
    size_bytes: int
    modified: float
    unfinished: tuple[str, ...] = ()
    """Names of files that are not all there: still written, given up, or links to nothing."""
    shows: bool = False
    """A projector lies beside it, by which it sees images."""


def places(settings: Settings, embedded: Path | None) -> list[Place]:
    """The places to look at, the likeliest first; of two entries for the same files the first one's place counts.
    ``embedded``: the file of the embedded model."""
    hub = settings.hub
    found = [Place(Path(os.path.abspath(hub.models_path)), "lmx", "publishers")]
    if hub.huggingface:
        from huggingface_hub import constants

        found.append(Place(Path(os.path.abspath(constants.HF_HUB_CACHE)), "huggingface", "hub"))
    if hub.lmstudio:
        found += [Place(path, "lmstudio", "publishers") for path in lmstudio_folders(Path.home())]
    for folder in hub.folders:
        path = Path(os.path.abspath(os.path.expanduser(folder)))
        with suppress(OSError):
            if any(_REPOSITORY.fullmatch(name) for name in os.listdir(path)):
                found.append(Place(path, "folder", "hub"))
                continue
        found.append(Place(path, "folder", "any"))
    if embedded is not None:
        found.append(Place(embedded, "embedded", "itself"))
    found += [Place(path, "folder", "itself") for path in named_paths(settings)]
    return list(dict.fromkeys(found))


def lmstudio_folders(home: Path) -> list[Path]:
    """Its home was ~/.cache/lm-studio, is ~/.lmstudio, and may be anywhere; a file in the user's home says where."""
    homes = [home / ".lmstudio", home / ".cache" / "lm-studio"]
    with suppress(OSError, UnicodeDecodeError):
        pointed = (home / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip()
        if pointed and "\0" not in pointed and os.path.isabs(pointed):
            homes.insert(0, Path(pointed))
    return [path / "models" for path in dict.fromkeys(homes)]


def named_paths(settings: Settings) -> dict[Path, str]:
    """Folders and GGUF files that the settings name as models, and how they call each."""
    model = settings.model
    names = [model.default, model.embedding, *model.preload, *model.aliases.values(), *settings.models]
    names += [own.draft_model for own in settings.models.values() if own.draft_model]
    found = {}
    for name in filter(None, names):
        expanded = os.path.expanduser(name)
        if name != EMBEDDED_ID and "\0" not in name and os.path.exists(expanded):
            found[Path(os.path.abspath(expanded))] = name
    return found


class Look:
    """One look at a place. Iterate over ``models``; then ``problems`` tells what could not be read."""

    def __init__(self, place: Place, version: str) -> None:
        """``version``: of what is made of the files; stamps of another one are other stamps."""
        self.problems: list[str] = []
        self._place = place
        self._version = version
        self._seen: set[tuple[int, int]] = set()

    def models(self) -> Iterator[Found]:
        path = self._place.path
        match self._place.layout:
            case "hub":
                yield from self._hub()
            case "itself" if path.suffix.lower() == ".gguf":
                yield from self._single_gguf(path)
            case "itself":
                if (listing := self._list(path)) is not None:
                    yield self._folder(path, listing, folder_name(path), ())
            case _:
                if self._place.source == "folder" and not path.is_dir():
                    self.problems.append(f"{path}, one of hub.folders, is not there")
                yield from self._walk(path, ())

    def _hub(self) -> Iterator[Found]:
        for name in sorted(self._names(self._place.path)):
            match = _REPOSITORY.fullmatch(name)
            repository = self._place.path / name
            if match is None or (commit := self._commit(repository)) is None:
                continue
            parts = tuple(match[1].split("--", 1))
            snapshot = repository / "snapshots" / commit
            unfinished = [
                name for name in self._names(repository / "blobs", quiet=True) if name.endswith(".incomplete")
            ]
            models = list(self._walk(snapshot, parts, tuple(unfinished))) if snapshot.is_dir() else []
            if not models and unfinished:  # nothing is there yet but what is being fetched
                models = [self._folder(snapshot, _Listing(), shown("/".join(parts)), tuple(unfinished))]
            yield from models

    def _commit(self, repository: Path) -> str | None:
        """That of the main branch."""
        try:
            commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return commit if _COMMIT.fullmatch(commit) else None

    def _walk(self, folder: Path, parts: tuple[str, ...], unfinished: tuple[str, ...] = ()) -> Iterator[Found]:
        """``parts``: the names of the folders below the place. ``unfinished``: what belongs to it elsewhere."""
        listing = self._list(folder)
        if listing is None:
            return
        free = self._place.layout == "any"
        is_model = listing.is_model() and (free or len(parts) <= 2)
        if is_model:
            name = parts[-1] if free and parts else "/".join(parts) or folder.name
            yield self._folder(folder, listing, shown(name), unfinished, shown("/".join(parts)) if free else "")
        if not listing.has_tensors() or not free:
            yield from self._ggufs(folder, listing, parts)
        if not is_model and "model_index.json" not in listing.files and len(parts) < _DEPTH[self._place.layout]:
            for name in sorted(listing.folders):
                yield from self._walk(folder / name, (*parts, name), unfinished)

    def _folder(
        self, folder: Path, listing: "_Listing", repository: str, unfinished: tuple[str, ...], also: str = ""
    ) -> Found:
        sizes, times = listing.sums(listing.files)
        missing = [
            name
            for name, status in listing.files.items()
            if (status is None or (name.endswith(_UNFINISHED) and _finished(name) not in listing.files))
            and _finished(name).endswith(_NEEDED)
        ]
        return Found(
            path=folder,
            place=self._place.path,
            source=self._place.source,
            repository=repository,
            names=(also,) if also else (),
            file="",
            is_gguf=False,
            stamp=self._stamp(listing, listing.files, bool(unfinished)),
            size_bytes=sizes,
            modified=times,
            unfinished=(*sorted(missing), *sorted(unfinished)),
        )

    def _single_gguf(self, path: Path) -> Iterator[Found]:
        listing = self._list(path.parent)
        if listing is None or path.name not in listing.files:
            return
        first = part_paths(path)[0]
        yield from (found for found in self._ggufs(path.parent, listing, ()) if found.path == first)

    def _ggufs(self, folder: Path, listing: "_Listing", parts: tuple[str, ...]) -> Iterator[Found]:
        models: dict[Path, list[str]] = {}
        names = sorted(listing.files)
        for name in names:
            whole = _finished(name)
            if is_gguf_model(whole):
                # What is still written counts as itself, until it has its name.
                path = folder / (name if name != whole and whole not in listing.files else whole)
                models.setdefault(part_paths(path)[0], []).append(name)
        shows = any(_IMAGES in name.lower() and name.lower().endswith(".gguf") for name in names)
        in_repository = self._place.layout in ("publishers", "hub") and bool(parts)
        for path, files in models.items():
            stem = shown(model_name(Path(_finished(path.name))).removeprefix("downloading_"))
            size, modified = listing.sums(files)
            yield Found(
                path=path,
                place=self._place.path,
                source=self._place.source,
                repository=shown("/".join(parts[:2])) if in_repository else stem,
                names=() if in_repository or not parts else (shown("/".join((*parts, stem))),),
                file=stem if in_repository else "",
                is_gguf=True,
                stamp=self._stamp(listing, files, shows),
                size_bytes=size,
                modified=modified,
                unfinished=tuple(name for name in files if listing.files[name] is None or name.endswith(_UNFINISHED)),
                shows=shows,
            )

    def _stamp(self, listing: "_Listing", names: Iterable[str], more: bool) -> bytes:
        about = [f"{self._version} {more}"]
        for name in sorted(names):
            status = listing.files[name]
            about.append(f"{name}\0{status.st_mtime_ns} {status.st_size}" if status else name)
        return hashlib.blake2b(os.fsencode("\0\0".join(about)), digest_size=16).digest()

    def _names(self, folder: Path, *, quiet: bool = False) -> list[str]:
        try:
            return os.listdir(folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            if not quiet:
                self.problems.append(f"{folder} cannot be read: {error.strerror}")
            return []

    def _list(self, folder: Path) -> "_Listing | None":
        """None: it cannot be read, was seen before (links may make circles), or is one too many."""
        listing = _Listing()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in self._seen or len(self._seen) >= _MOST_FOLDERS:
                return None
            self._seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    try:
                        if entry.is_dir():
                            listing.folders.append(entry.name)
                        else:
                            listing.files[entry.name] = entry.stat()
                    except OSError:  # a link to nothing, or to itself
                        listing.files[entry.name] = None
        except FileNotFoundError:
            return None
        except OSError as error:
            self.problems.append(f"{folder} cannot be read: {error.strerror}")
            return None
        return listing


@dataclass(slots=True)
class _Listing:
    """A folder's visible content."""

    files: dict[str, os.stat_result | None] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)

    def has_tensors(self) -> bool:
        return any(_finished(name).endswith((".safetensors", ".safetensors.index.json")) for name in self.files)

    def is_model(self) -> bool:
        """Whether it is a model's folder, whole or not, or rather one of GGUF files or of something else."""
        if "model_index.json" in self.files:  # a model of images
            return False
        if not self.has_tensors() and any(_finished(name).lower().endswith(".gguf") for name in self.files):
            return False
        if "config.json" in self.files:
            return self.has_tensors() or any(name in self.files for name in _WORDS)
        return any(
            name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
            for name in map(_finished, self.files)
        )

    def sums(self, names: Iterable[str]) -> tuple[int, float]:
        """Bytes of files, and when the newest was written."""
        known = [status for name in names if (status := self.files[name]) is not None]
        return sum(status.st_size for status in known), max((status.st_mtime for status in known), default=0.0)


def is_gguf_model(name: str) -> bool:
    """By its name: projectors for images and statistics of quantisers are files for a model."""
    name = name.lower()
    return name.endswith(".gguf") and not name.startswith(".") and not any(word in name for word in _NO_MODELS)


def _finished(name: str) -> str:
    """A file's name once it is all there."""
    if not name.endswith(_UNFINISHED):
        return name
    return next(name.removesuffix(suffix) for suffix in _UNFINISHED if name.endswith(suffix))


def shown(name: str) -> str:
    """A file's name as text that every log, terminal and JSON can hold."""
    return harmless(printable(name))


def harmless(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
