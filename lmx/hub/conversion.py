"""Keeps what was made of GGUF files: where it is, and whether it is still right.

Two things are made of a file. Its *words*, always: the tokenizer, the chat template and the facts that the server needs
of every model, whichever engine runs it. Its *weights*, as an MLX folder, when MLX runs it (llama.cpp loads the file
itself). The inventory calls this from a thread of the server; the work is done by a process of its own
(``lmx.hub.convert``). A conversion belongs to the file's content: the folder's name carries a key of its size, time and
first bytes, and of the converter's version.
"""

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmx.errors import ModelInvalid
from lmx.hub.folder import inspect_folder, read_json
from lmx.hub.gguf_parts import model_name, part_paths, printable

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


def words_folder(source: Path, cache_dir: Path) -> tuple[Path, GgufFacts]:
    """The folder with a GGUF file's words, made now if there is none yet, and its facts. Raises ModelInvalid."""
    folder = _folder(source, cache_dir / "words")
    if not words_are_whole(folder):
        _convert("words", source, folder)
    facts = read_json(folder / FACTS_FILE, why="lmx writes it when it reads a GGUF file")
    return folder, GgufFacts(**facts["gguf"])


def weights_folder(source: Path, words: Path, cache_dir: Path) -> Path:
    """The MLX folder of a GGUF file, converted now if there is none yet. Raises ModelInvalid."""
    folder = _folder(source, cache_dir / "converted")
    if not weights_are_whole(folder):
        _convert("weights", source, folder, words)
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


def _convert(what: str, source: Path, folder: Path, *more: Path) -> None:
    command = [sys.executable, "-m", "lmx.hub.convert", what, str(source), str(folder), *map(str, more)]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if process.returncode == REFUSED:
        raise ModelInvalid(process.stderr.strip())
    if process.returncode != 0:
        tail = " / ".join(process.stderr.strip().splitlines()[-3:])
        raise ModelInvalid(f"{source} could not be converted to {folder} (exit status {process.returncode}): {tail}")


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
