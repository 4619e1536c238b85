"""The promise where the prefix store is at work: whoever leaves while the disk is read, while waiting for another's
prefill, or in the step that restores, leaves nothing behind, on both engines and in every way of leaving.

The disk is one that does not answer: its files are FIFOs that nobody writes to, so what is asked of it first is read
for ever. A leader's prefill is long, and its end is not waited for.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.backends import BACKENDS
from tests.models import build_gguf
from tests.server import Server, serve
from tests.test_cancellation import GO, SOCKETS, backend, body, send

PREFIX = "The quick brown fox jumps over the lazy dog, and 17 of 42 others do not. " * 20
LEADER = "A prompt of many steps, whose end is not waited for by anyone at all here. " * 150


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    gguf = build_gguf(tmp_path_factory.mktemp("prefix-cancel") / "model.gguf", num_hidden_layers=4, hidden_size=256)
    return gguf if request.param == "llama" else gguf.with_suffix(".mlx")


@pytest.fixture(scope="module")
def prefixes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a server that ended has kept ``PREFIX``."""
    folder = tmp_path_factory.mktemp("prefixes")
    with serve(tmp_path_factory.mktemp("first"), "--model", str(model), settings=settings(model, folder)) as server:
        server.line(r"lmx: model \S+ ready")
        assert ask(server)["prompt_tokens_details"]["cached_tokens"] == 0
    assert block_files(folder)
    return folder


def settings(model: Path, folder: Path) -> dict[str, dict[str, Any]]:
    engine = {"max_rows": 4, "max_chunk_tokens": 32, "prefix_disk_bytes": 2**30, "prefix_dir": str(folder)}
    return {"engine": engine, "model": backend(model)}


@pytest.fixture(scope="module")
def server(model: Path, prefixes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serve(folder, "--model", str(model), settings=settings(model, prefixes)) as server:
        server.line(r"lmx: model \S+ ready")
        files = block_files(prefixes)
        for path in files:
            path.unlink()
            os.mkfifo(path)
        yield server
        for path in files:
            with suppress(OSError):  # nobody reads this one
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture(autouse=True)
def close_sockets() -> Iterator[None]:
    yield
    while SOCKETS:
        SOCKETS.pop().close()


@pytest.fixture(params=sorted(GO))
def go(request: pytest.FixtureRequest) -> Callable[[socket.socket], None]:
    return GO[request.param]


def ask(server: Server, text: str = PREFIX) -> dict[str, Any]:
    """The usage of an answer."""
    fields = body(messages=[{"role": "user", "content": text}], stream=False, max_tokens=2)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=fields, timeout=60)
    usage: dict[str, Any] = answer.raise_for_status().json()["usage"]
    return usage


def block_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.parent.parent == folder)


def test_while_the_disk_is_read(server: Server, go: Callable[[socket.socket], None]) -> None:
    for stream in (True, False):
        sock = send(server, messages=[{"role": "user", "content": PREFIX}], stream=stream)
        # With nothing else to do an engine lets a request wait for the disk alone.
        server.until(live_leases=1, waiting=1, engine_queued=1, engine_prefilling=0, engine_kv_used_bytes=0)
        go(sock)
        server.idle()


def test_while_waiting_for_a_leader(server: Server, go: Callable[[socket.socket], None]) -> None:
    text = f"{os.urandom(8).hex()} {LEADER}"
    leader = send(server, messages=[{"role": "user", "content": text}])
    server.until(live_leases=1, live_sequences=1, waiting=1)
    followers = [send(server, messages=[{"role": "user", "content": text + end}]) for end in ("a", "b")]
    server.until(live_leases=3, live_sequences=3, waiting=3)
    for sock in followers:
        go(sock)
    server.until(live_leases=1, live_sequences=1, waiting=1)  # the leader is at its prompt still
    go(leader)
    server.idle()


def test_when_the_leader_leaves(server: Server, go: Callable[[socket.socket], None]) -> None:
    text = f"{os.urandom(8).hex()} {LEADER}"
    leader = send(server, messages=[{"role": "user", "content": text}])
    server.until(live_leases=1, live_sequences=1, waiting=1)
    follower = send(server, messages=[{"role": "user", "content": text + "a"}], max_tokens=2, stream=False)
    server.until(live_leases=2, live_sequences=2)
    go(leader)
    assert follower.recv(65536).startswith(b"HTTP/1.1 200")
    server.idle()


def test_in_the_step_that_restores(server: Server, go: Callable[[socket.socket], None]) -> None:
    text = f"Once more: {PREFIX}"
    ask(server, text)
    for stream in (True, False):
        sock = send(server, messages=[{"role": "user", "content": f"{text} And more."}], stream=stream)
        while server.metrics()["lmx_live_leases"] == 0:
            pass
        go(sock)
        server.idle()
    assert ask(server, text)["prompt_tokens_details"]["cached_tokens"] > 500
