"""/admin/bench: what it measures, what it refuses, and that nothing of it stays behind."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api_server import CONTEXT, Server, with_server, write_model
from tests.server import Server as RealServer

SPREAD = {"p50", "p95", "p99", "max"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bench") / "bench-model")


def events(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


@with_server(LMX_NULL_STEP_MS=3)
async def test_every_length_is_measured_with_every_number_of_streams(server: Server) -> None:
    body = {"prompt_tokens": [5, 600], "generate_tokens": 40, "concurrency": [1, 3]}
    answer = await server.http.post("/admin/bench", json=body)
    assert answer.status_code == 200, answer.text
    result = answer.json()
    assert result["model"] == "bench-model"
    assert result["device"] == "none"
    assert result["settings"]["context_length"] == CONTEXT
    rows = result["rows"]
    assert [(row["prompt_tokens"], row["concurrency"]) for row in rows] == [(5, 1), (5, 3), (600, 1), (600, 3)]
    for row in rows:
        assert row["generate_tokens"] == 40
        assert row["prefill_tokens_per_s"] > 0
        assert row["decode_tokens_per_s"] > 0
        assert set(row["ttft_ms"]) == set(row["itl_ms"]) == SPREAD
        assert row["ttft_ms"]["max"] >= row["ttft_ms"]["p50"] > 0
        assert row["itl_ms"]["p50"] >= 0.5  # a step of the null engine takes 3 ms
        assert row["others"] == 0
    await server.free()
    counted = (await server.http.get("/metrics")).text
    [prompt_tokens] = [line for line in counted.splitlines() if line.startswith("lmx_prompt_tokens_total{")]
    # All of it was computed: 1 + 3 of each length, and the warm-up.
    assert float(prompt_tokens.split()[-1]) == 4 * (5 + 600) + 5


@with_server(LMX_NULL_STEP_MS=1)
async def test_a_stream_tells_what_is_measured(server: Server) -> None:
    body = {"prompt_tokens": [8], "generate_tokens": 4, "concurrency": [1, 2], "stream": True}
    answer = await server.http.post("/admin/bench", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *told, last = events(answer.text)
    assert [event["state"] for event in told] == ["warming up", "measuring", "measured", "measuring", "measured"]
    assert told[1]["message"] == "8 + 4 tokens, 1 at a time"
    assert last["done"]["rows"] == [event["row"] for event in told if "row" in event]


@with_server()
async def test_the_shortest_sweep_has_no_time_between_tokens(server: Server) -> None:
    body = {"prompt_tokens": [1], "generate_tokens": 1, "concurrency": [1]}
    [row] = (await server.http.post("/admin/bench", json=body)).json()["rows"]
    assert row["itl_ms"] is None
    assert row["decode_tokens_per_s"] is None


@with_server(LMX_NULL_STEP_MS=5)
async def test_prompts_differ_and_other_requests_are_told(server: Server) -> None:
    other = await server.send("/v1/completions", {"prompt": "Hi", "max_tokens": 4000, "stream": True})
    await server.leased(1)
    body = {"prompt_tokens": [64], "generate_tokens": 4, "concurrency": [2]}
    [row] = (await server.http.post("/admin/bench", json=body)).json()["rows"]
    assert row["others"] == 1
    other.socket.close()
    await server.free()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_it(stream: bool, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @with_server(LMX_NULL_STEP_MS=5)
    async def test(server: Server) -> None:
        body = {"prompt_tokens": [16], "generate_tokens": 4000, "concurrency": [4], "stream": stream}
        client = await server.send("/admin/bench", body)
        await server.leased(4)
        client.socket.close()
        await server.free()
        # Nobody else is kept from it, and nothing was kept of it.
        body |= {"generate_tokens": 2, "stream": False}
        assert (await server.http.post("/admin/bench", json=body)).status_code == 200

    test(model_folder, monkeypatch)


@with_server(LMX_NULL_STEP_MS=5)
async def test_two_at_a_time_would_measure_each_other(server: Server) -> None:
    client = await server.send("/admin/bench", {"prompt_tokens": [16], "generate_tokens": 4000, "concurrency": [1]})
    await server.leased(1)
    refused = await server.http.post("/admin/bench", json={"stream": True})
    assert refused.status_code == 409
    assert refused.json()["error"]["param"] == "model"
    client.socket.close()
    await server.free()


@with_server()
async def test_what_it_refuses(server: Server) -> None:
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"prompt_tokens": 512}, 400, "prompt_tokens"),
        ({"prompt_tokens": []}, 400, "prompt_tokens"),
        ({"prompt_tokens": [0]}, 400, "prompt_tokens[0]"),
        ({"prompt_tokens": [4, "8"]}, 400, "prompt_tokens[1]"),
        ({"prompt_tokens": [1] * 17}, 400, "prompt_tokens"),
        ({"prompt_tokens": [10**18]}, 400, "prompt_tokens[0]"),
        ({"prompt_tokens": [CONTEXT]}, 400, "prompt_tokens"),
        ({"prompt_tokens": [1], "generate_tokens": CONTEXT}, 400, "prompt_tokens"),
        ({"generate_tokens": 0}, 400, "generate_tokens"),
        ({"generate_tokens": True}, 400, "generate_tokens"),
        ({"concurrency": [65]}, 400, "concurrency[0]"),
        ({"concurrency": None}, 400, "concurrency"),
        ({"concurrency": [64] * 16, "prompt_tokens": [4000] * 16}, 400, "prompt_tokens"),
        ({"promptTokens": [4]}, 400, "promptTokens"),
        ({"stream": "yes"}, 400, "stream"),
        ({"model": 3}, 400, "model"),
        ({"model": "nobody"}, 404, "model"),
        ({"model": "a\0b"}, 404, "model"),
        ({"model": "../../etc/passwd"}, 404, "model"),
    ]
    for stream in ({}, {"stream": True}):
        for body, status, param in cases:
            answer = await server.http.post("/admin/bench", json=stream | body)
            assert answer.status_code == status, (body, answer.text)
            assert answer.json()["error"]["param"] == param, (body, answer.text)
    for raw in (b"{", b"[]", b'"x"', b"\xff"):
        assert (await server.http.post("/admin/bench", content=raw)).status_code == 400
    assert (await server.http.post("/admin/bench", content=b" " * 70_000)).status_code == 413
    assert (await server.http.get("/admin/bench")).status_code == 405
    await server.free()


@with_server(LMX_NULL_CRASH_AFTER=-1, LMX_NULL_CRASH_TOKEN=300, restart_backoff_s=0.01)
async def test_an_engine_that_dies_is_an_error(server: Server) -> None:
    answer = await server.http.post("/admin/bench", json={"prompt_tokens": [2000], "generate_tokens": 2})
    assert answer.status_code in (422, 503), answer.text
    assert answer.json()["error"]["code"] in ("engine_died", "request_crashes_engine")


@with_server(admin_keys={"root": "sk-root"})
async def test_it_is_the_operators(server: Server) -> None:
    assert (await server.http.post("/admin/bench", json={})).status_code in (401, 403)


def test_a_real_engine(tiny_server: RealServer) -> None:
    body = {"prompt_tokens": [40, 300], "generate_tokens": 6, "concurrency": [1, 2]}
    rows = httpx.post(f"{tiny_server.url}/admin/bench", json=body, timeout=60).raise_for_status().json()["rows"]
    assert [row["others"] for row in rows] == [0] * 4
    assert all(row["prefill_tokens_per_s"] > 0 for row in rows)
    tiny_server.idle()
