"""Keeps the MLX folders that GGUF files were converted into: where they are, whether they are still right.

The inventory calls it from a thread of the server. The conversion itself needs MLX, which the server never loads, so it
runs as a process (``lmx.hub.convert``). A conversion belongs to the file's content: the folder's name carries a key of
its size, time and first bytes, and of the converter's version.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from lmx.errors import ModelInvalid
from lmx.hub.folder import inspect_folder, read_json

CONVERTER_VERSION = 2
"""Raise it when the converter writes something else for the same file."""
FACTS_FILE = "lmx.json"
REFUSED = 3
"""Exit status of the converter when the file is at fault and stderr holds the message for the user."""
_HEAD_BYTES = 1024 * 1024


def converted_folder(source: Path, cache_dir: Path) -> Path:
    """The MLX folder for a GGUF file, converting it now if there is none yet. Raises ModelInvalid."""
    folder = cache_dir.expanduser() / "converted" / f"{source.stem}-{_key(source)}"
    if is_whole(folder):
        return folder
    command = [sys.executable, "-m", "lmx.hub.convert", str(source), str(folder)]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if process.returncode == REFUSED:
        raise ModelInvalid(process.stderr.strip())
    if process.returncode != 0:
        tail = " / ".join(process.stderr.strip().splitlines()[-3:])
        raise ModelInvalid(f"{source} could not be converted to {folder} (exit status {process.returncode}): {tail}")
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a finished conversion is there. A power cut can leave a renamed folder with unwritten files."""
    try:
        inspect_folder(folder)
        source_quantization(folder)
    except ModelInvalid:
        return False
    return True


def source_quantization(folder: Path) -> str:
    """How the GGUF file held its weights, for example "Q4_1"."""
    return str(read_json(folder / FACTS_FILE, why="lmx writes it when it converts a GGUF file")["quantization"])


def _key(source: Path) -> str:
    try:
        stat = source.stat()
        with source.open("rb") as file:
            digest = hashlib.sha256(file.read(_HEAD_BYTES))
    except OSError as error:
        raise ModelInvalid(f"{source} cannot be read: {error.strerror}.") from None
    digest.update(f"{stat.st_size} {stat.st_mtime_ns} {CONVERTER_VERSION}".encode())
    return digest.hexdigest()[:16]
