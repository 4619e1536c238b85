"""The engine's end of the socketpair: frames in without blocking a step, frames out. Called by the engine's one thread;
``wake`` by any."""

import contextlib
import select
import socket
from collections.abc import Iterator

from lmx.protocol import Decoder, Message, encode

_RECEIVE_BYTES = 1 << 20


class ServerGone(Exception):
    """The server closed its end: nobody is left to work for."""


class Link:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = Decoder()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._woken, self._waking = socket.socketpair()
        self._waking.setblocking(False)
        self._poll.register(self._woken, select.POLLIN)

    def receive(self, timeout_s: float | None) -> Iterator[Message]:
        """What has arrived, after waiting for it, or for ``wake``, at most ``timeout_s`` (None: as long as it takes).
        Raises ServerGone."""
        kept = list(self._decoder.feed(b""))  # of a last call that was not iterated to its end
        yield from kept
        waited = self._poll.poll(0 if kept else None if timeout_s is None else timeout_s * 1e3)
        if any(descriptor == self._woken.fileno() for descriptor, _ in waited):
            self._woken.recv(_RECEIVE_BYTES)
            waited = self._arrived()
        while waited:
            data = self._sock.recv(_RECEIVE_BYTES)
            if not data:
                raise ServerGone
            yield from self._decoder.feed(data)
            waited = self._arrived()

    def _arrived(self) -> list[tuple[int, int]]:
        return [found for found in self._poll.poll(0) if found[0] == self._sock.fileno()]

    def wake(self) -> None:
        """End the wait of ``receive``, from another thread."""
        with contextlib.suppress(BlockingIOError):  # so many wait already
            self._waking.send(b"\0")

    def send(self, message: Message) -> None:
        """Blocks while the server does not read: it has no other duty as urgent. Raises ServerGone."""
        try:
            self._sock.sendall(encode(message))
        except (BrokenPipeError, ConnectionResetError):
            raise ServerGone from None
