"""Whoever goes, in whatever way and at whatever moment, leaves no lease and no KV behind."""

import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import pytest
import trio

from tests.api_server import Server, with_server, write_model

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4000}
PIPELINED = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def close(client: trio.SocketStream) -> None:
    client.socket.close()


def half_close(client: trio.SocketStream) -> None:
    client.socket.shutdown(socket.SHUT_WR)


def reset(client: trio.SocketStream) -> None:
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.close()


@pytest.mark.parametrize("go", [close, half_close, reset])
@pytest.mark.parametrize("behind", [b"", b"\r\n", PIPELINED])
@pytest.mark.parametrize("shape", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}])
def test_a_client_that_goes_frees_everything(
    go: Callable[[trio.SocketStream], None],
    behind: bytes,
    shape: dict[str, Any],
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @with_server(LMX_NULL_STEP_MS=5)
    async def test(server: Server) -> None:
        client = await server.send(CHAT, LONG | shape, behind)
        await server.until(lambda engine: engine["kv_sequence_bytes"] > 0)
        await server.leased(shape.get("n", 1))
        go(client)
        await server.free()
        assert (await server.http.post(CHAT, json=LONG | {"max_tokens": 1})).status_code == 200

    test(model_folder, monkeypatch)


@with_server(LMX_NULL_STEP_MS=5)
async def test_a_client_that_goes_while_queued(server: Server) -> None:
    running = [await server.send(CHAT, LONG) for _ in range(8)]
    queued = [await server.send(CHAT, LONG | {"stream": stream}) for stream in (False, True)]
    await server.leased(10)
    for client in queued:
        close(client)
    await server.leased(8)
    for client in running:
        close(client)
    await server.free()


@with_server(write_timeout_s=0.3)
async def test_a_client_that_stops_reading(server: Server) -> None:
    body = LONG | {"n": 16, "stream": True, "logprobs": True, "top_logprobs": 20}
    await server.send(CHAT, body, receive_buffer_bytes=4096)
    await server.leased(16)
    await server.free()


@with_server(LMX_NULL_STEP_MS=5)
async def test_http2_reset_frees_its_own_request(server: Server) -> None:
    client = await server.connect()
    http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    http2.initiate_connection()
    body = b'{"messages":[{"role":"user","content":"Hi"}],"max_tokens":4000,"stream":true}'
    for stream_id in (1, 3):
        headers = [(":method", "POST"), (":path", CHAT), (":scheme", "http"), (":authority", "localhost")]
        http2.send_headers(stream_id, headers)
        http2.send_data(stream_id, body, end_stream=True)
    await client.send_all(http2.data_to_send())
    await server.leased(2)
    http2.reset_stream(1)
    await client.send_all(http2.data_to_send())
    await server.leased(1)
    close(client)
    await server.free()


@with_server(LMX_NULL_STEP_MS=5)
async def test_the_sdk_that_is_cancelled(server: Server) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(lambda: server.sdk.chat.completions.create(model="tiny", **LONG))
        await server.leased(5)
        nursery.cancel_scope.cancel()
    await server.free()


@with_server(LMX_NULL_STEP_MS=5)
async def test_cancelling_the_http_face_gives_all_leases_back(server: Server) -> None:
    """As ``lmx serve`` does at the end of its patience: running streams are cut, and hold nothing."""
    client = await server.send(CHAT, LONG | {"stream": True})
    await server.leased(1)
    server.shutdown.set()
    data = b""
    while data.count(b'"content":') < 20:  # a running stream goes on
        data += await client.receive_some()
    server.serving.cancel()
    while server.engine.statistics().live_leases:
        await trio.lowlevel.checkpoint()
    assert server.engine.statistics().live_sequences == 0
