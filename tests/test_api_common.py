"""What every answer of the HTTP faces has in common: headers, keys, CORS, paths, sizes, health, metrics."""

import json
from pathlib import Path

import httpx
import pytest
import trio

from lmx import __version__
from lmx.errors import EngineDied
from tests.api_server import Server, with_server, write_model

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@with_server()
async def test_request_ids_and_times(server: Server) -> None:
    for given in ("abc-123", None, "x" * 200, "with space"):
        for method, path in (("GET", "/v1/models"), ("GET", "/nope"), ("POST", CHAT), ("HEAD", "/")):
            headers = {"x-request-id": given} if given else {}
            response = await server.http.request(method, path, headers=headers, json=HELLO)
            told = response.headers["x-request-id"]
            assert (told == given) if given == "abc-123" else told.startswith("req_")
            assert response.headers["openai-processing-ms"].isdigit()
    response = await server.http.post(CHAT, json=HELLO | {"stream": True}, headers={"x-request-id": "s-1"})
    assert response.headers["x-request-id"] == "s-1"


@with_server()
async def test_somebody_is_there(server: Server) -> None:
    for path in ("/", "/api/hello"):
        assert (await server.http.get(path)).json()["version"] == __version__
        head = await server.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
    assert (await server.http.head("/v1/models")).status_code == 200


@with_server()
async def test_unknown_paths_and_methods(server: Server) -> None:
    response = await server.http.get("/v1/nope")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "/v1/nope" in response.json()["error"]["message"]
    for method, path, allowed in (("GET", CHAT, "POST"), ("POST", "/v1/models", "GET"), ("HEAD", CHAT, "POST")):
        response = await server.http.request(method, path)
        assert response.status_code == 405
        assert allowed in response.headers["allow"].split(", ")
    assert "Traceback" not in response.text


@with_server()
async def test_paths_as_clients_write_them(server: Server) -> None:
    for path in ("/models", "//v1/models", "/v1/v1/models", "/v1//models/", "/models/tiny"):
        client = await server.connect()
        await client.send_all(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join([part async for part in client])
        assert b"HTTP/1.1 200" in answer, path
        assert b'"tiny"' in answer
    for path in ("/chat/completions", "/v1/v1/chat/completions"):
        assert (await server.http.post(path, json=HELLO)).status_code == 200


@with_server(max_body_bytes=1_000_000)
async def test_a_body_that_is_too_large(server: Server) -> None:
    content = json.dumps(HELLO | {"user": "x" * 50_000_000}).encode()

    async def pieces():  # type: ignore[no-untyped-def]
        for start in range(0, len(content), 65536):
            yield content[start : start + 65536]

    for body in (content, pieces()):
        response = await server.http.post(CHAT, content=body)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert "1000000 bytes" in response.json()["error"]["message"]
    assert (await server.http.post(CHAT, json=HELLO)).status_code == 200


@with_server()
async def test_a_large_body_within_the_limit(server: Server) -> None:
    response = await server.http.post(CHAT, json=HELLO | {"metadata": {"x": "y" * 5_000_000}})
    assert response.status_code == 200


@with_server()
async def test_bodies_that_are_no_json(server: Server) -> None:
    for content in (b"", b"{", b'{"a":"\xff\xfe"}', b"[]", b'"x"'):
        response = await server.http.post(CHAT, content=content)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


@with_server(inference_keys={"alice": "sk-a"}, admin_keys={"root": "sk-root"})
async def test_keys(server: Server) -> None:
    server.http.headers["host"] = "any.example"
    for path in ("/health", "/"):
        assert (await server.http.get(path)).status_code == 200
    response = await server.http.get("/v1/models")
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    for path, key, status in (
        ("/v1/models", "sk-a", 200),
        ("/v1/models", "sk-root", 200),
        ("/v1/models", "sk-b", 401),
        ("/v1/models", "sk-a\u00fc", 401),
        ("/metrics", "sk-a", 200),
        ("/admin/status", "sk-root", 200),
        ("/admin/status", "sk-a", 403),
        ("//admin//status", "sk-a", 403),
    ):
        value = f"Bearer {key}".encode()
        response = await server.http.get(f"{server.url}{path}", headers={b"authorization": value})
        assert response.status_code == status, (path, key)
        response = await server.http.get(f"{server.url}{path}", headers={b"x-api-key": key.encode()})
        assert response.status_code == status, (path, key)


@with_server(cors_origins=["https://ui.example"])
async def test_foreign_hosts_and_origins(server: Server) -> None:
    assert (await server.http.get("/v1/models", headers={"host": "evil.example"})).status_code == 421
    response = await server.http.post(CHAT, json=HELLO, headers={"origin": "https://evil.example"})
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers
    response = await server.http.post(CHAT, json=HELLO, headers={"origin": "https://ui.example"})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://ui.example"
    assert "origin" in response.headers["vary"]
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    response = await server.http.options(CHAT, headers={"origin": "https://ui.example", **asks})
    assert response.status_code == 200
    assert response.headers["access-control-allow-headers"] == "authorization"
    assert (await server.http.options(CHAT, headers={"origin": "https://evil.example", **asks})).status_code == 403


@with_server(inference_keys={"alice": "sk-a"}, cors_origins=["*"])
async def test_a_preflight_needs_no_key(server: Server) -> None:
    headers = {"origin": "https://any.example", "access-control-request-method": "POST"}
    response = await server.http.options(CHAT, headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://any.example"
    assert (await server.http.post(CHAT, json=HELLO, headers={"origin": "https://any.example"})).status_code == 401


@with_server()
async def test_cors_is_off_by_default(server: Server) -> None:
    response = await server.http.get("/v1/models", headers={"origin": "http://localhost:3000"})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


@with_server()
async def test_health_and_readiness(server: Server) -> None:
    for path in ("/health", "/admin/health"):
        assert (await server.http.get(path)).json() == {"status": "ok", "models": {"tiny": "ready"}}
        assert (await server.http.get(f"{path}?ready")).status_code == 200
    server.engine.kill()
    await server.engine.wait_state("restarting")
    assert (await server.http.get("/health")).status_code == 200
    assert (await server.http.get("/health?ready")).status_code == 503
    await server.engine.wait_state("ready")
    assert (await server.http.get("/health?ready")).status_code == 200
    server.models.draining = True
    assert (await server.http.get("/health?ready")).json()["status"] == "draining"
    response = await server.http.post(CHAT, json=HELLO)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_overloaded"
    assert int(response.headers["retry-after"]) >= 1


@with_server()
async def test_metrics_count_answers(server: Server) -> None:
    await server.http.post(CHAT, json=HELLO)
    await server.http.post(CHAT, json=HELLO | {"stream": True})
    await server.http.post(CHAT, json=HELLO | {"n": 0})
    for path in ("/metrics", "/admin/metrics"):
        response = await server.http.get(path)
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = response.text.splitlines()
        assert 'lmx_requests_total{face="chat",finish="length",model="tiny",status="200"} 2.0' in lines
        assert 'lmx_requests_total{face="chat",finish="",model="",status="400"} 1.0' in lines
        assert 'lmx_live_leases{model="tiny"} 0.0' in lines


@with_server(max_queue=2, LMX_NULL_STEP_MS=20)
async def test_a_full_queue(server: Server) -> None:
    body = HELLO | {"max_tokens": 4000}
    for count in range(1, 9):  # rows of the engine
        await server.send(CHAT, body)
        await server.leased(count)
        await server.until(lambda engine: engine["waiting"] == 0)
    for count in (9, 10):
        await server.send(CHAT, body)
        await server.leased(count)
    for extra in ({}, {"stream": True}, {"n": 2}):
        response = await server.http.post(CHAT, json=body | extra, headers={"x-request-id": "q-1"})
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-request-id"] == "q-1"
    await server.leased(10)


@with_server()
async def test_an_address_in_a_header_is_not_believed(server: Server) -> None:
    assert (await server.http.get("/admin/status", headers={"remote-addr": "10.0.0.1"})).status_code == 200


@with_server()
async def test_status(server: Server) -> None:
    await server.http.post(CHAT, json=HELLO)
    status = (await server.http.get("/admin/status")).json()
    assert status["version"] == __version__
    assert status["uptime_s"] > 0
    assert status["memory"]["server_rss_bytes"] > 0
    (model,) = status["models"]
    assert model["id"] == "tiny"
    assert model["state"] == "ready"
    assert model["ready"]["path_reason"] == "the null engine runs no model"
    assert model["engine"]["live_leases"] == 0
    assert model["engine"]["kv_budget_bytes"] > 0


@with_server(LMX_NULL_STEP_MS=20)
async def test_an_engine_that_dies_is_told_to_its_clients(server: Server) -> None:
    client = await server.send(CHAT, HELLO | {"max_tokens": 4000, "stream": True})
    while b'"content":"' not in await client.receive_some():
        pass
    server.models.fail_all(EngineDied("The engine was killed (signal 9)."))
    data = b""
    while b"\r\n0\r\n\r\n" not in data:
        data += await client.receive_some()
    event = data[data.index(b'data: {"error"') :].split(b"\n\n")[0]
    error = json.loads(event.removeprefix(b"data: "))["error"]
    assert error["code"] == "engine_died"
    assert "signal 9" in error["message"]
    assert b"[DONE]" not in data
    await server.free()


@with_server()
async def test_a_bug_is_answered_without_its_trace(server: Server) -> None:
    server.models.listing = None  # type: ignore[method-assign, assignment]
    response = await server.http.get("/v1/models", headers={"x-request-id": "bug-1"})
    del server.models.listing
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["code"] == "internal_error"
    assert "bug-1" in error["message"]
    assert "Traceback" not in response.text
    assert "NoneType" not in response.text


@with_server()
async def test_http2(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.url, http1=False, http2=True) as client:
        assert (await client.post(CHAT, json=HELLO)).http_version == "HTTP/2"
        responses = []

        async def ask() -> None:
            responses.append((await client.post(CHAT, json=HELLO | {"stream": True})).text)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
        assert all(text.endswith("data: [DONE]\n\n") for text in responses)
