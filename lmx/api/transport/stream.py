"""The socket under one HTTP connection, watched at all times, so that a client that goes is seen within milliseconds.

Hypercorn reads only when its protocol wants bytes: while a pipelined request or a stray CRLF waits behind a running
one, it would not see the client leave until the handler ends; and it waits without limit for a client that has stopped
reading. ``WatchedStream`` stands between the two: its own task always reads ahead, and writes have a deadline. It
must never hand bytes out of order, and it knows nothing of HTTP. ``lmx.api.transport.http`` makes one for each
connection.
"""

import fcntl
import os
import socket
import struct
import sys
import termios
from contextlib import suppress

import trio

READ_AHEAD_BYTES = 1024 * 1024
READ_AHEAD_PATIENCE_S = 5.0
RECEIVE_BYTES = 64 * 1024
SEND_BUFFER_BYTES = 128 * 1024
SO_NWRITE = 0x1024
"""macOS's name (sys/socket.h) for what Linux calls TIOCOUTQ."""
LINGER_IDLE_S = 1.0
LINGER_S = 30.0


class WatchedStream:
    """What Hypercorn's TCPServer needs of a stream, over a ``trio.SocketStream``.

    Run ``watch()`` in a task beside the server, and the server inside ``scope``: the scope is cancelled when the client
    is gone (FIN, half-close and RST alike: whoever will not send any more is taken not to want an answer), when it
    stops reading for ``write_timeout_s``, or when the server has closed the connection.

    The read-ahead is bounded by READ_AHEAD_BYTES. Behind unread bytes a FIN cannot be seen by any portable means, so a
    client that keeps the buffer full for READ_AHEAD_PATIENCE_S, because it pipelines more than that behind a running
    request, is disconnected.
    """

    def __init__(self, stream: trio.SocketStream, *, write_timeout_s: float) -> None:
        self.socket = stream.socket
        self.scope = trio.CancelScope()
        self.gone = trio.Event()
        """The client will send nothing more."""
        self._stream = stream
        self._write_timeout_s = write_timeout_s
        self._buffer = bytearray()
        self._received_bytes = 0
        self._closed = False
        self._arrived = trio.Event()
        self._taken = trio.Event()
        _tune(stream.socket)

    async def watch(self) -> None:
        """Read ahead until the client goes; then cancel ``scope`` and close the socket, which ends a blocked send.

        Cancelled: stops at once; what it has read stays in the buffer.
        """
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self._stream.receive_some(RECEIVE_BYTES):
                self._received_bytes += len(data)
                if self._closed:
                    continue
                self._buffer += data
                self._arrived.set()
                if len(self._buffer) >= READ_AHEAD_BYTES and not await self._room():
                    break
        self.gone.set()
        self.abandon()

    async def _room(self) -> bool:
        with trio.move_on_after(READ_AHEAD_PATIENCE_S):
            while len(self._buffer) >= READ_AHEAD_BYTES and not self._closed:
                self._taken = trio.Event()
                await self._taken.wait()
            return True
        return False

    def abandon(self, *, reset: bool = False) -> None:
        """End the connection now: what runs on it is cancelled. ``reset`` also drops what the kernel holds unsent."""
        self._close()
        if reset:
            with suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _close(self) -> None:
        self._closed = True
        self._buffer.clear()
        self._arrived.set()
        self._taken.set()
        self.scope.cancel()

    async def linger(self) -> None:
        """Throw away what still arrives after the server's FIN, until the client closes or is silent for LINGER_IDLE_S.

        Closing a socket with unread bytes sends RST, which may destroy the answer before the client reads it: someone
        who uploads 50 MB must be able to read the 413. Takes LINGER_S at most. Cancelled: stops at once.
        """
        with trio.move_on_after(LINGER_S):
            received_bytes = -1
            while received_bytes != self._received_bytes and not self.gone.is_set():
                received_bytes = self._received_bytes
                with trio.move_on_after(LINGER_IDLE_S):
                    await self.gone.wait()

    # --- the face that TCPServer uses; errors as in trio.abc.Stream ---

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes, at least one. Raises ClosedResourceError. Cancelled: nothing is taken from the buffer."""
        await trio.lowlevel.checkpoint()
        while not self._buffer:
            if self._closed:
                raise trio.ClosedResourceError("the connection is closed")
            self._arrived = trio.Event()
            await self._arrived.wait()
        data = bytes(self._buffer[:max_bytes])
        del self._buffer[: len(data)]
        self._taken.set()
        return data

    async def send_all(self, data: bytes) -> None:
        """Send everything; BrokenResourceError when the client is gone or takes nothing for ``write_timeout_s``.

        A slow reader that takes something is served, however long it takes. Hypercorn shields its sends from
        cancellation, so that only this limit and the client's going end one. What the kernel takes at once does not
        yield to other tasks: who streams waits for the next tokens anyway.
        """
        view = memoryview(data)
        while view := view[self._send_now(view) :]:
            unread_bytes = self._unread_bytes()
            with trio.move_on_after(self._write_timeout_s) as limit:
                await trio.lowlevel.wait_writable(self.socket)
            # A socket becomes writable when much of its buffer is free again: a slow reader may need longer than that.
            if limit.cancelled_caught and self._unread_bytes() >= unread_bytes:
                self.abandon(reset=True)
                raise trio.BrokenResourceError(f"the client has read nothing for {self._write_timeout_s} s")

    def _send_now(self, data: memoryview) -> int:
        """Bytes that the kernel took without waiting. Raises BrokenResourceError."""
        try:
            return os.write(self.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError from error

    def _unread_bytes(self) -> int:
        """What the kernel holds and the client's has not acknowledged; 0 where a socket cannot tell."""
        try:
            if sys.platform == "darwin":
                return self.socket.getsockopt(socket.SOL_SOCKET, SO_NWRITE)
            return int.from_bytes(fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except OSError:
            return 0

    async def send_eof(self) -> None:
        """Send FIN; what was sent before still arrives."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """The server has finished with the connection: cancel what is left. The socket stays open for ``linger``."""
        self._close()
        await trio.lowlevel.checkpoint()


def _tune(sock: trio.socket.SocketType) -> None:
    """Events go out at once; a reader that stops is noticed after 128 KiB, not megabytes; a dead host within a minute.

    An option that this system or socket does not have changes nothing but promptness.
    """
    options = [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_SNDBUF", SEND_BUFFER_BYTES),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 30),
        (socket.IPPROTO_TCP, "TCP_KEEPALIVE", 30),  # macOS's name for TCP_KEEPIDLE
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 10),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    ]
    for level, name, value in options:
        with suppress(AttributeError, OSError):
            sock.setsockopt(level, getattr(socket, name), value)
