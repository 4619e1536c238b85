"""DELETE /admin/models and /admin/cleanup: what goes from the disk, and what never does."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from tests.admin_server import face
from tests.api_server import write_model
from tests.models_zoo import NAMES, in_trio

DAY_S = 86_400
ALONE: dict[str, Any] = {"folders": []}
"""lmx's own folder, and no other."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for name in NAMES:
        write_model(folder / name)
    return folder


@pytest.fixture
def own(zoo: Path, tmp_path: Path) -> Path:
    """The same in lmx's own folder."""
    shutil.copytree(zoo, tmp_path / "models" / "org")
    return tmp_path / "models" / "org"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@in_trio
async def test_a_model_is_removed_from_the_disk(own: Path, tmp_path: Path) -> None:
    async with face(own, tmp_path, hub=ALONE) as server:
        await server.until("org/ant", "ready")
        planned = await server.delete("models/org/bee?dry_run=true")
        assert planned["id"] == "org/bee"
        assert planned["paths"] == [str(own / "bee")]
        assert planned["freed_bytes"] > 0
        assert (own / "bee").exists()
        assert await server.delete("models/Org%2FBEE") == planned
        assert not (own / "bee").exists()
        await server.get("models/org/bee", 404)
        await server.delete("models/org/bee", 404)
        assert "org/bee" not in [model["id"] for model in (await server.get("models"))["models"]]
        assert names(own) == {"ant", "cat", "dog"}


@in_trio
async def test_what_is_in_memory_goes_with_force_only(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with face(own, tmp_path, hub=ALONE) as server:
        await server.until("org/ant", "ready")
        error = await server.delete("models/ant", 409)
        assert "force=true" in error["message"]
        assert (await server.delete("models/ant?force=false&dry_run"))["id"] == "org/ant"
        # One that is on its way in, too; who waits for it learns why it does not come.
        monkeypatch.setenv("LMX_NULL_LOAD", f"wait:{tmp_path / 'never'}")
        told: list[dict[str, Any]] = []

        async def load() -> None:
            told.append(await server.post("load", 503, model="bee"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await server.until("org/bee", "loading")
            await server.delete("models/org/bee", 409)
            await server.delete("models/org/bee?force=true")
        assert "unloaded" in told[0]["message"]
        assert (await server.delete("models/ant?force=1"))["id"] == "org/ant"
        assert server.models.states() == {}
        assert names(own) == {"cat", "dog"}


@in_trio
async def test_broken_models_are_listed_and_removed(own: Path, tmp_path: Path) -> None:
    (own / "bee" / "model.safetensors").write_bytes(b"12345678")
    async with face(own, tmp_path, hub=ALONE) as server:
        broken = await server.get("models/org/bee")
        assert "truncated" in broken["problem"]
        assert broken["backend"] is None
        error = await server.post("load", 422, model="bee")
        assert error["code"] == "model_invalid"
        await server.delete("models/org/bee")
        assert not (own / "bee").exists()


@in_trio
async def test_other_folders_need_force_and_links_are_not_followed(zoo: Path, own: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    shutil.copytree(zoo / "cat", theirs / "tiger")
    (theirs / "lynx").symlink_to(zoo / "dog")
    async with face(own, tmp_path, hub={"folders": [str(theirs)]}) as server:
        error = await server.delete("models/tiger", 403)
        assert "force=true" in error["message"]
        await server.delete("models/tiger?force=true")
        await server.delete("models/lynx?force=true")
        assert names(theirs) == set()
        assert (zoo / "dog" / "config.json").exists()
        for path in (
            "%2e%2e",
            "%2e%2e%2ftheirs",
            "org",
            "org%2f%2e%2e",
            "models",
            "org%2f..%2f..",
            "a%00b",
            "x" * 2000,
        ):
            await server.delete(f"models/{path}?force=true", 404)
        embedded = await server.delete("models/smollm2-135m-instruct?force=true", 403)
        assert "pip uninstall" in embedded["message"]
        error = await server.delete("models/org/cat?force=maybe", 400)
        assert error["param"] == "force"
        assert names(own) == set(NAMES)


@in_trio
async def test_unused_models_are_cleaned_up(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time() + 10 * DAY_S
    monkeypatch.setattr("lmx.hub.disk.time", SimpleNamespace(time=lambda: now))
    async with face(own, tmp_path, hub=ALONE, models={"cat": {"pin": True}}) as server:
        await server.until("org/ant", "ready")
        server.models.state.note_uses({"org/bee": now - 2 * DAY_S, "org/dog": now - 8 * DAY_S})
        assert (await server.post("cleanup", days=11))["models"] == []
        planned = await server.post("cleanup", days=5)
        [model] = planned["models"]
        assert (model["id"], model["last_used"], model["problem"]) == ("org/dog", now - 8 * DAY_S, "")
        assert (planned["freed_bytes"], planned["dry_run"]) == (model["size_bytes"], True)
        assert (own / "dog").exists()
        done = await server.post("cleanup", days=5, dry_run=False)
        assert done == planned | {"dry_run": False}
        assert names(own) == {"ant", "bee", "cat"}
    async with face(own, tmp_path, hub=ALONE | {"cleanup_days": 1}) as server:
        assert [model["id"] for model in (await server.post("cleanup"))["models"]] == ["org/cat", "org/bee"]


@in_trio
async def test_bodies_that_cannot_be(zoo: Path, tmp_path: Path) -> None:
    async with face(zoo, tmp_path) as server:
        for body, param in (
            ({"days": 0}, "days"),
            ({"days": 1.5}, "days"),
            ({"days": "3"}, "days"),
            ({"days": 10**9}, "days"),
            ({"days": 3, "dry_run": "no"}, "dry_run"),
            ({"days": 3, "dry_run": None}, "dry_run"),
            ({}, "days"),  # and none in the settings
        ):
            error = await server.post("cleanup", 400, **body)
            assert error["param"] == param, body
        assert (await server.http.get("/admin/cleanup")).status_code == 405


@in_trio
async def test_the_operators_only(own: Path, tmp_path: Path) -> None:
    async with face(own, tmp_path, hub=ALONE, server={"admin_keys": {"root": "sk-root"}}) as server:
        assert (await server.http.delete("/admin/models/org/cat?force=true")).status_code == 401
        assert (await server.http.post("/admin/cleanup", json={"days": 1, "dry_run": False})).status_code == 401
        assert names(own) == set(NAMES)
