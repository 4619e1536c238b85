"""Starts ``lmx serve`` on a free port for a measurement and ends it, whatever happens. Blocking."""

import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lmx.bench.client import BenchError

_START_S = 600.0
_STOP_S = 20.0
_LISTENING = re.compile(r"listening on (http://\S+)")


@dataclass(frozen=True, slots=True)
class RunningServer:
    url: str
    pid: int


@contextmanager
def running_server(model: str, environment: Mapping[str, str] | None = None) -> Iterator[RunningServer]:
    """A server of ``model`` (path or id) that is ready. ``environment`` is added to this process's own.

    Raises BenchError, with the server's last words, when it does not become ready.
    """
    command = [sys.executable, "-m", "lmx", "serve", "--host", "127.0.0.1", "--port", "0", "--model", model]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # Nothing is measured that an earlier run has left on the disk.
        env={
            **os.environ,
            "LMX_SERVER_DRAIN_S": "0",
            "LMX_ENGINE_PREFIX_DISK_BYTES": "0",
            **(environment or {}),
        },
    )
    log = _Log(process)
    try:
        url = log.url()
        _wait_ready(process, url, log)
        yield RunningServer(url, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.join()


class _Log:
    """Reads the server's log, so that it never blocks, finds the address in it, and keeps the end."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._tail: deque[str] = deque(maxlen=20)
        self._url = ""
        self._known = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._tail.append(line)
                if not self._url and (found := _LISTENING.search(line)):
                    self._url = found[1]
                    self._known.set()
        self._known.set()

    def url(self) -> str:
        self._known.wait(_START_S)
        if not self._url:
            raise self.error("the server did not start")
        return self._url

    def error(self, problem: str) -> BenchError:
        return BenchError(f"{problem}; its last lines:\n{''.join(self._tail)}")

    def join(self) -> None:
        self._thread.join()


def _wait_ready(process: "subprocess.Popen[str]", url: str, log: _Log) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise log.error(f"the server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health?ready", timeout=10):
                return
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise log.error(f"the server's health answers {error.code}") from None
        time.sleep(0.1)
    raise log.error(f"the model was not ready after {_START_S:.0f} s")
