"""/admin/download, convert, jobs: the face of what tests/test_jobs.py proves, over a real client and a small Hub."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.admin_server import face
from tests.api_server import write_model
from tests.hub_server import Hub, hub_server
from tests.models_zoo import in_trio

WEIGHTS = "model.safetensors"
JOB = {
    "id",
    "kind",
    "model",
    "state",
    "message",
    "chosen",
    "done_bytes",
    "total_bytes",
    "bytes_per_s",
    "eta_s",
    "error",
    "path",
    "created",
    "started",
    "ended",
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    write_model(folder / "ant")
    return folder


@pytest.fixture
def hub(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        files = {path.name: path.read_bytes() for path in (zoo / "ant").iterdir()}
        server.add("org/new-model", files, tags=("mlx",))
        yield server


@in_trio
async def test_from_the_hub_into_memory(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path, hub={"low_disk_bytes": 0}) as server:
        error = await server.post("load", 404, model="org/new-model")
        assert "lmx pull org/new-model" in error["message"]
        *_, last = told = await server.events("download", model="org/new-model")
        assert all(event.keys() == JOB for event in told)
        assert (last["state"], last["error"]) == ("done", ""), last
        assert last["chosen"]["why"]
        assert last["done_bytes"] == last["total_bytes"] > 0
        while "org/new-model" not in [entry.id for entry in server.models.library.entries]:  # which looks again
            await server.models.changes.wait()
        assert (await server.get("models/org/new-model"))["source"] == "lmx"
        assert (await server.post("load", model="ORG/new-model"))["state"] == "ready"
        [job] = (await server.get("jobs"))["jobs"]
        assert job == last
        assert (await server.get("downloads"))["jobs"] == [job]
        assert await server.get(f"jobs/{job['id']}") == await server.get(f"downloads/{job['id']}") == job
        assert await server.delete(f"jobs/{job['id']}") == job  # it is over


@in_trio
async def test_a_job_is_one_goes_on_and_is_cancelled(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    hub.holds[WEIGHTS] = 0
    async with face(zoo, tmp_path, hub={"low_disk_bytes": 0}) as server:
        begun = await server.post("download", 202, model="org/new-model")
        assert begun["state"] in ("queued", "running")
        again = await server.post("download", 202, model="org/new-model@main", revision=None)
        follower = await server.send("download", model="org/new-model", stream=True)
        assert b"text/event-stream" in await follower.receive_some()
        await trio.to_thread.run_sync(hub.until_held, WEIGHTS)
        await follower.aclose()  # and the job goes on
        assert {job["id"] for job in (await server.get("jobs"))["jobs"]} == {begun["id"], again["id"]}
        assert (await server.get(f"jobs/{begun['id']}"))["state"] == "running"
        assert (await server.get("status"))["jobs"] >= 1
        for job in {begun["id"], again["id"]}:
            cancelled = await server.delete(f"downloads/{job}")
            assert cancelled["state"] == "cancelled"
        assert (await server.get("status"))["jobs"] == 0
        assert [entry.id for entry in server.models.library.entries if entry.source == "lmx"] == []


@in_trio
async def test_what_the_hub_refuses_is_told(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path, hub={"low_disk_bytes": 0}) as server:
        *_, last = await server.events("download", model="org/nothing")
        assert last["state"] == "failed"
        assert "org/nothing" in last["error"]
        page = (await server.http.get("/metrics")).text
        assert 'lmx_jobs{kind="download",state="failed"} 1.0' in page


@in_trio
async def test_a_conversion(zoo: Path, tmp_path: Path, tiny_model: Path) -> None:
    async with face(zoo, tmp_path, hub={"low_disk_bytes": 0, "folders": [str(tiny_model.parent)]}) as server:
        *_, last = await server.events("convert", model=tiny_model.name, bits=4, group_size=32, name="small")
        assert last["kind"] == "convert"
        assert (last["state"], last["error"]) == ("done", ""), last
        assert last["chosen"] == {"bits": 4, "group_size": 32, "mode": "affine", "dtype": "", "name": "small"}
        error = await server.get(f"downloads/{last['id']}", 404)
        assert f"/admin/jobs/{last['id']}" in error["message"]


BODIES: list[tuple[str, dict[str, Any], int, str]] = [
    ("download", {}, 400, "model"),
    ("download", {"model": ""}, 400, "model"),
    ("download", {"model": 3}, 400, "model"),
    ("download", {"model": "a/b/c/d"}, 400, "model"),
    ("download", {"model": "../../etc"}, 400, "model"),
    ("download", {"model": "org/a\0b"}, 400, "model"),
    ("download", {"model": "/etc/passwd"}, 400, "model"),
    ("download", {"model": "org/a", "revision": 1}, 400, "revision"),
    ("download", {"model": "org/a", "allow_patterns": "*.json"}, 400, "allow_patterns"),
    ("download", {"model": "org/a", "allow_patterns": [""]}, 400, "allow_patterns"),
    ("download", {"model": "org/a", "allow_patterns": ["a\0"]}, 400, "allow_patterns"),
    ("download", {"model": "org/a", "allow_patterns": ["*"] * 101}, 400, "allow_patterns"),
    ("download", {"model": "org/a", "stream": 1}, 400, "stream"),
    ("convert", {}, 400, "model"),
    ("convert", {"model": "nobody"}, 404, "model"),
    ("convert", {"model": "a\0b"}, 404, "model"),
    ("convert", {"model": "../ant"}, 404, "model"),
    ("convert", {"model": "ant", "bits": 7}, 400, "bits"),
    ("convert", {"model": "ant", "bits": "4"}, 400, "bits"),
    ("convert", {"model": "ant", "group_size": 5}, 400, "group_size"),
    ("convert", {"model": "ant", "mode": "best"}, 400, "mode"),
    ("convert", {"model": "ant", "dtype": "int8"}, 400, "dtype"),
    ("convert", {"model": "ant", "name": "../x"}, 400, "name"),
    ("convert", {"model": "ant", "name": ""}, 400, "name"),
]


@in_trio
async def test_requests_that_cannot_be(zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path) as server:
        for path, body, status, param in BODIES:
            for stream in ({}, {"stream": True}):
                error = await server.post(path, status, **(stream | body))
                assert error["param"] == param, (path, body, error)
        for raw in (b"{", b"[]", b"\xff"):
            assert (await server.http.post("/admin/download", content=raw)).status_code == 400
        for id in ("nobody", "a%00b", "..%2f..", "x" * 3000, "download-000000000000"):
            for path in (f"jobs/{id}", f"downloads/{id}"):
                await server.get(path, 404)
                await server.delete(path, 404)
        assert (await server.http.get("/admin/jobs/x?stream=perhaps")).status_code == 400
        assert (await server.http.post("/admin/jobs")).status_code == 405
        assert (await server.get("jobs")) == {"jobs": []}


@in_trio
async def test_the_operators_only(zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path, server={"admin_keys": {"root": "sk-root"}}) as server:
        for method, path in (
            ("POST", "download"),
            ("POST", "convert"),
            ("GET", "jobs"),
            ("GET", "jobs/x"),
            ("DELETE", "jobs/x"),
            ("GET", "downloads"),
            ("GET", "downloads/x"),
            ("DELETE", "downloads/x"),
        ):
            assert (await server.http.request(method, f"/admin/{path}")).status_code == 401
