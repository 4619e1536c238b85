"""One engine process and the socket to it: started, spoken with, listened to, stopped. It knows nothing of requests.

A process must never outlive its ``EngineProcess``: ``stop`` ends it whatever state it is in, and the engine itself ends
when it sees its socket close, should the server die without a word. Called by ``lmx.serving.engine``, which decides
when and why.
"""

import logging
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import trio

from lmx import protocol

RECEIVE_BYTES = 64 * 1024
TAIL_LINES = 50
MOST_LINES = 100
"""Logged of what an engine prints at once."""
LINE_BYTES = 4096
DRAIN_S = 1.0
"""After a process has ended, how long its last frames and lines may take; they are in the kernel already."""
SILENT_S = 5.0
"""A process that has closed its socket must end within this time."""

ASK = protocol.Shutdown()

Handle = Callable[[protocol.Message], None]


class EngineProcess:
    """Made by ``start``; then ``run`` until it has ended, then ``stop`` always."""

    def __init__(self, process: trio.Process, stream: trio.SocketStream, logger: logging.Logger) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        """The last lines it wrote on stdout and stderr."""
        self.killed_for: str | None = None
        """Why ``kill`` was called, if it was."""
        self._process = process
        self._stream = stream
        self._logger = logger
        self._decoder = protocol.Decoder()
        self._outbox: list[bytes] = []
        self._outgoing = trio.Event()

    @classmethod
    async def start(
        cls, command: Sequence[str], environment: Mapping[str, str], logger: logging.Logger
    ) -> "EngineProcess":
        """Start ``command --fd N`` in a session of its own, so that a terminal's Ctrl-C reaches the server alone.

        Raises OSError. Never cancelled: either there is a process and the caller has it, or there is none.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs, trio.CancelScope(shield=True):
                process = await trio.lowlevel.open_process(
                    [*command, "--fd", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env={**environment, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        return cls(process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)), logger)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.returncode

    def send(self, message: protocol.Message) -> None:
        """Queue a frame; never blocks, so that a hung engine cannot hold its requests. To a dead process: nothing."""
        self._outbox.append(protocol.encode(message))
        self._outgoing.set()

    def kill(self, reason: str) -> None:
        """SIGKILL, which also ends a stopped process. ``run`` then returns."""
        if self.returncode is None:
            self.killed_for = self.killed_for or reason
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def run(self, handle: Handle) -> None:
        """Pass every message to ``handle`` until the process has ended and its last words are read.

        Cancelled: stops at once and leaves the process running; ``stop`` must follow.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            async with trio.open_nursery() as readers:
                readers.start_soon(self._read, handle)
                readers.start_soon(self._log)
                await self._process.wait()
                readers.cancel_scope.deadline = trio.current_time() + DRAIN_S
            nursery.cancel_scope.cancel()

    async def _write(self) -> None:
        with suppress(trio.BrokenResourceError):  # it has ended; _read and run notice
            while True:
                await self._outgoing.wait()
                self._outgoing = trio.Event()
                frames, self._outbox = self._outbox, []
                await self._stream.send_all(b"".join(frames))

    async def _read(self, handle: Handle) -> None:
        try:
            with suppress(ConnectionResetError):
                while data := await self._receive():
                    for message in self._decoder.feed(data):
                        handle(message)
        except Exception:
            # Whatever it is, this engine is of no use any more, and the other engines have nothing to do with it.
            self._logger.exception("a message from the engine (pid %d) could not be handled", self.pid)
            self.kill("it sent what could not be understood")
            return
        with trio.move_on_after(SILENT_S):
            await self._process.wait()
        self.kill("it closed its socket and did not end")

    async def _receive(self) -> bytes:
        """What has come, at least a byte; empty at the end. Cancelled: nothing was taken.

        Not ``receive_some``, which tries before it waits and yields once more afterwards: with ``send_all``'s likewise,
        a quarter of what a token cost the server (0.5 ms with one stream).
        """
        while True:
            await trio.lowlevel.wait_readable(self._stream.socket)
            with suppress(BlockingIOError):  # woken for nothing
                return os.read(self._stream.socket.fileno(), RECEIVE_BYTES)

    async def _log(self) -> None:
        output = self._process.stdout
        assert output is not None
        rest = b""
        while data := await output.receive_some():
            *lines, rest = (rest + data).split(b"\n")
            self._note(lines)
            rest = rest[-LINE_BYTES:]
        self._note([rest] if rest else [])

    def _note(self, lines: Sequence[bytes]) -> None:
        """An engine that prints without end must not cost the server its time: it is read as fast as it prints, so that
        it never waits, and most of it is left out."""
        if len(lines) > MOST_LINES:
            self._logger.info("engine %d: ... (%d lines)", self.pid, len(lines) - MOST_LINES)
        for line in lines[-MOST_LINES:]:
            text = line[:LINE_BYTES].decode(errors="replace")
            self.tail.append(text)
            self._logger.info("engine %d: %s", self.pid, text)

    async def stop(self, *, ask_s: float, terminate_s: float, shutdown: protocol.Shutdown = ASK) -> None:
        """End the process: ask, after ``ask_s`` SIGTERM, after another ``terminate_s`` SIGKILL.

        Shielded from cancellation; returns when the process is reaped.
        """
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._discard)  # an engine blocked in a send would not see the request
                nursery.start_soon(self._log)
                with trio.move_on_after(ask_s):
                    await self._ask_to_end(shutdown)
                    await self._process.wait()
                if self.returncode is None:
                    self._signal(signal.SIGTERM)
                    with trio.move_on_after(terminate_s):
                        await self._process.wait()
                if self.returncode is None:
                    self._signal(signal.SIGKILL)
                    await self._process.wait()
                nursery.cancel_scope.cancel()
            await self._stream.aclose()
            assert self._process.stdout is not None
            await self._process.stdout.aclose()

    async def _ask_to_end(self, shutdown: protocol.Shutdown) -> None:
        with suppress(trio.BrokenResourceError, OSError):
            await self._stream.send_all(protocol.encode(shutdown))
            # Should the frame follow half of another one, the end of the stream still says it.
            self._stream.socket.shutdown(socket.SHUT_WR)

    async def _discard(self) -> None:
        with suppress(trio.BrokenResourceError):
            while await self._stream.receive_some(RECEIVE_BYTES):
                pass
