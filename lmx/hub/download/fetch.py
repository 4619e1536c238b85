"""The fetching child: ``python -P -m lmx.hub.download.fetch REQUEST``, one for each download.

A process of its own, because huggingface_hub blocks and checksums take a core, and because what is killed cannot leak.
It chooses, fetches into ``models/.downloads/<key>`` and lands the model; each line on stdout is a JSON object:
``chosen``, ``done_bytes`` and ``total_bytes`` with a ``message``, and last ``done`` or ``error``. It may be ended at
any moment: what has come stays for the next try. It ends itself with its server (a pipe as standard input that closes).
Started by ``lmx.serving.jobs``.
"""

import errno
import fcntl
import json
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from lmx.errors import LmxError
from lmx.hub.download.choose import choose
from lmx.hub.download.hub import Patience, describe, explain, open_hub
from lmx.hub.download.land import is_there, land
from lmx.hub.download.names import read_name
from lmx.hub.download.request import Chosen, Request, model_folder, staging_folder
from lmx.hub.download.transfer import Transfer

FILES_AT_ONCE = 8
EVERY_S = 0.25
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskTooFull(LmxError):
    status = 507
    code = "insufficient_disk"


class DiskFailed(LmxError):
    code = "disk_failed"


class _Voice:
    """The lines to the server. What changes often is told four times a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._total_bytes = 0
        self._message = ""
        self._changed = False
        threading.Thread(target=self._report_now_and_then, daemon=True).start()

    def say(self, **line: Any) -> None:
        with self._lock:
            self._print(line)

    def tell(self, message: str) -> None:
        with self._lock:
            self._message = message
            self._report()

    def expect(self, total_bytes: int) -> None:
        with self._lock:
            self._total_bytes = total_bytes

    def count(self, n: int) -> None:
        with self._lock:
            self._done_bytes += n
            self._message = "downloading"
            self._changed = True

    def _report_now_and_then(self) -> None:
        while True:
            time.sleep(EVERY_S)
            with self._lock:
                if self._changed:
                    self._report()

    def _report(self) -> None:
        self._changed = False
        self._print({"message": self._message, "done_bytes": self._done_bytes, "total_bytes": self._total_bytes})

    def _print(self, line: dict[str, Any]) -> None:
        try:
            print(json.dumps(line), flush=True)
        except BrokenPipeError:
            os._exit(1)  # nobody is there any more


def fetch(request: Request, voice: _Voice) -> Path:
    """Raises LmxError."""
    models = Path(request.models_path)
    try:
        hub = open_hub()
        if request.chosen is not None:
            chosen = Chosen.from_json(request.chosen)
        else:
            voice.tell("asking the Hub")
            name = read_name(request.model, revision=request.revision, quantization=request.quantization)
            chosen = choose(
                hub,
                name,
                quantizations=request.quantizations,
                allow_patterns=request.allow_patterns,
                patience=Patience(request.first_wait_s, request.give_up_s / 20, voice.tell),
            )
            voice.say(chosen=chosen.as_json())
        voice.expect(chosen.total_bytes)
        folder = model_folder(models, chosen.repo)
        staging = staging_folder(models, chosen.key)
        with _staged(staging, voice):
            if is_there(folder, chosen):
                shutil.rmtree(staging, ignore_errors=True)
                voice.count(chosen.total_bytes)
                voice.tell("it was there already")
                return folder
            _check_disk(staging, chosen, request.low_disk_bytes)
            _bring(chosen, staging, Patience(request.first_wait_s, request.give_up_s, voice.tell), voice)
            voice.tell("putting it into its place")
            land(staging, folder, chosen, joins=chosen.format == "gguf" or bool(request.allow_patterns))
            return folder
    except OSError as error:
        if error.errno in _FULL:
            raise DiskTooFull(
                f"The disk of {models} was full before all had come. What has come is kept: free some space (POST "
                "/admin/cleanup lists what is unused), ask for the model again, and the download goes on from there."
            ) from None
        raise DiskFailed(f"{error.filename or models}: {error.strerror or error}") from error


def _bring(chosen: Chosen, staging: Path, patience: Patience, voice: _Voice) -> None:
    """Raises what the first file to fail did; the others are then still on their way, until the process ends."""
    transfer = Transfer(chosen.repo, chosen.revision, staging, patience, voice.count)
    threads = ThreadPoolExecutor(FILES_AT_ONCE)
    # The small ones first: what a repository refuses, or lacks, shows at once.
    futures = [threads.submit(transfer.bring, file) for file in sorted(chosen.files, key=lambda file: file.size)]
    for future in as_completed(futures):
        error = future.exception()
        if error is None:
            continue
        # The client's errors are OSErrors, too.
        if isinstance(error, HfHubHTTPError) or (isinstance(error, Exception) and not isinstance(error, OSError)):
            raise explain(error, chosen.repo, chosen.revision) from error
        raise error


def _check_disk(staging: Path, chosen: Chosen, low_disk_bytes: int) -> None:
    there = sum(path.lstat().st_size for path in staging.rglob("*") if path.is_file())
    needed = max(0, chosen.total_bytes - there)
    free = shutil.disk_usage(staging).free
    if needed and free < needed + low_disk_bytes:
        raise DiskTooFull(
            f"{chosen.repo} takes {_size(needed)} more, and {_size(low_disk_bytes)} are to stay free "
            f"(hub.low_disk_bytes), but the disk of {staging.parent.parent} has only {_size(free)}. Free some space "
            "(POST /admin/cleanup lists what is unused), choose a smaller quantisation, or another hub.models_dir."
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@contextmanager
def _staged(staging: Path, voice: _Voice) -> Iterator[None]:
    """The staging folder, held by this process alone; the system lets it go when the holder dies."""
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        held = os.open(staging, os.O_RDONLY)
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                voice.tell("another download fetches the same files; waiting for it")
                fcntl.flock(held, fcntl.LOCK_EX)
            # Whoever held it may have made it the model's folder.
            if not staging.is_dir() or not os.path.samestat(os.fstat(held), staging.stat()):
                continue
            yield
            return
        finally:
            os.close(held)


def _end_with_server() -> None:
    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    _end_with_server()
    os.nice(5)  # engines and the server come first
    voice = _Voice()
    try:
        folder = fetch(Request.from_json(json.loads(sys.argv[1])), voice)
    except LmxError as error:
        voice.say(error=describe(error))
        return 1
    voice.say(done=str(folder))
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # without waiting for the threads of other files
