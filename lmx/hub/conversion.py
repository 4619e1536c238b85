"""Keeps what was made of GGUF files: where it is, and whether it is still right.

Two things are made of a file. Its *words*, always: the tokenizer, the chat template and the facts that the server needs
of every model, whichever engine runs it. Its *weights*, as an MLX folder, when MLX runs it (llama.cpp loads the file
itself). The inventory asks for them from a thread of the server; what is not there yet is a ``Conversion``, which a
process of its own (``lmx.hub.convert``) does. A conversion belongs to the file's content: the folder's name carries a
key of its size, time and first bytes, and of the converter's version.
"""

import dataclasses
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmx.errors import ModelInvalid
from lmx.hub.folder import inspect_folder, read_json
from lmx.hub.gguf.parts import model_name, part_paths, printable

CONVERTER_VERSION = 3
"""Raise it when the converter writes something else for the same file."""
FACTS_FILE = "lmx.json"
REFUSED = 3
"""Exit status of the converter when the file is at fault and stderr holds the message for the user."""
WORDS_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
_HEAD_BYTES = 1024 * 1024
_NAME_BYTES = 200


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What a GGUF file's header says. Kept as FACTS_FILE beside its words."""

    architecture: str
    """llama.cpp's name: "llama", "gemma3", ..."""
    context_length: int
    quantization: str
    """The type of most matrices, for example "Q4_1"."""
    size_bytes: int
    """Of the file, all parts together."""
    mlx_refusal: str
    """Why MLX cannot run it at all, as a clause; empty if it can."""
    inexact: Mapping[str, int]
    """Tensors of each type for which MLX has no exact form, so that they must be dequantised: {"Q4_K": 27}."""
    sampling: Mapping[str, float]
    """How the model's makers want it sampled, as in ``FolderFacts``."""
    parameters: int
    mlx_bytes: int
    """What the weights take on MLX: packed as in the file where MLX can, else as float16."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """Something that must be made of a GGUF file before its model can be used."""

    what: Literal["words", "weights"]
    source: Path
    folder: Path
    words: Path | None = None
    """For weights: the folder that has them."""

    @property
    def command(self) -> list[str]:
        """The converter process. It ends, and takes back what is half-made, when its standard input closes or it gets
        SIGTERM. No code is taken from the working directory (-P): who knows whose that is."""
        more = [] if self.words is None else [str(self.words)]
        command = [sys.executable, "-P", "-m", "lmx.hub.convert", self.what, str(self.source), str(self.folder)]
        return command + more

    def check(self, returncode: int, output: bytes) -> None:
        """Of a converter that has ended. Raises ModelInvalid."""
        text = output.decode(errors="replace").strip()
        if returncode == REFUSED:
            raise ModelInvalid(text)
        if returncode != 0:
            tail = " / ".join(text.splitlines()[-3:])
            raise ModelInvalid(
                f"{self.source} could not be converted to {self.folder} (exit status {returncode}): {tail}"
            )

    def refuse_if_made(self, made: set[Path]) -> None:
        """``made``: the folders of conversions before this one; it is added. Raises ModelInvalid for the second time,
        so that nobody converts without end what is never whole."""
        if self.folder in made:
            raise ModelInvalid(f"{self.source} was converted, but {self.folder} is not whole. Is the disk full?")
        made.add(self.folder)

    def discard(self) -> None:
        """Remove what a converter left that was killed; not what another one works on."""
        lock = lock_path(self.folder)
        with suppress(OSError), lock.open("r+") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(unfinished_path(self.folder), ignore_errors=True)
            lock.unlink()


class ConversionNeeded(Exception):
    def __init__(self, conversion: Conversion) -> None:
        super().__init__(f"{conversion.folder} is not there yet")
        self.conversion = conversion


def convert(conversion: Conversion) -> None:
    """Do it now. Blocking. Raises ModelInvalid."""
    with subprocess.Popen(conversion.command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        output = process.stderr.read()
    conversion.check(process.returncode, output)


def unfinished_path(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.unfinished"


def lock_path(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


def words_folder(source: Path, cache_dir: Path) -> tuple[Path, GgufFacts]:
    """The folder with a GGUF file's words, and its facts. Raises ConversionNeeded, or ModelInvalid."""
    folder = _folder(source, cache_dir / "words")
    if not words_are_whole(folder):
        raise ConversionNeeded(Conversion("words", source, folder))
    facts = read_json(folder / FACTS_FILE, why="lmx writes it when it reads a GGUF file")
    return folder, GgufFacts(**facts["gguf"])


def weights_folder(source: Path, words: Path, cache_dir: Path) -> Path:
    """The MLX folder of a GGUF file. Raises ConversionNeeded, or ModelInvalid."""
    folder = _folder(source, cache_dir / "converted")
    if not weights_are_whole(folder):
        raise ConversionNeeded(Conversion("weights", source, folder, words))
    return folder


def write_facts(folder: Path, source: Path, facts: GgufFacts) -> None:
    """The last file of a words folder to be written."""
    sizes = {name: (folder / name).stat().st_size for name in WORDS_FILES}
    content = {"source": str(source), "files": sizes, "gguf": dataclasses.asdict(facts)}
    (folder / FACTS_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def words_are_whole(folder: Path) -> bool:
    """Whether finished words are there. A power cut can leave a renamed folder with unwritten files."""
    try:
        sizes = read_json(folder / FACTS_FILE, why="it tells what was written")["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (ModelInvalid, OSError):
        return False


def weights_are_whole(folder: Path) -> bool:
    """Whether a finished MLX folder is there."""
    try:
        inspect_folder(folder)
    except ModelInvalid:
        return False
    return True


def _folder(source: Path, parent: Path) -> Path:
    try:
        stats = [path.stat() for path in part_paths(source) if path.exists()]
        with source.open("rb") as file:
            digest = hashlib.sha256(file.read(_HEAD_BYTES))
    except OSError as error:
        raise ModelInvalid(f"{source} cannot be read: {error.strerror}.") from None
    for stat in stats:
        digest.update(f"{stat.st_size} {stat.st_mtime_ns} ".encode())
    digest.update(f"{CONVERTER_VERSION}".encode())
    # Short enough to leave room, in the 255 bytes of a file name, for what stands around it while a converter works.
    name = printable(model_name(source), _NAME_BYTES)
    return parent.expanduser() / f"{name}-{digest.hexdigest()[:16]}"
