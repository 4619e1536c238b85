"""Raw bytes, HTTP/2 frames and upgrades against a running server, by the thousand: ``make fuzz``. LMX_FUZZ_CASES sets
how many.

No answer may be a 5xx but 503, no process may die, no traceback may be logged, and /health answers all along.
tests/test_fuzz_http.py is a quick form of it; pytest collects this file only by its name.
"""

import os
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import hpack
import httpx
import hyperframe.frame as frames
import pytest
from hyperframe.exceptions import HyperframeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api_server import write_model
from tests.server import Server, serve

CASES = int(os.environ.get("LMX_FUZZ_CASES", "5000"))
QUIET_S = 0.05
"""An answer that has not come by then is not waited for; what the server logs and how it lives is looked at later."""

CHAT = b'{"messages":[{"role":"user","content":"Hi"}],"max_tokens":2}'
PATHS = [b"/", b"/health", b"/v1/models", b"/v1/chat/completions", b"/v1/completions", b"/tokenize", b"/admin/status"]
METHODS = [b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"CONNECT", b"PRI", b"get", b"\xc3\x9c"]
TARGETS = [
    b"*",
    b"?/admin/status",
    b"http://localhost/v1/models",
    b"http://[",
    b"//",
    b"/%00",
    b"/..",
    b"a:1",
    b"/#",
    b"",
]
HEADERS = [
    (b"Host", b"localhost"),
    (b"Host", b"evil.example"),
    (b"Connection", b"close"),
    (b"Connection", b"Upgrade, HTTP2-Settings"),
    (b"Upgrade", b"websocket"),
    (b"Upgrade", b"h2c"),
    (b"HTTP2-Settings", b"AAMAAABkAAQAAP__"),
    (b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ=="),
    (b"Sec-WebSocket-Version", b"13"),
    (b"Content-Length", b"5"),
    (b"Content-Length", b"60"),
    (b"Content-Length", b"-1"),
    (b"Transfer-Encoding", b"chunked"),
    (b"Transfer-Encoding", b"gzip, chunked"),
    (b"Expect", b"100-continue"),
    (b"Content-Type", b"application/json"),
    (b"Content-Encoding", b"gzip"),
    (b"Authorization", b"Bearer \xff\xfe"),
    (b"Origin", b"http://evil.example"),
    (b"x-request-id", b"\xe9"),
    (b"x-request-timeout", b"nan"),
    (b"Cookie", b"a=b; c"),
]
BODIES = [
    b"",
    b"hello",
    CHAT,
    b"5\r\nhello\r\n0\r\n\r\n",
    b"ffffffffffffffffff\r\n",
    b"0\r\nX: y\r\n\r\n",
    b"\x81\x85abcdhello",
]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GOOD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def mostly(values: Sequence[bytes], alphabet: st.SearchStrategy[bytes] | None = None) -> st.SearchStrategy[bytes]:
    return st.one_of(st.sampled_from(values), st.sampled_from(values), alphabet or st.binary(max_size=12))


@st.composite
def http1(draw: st.DrawFn) -> list[bytes]:
    """One or two requests, with what does not belong there, in pieces."""
    data = b""
    for _ in range(draw(st.integers(1, 2))):
        target = draw(st.one_of(st.sampled_from(PATHS), mostly(TARGETS)))
        version = draw(st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.1 x", b""]))
        end = draw(st.sampled_from([b"\r\n"] * 8 + [b"\n", b"\r"]))
        chosen = draw(st.lists(st.sampled_from(HEADERS), max_size=6)) * draw(st.integers(0, 1))
        fields = [
            b"%s: %s" % field
            for field in [(b"Host", b"localhost")] * draw(st.sampled_from([0, 1, 1, 1, 1, 2])) + chosen
        ]
        if draw(st.integers(0, 9)) == 0:
            fields.insert(draw(st.integers(0, len(fields))), draw(st.binary(max_size=30)))
        line = b" ".join([draw(mostly(METHODS)), target, version])
        data += end.join([line, *fields, b"", b""]) + draw(mostly(BODIES)) * draw(st.integers(0, 1))
    if draw(st.integers(0, 5)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=8)) + data[at + draw(st.integers(0, 8)) :]
    return cut(draw, data)


def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    at = sorted(draw(st.lists(st.integers(0, len(data)), max_size=2)))
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]


@st.composite
def upgrades(draw: st.DrawFn) -> list[bytes]:
    """WebSocket handshakes with something wrong, and frames that do not wait for the answer."""
    fields = {b"Host": b"localhost", b"Connection": b"Upgrade", b"Upgrade": b"websocket"}
    fields |= {b"Sec-WebSocket-Version": b"13", b"Sec-WebSocket-Key": b"dGhlIHNhbXBsZSBub25jZQ=="}
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)):
        fields[name] = draw(mostly([b"8", b"x", b"keep-alive, upgrade", b"h2c", b"WebSocket"]))
    target = draw(st.sampled_from([*PATHS, b"/llm", b"/system", b"/embedding?x=y"]))
    head = b"\r\n".join([b"GET %s HTTP/1.1" % target, *(b"%s: %s" % field for field in fields.items()), b"", b""])
    return [head, draw(mostly([b"", b"\x81\x85abcdhello", b"\x88\x80abcd", b"\x89\xfe\xff\xff", GOOD]))]


PSEUDO = [(b":method", b"GET"), (b":path", b"/health"), (b":scheme", b"http"), (b":authority", b"localhost")]
POST = [(b":method", b"POST"), (b":path", b"/v1/chat/completions"), *PSEUDO[2:]]
ODD = [
    (b":path", b"/caf\xe9"),
    (b":path", b""),
    (b":path", b"*"),
    (b":method", b"CONNECT"),
    (b":method", b"\xff"),
    (b":protocol", b"websocket"),
    (b":status", b"200"),
    (b":odd", b"1"),
    (b"Upper", b"1"),
    (b"", b"1"),
    (b"te", b"gzip"),
    (b"connection", b"close"),
    (b"transfer-encoding", b"chunked"),
    (b"content-length", b"x"),
    (b"content-length", b"3"),
    (b"host", b"evil.example"),
    (b"cookie", b"a"),
    (b"cookie", b"b"),
    (b"x", b"\r\n"),
]
SETTING_VALUES = [0, 1, 100, 16384, 65535, 2**24 - 1, 2**31 - 1, 2**32 - 1]


@st.composite
def http2(draw: st.DrawFn) -> list[bytes]:
    """A connection of frames that a client sends, might send, and must not send."""
    encoder = hpack.Encoder()
    data = PREFACE + frames.SettingsFrame(0).serialize()
    for number in range(draw(st.integers(1, 8))):
        if draw(st.integers(0, 29)) == 0:  # any frame's header over any bytes
            body = draw(st.binary(max_size=20))
            data += struct.pack(">IBBI", len(body), draw(st.integers(0, 15)), draw(st.integers(0, 255)), 1)[1:] + body
            continue
        with suppress(HyperframeError, struct.error):  # some cannot even be written
            data += draw(client_frames(encoder, 2 * number + 1)).serialize()
    return cut(draw, data)


@st.composite
def client_frames(draw: st.DrawFn, encoder: Any, fresh: int) -> Any:
    """``fresh``: a stream that was not used yet."""
    number = draw(st.sampled_from([1] * 4 + [max(fresh - 2, 1)] * 4 + [0, 2, 2**31 - 1]))
    match draw(st.sampled_from("hhhhhhhhddddprswwuuugc")):
        case "h":
            fields = list(draw(st.sampled_from([PSEUDO, POST])))
            for odd in draw(st.lists(st.sampled_from(ODD), max_size=2)) * draw(st.integers(0, 1)):
                fields.insert(draw(st.integers(0, len(fields))), odd)
            if draw(st.integers(0, 9)) == 0:
                del fields[draw(st.integers(0, len(fields) - 1))]
            block = encoder.encode(fields) if draw(st.integers(0, 19)) else draw(st.binary(max_size=20))
            flags = draw(st.sampled_from(["END_STREAM END_HEADERS"] * 6 + ["END_HEADERS"] * 6 + ["END_STREAM"]))
            opens = draw(st.integers(0, 7)) > 0
            return frames.HeadersFrame(fresh if opens else number or 1, block, flags=flags.split())
        case "d":
            flags = ["END_STREAM"] * draw(st.integers(0, 1))
            return frames.DataFrame(number or 1, draw(mostly([CHAT, b"", b"{", bytes(16384)])), flags=flags)
        case "p":
            return frames.PriorityFrame(number or 1, depends_on=draw(st.integers(0, 9)), stream_weight=9)
        case "r":
            return frames.RstStreamFrame(number or 1, error_code=draw(st.integers(0, 20)))
        case "s":
            key = st.sampled_from([1, 2, 3, 4, 5, 6, 8, 99])
            values = st.dictionaries(key, st.sampled_from(SETTING_VALUES), max_size=3)
            return frames.SettingsFrame(0, settings=draw(values))
        case "w":
            return frames.WindowUpdateFrame(number, window_increment=draw(st.sampled_from([1, 65535, 2**31 - 1])))
        case "g":
            return frames.GoAwayFrame(0, last_stream_id=draw(st.integers(0, 9)), error_code=0)
        case "c":
            return frames.ContinuationFrame(number or 1, draw(st.binary(max_size=9)), flags=["END_HEADERS"])
        case _:
            return frames.PingFrame(0, draw(st.binary(min_size=8, max_size=8)))


def exchange(server: Server, pieces: list[bytes]) -> bytes:
    """Send, and read until nothing comes for a moment."""
    answer = b""
    with socket.create_connection(server.address) as sock, suppress(ConnectionError, TimeoutError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(QUIET_S)
        for piece in pieces:
            sock.sendall(piece)
        while data := sock.recv(65536):
            answer += data
    return answer


def http1_statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"(?:^|\r\n)HTTP/1\.1 (\d{3}) ", answer)]


def http2_statuses(answer: bytes) -> list[int]:
    """Of a server that speaks HTTP/2; empty for one that answers in HTTP/1.1."""
    statuses, decoder = [], hpack.Decoder()
    while len(answer) >= 9 and not answer.startswith(b"HTTP/1.1"):
        frame, length = frames.Frame.parse_frame_header(memoryview(answer[:9]))
        if isinstance(frame, frames.HeadersFrame):
            fields = dict(decoder.decode(answer[9 : 9 + length], raw=True))
            statuses.append(int(fields[b":status"]))
        answer = answer[9 + length :]
    return statuses + http1_statuses(answer)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny")
    with serve(tmp_path_factory.mktemp("fuzz"), "--model", str(folder), null={}) as running:
        running.line(r"model \S+ ready")
        yield running


def plain_http2() -> bytes:
    block = hpack.Encoder().encode(PSEUDO)
    ask = frames.HeadersFrame(1, block, flags=["END_STREAM", "END_HEADERS"])
    return PREFACE + frames.SettingsFrame(0).serialize() + ask.serialize()


KINDS: list[Any] = [
    (http1, http1_statuses, GOOD, 200),
    (http2, http2_statuses, plain_http2(), 200),
    (upgrades, http1_statuses, GOOD.replace(b"\r\n\r\n", b"\r\nUpgrade: websocket\r\n\r\n"), 404),
]


@pytest.mark.parametrize(("strategy", "statuses", "plain", "status"), KINDS, ids=["http1", "http2", "upgrades"])
def test_what_comes_over_a_socket(
    server: Server, strategy: Any, statuses: Any, plain: bytes, status: int, cases: int
) -> None:
    pid, seen = server.engine()["pid"], dict.fromkeys(range(100, 600), 0)
    while statuses(exchange(server, [plain])) != [status]:  # a busy machine may not answer in QUIET_S
        pass
    with httpx.Client(base_url=server.url, timeout=10) as client:

        @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy())
        def check(pieces: list[bytes]) -> None:
            for found in statuses(exchange(server, pieces)):
                assert found < 500 or found == 503
                seen[found] += 1
            assert client.get("/health").status_code == 200

        check()
    print({status: count for status, count in seen.items() if count})
    server.idle()
    assert (server.engine()["pid"], server.engine()["restarts"]) == (pid, 0)
    assert [line for line in server.lines if "Traceback" in line] == []


@pytest.fixture
def cases() -> int:
    return CASES // len(KINDS)
