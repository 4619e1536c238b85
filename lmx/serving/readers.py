"""The processes that read large request bodies (``lmx.api.reader``): started when needed, few, and killed at once.

The server only passes bytes on. A reader serves one body at a time; who leaves before its answer (a client that went, a
deadline) kills it, which ends the work. None outlives ``aclose``, nor the server. Used by ``lmx.api.body``.
"""

import json
import pickle
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import psutil
import trio

from lmx.chat.model import Source
from lmx.errors import InvalidRequest

READERS = 2
"""A body that takes seconds must not keep all others waiting; more would compete with the engine."""
READ_LIMIT_S = 60.0
RETIRE_BYTES = 512 * 1024 * 1024
"""A reader that has kept this much memory is not used again."""
RECEIVE_BYTES = 256 * 1024
TOO_LARGE_EXIT = 77


class ReaderProcess:
    """One reader, as the server speaks with it."""

    def __init__(self, process: trio.Process, stream: trio.SocketStream) -> None:
        self._process = process
        self._stream = stream

    @classmethod
    async def start(cls, sources: Iterable[Source]) -> "ReaderProcess":
        ours, theirs = socket.socketpair()
        try:
            # No code from the working directory (-P), no text of its own on our stderr: a client could fill it.
            command = [sys.executable, "-P", "-m", "lmx.api.reader", str(theirs.fileno()), *map(json.dumps, sources)]
            process = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        return cls(process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))

    @property
    def fit(self) -> bool:
        """It may read another body."""
        try:
            return self._process.poll() is None and psutil.Process(self._process.pid).memory_info().rss < RETIRE_BYTES
        except psutil.Error:
            return False

    async def send(self, message: Any) -> None:
        """Raises InvalidRequest when the reader has died. Cancelled: the reader is of no more use."""
        await self.send_bytes([pickle.dumps(message)])

    async def send_bytes(self, pieces: list[bytes]) -> None:
        """As ``send``, for bytes that are not to be copied."""
        try:
            await self._stream.send_all(sum(map(len, pieces)).to_bytes(8, "big"))
            for piece in pieces:
                await self._stream.send_all(piece)
        except trio.BrokenResourceError:
            raise await self._death() from None

    async def receive(self) -> Any:
        """Raises InvalidRequest when the reader has died. Cancelled: the reader is of no more use."""
        header = await self._exactly(8)
        return pickle.loads(await self._exactly(int.from_bytes(header, "big")))

    async def _exactly(self, size: int) -> bytearray:
        data = bytearray()
        while len(data) < size:
            try:
                part = await self._stream.receive_some(min(size - len(data), RECEIVE_BYTES))
            except trio.BrokenResourceError:
                part = b""
            if not part:
                raise await self._death()
            data += part
        return data

    async def _death(self) -> InvalidRequest:
        code = await self._process.wait()
        why = "took too much memory" if code == TOO_LARGE_EXIT else f"ended its reader (exit code {code})"
        return InvalidRequest(f"The request cannot be read: it {why}. Send less.")

    async def kill(self) -> None:
        """End it now. Never cancelled: it takes a moment."""
        self._process.kill()
        self._stream.socket.close()
        with trio.CancelScope(shield=True):
            await self._process.wait()


class Readers:
    """At most READERS processes, none until a large body comes."""

    def __init__(self, sources: Callable[[], Iterable[Source]]) -> None:
        """``sources``: of the models that a new reader gets ready for."""
        self._sources = sources
        self._free = trio.CapacityLimiter(READERS)
        self._idle: list[ReaderProcess] = []
        self._live = 0

    @property
    def busy(self) -> int:
        """Bodies that are being read."""
        return self._free.borrowed_tokens

    async def warm(self) -> None:
        """Start a process if there is none to take: it gets ready while the body still comes."""
        if not self._idle and self._live < READERS:
            self._idle.append(await self._start())

    async def _start(self) -> ReaderProcess:
        self._live += 1
        try:
            return await ReaderProcess.start(self._sources())
        except BaseException:
            self._live -= 1
            raise

    @asynccontextmanager
    async def reader(self) -> AsyncIterator[ReaderProcess]:
        """A reader for one body; waits while all read. Left by an exception, Cancelled included: it is killed.

        Raises InvalidRequest after READ_LIMIT_S.
        """
        async with self._free:
            reader = await self._take()
            clean = False
            try:
                with trio.move_on_after(READ_LIMIT_S) as limit:
                    yield reader
                    clean = True
            finally:
                if clean and reader.fit:
                    self._idle.append(reader)
                else:
                    self._live -= 1
                    await reader.kill()
        if limit.cancelled_caught:
            raise InvalidRequest(f"The request cannot be read within {READ_LIMIT_S:.0f} s. Send less.")

    async def _take(self) -> ReaderProcess:
        while self._idle:
            reader = self._idle.pop()
            if reader.fit:
                return reader
            self._live -= 1
            await reader.kill()
        return await self._start()

    async def aclose(self) -> None:
        """End the idle ones; the others end with their requests. Never cancelled: it takes a moment."""
        while self._idle:
            self._live -= 1
            await self._idle.pop().kill()
