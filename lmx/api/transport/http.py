"""Serves the app: Hypercorn's HTTP/1.1 and HTTP/2 protocols over our own listeners and watched sockets.

Hypercorn's ``worker_serve`` has no seam for the stream, so this module does what that does around ``TCPServer``, with a
``WatchedStream`` under each connection. It must never let one connection's error reach another. Called by
``lmx.serve``.
"""

import logging
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import hypercorn.protocol
import trio
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from hypercorn.utils import wrap_app

from lmx.api.errors import contained
from lmx.api.transport.http1 import Http1
from lmx.api.transport.http2 import Http2
from lmx.api.transport.stream import WatchedStream
from lmx.config import ServerSettings
from lmx.config.live import Live

BACKLOG = 1024
ENDING_KEEP_ALIVE_S = 0.25
"""Once the server shuts down: enough for an answer's last frame to be on its way."""

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

logger = logging.getLogger("lmx.http")


# TCPServer has no seam for its protocols either.
hypercorn.protocol.H11Protocol = Http1
hypercorn.protocol.H2Protocol = Http2


async def serve_http(
    app: App,
    sockets: list[socket.socket],
    live: Live,
    *,
    shutdown: trio.Event,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``app`` on bound ``sockets`` until ``shutdown`` is set and the running requests have ended.

    After ``shutdown`` nothing is accepted and idle connections are closed; how long running requests may take is the
    caller's decision. Cancelled: every handler is cancelled, every socket closed, before Cancelled leaves.
    """
    config = _hypercorn_config(live.now.server)
    context = WorkerContext(None)
    state: LifespanState = {}
    lifespan = Lifespan(wrap_app(app, config.wsgi_max_body_size, "asgi"), config, state)
    alive: set[_Connection] = set()

    async def serve(stream: trio.SocketStream) -> None:
        server = live.now.server  # as it is now: a connection's limits stay
        connection = _Connection(app, _hypercorn_config(server), context, server, stream)
        alive.add(connection)
        try:
            await connection.serve(state)
        finally:
            alive.discard(connection)

    async with trio.open_nursery() as lifespan_nursery:
        await lifespan_nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        async with trio.open_nursery() as connections:
            listeners = []
            for sock in sockets:
                sock.listen(BACKLOG)
                listeners.append(trio.SocketListener(trio.socket.from_stdlib_socket(sock)))
            async with trio.open_nursery() as accepting:
                await accepting.start(partial(trio.serve_listeners, serve, listeners, handler_nursery=connections))
                task_status.started()
                await shutdown.wait()
                accepting.cancel_scope.cancel()
            await context.terminated.set()
            for connection in alive:
                connection.wake()
        await lifespan.wait_for_shutdown()
        lifespan_nursery.cancel_scope.cancel()


class _HttpConfig(Config):  # type: ignore[misc]
    write_timeout_s: float
    """For Http2: how long a stream's reader may take nothing."""


def _hypercorn_config(server: ServerSettings) -> Config:
    config = _HttpConfig()
    config.write_timeout_s = server.write_timeout_s
    config.keep_alive_timeout = server.keep_alive_s
    # On HTTP/2 Hypercorn breaks the streams that run when this count is passed.
    config.keep_alive_max_requests = 2**31
    config.h2_max_concurrent_streams = 1024
    config.h11_max_incomplete_size = 64 * 1024
    config.include_server_header = False
    config.errorlog = logger
    return config


class _Connection:
    """One accepted connection: Hypercorn's TCPServer on a watched stream, and the app it calls."""

    def __init__(
        self, app: App, config: Config, context: WorkerContext, server: ServerSettings, socket_stream: trio.SocketStream
    ) -> None:
        self._app = app
        self._config = config
        self._context = context
        self._settings = server
        self._stream = WatchedStream(socket_stream, write_timeout_s=server.write_timeout_s)
        self._running = 0
        """Requests in the app: at most one on HTTP/1.1."""
        self._changed = trio.Event()

    async def serve(self, state: LifespanState) -> None:
        """Until either side closes. Errors end with the connection. Cancelled: its handlers are cancelled first."""
        stream = self._stream
        app = wrap_app(self._call, self._config.wsgi_max_body_size, "asgi")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.watch)
                nursery.start_soon(self._close_when_idle)
                with stream.scope:
                    try:
                        await TCPServer(app, self._config, self._context, ConnectionState(state.copy()), stream)
                    except* Exception:
                        logger.warning("a connection was dropped after an error in the HTTP protocol", exc_info=True)
                if not self._context.terminated.is_set():
                    await stream.linger()
                nursery.cancel_scope.cancel()
        finally:
            stream.abandon()

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app; whatever it raises is its request's affair."""
        self._running += 1
        self.wake()
        try:
            with contained():
                await self._app(scope, receive, send)
        finally:
            self._running -= 1
            self.wake()

    def wake(self) -> None:
        """Something changed that idleness depends on."""
        self._changed.set()
        self._changed = trio.Event()

    async def _close_when_idle(self) -> None:
        """Hypercorn's own keep-alive timer does not come back after a request: Quart-Trio cancels the handler, which
        would start it, as soon as Hypercorn reports the end of the exchange."""
        while True:
            ending = self._context.terminated.is_set()
            with trio.move_on_after(ENDING_KEEP_ALIVE_S if ending else self._settings.keep_alive_s) as patience:
                await self._changed.wait()
            if patience.cancelled_caught and not self._running:
                break
        await self._stream.send_eof()
        await self._stream.aclose()
