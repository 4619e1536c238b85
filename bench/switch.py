"""What it takes to go from one model to another that does not fit beside it, against starting a bare engine.

Two copies of one model in a server whose memory holds one: each request for the other loads it on demand and evicts.
The baseline is the engine's process alone, from its start until it is ready. Meanwhile /health is asked all the time,
and the evicted engine's process is watched until it is gone.
"""

import json
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from bench.models import folder
from bench.result import Result, Row, median_ratio
from lmx import protocol
from lmx.bench.server import running_server

TARGET = 1.3
HEALTH_MS = 50.0
GONE_S = 1.0
CONTEXT = 2048


def run(quick: bool) -> Result:
    rows: list[Row] = []
    for name in ("llama-4x128",) if quick else ("llama-4x128", "smollm2"):
        with TemporaryDirectory() as temporary:
            rows.append({"model": name, **_measure(folder(name), Path(temporary), 4 if quick else 8)})
    return Result("seconds to switch models, against a bare engine's start", rows)


def _measure(model: Path, temporary: Path, switches: int) -> Row:
    zoo = temporary / "zoo"
    for name in ("left", "right"):
        shutil.copytree(model, zoo / name)
    environment = {
        "LMX_HUB_DATA_DIR": str(temporary / "data"),
        "LMX_HUB_FOLDERS": json.dumps([str(zoo)]),
        "LMX_HUB_HUGGINGFACE": "false",
        "LMX_HUB_LMSTUDIO": "false",
        "LMX_MODEL_CONTEXT_LENGTH": str(CONTEXT),
        "LMX_ENGINE_MAX_ROWS": "1",
    }
    with running_server(str(zoo / "left"), environment) as server:
        needed = _get(f"{server.url}/admin/models/left")["memory"]["estimate"]["total_bytes"]
    environment["LMX_MEMORY_LIMIT_BYTES"] = str(int(1.5 * needed))
    taken, bare, gone = [], [], []
    with running_server(str(zoo / "left"), environment) as server, _health(server.url) as waits:
        for turn in range(switches):
            name = ("right", "left")[turn % 2]
            bare.append(_bare_start(zoo / name))
            (before,) = _engines(server.pid)
            began = time.perf_counter()
            watcher = threading.Thread(target=_note_end, args=(before, gone))
            watcher.start()
            _get(f"{server.url}/v1/completions", {"model": name, "prompt": "x", "max_tokens": 1})
            taken.append(time.perf_counter() - began)
            watcher.join()
    ratio, p99 = median_ratio(taken, bare), statistics.quantiles(waits, n=100)[98] * 1000
    return {
        "switch s": statistics.median(taken),
        "bare start s": statistics.median(bare),
        "ratio": ratio,
        "target": TARGET,
        "process gone s": max(gone),
        "health p99 ms": p99,
        "ok": ratio <= TARGET and max(gone) <= GONE_S and p99 <= HEALTH_MS,
    }


def _bare_start(path: Path) -> float:
    """Seconds from the start of an engine's process until it is ready."""
    load = protocol.Load(path=str(path), context_length=CONTEXT, max_rows=1, words=str(path))
    began = time.perf_counter()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-P", "-m", "lmx.engine", "--fd", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
        ours.sendall(protocol.encode(load))
        decoder = protocol.Decoder()
        while not any(isinstance(message, protocol.Ready) for message in decoder.feed(ours.recv(1 << 16))):
            pass
        taken = time.perf_counter() - began
        process.kill()
        process.wait()
    return taken


def _engines(server: int) -> list[psutil.Process]:
    children = psutil.Process(server).children()
    return [child for child in children if "lmx.engine" in child.cmdline()]


def _note_end(process: psutil.Process, gone: list[float]) -> None:
    """How long after its last answer could come: the eviction begins with the request."""
    began = time.perf_counter()
    process.wait()
    gone.append(time.perf_counter() - began)


@contextmanager
def _health(url: str) -> Iterator[list[float]]:
    """Seconds that each answer took, asked a hundred times a second, each over a connection of its own."""
    waits: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.01):
            began = time.perf_counter()
            _get(f"{url}/health")
            waits.append(time.perf_counter() - began)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield waits
    finally:
        stop.set()
        asker.join()


def _get(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)
