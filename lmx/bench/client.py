"""A streaming HTTP client that costs little: it shares two cores with the server it measures.

One thread and one selector for all streams; it reads HTTP/1.1 (chunked or up to the end of the connection) and
server-sent events, notes when each event with text came, and keeps nothing else. Called by ``lmx.bench`` and the
repository's ``bench/``, which also open and close single streams with it.
"""

import json
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_RECEIVE_BYTES = 64 * 1024
_CONNECT_S = 10.0


class BenchError(Exception):
    """The measurement cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Request:
    prompt: str
    max_tokens: int


class Stream:
    """One request and what has come of it. Times are ``time.perf_counter()`` seconds."""

    def __init__(self, sock: socket.socket, request: Request, sent_at: float) -> None:
        self.sock = sock
        self.request = request
        self.sent_at = sent_at
        self.event_times: list[float] = []
        """When the events with text came."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        """By the server's usage, as the two above; 0 until the end."""
        self.done = False
        self._head = b""
        self._chunks: _ChunkedBody | None = None
        self._in_body = False
        self._events = b""

    def feed(self, data: bytes, now: float) -> None:
        """What the socket gave; empty: its end. Raises BenchError for any other answer than a whole stream."""
        if not data:
            raise BenchError(f"the connection ended in the middle of an answer: {(self._head + self._events)[-500:]!r}")
        if not self._in_body:
            self._head += data
            head, separator, data = self._head.partition(b"\r\n\r\n")
            if not separator:
                return
            self._begin(head, data)
        body = self._chunks.feed(data) if self._chunks else data
        *events, self._events = (self._events + body).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                self._event(event[6:], now)

    def _begin(self, head: bytes, rest: bytes) -> None:
        status, _, headers = head.partition(b"\r\n")
        if status.split()[1] != b"200":
            raise BenchError(f"the server answered {status.decode(errors='replace')}: {rest[:1000]!r}")
        self._in_body = True
        if b"transfer-encoding: chunked" in headers.lower():
            self._chunks = _ChunkedBody()

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise BenchError(f"the server ended a stream with {event['error']}")
        if any(map(_says_something, event.get("choices", ()))):
            self.event_times.append(now)
        if usage := event.get("usage"):
            self.prompt_tokens = usage["prompt_tokens"]
            self.completion_tokens = usage["completion_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


def _says_something(choice: dict[str, Any]) -> bool:
    return bool(choice.get("text") or choice.get("logprobs") or choice.get("delta", {}).get("content"))


class _ChunkedBody:
    """Takes the chunk framing of HTTP/1.1 away, from pieces cut anywhere."""

    def __init__(self) -> None:
        self._raw = b""
        self._left = 0
        """Bytes of the present chunk that have not come, its CRLF included."""

    def feed(self, data: bytes) -> bytes:
        raw, body = self._raw + data, []
        while raw:
            if self._left == 0:
                line, newline, after = raw.partition(b"\r\n")
                if not newline:
                    break
                raw, self._left = after, int(line.partition(b";")[0], 16) + 2
            piece, raw = raw[: self._left], raw[self._left :]
            self._left -= len(piece)
            body.append(piece[:-2] if self._left == 0 else piece[:-1] if self._left == 1 else piece)
        self._raw = raw
        return b"".join(body)


class Client:
    """Streams to one server: greedy completions that go on to ``max_tokens``. A context manager; leaving closes all."""

    def __init__(self, url: str, model: str, fields: Mapping[str, Any] | None = None, *, chat: bool = False) -> None:
        """``fields`` are added to every request's body. ``chat``: prompts are messages."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise BenchError(f"{url!r} is not a URL like http://127.0.0.1:1234")
        self._address = (parts.hostname, parts.port or 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1") + (
            "/v1/chat/completions" if chat else "/v1/completions"
        )
        self._chat = chat
        self._host = parts.netloc
        self._fields = {
            "model": model,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(fields or {}),
        }
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self._selector.get_map().values()):
            self.close(key.data)
        self._selector.close()

    def start(self, request: Request) -> Stream:
        """Connect and send. Raises BenchError."""
        prompt = (
            {"messages": [{"role": "user", "content": request.prompt}]} if self._chat else {"prompt": request.prompt}
        )
        body = json.dumps(self._fields | prompt | {"max_tokens": request.max_tokens}).encode()
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        try:
            sock = socket.create_connection(self._address, _CONNECT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sent_at = time.perf_counter()
            sock.sendall(head.encode() + body)
        except OSError as error:
            raise BenchError(f"no server answers at {self._host}: {error}") from None
        sock.setblocking(False)
        stream = Stream(sock, request, sent_at)
        self._selector.register(sock, selectors.EVENT_READ, stream)
        return stream

    def close(self, stream: Stream) -> None:
        """Close the stream's socket, whatever it still waits for."""
        self._selector.unregister(stream.sock)
        stream.sock.close()

    def wait(self, condition: Callable[[], bool], silence_s: float = 600.0) -> None:
        """Read until the condition holds; streams that are done are closed. Raises BenchError."""
        while not condition():
            ready = self._selector.select(silence_s)
            if not ready:
                raise BenchError(f"the server has said nothing for {silence_s:.0f} s")
            now = time.perf_counter()
            for key, _ in ready:
                stream: Stream = key.data
                try:
                    data = stream.sock.recv(_RECEIVE_BYTES)
                except OSError as error:
                    raise BenchError(f"the server broke a connection: {error}") from None
                stream.feed(data, now)
                if stream.done:
                    self.close(stream)

    def run(self, requests: Iterable[Request], concurrency: int) -> list[Stream]:
        """All requests, ``concurrency`` at a time: the next one starts when one has ended. Raises BenchError."""
        waiting = iter(requests)
        streams: list[Stream] = []

        def fill() -> bool:
            running = sum(not stream.done for stream in streams)
            while running < concurrency and (request := next(waiting, None)):
                streams.append(self.start(request))
                running += 1
            return running == 0

        self.wait(fill)
        return streams
