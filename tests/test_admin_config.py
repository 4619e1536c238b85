"""/admin/config and /admin/log: a change counts for the next request, a wrong one changes nothing, and nobody locks
himself out."""

import json
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from lmx.config import keys
from lmx.logs import RECENT_LINES, recent
from tests.api_server import Server, with_server, write_model
from tests.server import serve

COMPLETIONS = "/v1/completions"
ASK: dict[str, Any] = {"prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


async def change(server: Server, wanted: dict[str, Any], **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await server.http.post("/admin/config", json={"set": wanted}, headers=names)


async def changed(server: Server, wanted: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = await change(server, wanted, **headers)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


@with_server()
async def test_what_requests_depend_on_changes_at_once(server: Server) -> None:
    async def status(path: str = COMPLETIONS, body: dict[str, Any] = ASK, **headers: str) -> int:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return (await server.http.post(path, json=body, headers=names)).status_code

    assert await status(body=ASK | {"model": "other"}) == 404
    await changed(server, {"model.aliases.other": "tiny"})
    assert await status(body=ASK | {"model": "other"}) == 200
    assert await status(body=ASK | {"model": "mine"}) == 200  # the alias that was there

    assert await status(body=ASK | {"model": "free-*"}) == 404
    await changed(server, {"model.placeholders": ["free-*"]})
    assert await status(body=ASK | {"model": "free-lunch"}) == 200
    assert await status(body=ASK | {"model": "gpt-4o"}) == 404

    assert await status(host="llm.example") == 421
    await changed(server, {"server.allowed_hosts": ["llm.example"]})
    assert await status(host="llm.example") == 200

    answer = await server.http.get("/v1/models", headers={"origin": "http://localhost:3000"})
    assert "access-control-allow-origin" not in answer.headers
    await changed(server, {"server.cors_origins": ["*"]})
    answer = await server.http.get("/v1/models", headers={"origin": "http://localhost:3000"})
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"

    await changed(server, {"server.max_body_bytes": 1000})
    assert await status(body=ASK | {"prompt": "x" * 1000}) == 413
    assert (await server.http.post("/admin/cache/clear", content=b" " * 2000)).status_code == 413
    await changed(server, {"server.max_body_bytes": None})

    await changed(server, {"server.request_timeout_s": 1e-9})
    assert await status() == 504
    await changed(server, {"server.request_timeout_s": None, "server.inference_keys": {"bot": "sk-b"}})
    assert await status() == 401
    assert await status(x_api_key="sk-b") == 200
    await changed(server, {"server.inference_keys.bot": None})
    assert await status() == 200

    await changed(server, {"engine.max_unread_tokens": 1, "engine.max_queue": 1, "memory.policy": "refuse"})
    assert server.models.memory.settings.policy == "refuse"


@with_server()
async def test_folders_and_a_model_s_own_settings_change_at_once(server: Server) -> None:
    told = (await server.http.get("/admin/config")).json()["settings"]
    more = Path(told["model"]["default"]).parent / "more"
    await trio.to_thread.run_sync(lambda: (more.mkdir(), write_model(more / "second")))
    await changed(server, {"hub.folders": [str(more)]})
    while "second" not in (await server.http.get("/v1/models")).text:
        pass
    await changed(server, {"model.jit": False})
    assert "second" not in (await server.http.get("/v1/models")).text
    assert (await server.http.post(COMPLETIONS, json=ASK | {"model": "second"})).status_code == 404
    await changed(server, {"hub.folders": None, "models.tiny": {"ttl_s": 12, "pin": True, "kv_bits": 8}})
    settings = (await server.http.get("/admin/models/tiny")).json()["settings"]
    applied = {name: (settings[name]["value"], settings[name]["source"]) for name in ("ttl_s", "pin", "kv_bits")}
    assert applied == {"ttl_s": (12, "model"), "pin": (True, "model"), "kv_bits": (16, "default")}


@with_server()
async def test_a_model_s_sampling_comes_between_the_request_and_its_makers(server: Server) -> None:
    def last() -> dict[str, Any]:
        sampling: dict[str, Any] = server.submits()[-1]["sampling"]
        return sampling

    await server.http.post(COMPLETIONS, json=ASK)
    assert (last()["temperature"], last()["top_k"]) == (1.0, 0)
    answer = await changed(server, {"models.TINY.temperature": 0.25, "models.TINY.top_k": 7})
    assert answer["applied"] == {"models.TINY.temperature": 0.25, "models.TINY.top_k": 7}
    await server.http.post(COMPLETIONS, json=ASK | {"top_k": 3})
    assert (last()["temperature"], last()["top_k"]) == (0.25, 3)
    large = ASK | {"prompt": "x ", "metadata": {"padding": "x" * 100_000}}  # read by another process
    assert (await server.http.post(COMPLETIONS, json=large)).status_code == 200
    assert (last()["temperature"], last()["top_k"]) == (0.25, 7)
    await changed(server, {"models.TINY": None})
    await server.http.post(COMPLETIONS, json=ASK)
    assert (last()["temperature"], last()["top_k"]) == (1.0, 0)


@with_server(admin_keys={"root": "sk-root", "other": "sk-o"}, inference_keys={"bot": "sk-b"})
async def test_all_is_told_and_no_key(server: Server) -> None:
    admin = {"authorization": "Bearer sk-root"}
    for headers, status in (({}, 401), ({"x-api-key": "sk-b"}, 403), (admin, 200)):
        answers = [
            await server.http.get("/admin/config", headers=headers),
            await server.http.get("/admin/log", headers=headers),
            await server.http.get("/admin/log/lines", headers=headers),
            await server.http.get("/admin/requests", headers=headers),
            await server.http.post("/admin/config", headers=headers, json={"set": {"server.drain_s": 1}}),
        ]
        assert [answer.status_code for answer in answers] == [status] * 5
        assert "sk-" not in answers[0].text
    told = answers[0].json()
    assert told["settings"]["server"]["admin_keys"] == {"root": "***", "other": "***"}
    assert told["settings"]["server"]["drain_s"] == 30.0
    assert told["file"] is None
    assert {"server.port", "server.host", "hub.data_dir"} <= set(told["restart"])
    assert {"engine.max_rows", "model.kv_bits", "engine.command"} <= set(told["reload"])
    assert set(told["sources"].values()) == {"default", "command line"}
    assert set(told["sources"]) == {
        keys.dotted((section, key)) for section, values in told["settings"].items() for key in values
    }
    shown = (await change(server, told["settings"]["server"] | {"server.admin_keys": {"root": "***"}}, **admin)).json()
    assert "no setting" in shown["error"]["message"]
    masked = await change(server, {"server.drain_s": 2, "server.admin_keys": {"root": "***"}}, **admin)
    assert (masked.status_code, masked.json()["error"]["code"]) == (400, "invalid_config")
    schema = (await server.http.get("/openapi.json", headers={"x-api-key": "sk-b"})).json()["paths"]
    paths = {"/admin/config", "/admin/log", "/admin/log/lines", "/admin/requests"}
    assert paths | {"/admin/requests/{request_id}/cancel"} <= set(schema)
    fields = schema["/admin/config"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"set", "persist"} <= set(fields)
    assert {query["name"] for query in schema["/admin/log/lines"]["get"]["parameters"]} == {"n", "follow"}


LOCKS: list[tuple[dict[str, Any], str]] = [
    ({"server.admin_keys": {"root": "another"}}, "your own key"),
    ({"server.admin_keys": {"other": "sk-o"}}, "your own key"),
    ({"server.admin_keys.root": None}, "your own key"),
]


@with_server(admin_keys={"root": "sk-root", "other": "sk-o"}, allowed_hosts=["llm.example"])
async def test_nobody_locks_himself_out(server: Server) -> None:
    admin = {"authorization": "Bearer sk-root"}
    for wanted, words in LOCKS:
        refused = await change(server, {"server.drain_s": 1} | wanted, **admin)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "would_lock_out")
        assert words in refused.json()["error"]["message"].lower()
    told = (await server.http.get("/admin/config", headers=admin)).json()["settings"]["server"]
    assert (told["drain_s"], told["admin_keys"]) == (30.0, {"root": "***", "other": "***"})
    # What leaves the sender's own key is his affair; so is whoever may do without one, on this machine.
    await changed(server, {"server.admin_keys.other": None}, **admin)
    await changed(server, {"server.admin_keys": {"admin": "sk-root"}}, **admin)
    await changed(server, {"server.admin_keys": {}}, **admin)
    assert (await server.http.get("/admin/config")).status_code == 200
    # Without keys it is names that are admitted.
    refused = await change(server, {"server.allowed_hosts": []}, host="llm.example")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "would_lock_out")
    await changed(server, {"server.allowed_hosts": []})
    # The first key is known to who sets it, and holds from then on.
    await changed(server, {"server.admin_keys.first": "sk-first"})
    assert (await server.http.get("/admin/config")).status_code == 401
    assert (await server.http.get("/admin/config", headers={"x-api-key": "sk-first"})).status_code == 200


@with_server()
async def test_bad_bodies_are_told_and_change_nothing(server: Server) -> None:
    before = (await server.http.get("/admin/config")).json()
    cases: list[tuple[Any, str]] = [
        ({}, "set is required"),
        ({"set": {}}, "set"),
        ({"set": []}, "set"),
        ({"set": {"server.drain_s": 1}, "persist": "yes"}, "persist"),
        ({"set": {"server.drain_s": 1, "server.port": 2}}, "persist"),
        ({"set": {"server.drain_s": 1, "server.log_level": "loud"}}, "'debug'"),
        ({"set": {"server.drain_s": 1, "engine.command": ["sh"]}}, "lmx.toml"),
        ({"set": {"server.drain_s": {"a": [1] * 9}}}, "valid number"),
        ({"set": {"x" * 5000: 1}}, "no setting"),
        ({"set": {"a\x00.b": 1}}, "no setting"),
        ({"set": {'models."a\\u0000b".pin': True}}, "this change"),
    ]
    for body, words in cases:
        answer = await server.http.post("/admin/config", json=body)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]
        assert len(answer.text) < 1000
    assert (await server.http.post("/admin/config", content=b"{")).status_code == 400
    assert (await server.http.post("/admin/config", content=b" " * 70_000)).status_code == 413
    assert (await server.http.post("/admin/log", json={"level": "loud"})).status_code == 400
    assert (await server.http.get("/admin/log/lines?n=x")).status_code == 400
    assert (await server.http.get("/admin/config")).json() == before


@with_server()
async def test_who_reads_the_log_slowly_is_told_what_he_lost(server: Server) -> None:
    client = await server.connect(receive_buffer_bytes=4096)
    await client.send_all(b"GET /admin/log/lines?n=0&follow=true HTTP/1.1\r\nHost: localhost\r\n\r\n")
    text = await client.receive_some(65536)
    for number in range(3 * RECENT_LINES):
        recent.add(f"line {number} {'x' * 500}")
        if number % 100 == 0:
            await trio.lowlevel.checkpoint()
    recent.add("the end")
    while b"the end" not in text:
        text += await client.receive_some(65536)
    events = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: ")]
    lines = [line for event in events for line in event["lines"]]
    lost = sum(event.get("lost", 0) for event in events)
    assert lost > 0
    assert lost + len(lines) == 3 * RECENT_LINES + 1


def test_a_server_with_a_file(model_folder: Path, tmp_path: Path) -> None:
    """What is persisted, what is logged and by whom, and the log itself, over HTTP."""
    settings: dict[str, Any] = {"server": {"log_format": "json", "drain_s": 1}, "models": {"a.b/c": {"pin": True}}}
    with serve(tmp_path, "--model", str(model_folder), settings=settings, null={"step_ms": 1}) as server:
        file = tmp_path / "lmx.toml"
        file.write_text("# by hand\n" + file.read_text().replace("drain_s = 1", "drain_s = 1  # seconds"))
        file.chmod(0o640)
        with httpx.Client(base_url=server.url, timeout=30) as client:

            def post(wanted: dict[str, Any], status: int = 200) -> Any:
                answer = client.post("/admin/config", json={"set": wanted, "persist": True})
                assert answer.status_code == status, answer.text
                return answer.json()

            wanted = {"server.admin_keys": {"root": "sk-1"}, "server.drain_s": 2, 'models."a.b/c".top_k': 5}
            told = post(
                wanted | {"server.port": 4321, "model.preload": [], "hub.models_dir": "m", "server.log_level": "error"}
            )
            client.headers["x-api-key"] = "sk-1"
            assert (told["needs_restart"], told["persisted"]) == (["hub.models_dir"], str(file))
            assert told["overridden"] == {"server.port": "the command line"}
            assert client.get("/admin/config").json()["pending"] == {"hub.models_dir": "m"}
            text = file.read_text()
            assert text.startswith("# by hand\n")
            assert "drain_s = 2.0  # seconds" in text
            assert '[models."a.b/c"]\npin = true\ntop_k = 5' in text
            assert stat.S_IMODE(file.stat().st_mode) == 0o640
            assert client.get("/admin/config").json()["sources"]["server.drain_s"] == "file"

            post({"server.host": "203.0.113.7"}, 400)
            refused = post({"server.admin_keys.root": None, "server.host": "::1"}, 403)
            assert refused["error"]["code"] == "would_lock_out"
            assert file.read_text() == text
            file.write_text(text + "[server]\n")
            assert "not valid TOML" in post({"server.drain_s": 3}, 400)["error"]["message"]
            file.write_text(text)

            # The audit's lines come whatever the level.
            line = json.loads(server.line('.*"outcome": ?"done".*')[0])
            assert (line["message"], line["logger"], line["who"]) == ("POST /admin/config", "lmx.audit", "127.0.0.1")
            assert (line["set"]["server.drain_s"], line["set"]["server.admin_keys"]) == (2, "***")
            line = json.loads(server.line('.*"status": ?403.*"lmx.audit".*|.*"lmx.audit".*"status": ?403.*')[0])
            assert (line["who"], line["outcome"]) == ("root", "refused")
            assert client.post("/admin/cache/clear").status_code == 200
            server.line(".*lmx.audit.*cache/clear.*|.*cache/clear.*lmx.audit.*")
            assert not [one for one in server.lines if "sk-1" in one]

            assert client.post("/admin/log", json={"level": "debug"}).json() == {"level": "debug"}
            assert client.get("/admin/log").json() == {"level": "debug"}
            client.get("/admin/health")
            server.line('.*"level": ?"debug".*GET /admin/health.*|.*GET /admin/health.*"level": ?"debug".*')
            client.post("/admin/config", json={"set": {"server.log_format": "console"}})
            client.get("/v1/models?plain")
            server.line(r"^\d{4}-\S+ \S+ INFO lmx.requests: GET /v1/models")

            lines = client.get("/admin/log/lines", params={"n": 2000}).json()["lines"]
            assert lines[: len(server.lines)] == server.lines[: len(lines)]
            with client.stream("GET", "/admin/log/lines?n=1&follow") as response:
                events = (json.loads(part[6:]) for part in response.iter_lines() if part.startswith("data: "))
                assert len(next(events)["lines"]) == 1
                httpx.get(f"{server.url}/v1/models", headers={"x-request-id": "followed"})
                assert any("followed" in one for event in events for one in event["lines"])
