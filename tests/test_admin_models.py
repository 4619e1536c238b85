"""/admin/models, load, unload, cleanup: what an operator sees and does, and whatever else may be sent there."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.admin_server import face
from tests.api_server import write_model
from tests.models_zoo import NAMES, in_trio, limit_for
from tests.server import ROOT


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for name in NAMES:
        write_model(folder / name)
    return folder


@in_trio
async def test_models_on_the_disk_and_in_memory(zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path) as server:
        await server.until("ant", "ready")
        models = {model["id"]: model for model in (await server.get("models"))["models"]}
        assert list(models)[:4] == list(NAMES)  # the loaded one first
        loaded, other = models["ant"], models["bee"]
        assert (loaded["state"], other["state"]) == ("ready", "on disk")
        assert loaded.keys() == other.keys()
        assert other["path"] == str(zoo / "bee")
        assert other["architecture"] == "llama"
        assert other["format"] == "safetensors"
        assert (other["backend"], other["backend_reason"]) == ("mlx", "an MLX folder")
        assert other["memory"]["estimate"]["total_bytes"] > 0
        assert other["memory"]["owned_bytes"] == 0
        assert loaded["settings"]["max_rows"] == {"value": 8, "source": "default"}
        assert loaded["memory"]["estimate"]["rows"] == 8
        assert loaded["kept"]
        # The same under other names, and with what was measured of it.
        for name in ("bee", "BEE", "%62ee", "bee/"):
            assert await server.get(f"models/{name}") == other | {"benches": []}, name
        await server.post("bench", model="ant", prompt_tokens=[4], generate_tokens=2, concurrency=[1])
        [bench] = (await server.get("models/ant"))["benches"]
        assert bench["rows"][0]["prompt_tokens"] == 4
        assert bench["settings"]["max_rows"] == 8


@in_trio
async def test_load_and_unload_by_hand(zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path) as server:
        loaded = await server.post("load", model="Bee", context_length=1024, max_batch=2, ttl=600, pin=True)
        assert (loaded["id"], loaded["state"]) == ("bee", "ready")
        assert loaded["load_s"] > 0
        assert (loaded["pinned"], loaded["ttl_s"]) == (True, 600)
        assert loaded["settings"]["context_length"] == {"value": 1024, "source": "request"}
        assert loaded["settings"]["kv_bits"] == {"value": 16, "source": "default"}
        served = {model["id"]: model for model in (await server.get("status"))["models"]}
        assert served["bee"]["ready"]["context_length"] == 1024
        # Once more: nothing happens.
        again = await server.post("load", model="bee")
        assert again["since"] == loaded["since"]
        unloaded = await server.post("unload", model="BEE", drain=1)
        assert unloaded.keys() == {"id", "freed_bytes", "seconds"}
        assert (await server.get("models/bee"))["state"] == "on disk"
        error = await server.post("unload", 404, model="bee")
        assert error["code"] == "model_not_found"


@in_trio
async def test_a_draft_model_is_loaded_beside_its_target(zoo: Path, tmp_path: Path) -> None:
    places = tmp_path / "zoo"
    shutil.copytree(zoo, places)
    words = places / "cat" / "tokenizer.json"
    words.write_text(words.read_text().replace('"!"', '"other"'))
    async with face(places, tmp_path) as server:
        alone = await server.post("load", model="bee")
        loaded = await server.post("load", model="bee", draft_model="ANT", speculation="auto")
        assert loaded["settings"]["draft_model"] == {"value": "ANT", "source": "request"}
        assert loaded["since"] > alone["since"], "it was loaded anew"
        key = "weights_bytes"
        assert loaded["memory"]["estimate"][key] > alone["memory"]["estimate"][key]
        for draft, status in (("nothing", 404), ("cat", 422)):
            error = await server.post("load", status, model="bee", draft_model=draft)
            assert error["param"] == "draft_model", error
        assert "vocabulary" in error["message"]


@in_trio
async def test_a_load_tells_of_itself(zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path) as server:
        *told, last = await server.events("load", model="bee")
        assert told[0].keys() == {"state", "message"}
        assert [event["state"] for event in told][-2:] == ["loading", "ready"]
        assert last["done"]["id"] == "bee"
        assert last["done"]["state"] == "ready"


@in_trio
async def test_without_waiting(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = tmp_path / "go"
    async with face(zoo, tmp_path / "data", model={"default": str(zoo / "ant")}) as server:
        await server.until("ant", "ready")
        monkeypatch.setenv("LMX_NULL_LOAD", f"wait:{go}")
        begun = await server.post("load", 202, model="bee", wait=False)
        assert begun["id"] == "bee"
        assert begun["state"] in ("reading", "waiting", "loading")
        await server.until("bee", "loading")
        go.touch()
        await server.until("bee", "ready")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_gives_the_load_up(
    stream: bool, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @in_trio
    async def test() -> None:
        async with face(zoo, tmp_path / "data") as server:
            await server.until("ant", "ready")
            monkeypatch.setenv("LMX_NULL_LOAD", f"wait:{tmp_path / 'never'}")
            first = await server.send("load", model="bee", stream=stream)
            second = await server.send("load", model="bee", stream=stream)
            await server.until("bee", "loading")
            while (await server.get("models/bee"))["leases"] != 2:
                pass
            first.socket.close()
            while (await server.get("models/bee"))["leases"] != 1:
                pass
            assert (await server.get("models/bee"))["state"] == "loading"  # somebody still waits
            second.socket.close()
            await server.until("bee", "gone")

    test()


@in_trio
async def test_two_loads_of_one_model_are_one(zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path) as server:
        answers: list[dict[str, Any]] = []

        async def load() -> None:
            answers.append(await server.post("load", model="bee"))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(load)
        assert {answer["since"] for answer in answers} == {answers[0]["since"]}


@in_trio
async def test_unload_while_it_loads(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with face(zoo, tmp_path / "data") as server:
        await server.until("ant", "ready")
        monkeypatch.setenv("LMX_NULL_LOAD", f"wait:{tmp_path / 'never'}")
        refused: list[dict[str, Any]] = []

        async def load() -> None:
            refused.append(await server.post("load", 503, model="bee"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await server.until("bee", "loading")
            assert (await server.post("unload", model="bee", drain=0))["id"] == "bee"
        assert "unloaded" in refused[0]["message"]


@in_trio
async def test_a_load_that_fails(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with face(zoo, tmp_path) as server:
        await server.until("ant", "ready")
        monkeypatch.setenv("LMX_NULL_LOAD", "model_invalid")
        error = await server.post("load", 503, model="bee")
        assert error["code"] == "model_loading_failed"
        *_, last = await server.events("load", model="bee")
        assert last["error"]["code"] == "model_loading_failed"


@in_trio
async def test_an_engine_that_dies_while_it_loads(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with face(zoo, tmp_path, engine={"max_restarts": 1}) as server:
        await server.until("ant", "ready")
        monkeypatch.setenv("LMX_NULL_LOAD", "exit")
        error = await server.post("load", 503, model="bee")
        assert error["code"] == "model_loading_failed"
        assert "told to exit at load" in error["message"]
        assert (await server.get("models/ant"))["state"] == "ready"


@in_trio
async def test_a_folder_that_vanishes_while_the_model_is_loaded(zoo: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(zoo / "bee", own / "bee")
    async with face(zoo, tmp_path / "data", hub={"folders": [str(own)]}) as server:
        loaded = await server.post("load", model="bee")
        shutil.rmtree(own / "bee")
        await trio.to_thread.run_sync(server.models.library.scan)
        left = await server.get("models/bee")
        assert (left["state"], left["path"], left["source"]) == ("ready", loaded["path"], "folder")
        assert left.keys() == loaded.keys()
        await server.delete("models/bee?force=true", 404)
        assert (await server.http.post("/v1/completions", json={"model": "bee", "prompt": "x"})).status_code == 200
        await server.post("unload", model="bee")
        await server.post("load", 404, model="bee")


@in_trio
async def test_what_does_not_fit_is_refused_with_the_numbers(zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path, memory={"limit_bytes": limit_for(zoo, 1), "policy": "refuse"}) as server:
        await server.until("ant", "ready")
        await server.post("load", model="ant", pin=True)
        for body in ({}, {"stream": True}, {"wait": True}):
            answer = await server.http.post("/admin/load", json={"model": "bee"} | body)
            text = answer.text
            assert "insufficient_memory" in text, text
            assert "It needs" in text
            assert "pinned: ant" in text


@in_trio
async def test_a_name_that_is_not_here(zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path) as server:
        error = await server.post("load", 404, model="mlx-community/Qwen3-0.6B-4bit")
        assert "lmx pull mlx-community/Qwen3-0.6B-4bit" in error["message"]
        error = await server.post("load", 404, model="beee")
        assert "bee" in error["message"]
        assert (await server.post("load", 422, model="/etc"))["code"] == "model_invalid"
        for name in ("../../nowhere/passwd", "a\0b", "/nowhere", "~nobody/x", "/dev/null", "x" * 1000, "C:\\x"):
            error = await server.post("load", 404, model=name)
            assert "lmx pull" not in error["message"]
        for path in ("..%2f..%2fetc%2fpasswd", "a%00b", "nobody", "x" * 3000, "%ff", "a/b/c/d"):
            await server.get(f"models/{path}", 404)
        assert (await server.http.get("/admin/models")).json()["models"][0]["id"] == "ant"


BODIES: list[tuple[str, dict[str, Any], str]] = [
    ("load", {}, "model"),
    ("load", {"model": None}, "model"),
    ("load", {"model": 3}, "model"),
    ("load", {"model": ""}, "model"),
    ("load", {"model": ["bee"]}, "model"),
    ("load", {"model": "x" * 1001}, "model"),
    ("load", {"model": "bee", "context_length": -1}, "context_length"),
    ("load", {"model": "bee", "context_length": "4096"}, "context_length"),
    ("load", {"model": "bee", "context_length": 4096.5}, "context_length"),
    ("load", {"model": "bee", "kv_bits": 3}, "kv_bits"),
    ("load", {"model": "bee", "kv_bits": "8"}, "kv_bits"),
    ("load", {"model": "bee", "max_batch": 0}, "max_batch"),
    ("load", {"model": "bee", "max_batch": 10**9}, "max_batch"),
    ("load", {"model": "bee", "ttl": -1}, "ttl"),
    ("load", {"model": "bee", "ttl": "10m"}, "ttl"),
    ("load", {"model": "bee", "pin": "yes"}, "pin"),
    ("load", {"model": "bee", "wait": 1}, "wait"),
    ("load", {"model": "bee", "stream": "true"}, "stream"),
    ("load", {"model": "bee", "draft_model": 1}, "draft_model"),
    ("load", {"model": "bee", "speculation": "on"}, "speculation"),
    ("load", {"model": "bee", "contextLength": 1}, "contextLength"),
    ("unload", {}, "model"),
    ("unload", {"model": {}}, "model"),
    ("unload", {"model": "bee", "drain": -0.1}, "drain"),
    ("unload", {"model": "bee", "drain": True}, "drain"),
]


@in_trio
async def test_bodies_that_cannot_be(zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path) as server:
        for path, body, param in BODIES:
            error = await server.post(path, 400, **body)
            assert (error["param"], error["type"]) == (param, "invalid_request_error"), (path, body, error)
        for path in ("load", "unload"):
            for raw in (b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN}'):
                assert (await server.http.post(f"/admin/{path}", content=raw)).status_code == 400
            assert (await server.http.post(f"/admin/{path}", content=b"x" * 70_000)).status_code == 413
            assert (await server.http.get(f"/admin/{path}")).status_code == 405
        assert (await server.http.put("/admin/models/bee")).status_code == 405
        assert server.models.states().keys() == {"ant"}


@in_trio
async def test_while_the_server_drains(zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path) as server:
        server.models.draining = True
        for body in ({}, {"stream": True}, {"wait": False}):
            error = await server.post("load", 503, model="bee", **body)
            assert "shutting down" in error["message"]
        assert (await server.get("models"))["models"]
        await server.post("unload", model="ant")


@in_trio
async def test_the_operators_only(zoo: Path, tmp_path: Path) -> None:
    keys = {"admin_keys": {"root": "sk-root"}, "inference_keys": {"a": "sk-a"}}
    async with face(zoo, tmp_path, server=keys) as server:
        for method, path in (
            ("GET", "models"),
            ("GET", "models/ant"),
            ("POST", "load"),
            ("POST", "unload"),
            ("POST", "bench"),
        ):
            for key, status in (("", 401), ("sk-a", 403)):
                headers = {"x-api-key": key} if key else {}
                answer = await server.http.request(method, f"/admin/{path}", headers=headers)
                assert answer.status_code == status, (method, path)
        listed = await server.http.get("/admin/models", headers={"x-api-key": "sk-root"})
        assert listed.status_code == 200


@in_trio
async def test_every_route_is_documented(zoo: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "admin.md").read_text(encoding="utf-8")
    async with face(zoo, tmp_path) as server:
        paths = (await server.http.get("/openapi.json")).json()["paths"]
        routes = {
            (method, path): operation
            for path, operations in paths.items()
            if path.startswith("/admin")
            for method, operation in operations.items()
            if method in ("get", "post", "delete")
        }
        assert len(routes) >= 24
        for (method, path), operation in routes.items():
            assert operation["summary"], path
            assert path.replace("{id}", "").rstrip("/") in page, path
            if method == "post" and not path.endswith(("/cancel", "/clear")):
                content = operation["requestBody"]["content"]["application/json"]["schema"]
                assert content["properties"], path
        query = {parameter["name"] for parameter in paths["/admin/models/{name}"]["delete"]["parameters"]}
        assert query == {"name", "force", "dry_run"}


@in_trio
async def test_loads_are_counted(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with face(zoo, tmp_path / "data", memory={"limit_bytes": limit_for(zoo, 1)}) as server:
        await server.until("ant", "ready")
        await server.post("load", model="bee")  # ant gives way
        monkeypatch.setenv("LMX_NULL_LOAD", "model_invalid")
        await server.post("load", 503, model="cat")
        monkeypatch.setenv("LMX_NULL_LOAD", f"wait:{tmp_path / 'never'}")
        waiting = await server.send("load", model="dog")
        await server.until("dog", "loading")
        page = (await server.http.get("/metrics")).text
        assert 'lmx_models{state="loading"} 1.0' in page
        waiting.socket.close()
        await server.until("dog", "gone")
        page = (await server.http.get("/admin/metrics")).text
        for line in (
            'lmx_model_loads_total{model="ant",outcome="ready"} 1.0',
            'lmx_model_loads_total{model="bee",outcome="ready"} 1.0',
            'lmx_model_loads_total{model="cat",outcome="failed"} 1.0',
            'lmx_model_loads_total{model="dog",outcome="cancelled"} 1.0',
            'lmx_model_load_seconds_count{model="bee"} 1.0',
            'lmx_model_evictions_total{model="ant"} 1.0',
            "lmx_memory_budget_bytes ",
        ):
            assert line in page, page
        assert 'lmx_ready{model="dog"}' not in page  # its engine is gone


@in_trio
async def test_status_tells_of_memory_disk_and_every_stay(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with face(zoo, tmp_path / "data") as server:
        await server.until("ant", "ready")
        monkeypatch.setenv("LMX_NULL_LOAD", f"wait:{tmp_path / 'never'}")
        await server.post("load", 202, model="bee", wait=False)
        await server.until("bee", "loading")
        status = await server.get("status")
        ant, bee = status["models"]
        assert ant.keys() == bee.keys()
        assert (ant["state"], ant["kept"], ant["engine"]["state"]) == ("ready", True, "ready")
        assert (bee["state"], bee["ready"], bee["leases"]) == ("loading", None, 0)
        assert bee["estimate"]["rows"] == 8
        memory = status["memory"]
        assert memory["budget_bytes"] > memory["reserved_bytes"] >= bee["needed_bytes"] > 0
        assert memory["alarm"] is False
        assert status["jobs"] == 0
        assert 0 < status["disk"]["free_bytes"] <= status["disk"]["total_bytes"]


@in_trio
async def test_a_measurement_loads_the_model_or_says_why_not(zoo: Path, tmp_path: Path) -> None:
    body: dict[str, Any] = {"model": "bee", "prompt_tokens": [4], "generate_tokens": 2, "concurrency": [1]}
    limit = {"limit_bytes": limit_for(zoo, 1)}
    async with face(zoo, tmp_path / "waits", memory=limit | {"wait_s": 0.3}) as server:
        await server.until("ant", "ready")
        lease = await server.models.take("ant")
        error = await server.post("bench", 503, **body)
        assert error["code"] == "insufficient_memory"
        lease.release()
    async with face(zoo, tmp_path / "evicts", memory=limit) as server:
        await server.until("ant", "ready")
        *told, last = await server.events("bench", **body)
        assert [event["state"] for event in told] == ["loading", "warming up", "measuring", "measured"]
        assert last["done"]["model"] == "bee"
        assert server.models.states() == {"bee": "ready"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_operator_ends_what_another_waits_for(
    stream: bool, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @in_trio
    async def test() -> None:
        monkeypatch.setenv("LMX_NULL_STEP_MS", "5")
        async with face(zoo, tmp_path / "data") as server:
            await server.until("ant", "ready")
            monkeypatch.setenv("LMX_NULL_LOAD", f"wait:{tmp_path / 'never'}")
            answers: list[str] = []

            async def ask(path: str, **body: Any) -> None:
                headers = {"x-request-id": path}
                answer = await server.http.post(f"/admin/{path}", json=body | {"stream": stream}, headers=headers)
                answers.append(answer.text)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(ask, "load", model="bee"))
                nursery.start_soon(partial(ask, "bench", prompt_tokens=[4], generate_tokens=4000, concurrency=[2]))
                ant = server.models.listing()[0].engine
                while server.models.states().get("bee") != "loading" or ant.statistics().live_leases != 2:
                    await trio.lowlevel.checkpoint()
                running = {one["id"]: one for one in (await server.get("requests"))["requests"]}
                assert (running["load"]["model"], running["bench"]["model"]) == ("bee", "ant")
                for name in running:
                    assert (await server.post(f"requests/{name}/cancel"))["cancelled"]
                assert ant.statistics().live_leases == 0
            assert all("request_cancelled" in text for text in answers), answers
            await server.until("bee", "gone")

    test()
