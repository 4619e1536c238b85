"""/admin/requests: what is being served is told as it is, and an operator can end it: at once, with a clear error, and
with nothing left behind."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import trio
from quart import Response

from lmx.api.events import EventWriter
from tests.api_server import Server, with_server, write_model

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4000, "user": "bot"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


async def requests(server: Server) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = (await server.http.get("/admin/requests")).json()["requests"]
    return listed


async def cancel(server: Server, request_id: str) -> httpx.Response:
    return await server.http.post(f"/admin/requests/{request_id}/cancel")


async def ask(server: Server, request_id: str, body: dict[str, Any], answers: list[httpx.Response]) -> None:
    answers.append(await server.http.post(CHAT, json=body, headers={"x-request-id": request_id}))


@with_server(LMX_NULL_STEP_MS=5, max_rows=1)
async def test_a_running_and_a_waiting_request_are_told_and_ended(server: Server) -> None:
    answers: list[httpx.Response] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, server, "first", LONG, answers)
        await server.until(lambda engine: engine["kv_sequence_bytes"] > 0)
        nursery.start_soon(ask, server, "second", LONG | {"stream": True}, answers)
        await server.leased(2)
        first, second = await requests(server)
        assert (first["id"], first["state"], second["id"], second["state"]) == ("first", "decode", "second", "queued")
        assert (first["model"], first["client"], first["face"]) == ("tiny", "bot", "chat")
        assert first["prompt_tokens"] > 0
        assert 0 < first["completion_tokens"] < 4000
        assert second["completion_tokens"] == 0
        assert 0 <= second["age_s"] <= first["age_s"]
        # What waits holds a lease, too.
        assert (await cancel(server, "second")).json() == {"id": "second", "cancelled": True, "count": 1}
        assert [one["id"] for one in await requests(server)] == ["first"]
        assert (await cancel(server, "first")).status_code == 200
        engine = (await server.http.get("/admin/status")).json()["models"][0]["engine"]
        assert (engine["live_leases"], engine["live_sequences"]) == (0, 0)
    for answer in answers:
        events = answer.text.split("data: ")[-1] if answer.status_code == 200 else answer.text
        assert json.loads(events)["error"]["code"] == "request_cancelled"
    assert sorted(answer.status_code for answer in answers) == [200, 410]  # the stream had begun to wait
    assert await requests(server) == []
    assert (await server.http.post(CHAT, json=LONG | {"max_tokens": 1})).status_code == 200
    gone = await cancel(server, "first")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "request_not_found")


@pytest.mark.parametrize("request_id", ["same", "a/b?c#d%2F"])
def test_all_requests_of_an_id_are_ended(request_id: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @with_server(LMX_NULL_STEP_MS=5)
    async def test(server: Server) -> None:
        answers: list[httpx.Response] = []
        async with trio.open_nursery() as nursery:
            for shape in ({}, {"stream": True}, {"n": 3}):
                nursery.start_soon(ask, server, request_id, LONG | shape, answers)
            nursery.start_soon(ask, server, "other", LONG, answers)
            await server.leased(6)
            told = (await cancel(server, quote(request_id, safe=""))).json()
            assert told == {"id": request_id, "cancelled": True, "count": 3}
            await server.leased(1)
            assert [one["id"] for one in await requests(server)] == ["other"]
            await cancel(server, "other")
        assert sorted(answer.status_code for answer in answers) == [200, 410, 410, 410]
        await server.free()

    test(model_folder, monkeypatch)


@with_server(LMX_NULL_STEP_MS=5)
async def test_a_client_that_reads_nothing_is_ended(server: Server) -> None:
    """Its connection is full; the lease is freed all the same."""
    body = json.dumps(LONG | {"stream": True, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}).encode()
    client = await server.connect(receive_buffer_bytes=4096)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nX-Request-Id: slow\r\nContent-Length: {len(body)}\r\n\r\n"
    await client.send_all(head.encode() + body)
    await server.leased(1)
    assert (await cancel(server, "slow")).status_code == 200
    await server.free()


@with_server(admin_keys={"root": "sk-root"}, LMX_NULL_STEP_MS=5)
async def test_only_admins_end_requests(server: Server) -> None:
    client = await server.send(CHAT, LONG | {"stream": True})
    async with trio.open_nursery() as nursery:
        admin = {"x-api-key": "sk-root"}
        while not (listed := (await server.http.get("/admin/requests", headers=admin)).json()["requests"]):
            pass
        request_id = listed[0]["id"]
        assert (await cancel(server, request_id)).status_code == 401
        answer = await server.http.post(f"/admin/requests/{request_id}/cancel", headers=admin)
        assert answer.status_code == 200
        nursery.cancel_scope.cancel()
    text = b""
    while b"request_cancelled" not in text:
        text += await client.receive_some(65536)
    assert b"[DONE]" not in text


def test_a_stream_that_is_ended_while_it_begins_has_its_headers() -> None:
    """Else the error event would come before them, and the connection would break."""
    sent: list[str] = []

    async def send(message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message["type"])

    async def main() -> None:
        writer = EventWriter(send, Response(""))
        with trio.CancelScope() as ended:
            ended.cancel()
            await writer.start()
        assert ended.cancelled_caught
        assert (sent, writer.started) == (["http.response.start"], True)

    trio.run(main)
