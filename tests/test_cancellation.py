"""The promise, against the real engines: whenever and however a client goes, its KV is free and every account says so.

The API's own tests drive more states through the null engine; here the sequences are real ones, in MLX's arenas and in
llama.cpp's cells.
"""

import concurrent.futures
import json
import os
import random
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import httpx
import openai
import pytest

from tests.backends import BACKENDS
from tests.models import build_gguf
from tests.server import Server, serve

STORM = 200
LONG_PROMPT = "The quick brown fox jumps over the lazy dog, and 17 of 42 others do not. " * 150


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for each back end, of the same weights: an MLX folder, a GGUF file.

    Large enough that a long prompt takes many steps and a stream can be left in the middle.
    """
    gguf = build_gguf(tmp_path_factory.mktemp("cancel") / "model.gguf", num_hidden_layers=4, hidden_size=256)
    return gguf if request.param == "llama" else gguf.with_suffix(".mlx")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {
        "engine": {"max_rows": 2, "max_chunk_tokens": 32},
        "server": {"write_timeout_s": 0.5},
        "model": backend(model),
    }
    with serve(tmp_path_factory.mktemp("server"), "--model", str(model), settings=settings) as server:
        server.line(r"lmx: model \S+ ready")
        yield server


def backend(model: Path) -> dict[str, str]:
    return {"backend": "llama" if model.suffix == ".gguf" else "mlx"}


def body(**fields: Any) -> dict[str, Any]:
    fields.setdefault("messages", [{"role": "user", "content": "Hello!"}])
    return {"model": "default", "max_tokens": 5000, "temperature": 0, "ignore_eos": True, "stream": True, **fields}


SOCKETS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def close_sockets() -> Iterator[None]:
    """What a test only half closed."""
    yield
    while SOCKETS:
        SOCKETS.pop().close()


def send(server: Server, behind: bytes = b"", receive_buffer_bytes: int = 0, **fields: Any) -> socket.socket:
    """POST a chat completion over a socket of its own."""
    sock = socket.socket()
    SOCKETS.append(sock)
    if receive_buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    sock.connect(server.address)
    sock.settimeout(60)
    data = json.dumps(body(**fields)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data + behind)
    return sock


def read_chunks(sock: socket.socket, count: int) -> bytes:
    """Read until ``count`` chunks with content have come."""
    data = b""
    while data.count(b'"content":"') < count + 1:  # the role chunk has an empty one
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    return data


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


GO: dict[str, Callable[[socket.socket], None]] = {
    "fin": lambda sock: sock.close(),
    "half-close": lambda sock: sock.shutdown(socket.SHUT_WR),
    "reset": reset,
}


@pytest.fixture(params=sorted(GO))
def go(request: pytest.FixtureRequest) -> Callable[[socket.socket], None]:
    return GO[request.param]


def test_while_queued(server: Server, go: Callable[[socket.socket], None]) -> None:
    running = [send(server) for _ in range(2)]
    for sock in running:
        read_chunks(sock, 1)
    queued = [send(server), send(server, stream=False)]
    server.until(live_leases=4, live_sequences=4, waiting=2)
    for sock in queued:
        go(sock)
    server.until(live_leases=2, live_sequences=2, waiting=0)
    for sock in running:
        read_chunks(sock, 1)  # they go on
        go(sock)
    server.idle()


@pytest.mark.parametrize(
    "fields",
    [{"stream": True}, {"stream": False}, {"stream": False, "prompt_logprobs": 5, "n": 1}],
    ids=["stream", "whole", "prompt logprobs"],
)
def test_in_prefill(server: Server, go: Callable[[socket.socket], None], fields: dict[str, Any]) -> None:
    before = server.metrics()
    sock = send(server, messages=[{"role": "user", "content": LONG_PROMPT}], **fields)
    server.until(live_leases=1, live_sequences=1, waiting=1)
    go(sock)
    server.idle()
    after = server.metrics()
    assert after["lmx_generated_tokens_total"] == before["lmx_generated_tokens_total"]
    assert after["lmx_cancel_free_seconds_count"] == before["lmx_cancel_free_seconds_count"] + 1


@pytest.mark.parametrize("behind", [b"", b"\r\n", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_in_decode(server: Server, go: Callable[[socket.socket], None], behind: bytes) -> None:
    """Also with bytes behind the request, where Hypercorn stops reading."""
    sock = send(server, behind)
    read_chunks(sock, 3)
    go(sock)
    server.idle()


IN_A_FORM = {
    "regular expression": {"structured_outputs": {"regex": "[a-z ]+"}},
    "schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "list", "schema": {"type": "array", "items": {"type": "number"}, "minItems": 4000}},
        }
    },
    "tool call": {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "write",
                    "parameters": {
                        "type": "object",
                        "properties": {"text": {"type": "string", "minLength": 9000}},
                        "required": ["text"],
                    },
                },
            }
        ],
        "tool_choice": "required",
    },
}


@pytest.mark.parametrize(("form", "stream"), [("regular expression", True), ("schema", False), ("tool call", True)])
def test_in_a_grammar(server: Server, go: Callable[[socket.socket], None], form: str, stream: bool) -> None:
    before = server.metrics()["lmx_generated_tokens_total"]
    sock = send(server, stream=stream, temperature=1, **IN_A_FORM[form])
    server.until(live_leases=1, live_sequences=1, waiting=0)  # its first token is out
    go(sock)
    server.idle()
    assert server.metrics()["lmx_generated_tokens_total"] > before


def test_just_before_the_end(server: Server, go: Callable[[socket.socket], None]) -> None:
    for tokens in (1, 2, 12):
        sock = send(server, max_tokens=tokens)
        while b'"role"' not in sock.recv(65536):
            pass
        server.until(waiting=0)  # the first token is out, so the last one is near
        go(sock)
        server.idle()


@pytest.mark.parametrize("stream", [True, False])
def test_with_several_choices(server: Server, go: Callable[[socket.socket], None], stream: bool) -> None:
    sock = send(server, n=3, stream=stream, temperature=1)
    server.until(live_leases=3, live_sequences=3, waiting=1)
    go(sock)
    server.idle()


def test_not_streaming_with_bytes_behind(server: Server, go: Callable[[socket.socket], None]) -> None:
    sock = send(server, b"\r\n", stream=False)
    server.until(live_leases=1, waiting=0)
    go(sock)
    server.idle()


def test_a_client_that_stops_reading(server: Server) -> None:
    sock = send(server, receive_buffer_bytes=2048, n=8, temperature=1, logprobs=True, top_logprobs=20)
    server.until(live_leases=8)
    server.idle()  # write_timeout_s after its buffers are full
    sock.close()


def test_a_deadline(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body(stream=False, timeout=0.2), timeout=60)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    streamed = httpx.post(
        f"{server.url}/v1/chat/completions", json=body(), headers={"x-request-timeout": "0.2"}, timeout=60
    )
    assert streamed.status_code == 200
    last = streamed.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    server.idle()


def test_http2_stream_reset(server: Server) -> None:
    http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    http2.initiate_connection()
    for stream_id in (1, 3):
        headers = [
            (":method", "POST"), (":path", "/v1/chat/completions"), (":scheme", "http"), (":authority", "localhost"),
        ]  # fmt: skip
        http2.send_headers(stream_id, headers)
        form = IN_A_FORM["tool call"] if stream_id == 1 else {}
        http2.send_data(stream_id, json.dumps(body(temperature=1, **form)).encode(), end_stream=True)
    with socket.create_connection(server.address) as sock:
        sock.sendall(http2.data_to_send())
        server.until(live_leases=2, waiting=0)
        http2.reset_stream(1)
        sock.sendall(http2.data_to_send())
        server.until(live_leases=1, live_sequences=1)
        http2.close_connection()
        sock.sendall(http2.data_to_send())
        server.idle()


def test_the_sdk_leaves_a_stream(server: Server) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
        client.chat.completions.create(
            model="default", messages=messages, max_tokens=5000, stream=True, extra_body={"ignore_eos": True}
        ) as stream,
    ):
        for count, _ in enumerate(stream):
            if count == 5:
                break
    server.idle()


def test_a_storm_of_streams_leaves_nothing(storm_server: Server) -> None:
    """200 streams, each left after a random number of events, by FIN or by reset; memory is back where it was."""
    with send(storm_server, cache=False) as sock:
        read_chunks(sock, 2)
    storm_server.idle()
    active_bytes = storm_server.engine()["engine"]["mlx_active_bytes"]
    draw = random.Random(8)

    def one(events: int, go: Callable[[socket.socket], None], fields: dict[str, Any]) -> None:
        sock = send(storm_server, **fields)
        data = b""
        while data.count(b"data: ") < events and b"[DONE]" not in data:
            data += sock.recv(65536)
        go(sock)

    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        storm = []
        for _ in range(STORM):
            fields = {
                "messages": [{"role": "user", "content": "Tell me more. " * draw.choice([1, 1, 20, 200])}],
                "max_tokens": draw.choice([3, 30, 200]),
                "temperature": draw.choice([0, 1]),
                "seed": draw.randrange(2**40),
                "cache": False,  # what is kept is no leak
            }
            storm.append(pool.submit(one, draw.choice([0, 1, 2, 5, 20]), draw.choice([GO["fin"], reset]), fields))
        for one_of_them in storm:
            one_of_them.result()
    storm_server.idle()
    record = storm_server.engine()["engine"]
    llama = storm_server.status()["models"][0]["backend"] == "llama"
    assert record["arena_bytes"] == (record["kv_budget_bytes"] if llama else 0)  # llama.cpp keeps its buffer
    assert abs(record["mlx_active_bytes"] - active_bytes) <= 4096


@pytest.fixture(scope="module", params=BACKENDS)
def storm_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if request.param == "mlx":
        yield request.getfixturevalue("tiny_server")
        return
    folder = tmp_path_factory.mktemp("storm")
    model = build_gguf(folder / "model.gguf")
    with serve(folder, "--model", str(model), settings={"model": backend(model)}) as server:
        server.line(r"lmx: model \S+ ready")
        yield server


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "no step for")])
def test_an_engine_that_dies_or_hangs(model: Path, tmp_path: Path, number: signal.Signals, cause: str) -> None:
    """Its clients get a clear error at once, a stream in an event of its own; the next request works."""
    settings = {"engine": {"hang_timeout_s": 1.0, "restart_backoff_s": 0.05}, "model": backend(model)}
    with serve(tmp_path, "--model", str(model), settings=settings) as server:
        server.line(r"lmx: model \S+ ready")
        sock = send(server)
        read_chunks(sock, 2)
        pid = server.engine()["pid"]
        os.kill(pid, number)
        data = b""
        while piece := sock.recv(65536):
            data += piece
            if b'"error"' in data:
                break
        assert b"[DONE]" not in data
        error = json.loads(data[data.index(b'data: {"error"') + 6 :].split(b"\n")[0])["error"]
        assert error["code"] == "engine_died"
        assert cause in error["message"]
        sock.close()
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body(stream=False, max_tokens=5), timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 5
        record = server.until(state="ready", restarts=1, live_leases=0)
        assert record["pid"] != pid
        server.idle()
        assert server.metrics()["lmx_engine_restarts_total"] == 1


def test_shutdown_with_running_requests_leaves_nothing(model: Path, tmp_path: Path) -> None:
    settings = {"server": {"drain_s": 0.2}, "model": backend(model)}
    with serve(tmp_path, "--model", str(model), settings=settings, stop=False) as server:
        server.line(r"lmx: model \S+ ready")
        socks = [send(server), send(server, messages=[{"role": "user", "content": LONG_PROMPT}])]
        read_chunks(socks[0], 2)
        server.process.send_signal(signal.SIGTERM)
        for sock in socks:
            data = b""
            while piece := sock.recv(65536):
                data += piece
            assert b'data: {"error"' in data
            assert b"[DONE]" not in data
        server.ended(0)
