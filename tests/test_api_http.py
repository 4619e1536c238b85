"""The HTTP layer alone, with a small ASGI app: a client that goes or stops reading is seen, whatever it left unread."""

import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest
import trio

from lmx.api.transport import stream as stream_module
from lmx.api.transport.http import serve_http
from lmx.config import Sources
from lmx.config.keys import flat
from lmx.config.live import Live

HANG = b"GET /hang HTTP/1.1\r\nHost: localhost\r\n\r\n"
OK = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE = 600_000
PATIENCE_S = 10  # bounds a failing test; a passing one waits for events only


class Service:
    """A running server whose app tells what becomes of its handlers."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.clients: list[trio.SocketStream] = []
        self.shutdown = trio.Event()
        self.stopped = trio.Event()
        self._started, self.started = trio.open_memory_channel[str](1000)
        self._cancelled, self.cancelled = trio.open_memory_channel[str](1000)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        path = scope["path"]
        async with trio.open_nursery() as nursery:

            async def watch() -> None:  # as Quart-Trio does
                while (await receive())["type"] != "http.disconnect":
                    pass
                nursery.cancel_scope.cancel()

            if path != "/refuse":  # that one answers and never reads the body
                nursery.start_soon(watch)
            self._started.send_nowait(path)
            try:
                if path == "/hang":
                    await trio.sleep_forever()
                await send({"type": "http.response.start", "status": 200, "headers": []})
                if path == "/large":
                    await send({"type": "http.response.body", "body": bytes(LARGE), "more_body": True})
                while path == "/flood":
                    await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await send({"type": "http.response.body", "body": b"ok"})
            except trio.Cancelled:
                if path in ("/hang", "/flood"):  # the others have sent everything
                    self._cancelled.send_nowait(path)
                raise
            nursery.cancel_scope.cancel()

    async def connect(self, receive_buffer_bytes: int | None = None) -> trio.SocketStream:
        sock = trio.socket.socket()
        if receive_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.clients.append(trio.SocketStream(sock))
        await sock.connect(("127.0.0.1", self.port))
        return self.clients[-1]


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Service]:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    service = Service(sock.getsockname()[1])
    configured = Live(Sources(command_line=flat({"server": settings})), Path("lmx.toml"))
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await serve_http(service.app, [sock], configured, shutdown=service.shutdown, task_status=task_status)
            service.stopped.set()

        await nursery.start(run)
        try:
            yield service
        finally:
            for client in service.clients:
                client.socket.close()
        nursery.cancel_scope.cancel()


def in_trio(**settings: Any) -> Callable[[Callable[[Service], Awaitable[None]]], Callable[[], None]]:
    """Run the test as a Trio task against its own server."""

    def decorate(test: Callable[[Service], Awaitable[None]]) -> Callable[[], None]:
        async def main() -> None:
            with trio.fail_after(PATIENCE_S):
                async with serving(**settings) as service:
                    await test(service)

        def run() -> None:
            trio.run(main)

        run.__doc__ = test.__doc__
        return run

    return decorate


def reset(client: trio.SocketStream) -> None:
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.close()


def close(client: trio.SocketStream) -> None:
    client.socket.close()


def half_close(client: trio.SocketStream) -> None:
    client.socket.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("go", [close, half_close, reset])
@pytest.mark.parametrize(
    "behind",
    [b"", b"\r\n", b"\r\n\r\n", OK, HANG + OK, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n", b"junk"],
)
@pytest.mark.parametrize("together", [True, False])
def test_a_client_that_goes_is_seen_whatever_it_left_unread(
    go: Callable[[trio.SocketStream], None], behind: bytes, together: bool
) -> None:
    @in_trio()
    async def test(service: Service) -> None:
        client = await service.connect()
        await client.send_all(HANG + behind if together else HANG)
        assert await service.started.receive() == "/hang"
        if behind and not together:
            await client.send_all(behind)
        go(client)
        assert await service.cancelled.receive() == "/hang"
        with pytest.raises(trio.WouldBlock):
            service.started.receive_nowait()  # and what it had pipelined never starts

    test()


async def read_until(client: trio.SocketStream, text: bytes, count: int = 1) -> bytes:
    data = b""
    while data.count(text) < count:
        more = await client.receive_some()
        assert more, f"the server closed after {data!r}"
        data += more
    return data


@in_trio()
async def test_pipelined_requests_are_answered_in_order(service: Service) -> None:
    client = await service.connect()
    await client.send_all(OK * 5)
    data = await read_until(client, b"\r\n2\r\nok\r\n0\r\n\r\n", 5)
    assert data.count(b"HTTP/1.1 200") == 5


@in_trio()
async def test_a_pipelining_client_that_does_not_go_is_not_cancelled(service: Service) -> None:
    client, other = await service.connect(), await service.connect()
    await client.send_all(HANG + OK)
    await service.started.receive()
    await other.send_all(OK)
    await read_until(other, b"ok\r\n0\r\n\r\n")
    with pytest.raises(trio.WouldBlock):
        service.cancelled.receive_nowait()


def test_a_client_that_fills_the_read_ahead_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "READ_AHEAD_PATIENCE_S", 0.1)

    @in_trio()
    async def test(service: Service) -> None:
        client = await service.connect()
        await client.send_all(HANG)
        await service.started.receive()
        with pytest.raises(trio.BrokenResourceError):
            await client.send_all(OK * 1_000_000)
        assert await service.cancelled.receive() == "/hang"

    test()


@in_trio(write_timeout_s=0.2)
async def test_a_client_that_stops_reading_is_disconnected(service: Service) -> None:
    client = await service.connect()
    await client.send_all(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert await service.started.receive() == "/flood"
    assert await service.cancelled.receive() == "/flood"
    with pytest.raises(trio.BrokenResourceError):
        await read_until(client, b"the end")


@in_trio(write_timeout_s=0.6)
async def test_a_slow_and_steady_reader_is_served(service: Service) -> None:
    """Less in ``write_timeout_s`` than what makes a socket writable again."""
    client = await service.connect(receive_buffer_bytes=16384)
    await client.send_all(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for _ in range(15):
        assert await client.receive_some(8192)
        await trio.sleep(0.1)
    await read_until(client, b"ok\r\n0\r\n\r\n")


@in_trio(write_timeout_s=3600)
async def test_a_client_that_goes_ends_a_blocked_write(service: Service) -> None:
    client = await service.connect()
    await client.send_all(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await service.started.receive()
    half_close(client)
    assert await service.cancelled.receive() == "/flood"


@in_trio(keep_alive_s=0.1)
async def test_an_idle_connection_is_closed_and_a_busy_one_is_not(service: Service) -> None:
    idle, busy, silent = await service.connect(), await service.connect(), await service.connect()
    await busy.send_all(HANG)
    await idle.send_all(OK)
    await read_until(idle, b"ok\r\n0\r\n\r\n")
    assert await idle.receive_some() == b""
    assert await silent.receive_some() == b""
    with pytest.raises(trio.WouldBlock):
        service.cancelled.receive_nowait()


@in_trio()
async def test_shutdown_closes_idle_connections_and_lets_requests_end(service: Service) -> None:
    idle, busy = await service.connect(), await service.connect()
    await idle.send_all(OK)
    await read_until(idle, b"ok\r\n0\r\n\r\n")
    await service.started.receive()
    await busy.send_all(HANG)
    await service.started.receive()
    service.shutdown.set()
    assert await idle.receive_some() == b""
    with pytest.raises(OSError, match="Connection refused"):
        await service.connect()
    assert not service.stopped.is_set()
    close(busy)
    await service.cancelled.receive()
    await service.stopped.wait()


@in_trio()
async def test_garbage_is_refused_and_the_server_goes_on(service: Service) -> None:
    client = await service.connect()
    await client.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not http\r\n\r\n")
    assert (await client.receive_some()).startswith(b"HTTP/1.1 400")
    other = await service.connect()
    await other.send_all(OK)
    await read_until(other, b"ok\r\n0\r\n\r\n")


# --- HTTP/2 ---------------------------------------------------------------------------------------


class Http2Client:
    """A client by prior knowledge, whose every frame the test decides on."""

    def __init__(self, stream: trio.SocketStream, *, checks: bool = True) -> None:
        self.stream = stream
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True, validate_outbound_headers=checks, normalize_outbound_headers=checks
            )
        )
        self.h2.initiate_connection()

    async def flush(self) -> None:
        await self.stream.send_all(self.h2.data_to_send())

    async def request(self, path: str, *, end_stream: bool = True) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        method = "GET" if end_stream else "POST"
        headers = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "localhost")]
        self.h2.send_headers(stream_id, headers, end_stream=end_stream)
        await self.flush()
        return stream_id

    async def until(self, kind: type[h2.events.Event]) -> h2.events.Event:
        while True:
            data = await self.stream.receive_some()
            assert data, "the server closed"
            for event in self.h2.receive_data(data):
                if isinstance(event, kind):
                    return event
            await self.flush()


@in_trio()
async def test_http2_reset_cancels_its_own_request_only(service: Service) -> None:
    client = Http2Client(await service.connect())
    first, _second = await client.request("/hang"), await client.request("/hang")
    await service.started.receive()
    await service.started.receive()
    client.h2.reset_stream(first)
    await client.flush()
    await service.cancelled.receive()
    await client.request("/")
    await client.until(h2.events.StreamEnded)
    with pytest.raises(trio.WouldBlock):
        service.cancelled.receive_nowait()
    close(client.stream)
    await service.cancelled.receive()


async def good_sibling(service: Service, client: Http2Client) -> None:
    """The connection's other streams never noticed: one that ran still runs, and a new one is served."""
    await client.request("/")
    await client.until(h2.events.StreamEnded)
    with pytest.raises(trio.WouldBlock):
        service.cancelled.receive_nowait()


@in_trio(write_timeout_s=0.2)
async def test_http2_stream_that_is_not_read_is_reset_alone(service: Service) -> None:
    """It shows in the flow-control window: no write to the socket ever blocks."""
    client = Http2Client(await service.connect())
    await client.request("/hang")
    await service.started.receive()
    flood = await client.request("/flood")
    reset_event = await client.until(h2.events.StreamReset)
    assert isinstance(reset_event, h2.events.StreamReset)
    assert reset_event.stream_id == flood
    assert await service.cancelled.receive() == "/flood"
    client.h2.increment_flow_control_window(2**20)  # of the connection
    await good_sibling(service, client)


@in_trio(write_timeout_s=0.3)
async def test_http2_slow_and_steady_reader_is_served(service: Service) -> None:
    """A large answer sent at once, taken a little at a time, for longer than ``write_timeout_s`` in all."""
    client = Http2Client(await service.connect())
    client.h2.increment_flow_control_window(LARGE)
    stream_id = await client.request("/large")
    for _ in range(8):
        await client.until(h2.events.DataReceived)
        await trio.sleep(0.1)
        client.h2.increment_flow_control_window(20_000, stream_id)
        await client.flush()
    client.h2.increment_flow_control_window(LARGE, stream_id)
    await client.flush()
    await client.until(h2.events.StreamEnded)


@in_trio()
async def test_http2_body_after_the_answer_costs_nothing(service: Service) -> None:
    client = Http2Client(await service.connect())
    await client.request("/hang")
    stream_id = await client.request("/refuse", end_stream=False)
    await client.until(h2.events.StreamEnded)
    sent = 0
    while sent < 300_000:  # more than the window of the connection, were it not given back
        while client.h2.local_flow_control_window(stream_id) < 16384:
            await client.until(h2.events.WindowUpdated)
        client.h2.send_data(stream_id, bytes(16384))
        await client.flush()
        sent += 16384
    client.h2.end_stream(stream_id)
    await good_sibling(service, client)


MALFORMED: list[list[tuple[bytes, bytes]]] = [
    [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"localhost")],
    [(b":path", b"/"), (b":scheme", b"http"), (b":authority", b"localhost")],
    [(b":method", b"GET"), (b":path", b""), (b":scheme", b"http"), (b":authority", b"localhost")],
    [(b":method", b"GET"), (b":path", b"/"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"localhost")],
    [(b":method", b"G\xcbT"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"localhost")],
    [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http")],
    [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"localhost"), (b"X-Up", b"1")],
    [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"localhost"), (b"", b"1")],
    [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"localhost"), (b"a", b"\r\n")],
    [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"localhost"), (b":odd", b"1")],
    [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"a"), (b"connection", b"close")],
    [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"a"), (b"content-length", b"x")],
]


@pytest.mark.parametrize("headers", MALFORMED)
def test_http2_malformed_request_ends_its_own_stream_only(headers: list[tuple[bytes, bytes]]) -> None:
    @in_trio()
    async def test(service: Service) -> None:
        client = Http2Client(await service.connect(), checks=False)
        await client.request("/hang")
        bad = client.h2.get_next_available_stream_id()
        client.h2.send_headers(bad, headers, end_stream=True)
        await client.flush()
        reset_event = await client.until(h2.events.StreamReset)
        assert isinstance(reset_event, h2.events.StreamReset)
        assert (reset_event.stream_id, reset_event.error_code) == (bad, h2.errors.ErrorCodes.PROTOCOL_ERROR)
        await good_sibling(service, client)

    test()


@in_trio()
async def test_http2_body_of_another_length_than_announced_ends_its_own_stream_only(service: Service) -> None:
    client = Http2Client(await service.connect(), checks=False)
    await client.request("/hang")
    await service.started.receive()
    bad = client.h2.get_next_available_stream_id()
    headers = [
        (":method", "POST"),
        (":path", "/hang"),
        (":scheme", "http"),
        (":authority", "a"),
        ("content-length", "5"),
    ]
    client.h2.send_headers(bad, headers)
    client.h2.send_data(bad, b"123456", end_stream=True)
    await client.flush()
    reset_event = await client.until(h2.events.StreamReset)
    assert isinstance(reset_event, h2.events.StreamReset)
    assert reset_event.stream_id == bad
    assert await service.cancelled.receive() == "/hang"
    await good_sibling(service, client)


@in_trio()
async def test_http2_priority_frames_for_thousands_of_idle_streams_cost_nothing(service: Service) -> None:
    client = Http2Client(await service.connect())
    await client.request("/hang")
    for stream_id in range(101, 8001, 2):
        client.h2.prioritize(stream_id, weight=1 + stream_id % 256, depends_on=stream_id - 2)
    await client.flush()
    await good_sibling(service, client)


# --- a large body refused early --------------------------------------------------------------------


@in_trio()
async def test_an_answer_before_the_end_of_the_body_can_be_read(service: Service) -> None:
    client = await service.connect()
    size = 50_000_000
    await client.send_all(b"POST /refuse HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size)
    await client.send_all(bytes(size))
    assert (await read_until(client, b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert await client.receive_some() == b""
