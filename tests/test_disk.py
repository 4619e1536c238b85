"""Removal frees what is a model's own, inside folders of models, and nothing else; what is left is as it was."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.config import Settings
from lmx.errors import Forbidden, InvalidRequest, LmxError, ModelNotFound
from lmx.hub.disk import Removal, removal, remove, space, unused
from lmx.hub.library import Entry, Library
from lmx.hub.state import State
from tests.model_places import COMMIT, OTHER_COMMIT, add_to_hub_cache, settings_in, write_folder, write_gguf
from tests.models import build_gguf

DAY = 86400.0


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "lmx" / "models"


def library(settings: Settings) -> Library:
    found = Library(settings, State(None))
    found.scan()
    return found


def entry_of(settings: Settings, name: str) -> Entry:
    """Also a broken one's."""
    return library(settings).look_up(name)


def ids(settings: Settings) -> set[str]:
    return {entry.id for entry in library(settings).entries if entry.source != "embedded"}


def plan(settings: Settings, name: str) -> Removal:
    """The plan, after a look at it has changed nothing."""
    before = tree(settings.hub.models_path.parent.parent)
    planned = removal(entry_of(settings, name), settings)
    assert tree(settings.hub.models_path.parent.parent) == before
    return planned


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def bytes_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


# --- lmx's own folder -----------------------------------------------------------------------------------


def test_a_folder_and_its_empty_publisher(own: Path, tmp_path: Path) -> None:
    folder = write_folder(own / "org" / "Tiny")
    kept = write_folder(own / "other" / "Kept")
    size = bytes_of(folder)
    settings = settings_in(tmp_path)
    planned = plan(settings, "org/Tiny")
    assert (planned.id, planned.paths, planned.freed_bytes, planned.needs_force) == ("org/Tiny", (folder,), size, "")
    (own / "org" / ".DS_Store").write_bytes(b"")
    assert remove(planned) == size
    assert sorted(own.iterdir()) == [own / "other"]
    assert kept.exists()
    with pytest.raises(ModelNotFound, match="Nothing is left of org/Tiny"):
        removal(replace(entry_of(settings, "other/Kept"), id="org/Tiny", path=folder), settings)


def test_one_gguf_model_of_several(own: Path, tmp_path: Path) -> None:
    """With all its parts, and with the folder when it was the last."""
    parts = build_gguf(tmp_path / "p" / "m-F32.gguf", split_max_tensors=10).parent
    shutil.rmtree(parts / "m-F32.mlx")
    folder = own / "org" / "m-GGUF"
    shutil.copytree(parts, folder / "F32")
    write_gguf(folder / "m-Q8_0.gguf")
    write_gguf(folder / "mmproj-F16.gguf", architecture="clip")
    (folder / ".lmx.json").write_text("{}")
    settings = settings_in(tmp_path)
    planned = plan(settings, "org/m-GGUF:F32")
    assert planned.paths == tuple(sorted((folder / "F32").iterdir()))
    assert remove(planned) == bytes_of(parts)
    assert ids(settings) == {"org/m-GGUF"}
    planned = plan(settings, "org/m-GGUF")
    assert planned.paths == (folder,)
    remove(planned)
    assert list(own.iterdir()) == []


def test_tensors_beside_gguf_files_go_alone(own: Path, tmp_path: Path) -> None:
    folder = write_folder(own / "org" / "both")
    gguf = write_gguf(folder / "both-Q8_0.gguf")
    settings = settings_in(tmp_path)
    assert ids(settings) == {"org/both", "org/both:Q8_0"}
    remove(plan(settings, "org/both"))
    assert list(folder.iterdir()) == [gguf]
    assert ids(settings) == {"org/both"}


def test_a_broken_model_goes_as_well(own: Path, tmp_path: Path) -> None:
    folder = write_folder(own / "org" / "Broken")
    (folder / "tokenizer.json").unlink()
    settings = settings_in(tmp_path)
    assert entry_of(settings, "Broken").problem
    remove(plan(settings, "Broken"))
    assert not folder.exists()


def test_the_embedded_model_stays(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    entry = library(settings).entries[-1]
    with pytest.raises(Forbidden, match="pip uninstall"):
        removal(entry, settings)
    assert entry.path.exists()


def test_what_cannot_be_put_aside_is_all_there_still(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own / "org" / "m"
    build_gguf(tmp_path / "p" / "m-F32.gguf", split_max_tensors=10)
    shutil.rmtree(tmp_path / "p" / "m-F32.mlx")
    shutil.copytree(tmp_path / "p", folder)
    write_gguf(folder / "m-Q8_0.gguf")
    settings = settings_in(tmp_path)
    planned = plan(settings, "org/m:F32")
    before = tree(own)
    rename, done = os.rename, list[Path]()

    def fail_at_last(source: Path, target: Path) -> None:
        if len(done) == len(planned.paths) - 1:
            done.append(source)
            raise PermissionError(13, "Permission denied", str(source))
        done.append(source)
        rename(source, target)

    monkeypatch.setattr("os.rename", fail_at_last)
    with pytest.raises(LmxError, match=r"could not be removed: .*Permission denied"):
        remove(planned)
    assert tree(own) == before
    monkeypatch.undo()
    remove(planned)
    assert ids(settings) == {"org/m"}


def test_what_an_interrupted_removal_left_goes_with_the_next(own: Path, tmp_path: Path) -> None:
    """Until then nobody sees it."""
    write_folder(own / "org" / "a")
    write_folder(own / "org" / ".lmx-removed-0123" / "0")
    settings = settings_in(tmp_path)
    assert ids(settings) == {"org/a"}
    remove(plan(settings, "a"))
    assert list(own.iterdir()) == []


# --- links, and other people's folders ------------------------------------------------------------------


def test_a_link_goes_and_not_what_it_leads_to(own: Path, tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere" / "m")
    (own / "org").mkdir(parents=True)
    (own / "org" / "m").symlink_to(elsewhere)
    inside = write_folder(own / "org" / "real")
    (inside / "more").symlink_to(tmp_path / "elsewhere")
    settings = settings_in(tmp_path)
    planned = plan(settings, "org/m")
    assert (planned.paths, planned.freed_bytes) == ((own / "org" / "m",), 0)
    remove(planned)
    remove(plan(settings, "org/real"))
    assert list(own.iterdir()) == []
    assert (elsewhere / "config.json").exists()


def test_what_lies_behind_a_link_is_not_touched(own: Path, tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere" / "m").parent
    own.mkdir(parents=True)
    (own / "org").symlink_to(elsewhere)
    settings = settings_in(tmp_path)
    with pytest.raises(Forbidden, match="is a link to there"):
        plan(settings, "org/m")
    assert (elsewhere / "m" / "config.json").exists()


def test_a_folder_of_models_may_itself_be_a_link(tmp_path: Path) -> None:
    disk_folder = tmp_path / "disk"
    folder = write_folder(disk_folder / "org" / "m")
    (tmp_path / "lmx").mkdir()
    (tmp_path / "lmx" / "models").symlink_to(disk_folder)
    settings = settings_in(tmp_path)
    remove(plan(settings, "org/m"))
    assert not folder.exists()
    assert disk_folder.exists()


@pytest.mark.parametrize("where", ["lmstudio", "folder"])
def test_other_peoples_folders_want_force(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / ".lmstudio" / "models" if where == "lmstudio" else tmp_path / "disk"
    path = write_gguf(root / "pub" / "m-GGUF" / "m-Q8_0.gguf")
    settings = settings_in(tmp_path, lmstudio=True, folders=[str(tmp_path / "disk")])
    planned = plan(settings, "m-Q8_0")
    assert planned.needs_force
    with pytest.raises(Forbidden, match="force"):
        remove(planned)
    assert path.exists()
    remove(planned, force=True)
    assert not path.exists()
    assert root.exists()


def test_what_is_in_no_folder_of_models_stays(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "Named")
    settings = settings_in(tmp_path)
    model = settings.model.model_copy(update={"default": str(folder)})
    settings = settings.model_copy(update={"model": model})
    with pytest.raises(Forbidden, match="in no folder of models"):
        plan(settings, "Named")
    listed = settings_in(tmp_path, folders=[str(folder)])
    with pytest.raises(Forbidden, match="in no folder of models"):  # it is one itself
        plan(listed, "Named")
    outside = replace(entry_of(settings, "Named"), source="lmx", path=Path("/etc"))
    with pytest.raises(Forbidden):
        removal(outside, settings)


# --- the Hugging Face cache -----------------------------------------------------------------------------


def test_blobs_of_other_revisions_stay(hub_cache: Path, tmp_path: Path) -> None:
    old = write_folder(tmp_path / "old")
    new = tmp_path / "new"
    shutil.copytree(old, new)
    (new / "config.json").write_text((old / "config.json").read_text().replace("4096", "99"))
    add_to_hub_cache(hub_cache, "org/m", new)
    kept = add_to_hub_cache(hub_cache, "org/m", old, commit=OTHER_COMMIT, ref="v1")
    settings = settings_in(tmp_path, huggingface=True)
    planned = plan(settings, "org/m")
    assert planned.freed_bytes == (new / "config.json").stat().st_size
    assert remove(planned) == planned.freed_bytes
    assert ids(settings) == set()
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {
        path.name: path.read_bytes() for path in old.iterdir()
    }
    repository = hub_cache / "models--org--m"
    assert [path.name for path in (repository / "snapshots").iterdir()] == [OTHER_COMMIT]
    assert len(list((repository / "blobs").iterdir())) == len(list(old.iterdir()))


def test_the_last_revision_takes_the_repository(hub_cache: Path, tmp_path: Path) -> None:
    files = write_folder(tmp_path / "files")
    add_to_hub_cache(hub_cache, "org/m", files)
    add_to_hub_cache(hub_cache, "org/kept", files)
    settings = settings_in(tmp_path, huggingface=True)
    planned = plan(settings, "org/m")
    assert planned.freed_bytes == bytes_of(files)
    remove(planned)
    assert [path.name for path in hub_cache.iterdir()] == ["models--org--kept"]
    assert entry_of(settings, "org/kept").problem == ""


def test_one_gguf_model_of_a_repository(hub_cache: Path, tmp_path: Path) -> None:
    for word in ("Q8_0", "F32"):
        write_gguf(tmp_path / "files" / f"m-{word}.gguf", quantization=word)
    add_to_hub_cache(hub_cache, "org/m-GGUF", tmp_path / "files")
    settings = settings_in(tmp_path, huggingface=True)
    remove(plan(settings, "m:F32"))
    assert ids(settings) == {"org/m-GGUF"}
    assert entry_of(settings, "m:Q8_0").problem == ""
    assert len(list((hub_cache / "models--org--m-GGUF" / "blobs").iterdir())) == 1
    remove(plan(settings, "m"))
    assert list(hub_cache.iterdir()) == []


def test_a_half_download_goes_as_a_whole(hub_cache: Path, tmp_path: Path) -> None:
    """Also where huggingface_hub finds nothing that it would call a repository."""
    settings = settings_in(tmp_path, huggingface=True)
    repository = hub_cache / "models--org--m"
    for damaged in (False, True):
        if damaged:
            snapshot = add_to_hub_cache(hub_cache, "org/m", write_folder(tmp_path / "files"))
            (snapshot / "model.safetensors").resolve().unlink()
        else:
            (repository / "blobs").mkdir(parents=True)
            (repository / "refs").mkdir()
            (repository / "refs" / "main").write_text(COMMIT)
            (repository / "blobs" / "abc.incomplete").write_bytes(b"x" * 100)
        assert entry_of(settings, "org/m").problem
        planned = plan(settings, "org/m")
        assert planned.paths == (repository,)
        assert planned.freed_bytes >= 100
        remove(planned)
        assert list(hub_cache.iterdir()) == []


def test_a_damaged_repository_with_another_revision_is_left_to_its_own_tool(hub_cache: Path, tmp_path: Path) -> None:
    files = write_folder(tmp_path / "files")
    snapshot = add_to_hub_cache(hub_cache, "org/m", files)
    add_to_hub_cache(hub_cache, "org/m", files, commit=OTHER_COMMIT, ref="v1")
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(Forbidden, match="hf cache rm model/org/m"):
        plan(settings_in(tmp_path, huggingface=True), "org/m")


def test_a_removal_that_stops_half_way_leaves_no_model(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library does not see it, whatever is still on the disk; and it says so."""
    add_to_hub_cache(hub_cache, "org/m", write_folder(tmp_path / "files"))
    settings = settings_in(tmp_path, huggingface=True)
    planned = plan(settings, "org/m")
    monkeypatch.setattr("huggingface_hub.DeleteCacheStrategy.execute", lambda self: None)
    with pytest.raises(LmxError, match="could not be deleted"):
        remove(planned)
    assert ids(settings) == set()
    assert (hub_cache / "models--org--m").exists()


def test_a_linked_repository_is_unlinked(hub_cache: Path, tmp_path: Path) -> None:
    add_to_hub_cache(tmp_path / "disk", "org/m", write_folder(tmp_path / "files"))
    (hub_cache / "models--org--m").symlink_to(tmp_path / "disk" / "models--org--m")
    settings = settings_in(tmp_path, huggingface=True)
    planned = plan(settings, "org/m")
    assert (planned.paths, planned.freed_bytes) == ((hub_cache / "models--org--m",), 0)
    remove(planned)
    assert list(hub_cache.iterdir()) == []
    assert (tmp_path / "disk" / "models--org--m" / "refs" / "main").exists()


# --- space, and what nobody uses ------------------------------------------------------------------------


def test_free_space_is_that_of_the_folders_disk(tmp_path: Path) -> None:
    """Also before the folder is made."""
    found = space(settings_in(tmp_path, low_disk_bytes=0))
    assert found.path == tmp_path
    assert 0 < found.free_bytes <= found.total_bytes
    assert abs(found.free_bytes - shutil.disk_usage(tmp_path).free) < 2**30
    assert not found.low
    assert space(settings_in(tmp_path, low_disk_bytes=2**62)).low


def an_entry(name: str, source: str, modified: float) -> Entry:
    path = Path("/nowhere") / name
    return Entry(name, (), path, source, "mlx", "llm", "", "", 0, 0, 0, (), modified, "")  # type: ignore[arg-type]


def test_what_was_unused_for_days(tmp_path: Path) -> None:
    now = 1000 * DAY
    entries = [
        an_entry("old", "lmx", now - 50 * DAY),
        an_entry("older", "huggingface", now - 60 * DAY),
        an_entry("used", "lmx", now - 50 * DAY),
        an_entry("new", "lmx", now - 2 * DAY),
        an_entry("pinned", "lmx", now - 50 * DAY),
        an_entry("theirs", "lmstudio", now - 50 * DAY),
        an_entry("listed", "folder", now - 50 * DAY),
        an_entry("smollm2", "embedded", now - 50 * DAY),
    ]
    uses = {"used": now - 3 * DAY, "old": now - 40 * DAY}
    assert [entry.id for entry in unused(entries, uses, 30, {"pinned"}, now)] == ["older", "old"]
    with pytest.raises(InvalidRequest, match="days is 0"):
        unused(entries, uses, 0, ())


def test_a_fresh_copy_of_old_files_is_not_unused(own: Path, tmp_path: Path) -> None:
    folder = write_folder(own / "org" / "m")
    for path in (*folder.iterdir(), folder):
        os.utime(path, (1, 1))
    entry = entry_of(settings_in(tmp_path), "m")
    assert entry.modified == 1
    assert unused([entry], {}, 30, ()) == ()


@given(
    st.lists(st.tuples(st.integers(0, 100), st.none() | st.integers(0, 100), st.booleans()), max_size=8),
    st.integers(1, 50),
)
def test_nothing_pinned_or_used_lately_is_unused(models: list[tuple[int, int | None, bool]], days: int) -> None:
    """Whatever the clock says: a use in the future is a late one."""
    now = 60 * DAY
    entries = [an_entry(str(number), "lmx", came * DAY) for number, (came, _, _) in enumerate(models)]
    uses = {str(number): used * DAY for number, (_, used, _) in enumerate(models) if used is not None}
    pinned = {str(number) for number, (_, _, pin) in enumerate(models) if pin}
    found = {entry.id for entry in unused(entries, uses, days, pinned, now)}
    for number, (came, used, pin) in enumerate(models):
        late = max(came, used or 0) >= 60 - days
        assert (str(number) in found) is not (pin or late)
