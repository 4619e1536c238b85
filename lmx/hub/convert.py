"""The converter process: ``python -m lmx.hub.convert words SOURCE FOLDER`` or ``weights SOURCE FOLDER WORDS``.

Started for a ``lmx.hub.conversion.Conversion``, because reading a vocabulary takes seconds of Python's time, and the
weights need MLX, which the server never loads (``words`` does without it). The folder appears whole or not at all, also
with two converters at work, and nothing else stays behind; SIGTERM, and the end of the process that started it (a pipe
as standard input that closes), take back what is half-made.
"""

import fcntl
import json
import os
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmx.errors import ModelInvalid
from lmx.hub.conversion import (
    REFUSED,
    GgufFacts,
    lock_path,
    unfinished_path,
    weights_are_whole,
    words_are_whole,
    write_facts,
)
from lmx.hub.folder import inspect_folder, read_json
from lmx.hub.gguf.file import GgufFile
from lmx.hub.gguf.mlx import inexact_types, mlx_bytes, mlx_folder
from lmx.hub.gguf.tokenizer import write_tokenizer


def convert_words(source: Path, folder: Path) -> None:
    """Make ``folder`` of the file's tokenizer, chat template and facts, unless it is there. Raises ModelInvalid."""

    def write(unfinished: Path) -> None:
        file = GgufFile(source)
        refusal = ""
        try:
            mlx_folder(file)
        except ModelInvalid as error:
            refusal = error.message
        facts = GgufFacts(
            architecture=file.architecture,
            context_length=int(file.need("context_length")),
            quantization=file.quantization,
            size_bytes=file.size_bytes,
            mlx_refusal=refusal,
            inexact=inexact_types(file),
            sampling=file.sampling,
            parameters=sum(tensor.elements for tensor in file.tensors.values()),
            mlx_bytes=mlx_bytes(file),
        )
        config = {"model_type": file.architecture, "eos_token_id": write_tokenizer(file, unfinished)}
        _write_json(unfinished / "config.json", config)
        write_facts(unfinished, source, facts)

    _build(folder, words_are_whole, write)


def convert_weights(source: Path, folder: Path, words: Path) -> None:
    """Make ``folder`` an MLX folder of the file, with the tokenizer from ``words``. Raises ModelInvalid."""

    def write(unfinished: Path) -> None:
        from lmx.hub.gguf.weights import write_weights

        file = GgufFile(source)
        config, names = mlx_folder(file)
        config |= write_weights(file, config, names, unfinished)
        config["eos_token_id"] = read_json(words / "config.json", why="lmx wrote it")["eos_token_id"]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(words / name, unfinished / name)
        _write_json(unfinished / "config.json", config)
        inspect_folder(unfinished)

    _build(folder, weights_are_whole, write)


def _build(folder: Path, is_whole: Callable[[Path], bool], write: Callable[[Path], None]) -> None:
    with _lock(folder):
        if is_whole(folder):
            return
        unfinished = unfinished_path(folder)
        for leftover in (unfinished, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir()
        try:
            write(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One converter at a time for a folder. The system releases the lock when its holder dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = lock_path(folder)
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Whoever held it before has removed the file; a lock on a removed file keeps nobody out.
            if not _is_same(lock.fileno(), path):
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def _end_on_request() -> None:
    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows is the tidying up
        sys.exit(128 + signal.SIGTERM)

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    what, *paths = sys.argv[1:]
    _end_on_request()
    try:
        if what == "words":
            convert_words(*map(Path, paths))
        else:
            convert_weights(*map(Path, paths))
    except ModelInvalid as error:
        print(error.message, file=sys.stderr)
        return REFUSED
    except OSError as error:
        print(f"{error.filename or paths[1]}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
