"""What arrives that is not an ordinary request: upgrades, odd targets, raw bytes, errors that no handler stops."""

import json
import socket
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from tests.api_server import Server, with_server, write_model

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
WEBSOCKET = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAAAAAAA\r\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


async def raw(server: Server, request: str | bytes) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of the answer to ``request``, on a connection of its own."""
    client = await server.connect()
    await client.send_all(request.encode("latin-1") if isinstance(request, str) else request)
    data = b""
    while (head := data.partition(b"\r\n\r\n")) and (not head[1] or not _whole(head[0], head[2])):
        more = await client.receive_some()
        assert more, data
        data += more
    lines = head[0].decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, json.loads(_body(head[0], head[2]))


def _whole(head: bytes, body: bytes) -> bool:
    return body.endswith(b"\r\n0\r\n\r\n") if b"chunked" in head.lower() else bool(body)


def _body(head: bytes, body: bytes) -> bytes:
    if b"chunked" not in head.lower():
        return body
    return b"".join(body.split(b"\r\n")[1:-3:2])


def check_error(answer: tuple[int, dict[str, str], Any], *statuses: int) -> None:
    status, headers, body = answer
    assert status in statuses
    assert headers["content-type"] == "application/json"
    assert set(body["error"]) == {"message", "type", "param", "code"}


@with_server()
async def test_a_websocket_upgrade_gets_a_json_404(server: Server) -> None:
    for path in ("/llm", "/system", "/", "/v1/models", "/health", CHAT, "/v1/realtime?model=x"):
        answer = await raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{WEBSOCKET}\r\n")
        check_error(answer, 404)
        assert answer[1]["x-request-id"].startswith("req_")
        assert "WebSocket" in answer[2]["error"]["message"]
    for bad in ("Connection: upgrade\r\nUpgrade: WebSocket\r\n", WEBSOCKET.replace("13", "8")):
        check_error(await raw(server, f"GET /llm HTTP/1.1\r\nHost: localhost\r\n{bad}\r\n"), 404)
    # Frames that a client sends without waiting for the answer harm nobody.
    client = await server.connect()
    await client.send_all(f"GET /llm HTTP/1.1\r\nHost: localhost\r\n{WEBSOCKET}\r\n".encode() + b"\x81\x85abcdhello")
    assert (await client.receive_some()).startswith(b"HTTP/1.1 404")
    assert (await server.http.get("/health")).status_code == 200


@with_server(inference_keys={"alice": "sk-a"})
async def test_a_websocket_upgrade_needs_the_key_too(server: Server) -> None:
    check_error(await raw(server, f"GET /llm HTTP/1.1\r\nHost: localhost\r\n{WEBSOCKET}\r\n"), 401)


@with_server()
async def test_other_upgrades_are_passed_over(server: Server) -> None:
    for upgrade in (H2C, H2C.replace("AAAA", "!"), "Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n"):
        status, _, body = await raw(server, f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{upgrade}\r\n")
        assert (status, body["object"]) == (200, "list")


@with_server()
async def test_every_form_of_target_gets_an_answer(server: Server) -> None:
    for target in (
        "?/admin/status",
        "?",
        "*",
        "x",
        "admin/status",
        "http:",
        "http://",
        "//",
        "/%00",
        "/%ff",
        "/\\",
        "/#x",
    ):
        check = await raw(server, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        if target not in ("http://", "//"):  # these two are the root's
            check_error(check, 404)
    check_error(await raw(server, "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"), 404, 405, 421)
    check_error(await raw(server, "CONNECT localhost:1 HTTP/1.1\r\nHost: localhost:1\r\n\r\n"), 404, 405)
    check_error(await raw(server, "OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n"), 404, 405)
    check_error(await raw(server, "BREW /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"), 405)
    absolute = await raw(server, "GET http://localhost:1//v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (absolute[0], absolute[2]["object"]) == (200, "list")


@with_server(inference_keys={"alice": "sk-a"})
async def test_no_form_of_target_gets_round_the_keys(server: Server) -> None:
    for target in ("http://localhost/v1/models", "HTTP://x//v1//models", "/v1/models?x", "/%76%31/models"):
        check_error(await raw(server, f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"), 401)
    for target in ("http://localhost/admin/status", "http://localhost//admin//status"):
        request = f"GET {target} HTTP/1.1\r\nHost: evil.example\r\n\r\n"
        check_error(await raw(server, request), 421, 403)


@with_server()
async def test_bytes_that_are_no_http_get_the_error_object(server: Server) -> None:
    for garbage, status in (
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 tls\r\n\r\n", 400),
        (b"GET /caf\xe9 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000, 431),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
    ):
        check_error(await raw(server, garbage), status)


@with_server(inference_keys={"a": "schlüssel", "b": "ключ", "c": "déjà", "d": "sk-é à"})
async def test_keys_outside_ascii_are_taken_in_both_encodings(server: Server) -> None:
    for key, encodings in (("schlüssel", "utf-8 latin-1"), ("ключ", "utf-8"), ("déjà", "utf-8 latin-1")):
        for encoding in encodings.split():
            for header in (b"authorization: Bearer ", b"x-api-key: "):
                request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + header + key.encode(encoding)
                assert (await raw(server, request + b"\r\n\r\n"))[0] == 200, (key, encoding)
    for wrong in (b"schl\xc3ssel", b"", b"????", b"schlussel", b"d\xe9j"):
        request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nx-api-key: " + wrong + b"\r\n\r\n"
        check_error(await raw(server, request), 401)


@with_server()
async def test_names_that_public_dns_cannot_hand_out_are_ours(server: Server) -> None:
    names = ["host.docker.internal", "host.containers.internal", "Some-Mac.local", "gateway.docker.internal.", "lmx"]
    for name in (*names, socket.gethostname(), "nas.home.arpa", "localhost", "a.localhost", "[::1]", "192.168.1.5"):
        for host in (name, f"{name}:{server.port}"):
            assert (await server.http.get("/v1/models", headers={"host": host})).status_code == 200, host
    for name in (
        "evil.example",
        "host.docker.internal.evil.example",
        "evillocal.com",
        "x.local.com",
        "local.io",
        "a b",
    ):
        assert (await server.http.get("/v1/models", headers={"host": name})).status_code == 421, name
    page = {"origin": "http://evil.example", "host": "host.docker.internal"}
    assert (await server.http.get("/v1/models", headers=page)).status_code == 403


# --- HTTP/2 ---------------------------------------------------------------------------------------


@with_server(LMX_NULL_STEP_MS=5)
async def test_http2_odd_requests_get_json_beside_a_good_stream(server: Server) -> None:
    client = await server.connect()
    checks = h2.config.H2Configuration(client_side=True, validate_outbound_headers=False)
    http2 = h2.connection.H2Connection(checks)
    http2.initiate_connection()
    body = json.dumps(HELLO | {"max_tokens": 400, "stream": True}).encode()
    http2.send_headers(1, [(":method", "POST"), (":path", CHAT), (":scheme", "http"), (":authority", "localhost")])
    http2.send_data(1, body, end_stream=True)
    odd = [
        [(b":method", b"GET"), (b":path", path), (b":scheme", b"http"), (b":authority", b"localhost")]
        for path in (b"/caf\xe9", b"?/admin/status", b"*", b"/a b", b"x", b"/\xf0\x9f\x98\x80", b"/%zz", b"/llm#\x7f")
    ]
    odd.append([(b":method", b"CONNECT"), (b":authority", b"localhost:1")])
    odd.append([(b":method", b"PUT?"), (b":path", b"/v1/models"), (b":scheme", b"x"), (b":authority", b"localhost")])
    for number, headers in enumerate(odd):
        http2.send_headers(3 + 2 * number, headers, end_stream=True)
    await client.send_all(http2.data_to_send())
    statuses: dict[int, int] = {}
    bodies: dict[int, bytes] = {}
    while 1 not in bodies or not bodies[1].endswith(b"[DONE]\n\n"):
        data = await client.receive_some()
        assert data, "the connection ended"
        for event in http2.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                statuses[event.stream_id] = int(dict(event.headers)[b":status"])
            elif isinstance(event, h2.events.DataReceived):
                bodies[event.stream_id] = bodies.get(event.stream_id, b"") + event.data
                http2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        await client.send_all(http2.data_to_send())
    assert statuses.pop(1) == 200
    assert set(statuses.values()) <= {404, 405}
    assert len(statuses) == len(odd)
    for stream_id in statuses:
        assert "message" in json.loads(bodies[stream_id])["error"]


@with_server(write_timeout_s=0.3, LMX_NULL_STEP_MS=2)
async def test_http2_stream_that_is_not_read_gives_its_lease_back_and_its_sibling_goes_on(server: Server) -> None:
    client = await server.connect()
    http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    http2.initiate_connection()
    http2.increment_flow_control_window(2**30)
    body = json.dumps(HELLO | {"max_tokens": 4000, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    for stream_id in (1, 3):
        http2.send_headers(stream_id, [(":method", "POST"), (":path", CHAT), (":scheme", "http"), (":authority", "a")])
        http2.send_data(stream_id, body, end_stream=True)
    http2.increment_flow_control_window(2**30, 3)  # only this one is ever read
    await client.send_all(http2.data_to_send())
    seen = dict.fromkeys((1, 3), 0)
    while True:
        data = await client.receive_some()
        assert data, "the connection ended"
        for event in http2.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                seen[event.stream_id] += len(event.data)
            elif isinstance(event, h2.events.StreamReset):
                assert event.stream_id == 1
                break
        else:
            continue
        break
    await server.leased(1)
    assert seen[3] > seen[1]
    before = seen[3]
    while seen[3] < before + 10_000:
        for event in http2.receive_data(await client.receive_some()):
            if isinstance(event, h2.events.DataReceived):
                seen[event.stream_id] += len(event.data)


# --- what libraries raise -------------------------------------------------------------------------


class Panic(BaseException):
    """As pyo3's PanicException: no ``Exception``."""


@pytest.mark.parametrize(
    "raised",
    [
        Panic("rust"),
        MemoryError(),
        RecursionError(),
        ExceptionGroup("tasks", [ValueError("x")]),
        BaseExceptionGroup("tasks", [Panic("rust"), ValueError("x")]),
    ],
    ids=lambda raised: type(raised).__name__,
)
def test_whatever_a_library_raises_is_an_error_of_that_request(
    raised: BaseException, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @with_server(LMX_NULL_STEP_MS=5)
    async def test(server: Server) -> None:
        other = await server.send(CHAT, HELLO | {"max_tokens": 4000, "stream": True})
        await server.leased(1)
        chat = server.models.listing()[0].chat

        def fail(*_: Any, **__: Any) -> Any:
            raise raised

        monkeypatch.setattr(type(chat), "encode_chat", fail)  # in a worker thread
        for stream in (False, True):
            response = await server.http.post(CHAT, json=HELLO | {"stream": stream})
            # While a client's data is read it is the client's, unless it looks like a mistake of ours.
            ours = isinstance(raised, ExceptionGroup)
            expected = (500, "internal_error") if ours else (400, "invalid_value")
            assert (response.status_code, response.json()["error"]["code"]) == expected
        monkeypatch.setattr(type(chat), "text_stream", fail)  # in the handler's task, and in a stream that has begun
        body = {"prompt": [5], "max_tokens": 2}
        assert (await server.http.post("/v1/completions", json=body)).status_code == 500
        response = await server.http.post("/v1/completions", json=body | {"stream": True})
        assert "internal_error" in response.text
        assert "[DONE]" not in response.text
        await server.leased(1)
        streamed = b""
        while b"data: " not in streamed:
            piece = await other.receive_some(10_000_000)
            assert piece, streamed
            streamed += piece

    test(model_folder, monkeypatch)
