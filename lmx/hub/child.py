"""What the children that work for a job (``lmx.hub.download.fetch``, ``lmx.hub.quantize``) have in common: their lines
to the server, their end, the disk.

Each line on stdout is a JSON object: ``message`` with ``done_bytes``, ``came_bytes`` and ``total_bytes``, what the
child's own kind adds, and last ``done`` (a path) or ``error``. A child may be ended at any moment, and ends itself with
its server. The server must never import this: its standard input is its own.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lmx.errors import LmxError

EVERY_S = 0.25
STILL_S = 2.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskTooFull(LmxError):
    status = 507
    code = "insufficient_disk"


class DiskFailed(LmxError):
    code = "disk_failed"


class Voice:
    """The lines to the server. What changes often is told four times a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._came_bytes = 0
        self._total_bytes = 0
        self._message = ""
        self._changed = False
        self._told = 0.0
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
        """``n`` more bytes are there; negative: they were thrown away."""
        with self._lock:
            self._done_bytes += n
            self._changed = True

    def came(self, n: int, message: str) -> None:
        """``n`` more bytes are there, and this process brought them: they make the rate."""
        with self._lock:
            self._done_bytes += n
            self._came_bytes += n
            self._message = message
            self._changed = True

    def _report_now_and_then(self) -> None:
        while True:
            time.sleep(EVERY_S)
            with self._lock:
                # Also what stands still, or the rate would stay what it was.
                if self._changed or (self._total_bytes and time.monotonic() - self._told > STILL_S):
                    self._report()

    def _report(self) -> None:
        self._changed = False
        self._told = time.monotonic()
        counts = {name: getattr(self, f"_{name}") for name in ("done_bytes", "came_bytes", "total_bytes")}
        self._print({"message": self._message, **counts})

    def _print(self, line: dict[str, Any]) -> None:
        try:
            print(json.dumps(line), flush=True)
        except BrokenPipeError:
            os._exit(1)  # nobody is there any more


def run(work: Callable[[Voice], Path]) -> NoReturn:
    """A child's ``main``. It does not wait for the threads that ``work`` leaves when it fails."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_end_with_server, daemon=True).start()
    os.nice(5)  # engines and the server come first
    voice = Voice()
    status = 0
    try:
        voice.say(done=str(work(voice)))
    except LmxError as error:
        voice.say(error={"message": error.message, "code": error.code, "status": error.status})
        status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stderr.flush()
    os._exit(status)


def _end_with_server() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


@contextmanager
def staged(staging: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """The staging folder, held by this process alone; the system lets it go when the holder dies."""
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        held = os.open(staging, os.O_RDONLY)
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell("another job makes the same; waiting for it")
                fcntl.flock(held, fcntl.LOCK_EX)
            # Whoever held it may have made it the model's folder.
            if not staging.is_dir() or not os.path.samestat(os.fstat(held), staging.stat()):
                continue
            yield
            return
        finally:
            os.close(held)


def check_disk(what: str, needed: int, low_disk_bytes: int, promised_bytes: int, folder: Path) -> None:
    """``promised_bytes``: what other jobs will still write. Raises DiskTooFull."""
    free = shutil.disk_usage(folder).free
    if needed > 0 and free < needed + low_disk_bytes + promised_bytes:
        others = f" and other jobs will take {_size(promised_bytes)} of that" if promised_bytes else ""
        raise DiskTooFull(
            f"{what} takes {_size(needed)} more, and {_size(low_disk_bytes)} are to stay free (hub.low_disk_bytes), "
            f"but the disk of {folder} has only {_size(free)}{others}. Free some space (POST /admin/cleanup lists what "
            "is unused), choose a smaller quantisation, or another hub.models_dir."
        )


def disk_error(error: OSError, folder: Path, kept: str) -> LmxError:
    """``kept``: what becomes of what has been written, as a sentence."""
    if error.errno in _FULL:
        return DiskTooFull(
            f"The disk of {folder} was full before all was there. Free some space (POST /admin/cleanup lists what is "
            f"unused). {kept}"
        )
    return DiskFailed(f"{error.filename or folder}: {error.strerror or error}")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
