"""The life of a server, ``lmx serve``: binds the port, and holds everything together from start to the last signal.

The order matters: everything that can be refused (settings, port, model) is refused before anything is started, with
one line that says the way out and exit code 2. The engines outlive the HTTP face, so that the last request can still
give its lease back. Called by ``lmx.cli``, which reads the settings and owns the log.
"""

import errno
import gc
import logging
import os
import resource
import signal
import socket
from functools import partial
from typing import Any

import trio

from lmx.api.app import create_app
from lmx.api.errors import expected
from lmx.api.transport.http import BACKLOG, serve_http
from lmx.config import Settings
from lmx.config.live import Live
from lmx.errors import ConfigError, LmxError, ModelOverloaded
from lmx.logs import Log, flush
from lmx.serving.housekeeping import Housekeeping
from lmx.serving.metrics import Metrics
from lmx.serving.models import Models
from lmx.serving.removal import Removals

OPEN_FILES = 65_536
LAST_WORDS_S = 2.0
"""After ``drain_s``: how long requests have to send the error that ends them."""

logger = logging.getLogger("lmx")


def serve(live: Live, log: Log) -> int:
    """Serve until a signal; the exit code. Raises ConfigError where nothing can be started."""
    live.watch(partial(_use_log, log))
    _raise_open_files()
    return trio.run(_Server(live, _bind(live.now.server.host, live.now.server.port)).run)


def _use_log(log: Log, settings: Settings) -> None:
    log.use(settings.server.log_format)
    logger.setLevel(settings.server.log_level.upper())


def _raise_open_files() -> None:
    """Each connection is a file; the soft limit is often 256 (macOS) or 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError) as error:
            logger.warning("the limit of open files stays at %d: %s", soft, error)


def _bind(host: str, port: int) -> list[socket.socket]:
    """Listen on every address of ``host``; port 0 takes one free port for all of them. Raises ConfigError."""
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol_number, _, address in dict.fromkeys(addresses):
            sock = socket.socket(family, kind, protocol_number)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port or sockets[0].getsockname()[1], *address[2:]))
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise _bind_error(error, host, port) from None
    return sockets


def _bind_error(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        way_out = (
            f"another program (LM Studio, or another lmx?) uses it; `lsof -nP -iTCP:{port} -sTCP:LISTEN` names it. "
            "Stop it, or choose another port with --port (0 takes a free one)"
        )
    elif error.errno == errno.EACCES:
        way_out = "ports below 1024 need more rights; choose a higher one with --port"
    else:
        way_out = (
            f"{error.strerror or error}; --host must be an address or name of this machine (0.0.0.0: every network)"
        )
    return ConfigError(f"Cannot listen on {host} port {port}: {way_out}.", param="server.port")


class _Server:
    """One run of ``lmx serve``."""

    def __init__(self, live: Live, sockets: list[socket.socket]) -> None:
        self._live = live
        self._sockets = sockets
        self._metrics = Metrics()
        self._models: Models | None = None
        self._shutdown = trio.Event()
        self._serving = trio.CancelScope()

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit code."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_signals)
            code = await self._serve()
            nursery.cancel_scope.cancel()
        return code

    async def _serve(self) -> int:
        models = self._models = Models(self._live, self._metrics)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(models.run)
                nursery.start_soon(self._drain, models)
                nursery.start_soon(Housekeeping(Removals(models, self._live), self._live).run)
                # A model that cannot be is refused before anybody is answered; one that must be converted first is not.
                await models.presentable.wait()
                if not self._shutdown.is_set():
                    with self._serving:
                        await self._serve_http(create_app(models, self._live, self._metrics))
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            if group.subgroup(LmxError) is None:
                raise
            logger.error("%s", expected(group, "").message)
            return 2
        logger.info("stopped")
        return 0

    async def _serve_http(self, app: Any) -> None:
        # What was made up to here stays: a full collection that looks at it would hold the event loop for 80 ms.
        gc.collect()
        gc.freeze()
        serve = partial(serve_http, app, self._sockets, self._live, shutdown=self._shutdown)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve)
            for sock in self._sockets:
                host, port = sock.getsockname()[:2]
                logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def _drain(self, models: Models) -> None:
        """After the first signal: refuse what is new, let what runs finish in time, end the rest with a clear error."""
        await self._shutdown.wait()
        models.draining = True
        drain_s = self._live.now.server.drain_s
        if not models.listing():
            logger.info("stopping; the model that was being read is given up")
            models.stop_loading()
        else:
            logger.info("stopping; running requests have %g s to finish (a second signal ends at once)", drain_s)
        await trio.sleep(drain_s)
        models.fail_all(ModelOverloaded("The server is shutting down; this request did not finish in time."))
        await trio.sleep(LAST_WORDS_S)
        self._serving.cancel()

    async def _watch_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                if self._shutdown.is_set():
                    if self._models is not None:
                        self._models.kill()
                    logger.warning("second signal: ended at once")
                    flush()
                    os._exit(128 + number)
                self._shutdown.set()
