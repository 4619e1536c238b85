"""Starts a real ``python -m lmx serve`` for tests that stand where users stand, and proves that it ends without a
trace."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import tomlkit
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
NULL_ENGINE = [sys.executable, str(ROOT / "bench" / "null_engine.py")]
PATIENCE_S = 180
"""Bounds a failing test; a passing one waits for lines and states."""
MARK = "LMX_TEST_SERVER"
"""In the environment of a server and everything it starts, so that what it leaves behind can be found."""


class Server:
    """A running server process. ``url`` is known once it listens."""

    def __init__(self, process: "subprocess.Popen[str]", mark: str) -> None:
        self.process = process
        self.lines: list[str] = []
        """What it has written to stderr."""
        self._mark = mark
        # One for all: each makes an SSL context, which takes 20 ms.
        self._http = httpx.Client(timeout=PATIENCE_S, verify=False, trust_env=False)
        self._ended = False
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                with self._more:
                    self.lines.append(line.rstrip())
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def line(self, pattern: str) -> re.Match[str]:
        """Wait for a line on stderr in which ``pattern`` is found."""

        def found() -> re.Match[str] | bool:
            matches = (re.search(pattern, line) for line in self.lines)
            return next((match for match in matches if match), False) or self._ended

        with self._more:
            match = self._more.wait_for(found, PATIENCE_S)
        assert isinstance(match, re.Match), f"no line matches {pattern!r}:\n" + "\n".join(self.lines)
        return match

    @property
    def url(self) -> str:
        return self.line(r"listening on (http://[^\s\"]+)")[1]

    @property
    def address(self) -> tuple[str, int]:
        """For raw sockets."""
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def status(self) -> dict[str, Any]:
        """/admin/status."""
        document: dict[str, Any] = self._http.get(f"{self.url}/admin/status").raise_for_status().json()
        return document

    def engine(self) -> dict[str, Any]:
        """What /admin/status says of the engine: lmx.serving.statistics.EngineStatistics; None before it is started."""
        record: dict[str, Any] = self.status()["models"][0]["engine"]
        return record

    def metrics(self) -> dict[str, float]:
        """/metrics: the sum of each sample over its labels."""
        text = self._http.get(f"{self.url}/metrics").raise_for_status().text
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def until(self, **wanted: Any) -> dict[str, Any]:
        """Ask /admin/status until the engine's record has these values; keys with ``engine_`` are the engine's own."""
        gives_up = time.monotonic() + PATIENCE_S
        while True:
            models = self.status()["models"]  # none, for a moment at the start
            record = models[0]["engine"] if models else None
            own = (record or {}).get("engine") or {}
            seen = {k: own.get(k[7:]) if k.startswith("engine_") else (record or {}).get(k) for k in wanted}
            if seen == wanted:
                return record
            assert self.process.poll() is None, "\n".join(self.lines)
            assert time.monotonic() < gives_up, f"{seen} never became {wanted}"

    def idle(self) -> None:
        """Until the engine itself reports that it holds nothing; the server's account and the metrics must agree."""
        self.until(state="ready", live_leases=0, engine_queued=0, engine_decoding=0, engine_kv_used_bytes=0)
        record, metrics = self.engine(), self.metrics()
        assert (record["waiting"], record["live_sequences"], record["kv_sequence_bytes"]) == (0, 0, 0)
        gauges = ("lmx_live_leases", "lmx_live_sequences", "lmx_waiting", "lmx_running", "lmx_kv_sequence_bytes")
        assert [metrics[name] for name in gauges] == [0, 0, 0, 0, 0]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it as an init system would; it must exit 0 and leave no process."""
        self.process.send_signal(number)
        self.ended(0)

    def ended(self, returncode: int) -> None:
        """Wait for the end; nothing that the server started may still run."""
        assert self.process.wait(PATIENCE_S) == returncode, "\n".join(self.lines)
        self._reader.join(PATIENCE_S)
        self._http.close()
        assert self.left_behind() == []

    def left_behind(self) -> list[psutil.Process]:
        """Processes that carry this server's mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def clean_up(self) -> None:
        """After a failure: leave nothing to the next test."""
        for process in self.left_behind():
            process.kill()
        self.process.wait()
        self._reader.join()
        self._http.close()


@contextmanager
def serve(
    folder: Path,
    *arguments: str,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    null: Mapping[str, Any] | None = None,
    stop: bool = True,
    python: Sequence[str] = (sys.executable,),
) -> Iterator[Server]:
    """A server with ``folder`` as its working directory, on a free port unless ``arguments`` name one.

    ``settings`` become its lmx.toml; where they do not say it, nothing is kept on the disk for the next test.
    ``null``: the null engine, with these ``LMX_NULL_`` variables. At the end of the block it is stopped and must exit 0
    without leaving a process; ``stop=False``: the test has ended it.
    """
    tables: dict[str, dict[str, Any]] = {name: dict(values) for name, values in (settings or {}).items()}
    tables.setdefault("engine", {}).setdefault("prefix_disk_bytes", 0)
    mark = uuid.uuid4().hex
    environ = {k: v for k, v in os.environ.items() if not k.startswith("LMX_")} | {"PYTHONPATH": str(ROOT), MARK: mark}
    if null is not None:
        tables["engine"]["command"] = NULL_ENGINE
        environ |= {"LMX_NULL_FIRST_TOKEN": "300"}
        environ |= {f"LMX_NULL_{name.upper()}": str(value) for name, value in null.items()}
    (folder / "lmx.toml").write_text(tomlkit.dumps(tables), encoding="utf-8")
    port = () if "--port" in arguments else ("--port", "0")
    process = subprocess.Popen(
        [*python, "-m", "lmx", "serve", *port, *arguments],
        cwd=folder,
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    server = Server(process, mark)
    try:
        yield server
        if stop:
            server.stop()
    finally:
        server.clean_up()
