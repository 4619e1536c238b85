"""The library: what is a model and what is not, what files say of it, what it is called, and that looking is cheap."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.config import Settings
from lmx.errors import ModelInvalid, ModelNotFound
from lmx.hub.architectures import mlx_architectures, mlx_refusal
from lmx.hub.inventory import EMBEDDED_ID, find
from lmx.hub.library import Entry, Library
from lmx.hub.library.facts import Facts, read_facts
from lmx.hub.library.library import _identity
from lmx.hub.library.names import Names, assemble
from lmx.hub.library.places import Found, Look, Place, lmstudio_folders
from lmx.hub.state import FILE_NAME, State
from tests.architectures import modules
from tests.model_places import COMMIT, OTHER_COMMIT, add_to_hub_cache, settings_in, write_folder, write_gguf
from tests.models import build_gguf

TOOLS = "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """lmx's own folder of models."""
    return tmp_path / "lmx" / "models"


def look(settings: Settings) -> dict[str, Entry]:
    """What a scan finds, without the embedded model."""
    library = Library(settings, State(None))
    library.scan()
    return {entry.id: entry for entry in library.entries if entry.source != "embedded"}


def only(settings: Settings) -> Entry:
    [entry] = look(settings).values()
    return entry


# --- places ---------------------------------------------------------------------------------------------


def test_lmxs_own_folder(own: Path, tmp_path: Path) -> None:
    folder = write_folder(own / "org" / "Tiny-4bit", metadata={"format": "mlx"})
    entry = only(settings_in(tmp_path))
    assert entry == Entry(
        id="org/Tiny-4bit",
        aliases=("Tiny-4bit",),
        path=folder,
        source="lmx",
        format="mlx",
        kind="llm",
        architecture="llama",
        quantization="f16",
        parameters=16 * 8,
        size_bytes=sum(path.stat().st_size for path in folder.iterdir()),
        context_length=4096,
        capabilities=(),
        modified=max(path.stat().st_mtime for path in folder.iterdir()),
        problem="",
    )
    assert find(entry.loadable, tmp_path).path == folder


def test_the_embedded_model_is_among_them(tmp_path: Path) -> None:
    library = Library(settings_in(tmp_path), State(None))
    library.scan()
    [entry] = library.entries
    assert (entry.id, entry.source, entry.format, entry.quantization) == (EMBEDDED_ID, "embedded", "gguf", "Q4_1")
    assert (entry.kind, entry.context_length, entry.problem) == ("llm", 8192, "")
    assert entry.loadable == EMBEDDED_ID
    assert 130e6 < entry.parameters < 140e6
    assert library.find(EMBEDDED_ID.upper()) is entry


def test_the_hugging_face_cache(hub_cache: Path, tmp_path: Path) -> None:
    """The main branch's snapshot, of models alone."""
    old = write_folder(tmp_path / "old", config={"max_position_embeddings": 1})
    new = write_folder(tmp_path / "new")
    add_to_hub_cache(hub_cache, "org/tiny", old, commit=OTHER_COMMIT)
    snapshot = add_to_hub_cache(hub_cache, "org/tiny", new)
    add_to_hub_cache(hub_cache, "gpt2", new)
    add_to_hub_cache(hub_cache, "org/no-branch", new, ref="other")
    (hub_cache / "datasets--org--words").mkdir()
    (hub_cache / ".locks").mkdir()
    (hub_cache / "version.txt").write_text("1")
    found = look(settings_in(tmp_path, huggingface=True))
    assert found.keys() == {"org/tiny", "gpt2"}
    tiny = found["org/tiny"]
    assert (tiny.path, tiny.source, tiny.context_length, tiny.problem) == (snapshot, "huggingface", 4096, "")
    assert tiny.size_bytes == sum(path.stat().st_size for path in new.iterdir())
    assert tiny.aliases == ("tiny",)
    assert find(tiny.loadable, tmp_path).id == "org/tiny"


def test_a_repository_with_several_gguf_models(hub_cache: Path, tmp_path: Path) -> None:
    """Each is a model of its own, one in parts one model; who names the repository gets what the settings prefer."""
    files = tmp_path / "files"
    write_gguf(files / "Tiny-Q8_0.gguf")
    write_gguf(files / "Tiny-Q4_K_M.gguf", quantization="Q4_0")
    parts = build_gguf(files / "BF16" / "Tiny-BF16.gguf", "BF16", split_max_tensors=10).parent
    shutil.rmtree(parts / "Tiny-BF16.mlx")
    write_gguf(files / "mmproj-Tiny-F16.gguf", architecture="clip")
    snapshot = add_to_hub_cache(hub_cache, "org/Tiny-GGUF", files)
    (snapshot / "._Tiny-Q8_0.gguf").write_bytes(b"AppleDouble")
    found = look(settings_in(tmp_path, huggingface=True))
    assert found.keys() == {"org/Tiny-GGUF:Q8_0", "org/Tiny-GGUF:Q4_K_M", "org/Tiny-GGUF:BF16"}
    assert all(not entry.problem for entry in found.values())
    whole = found["org/Tiny-GGUF:BF16"]
    assert whole.path.name == "Tiny-BF16-00001-of-00003.gguf"
    assert whole.size_bytes == sum(path.stat().st_size for path in parts.iterdir())
    assert found["org/Tiny-GGUF:Q8_0"].capabilities == ("vision",)
    names = Names(tuple(found.values()), {})
    for name in ("org/tiny-gguf", "Tiny-GGUF", "tiny", "tiny:q4_k_m", "hf.co/org/Tiny-GGUF:Q4_K_M", "Tiny-Q4_K_M"):
        assert names.find(name).id == "org/Tiny-GGUF:Q4_K_M", name
    assert names.find("https://huggingface.co/org/Tiny-GGUF:q8_0").id == "org/Tiny-GGUF:Q8_0"


def test_one_gguf_model_has_its_repositorys_name(hub_cache: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "files" / "Tiny-Q8_0.gguf")
    add_to_hub_cache(hub_cache, "org/Tiny-GGUF", tmp_path / "files")
    entry = only(settings_in(tmp_path, huggingface=True))
    assert entry.id == "org/Tiny-GGUF"
    assert "org/Tiny-GGUF:Q8_0" in entry.aliases
    assert "Tiny-Q8_0" in entry.aliases


def test_lmstudios_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its home was one place, is another, and may be where a file says."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_gguf(tmp_path / ".lmstudio" / "models" / "pub" / "Tiny-GGUF" / "Tiny-Q8_0.gguf")
    write_folder(tmp_path / ".cache" / "lm-studio" / "models" / "mlx-community" / "Older")
    write_folder(tmp_path / "elsewhere" / "models" / "pub" / "Moved")
    (tmp_path / ".lmstudio-home-pointer").write_text(f"{tmp_path}/elsewhere\n")
    found = look(settings_in(tmp_path, lmstudio=True))
    assert found.keys() == {"pub/Tiny-GGUF", "mlx-community/Older", "pub/Moved"}
    assert {entry.source for entry in found.values()} == {"lmstudio"}


@pytest.mark.parametrize("pointer", [b"", b"relative/path", b"a\0b", b"\xff\xfe"])
def test_lmstudios_pointer_may_say_nonsense(pointer: bytes, tmp_path: Path) -> None:
    (tmp_path / ".lmstudio-home-pointer").write_bytes(pointer)
    assert lmstudio_folders(tmp_path) == [tmp_path / ".lmstudio/models", tmp_path / ".cache/lm-studio/models"]


def test_listed_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At any depth that a person would make, by folders' and files' own names."""
    write_folder(tmp_path / "disk" / "a" / "b" / "Deep")
    write_folder(tmp_path / "disk" / "Shallow")
    write_gguf(tmp_path / "disk" / "gguf" / "Loose.Q8_0.gguf")
    write_folder(tmp_path / "Itself")
    write_folder(tmp_path / "disk" / ".hidden" / "Hidden")
    found = look(settings_in(tmp_path, folders=[str(tmp_path / "disk"), str(tmp_path / "Itself"), "/nowhere/at/all"]))
    assert found.keys() == {"Deep", "Shallow", "Loose.Q8_0", "Itself"}
    assert {entry.source for entry in found.values()} == {"folder"}
    assert "/nowhere/at/all, one of hub.folders, is not there" in caplog.text
    assert found["Deep"].aliases == ("a/b/Deep",)


def test_a_listed_hugging_face_cache_is_one(tmp_path: Path) -> None:
    add_to_hub_cache(tmp_path / "disk", "org/tiny", write_folder(tmp_path / "files"))
    entry = only(settings_in(tmp_path, folders=[str(tmp_path / "disk")]))
    assert (entry.id, entry.source) == ("org/tiny", "folder")


def test_paths_that_the_settings_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, gguf = write_folder(tmp_path / "Named"), write_gguf(tmp_path / "other" / "b.gguf")
    settings = settings_in(tmp_path).model_copy(
        update={"model": settings_in(tmp_path).model.model_copy(update={"default": "Named", "preload": [str(gguf)]})}
    )
    found = look(settings)
    assert {entry.path for entry in found.values()} == {folder, gguf}
    names = Names(tuple(found.values()), {})
    assert names.find("Named").path == names.find(str(folder)).path == folder
    assert names.find("b").path == names.find(str(gguf)).path == gguf


def test_the_same_files_are_one_model(own: Path, tmp_path: Path) -> None:
    """By whichever way they are reached; all their paths mean it."""
    folder = write_folder(own / "org" / "Tiny")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "link").symlink_to(folder)
    library = Library(settings_in(tmp_path, folders=[str(tmp_path / "disk"), str(own)]), State(None))
    library.scan()
    [entry] = [entry for entry in library.entries if entry.source != "embedded"]
    assert (entry.id, entry.source) == ("org/Tiny", "lmx")
    assert library.find(str(tmp_path / "disk" / "link")) is library.find(str(folder)) is entry


def test_the_same_name_in_two_places(own: Path, hub_cache: Path, tmp_path: Path) -> None:
    write_folder(own / "org" / "Tiny")
    add_to_hub_cache(hub_cache, "org/Tiny", write_folder(tmp_path / "files"))
    found = look(settings_in(tmp_path, huggingface=True))
    assert found.keys() == {"org/Tiny", "org/Tiny@huggingface"}
    names = Names(tuple(found.values()), {})
    assert names.find("tiny").source == "lmx"
    assert names.find("org/tiny@huggingface").source == "huggingface"


# --- what files say -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "template", "expected"),
    [
        ({}, TOOLS, ("llm", ("tools",))),
        ({}, THINKS, ("llm", ("reasoning",))),
        ({}, TOOLS + THINKS, ("llm", ("tools", "reasoning"))),
        ({}, "You have no tools. {{ messages }}", ("llm", ())),
        ({"vision_config": {"depth": 1}, "text_config": {"max_position_embeddings": 77}}, None, ("llm", ("vision",))),
        ({"model_type": "bert"}, None, ("embeddings", ("embedding",))),
        (
            {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "yes"}},
            TOOLS,
            ("embeddings", ("embedding",)),
        ),
    ],
)
def test_kinds_and_capabilities(config, template, expected, own: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_folder(own / "org" / "m", config=config, template=template)
    entry = only(settings_in(tmp_path))
    assert (entry.kind, entry.capabilities) == expected


def test_templates_in_files_of_their_own(own: Path, tmp_path: Path) -> None:
    folder = write_folder(own / "org" / "m", template=None)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    (folder / "chat_template.jinja").write_text(THINKS)
    assert only(settings_in(tmp_path)).capabilities == ("tools", "reasoning")


def test_sentence_transformers_that_were_writers(own: Path, tmp_path: Path) -> None:
    folder = write_folder(own / "org" / "m")
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert only(settings_in(tmp_path)).kind == "embeddings"


@pytest.mark.parametrize(
    ("config", "metadata", "expected"),
    [
        ({"quantization": {"bits": 4, "group_size": 64}}, None, ("mlx", "4-bit")),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, None, ("mlx", "mxfp4")),
        ({}, {"format": "mlx"}, ("mlx", "f16")),
        ({}, {"format": "pt"}, ("safetensors", "f16")),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, {"format": "pt"}, ("safetensors", "awq")),
    ],
)
def test_formats_and_quantizations(config, metadata, expected, own: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_folder(own / "org" / "m", config=config, metadata=metadata)
    entry = only(settings_in(tmp_path))
    assert (entry.format, entry.quantization) == expected


def test_gguf_metadata(own: Path, tmp_path: Path) -> None:
    write_gguf(own / "a" / "writer" / "w.gguf", tokenizer__chat_template=TOOLS + THINKS)
    write_gguf(own / "a" / "encoder" / "e.gguf", architecture="bert")
    write_gguf(own / "a" / "decoder" / "d-UD-Q4_K_XL.gguf", architecture="qwen3", qwen3__pooling_type=3)
    write_gguf(own / "a" / "adapter" / "l.gguf", general__type="adapter")
    found = look(settings_in(tmp_path))
    assert {name: (e.kind, e.capabilities, e.quantization) for name, e in found.items()} == {
        "a/writer": ("llm", ("tools", "reasoning"), "Q8_0"),
        "a/encoder": ("embeddings", ("embedding",), "Q8_0"),
        "a/decoder": ("embeddings", ("embedding",), "UD-Q4_K_XL"),
    }
    assert (found["a/writer"].parameters, found["a/writer"].context_length) == (4 * 256, 2048)


def test_architectures_that_nobody_here_runs(own: Path, tmp_path: Path) -> None:
    """Are told apart before anybody loads one, by mlx-lm's own files; which are the names that it takes."""
    folder = write_folder(own / "org" / "hears", config={"model_type": "whisper"})
    entry = only(settings_in(tmp_path))
    assert entry.problem.startswith(f"{folder} is of the architecture 'whisper', which mlx-lm ")
    with unittest.mock.patch("resource.setrlimit"):
        from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING
    known = mlx_architectures()
    assert known >= {*modules(), *MODEL_REMAPPING, *(name for name, _ in MODEL_ARCHITECTURE_REMAPPING)}
    assert mlx_refusal({"model_type": "kimi_k2"}) == mlx_refusal({"model_type": "x", "model_file": "x.py"}) == ""


def test_nothing_heavy_is_imported(own: Path, tmp_path: Path) -> None:
    """The server looks for models all the time."""
    write_folder(own / "org" / "a")
    write_gguf(own / "org" / "b" / "b.gguf")
    code = (
        "import sys; from lmx.config import load_settings; from lmx.hub.library import Library;"
        "from lmx.hub.state import State;"
        "library = Library(load_settings(None, {}, {'hub': {'models_dir': sys.argv[1]}}), State(None)); library.scan();"
        "heavy = ('mlx', 'mlx_lm', 'llama_cpp', 'transformers', 'gguf', 'numpy', 'torch', 'httpx');"
        "print(library.find('a').problem, library.find('b').problem, [name for name in heavy if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code, str(own)], check=True, capture_output=True, text=True)
    assert output.stdout.strip() == "[]"


# --- what is broken, and what is no model ---------------------------------------------------------------


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def drop_shard_and_index(folder: Path) -> None:
    drop_shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def truncate(folder: Path) -> None:
    path = folder / "model-00003-of-00003.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def download_on(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    path.rename(path.with_name(f"{path.name}.part"))


def link_to_nothing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../gone")


def link_in_a_circle(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


def nest_deeply(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def pipe_for_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def pipe_for_weights(folder: Path) -> None:
    (folder / "model-00001-of-00003.safetensors").unlink()
    os.mkfifo(folder / "model-00001-of-00003.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (pipe_for_config, "config.json is no file"),
        (pipe_for_weights, "model-00001-of-00003.safetensors is no file"),
        (drop_shard, "lacks 1 of its weight files: model-00002-of-00003.safetensors"),
        (drop_shard_and_index, "lacks 1 of its weight files: model-00002-of-00003.safetensors"),
        (truncate, "model-00003-of-00003.safetensors is truncated"),
        (drop_tokenizer, "has no tokenizer.json"),
        (drop_config, "config.json does not exist"),
        (cut_config, "is not valid JSON"),
        (download_on, "is half-downloaded (model-00001-of-00003.safetensors.part)"),
        (link_to_nothing, "is half-downloaded (tokenizer.json)"),
        (link_in_a_circle, "is half-downloaded (config.json)"),
        (nest_deeply, "cannot be read"),
    ],
)
def test_broken_folders(damage: Callable[[Path], None], says: str, own: Path, tmp_path: Path) -> None:
    """They are there, with the reason; who asks for one is told it. Once mended they are whole."""
    whole = write_folder(tmp_path / "whole", shards=3)
    folder = own / "org" / "Broken"
    shutil.copytree(whole, folder)
    damage(folder)
    library = Library(settings_in(tmp_path), State(None))
    library.scan()
    with pytest.raises(ModelInvalid) as error:
        library.find("broken")
    assert says in error.value.message
    assert str(folder) in error.value.message
    assert library.look_up("broken").problem == error.value.message
    assert error.value.message.endswith((".", "?", ")"))

    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    assert library.scan()
    assert library.find("broken").problem == ""


def test_broken_gguf_files(own: Path, tmp_path: Path) -> None:
    cut = write_gguf(own / "org" / "cut" / "cut.gguf")
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size - 1)
    build_gguf(tmp_path / "parts.gguf", split_max_tensors=10)
    for number in (1, 3):
        name = f"parts-0000{number}-of-00003.gguf"
        (own / "org" / f"lacks-{number}").mkdir(parents=True)
        for part in tmp_path.glob("parts-*.gguf"):
            if part.name != name:
                shutil.copy(part, own / "org" / f"lacks-{number}")
    (own / "org" / "other").mkdir()
    (own / "org" / "other" / "words.gguf").write_bytes(b"not at all")
    (own / "org" / "comes").mkdir()
    (own / "org" / "comes" / "x-Q4_K_M.gguf.part").write_bytes(b"GGUF")
    write_gguf(own / "org" / "mute" / "mute.gguf", tokenizer__ggml__model="")
    problems = {name: entry.problem for name, entry in look(settings_in(tmp_path)).items()}
    assert problems.keys() == {f"org/{name}" for name in ("cut", "lacks-1", "lacks-3", "other", "comes", "mute")}
    assert "is truncated or damaged" in problems["org/cut"]
    for number in (1, 3):
        assert f"of which are missing: parts-0000{number}-of-00003.gguf." in problems[f"org/lacks-{number}"]
    assert "is no GGUF file" in problems["org/other"]
    assert "half-downloaded (x-Q4_K_M.gguf.part)" in problems["org/comes"]
    assert "no vocabulary" in problems["org/mute"]


def test_a_gguf_file_of_false_numbers_is_not_read_for_hours(own: Path, tmp_path: Path) -> None:
    """Nor one that is a pipe."""
    (own / "org" / "a").mkdir(parents=True)
    os.mkfifo(own / "org" / "a" / "a.gguf")
    heads = {
        "fields": struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**60),
        "tensors": struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 0),
        "list": struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 2**60),
    }
    for name, head in heads.items():
        with (own / "org" / f"{name}.gguf").open("wb") as file:
            file.write(head)
            file.truncate(2**34)
    problems = {name: entry.problem for name, entry in look(settings_in(tmp_path)).items()}
    assert "a.gguf is no file" in problems.pop("org/a")
    assert len(problems) == 3
    assert all("is truncated or damaged" in problem for problem in problems.values())


def test_a_download_into_the_hugging_face_cache(hub_cache: Path, tmp_path: Path) -> None:
    """It is a half one from its first byte until its last, and says how to go on."""
    whole = write_folder(tmp_path / "files", shards=2)
    repository = hub_cache / "models--org--tiny"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    settings = settings_in(tmp_path, huggingface=True)
    assert look(settings) == {}
    (repository / "blobs" / "abc.12345678.incomplete").write_bytes(b"1")
    entry = only(settings)
    assert entry.id == "org/tiny"
    assert "half-downloaded (1 unfinished file(s))" in entry.problem
    assert "lmx pull org/tiny" in entry.problem

    (tmp_path / "some").mkdir()
    shutil.copy(whole / "config.json", tmp_path / "some")
    shutil.copy(whole / "tokenizer.json", tmp_path / "some")
    snapshot = add_to_hub_cache(hub_cache, "org/tiny", tmp_path / "some")
    entry = only(settings)
    assert "half-downloaded" in entry.problem
    assert (entry.architecture, entry.context_length) == ("llama", 4096)

    shutil.rmtree(snapshot)
    add_to_hub_cache(hub_cache, "org/tiny", whole)
    assert only(settings).problem == ""  # what an earlier try left harms nobody
    next((repository / "blobs").glob("*[!e]")).unlink()
    assert only(settings).problem != ""


def test_what_is_no_model(own: Path, hub_cache: Path, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images" / "text_encoder").parent
    (images / "model_index.json").write_text("{}")
    add_to_hub_cache(hub_cache, "org/images", images)
    (tmp_path / "disk" / "project").mkdir(parents=True)
    (tmp_path / "disk" / "project" / "config.json").write_text("{}")
    (tmp_path / "disk" / "project" / "tokenizer.json").write_text("{}")
    (tmp_path / "disk" / "adapter").mkdir()
    (tmp_path / "disk" / "adapter" / "adapters.safetensors").write_text("")
    write_gguf(tmp_path / "disk" / "mmproj-x.gguf")
    (tmp_path / "disk" / "x.imatrix.gguf").write_text("")
    assert look(settings_in(tmp_path, huggingface=True, folders=[str(tmp_path / "disk")])) == {}


def test_hostile_names(tmp_path: Path) -> None:
    """What a terminal would obey is shown as what it is not; the files are found all the same."""
    disk = tmp_path / "disk"
    whole = write_folder(tmp_path / "whole")
    for name in (b"a\nb", b"\x1b[31mred", b"\xff\xfe", "ünï".encode(), b"with space"):
        shutil.copytree(whole, disk / os.fsdecode(name))
    (disk / "loop").symlink_to(disk)
    (disk / "nothing").symlink_to(disk / "nowhere")
    library = Library(settings_in(tmp_path, folders=[str(disk)]), State(None))
    library.scan()
    found = {entry.id for entry in library.entries if entry.source == "folder"}
    assert found == {"a�b", "�[31mred", "��", "ünï", "with space"}
    assert all(not entry.problem for entry in library.entries)
    assert library.find("u\u0308ni\u0308").id == "ünï"
    json.dumps([entry.id for entry in library.entries]).encode()
    assert Library(library.settings, library._state).entries == library.entries


@contextmanager
def as_nobody() -> Iterator[None]:
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)


def test_folders_that_may_not_be_read(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        disk = Path(name)
        disk.chmod(0o755)
        write_folder(disk / "open")
        write_folder(disk / "closed" / "inner")
        (disk / "closed").chmod(0)
        library = Library(settings_in(disk / "none", folders=[name]), State(None))
        with as_nobody():
            library.scan()
            library.scan()
        assert [entry.id for entry in library.entries if entry.source == "folder"] == ["open"]
        [record] = [record for record in caplog.records if "closed" in record.getMessage()]
        assert "Permission denied" in record.getMessage()
        (disk / "closed").chmod(0o755)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of models, in folders of their own."""
    root = tmp_path_factory.mktemp("sound")
    folder = write_folder(root / "folder" / "m")
    return [write_gguf(root / "gguf" / "m.gguf"), folder / "model.safetensors", folder / "config.json"]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), which=st.integers(0, 2))
def test_no_file_makes_the_reading_fail(data: st.DataObject, which: int, sound: list[Path]) -> None:
    """Whatever stands in it."""
    path = sound[which]
    whole = path.read_bytes()
    at = data.draw(st.integers(0, min(600, len(whole))))
    junk = data.draw(st.binary(max_size=20))
    keep = data.draw(st.integers(1, len(whole)) | st.just(len(whole)))
    try:
        path.write_bytes((whole[:at] + junk + whole[at + len(junk) :])[:keep])
        place = Place(sound[0].parent if which == 0 else sound[1].parent.parent, "folder", "any")
        [found] = Look(place, "").models()
        facts = read_facts(found)
        assert facts.problem or not facts.is_model or keep == len(whole)
    finally:
        path.write_bytes(whole)


# --- names ----------------------------------------------------------------------------------------------


def found_model(source: str, place: str, repository: str, file: str, size: int) -> Found:
    path = Path(place) / repository / file if file else Path(place) / repository
    return Found(path, Path(place), source, repository, (), file, bool(file), b"", size, 0.0)  # type: ignore[arg-type]


_WORD = st.sampled_from(["a", "A", "b", "a-GGUF", "a-Q8_0"])
_MODELS = st.lists(
    st.builds(
        found_model,
        st.sampled_from(["lmx", "huggingface", "folder"]),
        st.sampled_from(["/x", "/y"]),
        st.builds("{}/{}".format, _WORD, _WORD) | _WORD,
        st.sampled_from(["", "a-Q8_0", "a-Q4_K_M", "b-Q8_0", "plain"]),
        st.integers(0, 9),
    ),
    max_size=8,
    unique_by=lambda found: found.path,
)


@settings(deadline=None)
@given(_MODELS)
def test_names_mean_one_model(models: list[Found]) -> None:
    entries = assemble([(found, Facts()) for found in models], ["Q4_K_M"], {})
    assert len(entries) == len(models) == len({entry.id for entry in entries})
    names = Names(entries, {})
    for entry in entries:
        assert names.find(entry.id) is entry
        for alias in entry.aliases:
            assert names.find(alias) is entry
            assert names.find(alias.swapcase()) is entry
        assert names.find(str(entry.path)) is entry


def test_names_in_another_case_where_that_is_clear(own: Path, tmp_path: Path) -> None:
    write_folder(own / "org" / "Tiny")
    write_folder(own / "org" / "tiny")
    write_folder(own / "org" / "Other")
    names = Names(tuple(look(settings_in(tmp_path)).values()), {})
    assert names.find("org/Tiny").id == "org/Tiny"
    assert names.find("org/tiny").id == "org/tiny"
    assert names.find("ORG/OTHER:latest").id == "org/Other"
    with pytest.raises(ModelNotFound, match=r"may mean org/Tiny or org/tiny"):
        names.find("ORG/TINY")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("org/Tinny", r"Did you mean org/Tiny\?"),
        ("nothing like it", r"There are: "),
        ("a\0b", "has NULs"),
        ("x" * 5000, "too long"),
        ("../org/Tiny", r"names have no \.\. in them"),
        ("org/../org/Tiny", r"names have no \.\. in them"),
        ("/etc/passwd", "There is no model"),
        ("", "There is no model"),
    ],
)
def test_names_of_nothing(name: str, says: str, own: Path, tmp_path: Path) -> None:
    write_folder(own / "org" / "Tiny")
    library = Library(settings_in(tmp_path), State(None))
    library.scan()
    with pytest.raises(ModelNotFound, match=says):
        library.find(name)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
def test_no_name_makes_finding_fail(name: str) -> None:
    names = Names(assemble([(found_model("lmx", "/x", "a/b", "", 1), Facts())], [], {}), {})
    if name.casefold() not in ("a/b", "b"):
        with pytest.raises(ModelNotFound):
            names.find(name)


# --- looking again --------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models whose files were opened."""
    paths: list[Path] = []

    def read(found: Found) -> Facts:
        paths.append(found.path)
        return read_facts(found)

    monkeypatch.setattr("lmx.hub.library.library.read_facts", read)
    return paths


def test_looking_again_opens_nothing(own: Path, tmp_path: Path, reads: list[Path]) -> None:
    """Nor does another process that has the same state, before it has looked at all."""
    for number in range(30):
        write_folder(own / "org" / f"m{number}")
    path = tmp_path / "data" / FILE_NAME
    library = Library(settings_in(tmp_path), State(path))
    assert library.scan()
    assert len(reads) == 31
    del reads[:]
    assert not library.scan()
    again = Library(settings_in(tmp_path), State(path))
    assert again.entries == library.entries
    assert not again.scan()
    assert reads == []
    assert again.entries == library.entries


def test_what_changed_is_read_again(own: Path, tmp_path: Path, reads: list[Path]) -> None:
    state = State(tmp_path / FILE_NAME)
    folders = [write_folder(own / "org" / name) for name in ("a", "b", "c")]
    library = Library(settings_in(tmp_path), state)
    library.scan()
    del reads[:]
    (folders[0] / "chat_template.jinja").write_text(TOOLS)
    shutil.rmtree(folders[2])
    added = write_folder(own / "org" / "d")
    assert library.scan()
    assert sorted(reads) == [folders[0], added]
    assert library.find("a").capabilities == ("tools",)
    assert {entry.id for entry in library.entries} == {"org/a", "org/b", "org/d", EMBEDDED_ID}
    with state.connection() as db:
        assert db.execute("SELECT count(*) FROM files").fetchone() == (4,)


def test_two_processes_with_other_folders_share_a_state(tmp_path: Path, reads: list[Path]) -> None:
    """Neither forgets what the other knows."""
    write_folder(tmp_path / "x" / "a")
    write_folder(tmp_path / "y" / "b")
    state = State(tmp_path / FILE_NAME)
    libraries = [Library(settings_in(tmp_path, folders=[str(tmp_path / name)]), state) for name in "xy"]
    for _ in range(2):
        for library, name in zip(libraries, "ab", strict=True):
            library.scan()
            assert {entry.id for entry in library.entries} == {name, EMBEDDED_ID}
    assert len(reads) == 4  # each also the embedded one, which the other has read but not told
    assert {e.id for e in Library(libraries[0].settings, state).entries} == {"a", EMBEDDED_ID}


def test_a_disk_that_comes_back_is_still_known(tmp_path: Path, reads: list[Path]) -> None:
    write_folder(tmp_path / "disk" / "a")
    library = Library(settings_in(tmp_path, folders=[str(tmp_path / "disk")]), State(None))
    library.scan()
    (tmp_path / "disk").rename(tmp_path / "away")
    assert library.scan()
    assert [entry.id for entry in library.entries] == [EMBEDDED_ID]
    (tmp_path / "away").rename(tmp_path / "disk")
    del reads[:]
    assert library.scan()
    assert library.find("a").problem == ""
    assert reads == []


def test_a_state_of_another_version_is_read_anew(own: Path, tmp_path: Path, reads: list[Path]) -> None:
    write_folder(own / "org" / "a")
    state = State(tmp_path / FILE_NAME)
    Library(settings_in(tmp_path), state).scan()
    with state.connection() as db:
        db.execute('UPDATE files SET facts = \'{"found": {}, "facts": 1}\'')
    del reads[:]
    library = Library(settings_in(tmp_path), state)
    assert library.entries == ()
    library.scan()
    assert len(reads) == 2
    assert library.find("a").problem == ""


async def _watch(own: Path, tmp_path: Path) -> None:
    library = Library(settings_in(tmp_path), State(None))
    changes, changed = trio.open_memory_channel[tuple[str, ...]](10)

    def tell() -> None:
        changes.send_nowait(tuple(entry.id for entry in library.entries))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(library.watch, tell)
        with trio.fail_after(20):
            assert await changed.receive() == (EMBEDDED_ID,)
            await trio.to_thread.run_sync(write_folder, own / "org" / "new")
            library.nudge()
            assert await changed.receive() == ("org/new", EMBEDDED_ID)
        nursery.cancel_scope.cancel()


def test_watching(own: Path, tmp_path: Path) -> None:
    """A nudge is answered at once, not when the next look is due."""
    began = time.monotonic()
    trio.run(_watch, own, tmp_path)
    assert time.monotonic() - began < 20


def test_a_disk_that_fails_under_the_watch_does_not_end_it(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        library = Library(settings_in(tmp_path), State(None))
        failed, found = trio.Event(), trio.Event()
        scan, tries = library.scan, []

        def broken() -> bool:
            tries.append(1)
            if len(tries) == 1:
                trio.from_thread.run_sync(failed.set)
                raise MemoryError
            return scan()

        monkeypatch.setattr(library, "scan", broken)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(library.watch, found.set)
            with trio.fail_after(20):
                await failed.wait()
                while not found.is_set():
                    library.nudge()
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert "looking for models failed" in caplog.text


def test_identities_are_of_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", dtype=np.float32)
    (tmp_path / "b").symlink_to(folder)
    assert _identity(folder) == _identity(tmp_path / "b") != _identity(tmp_path)
