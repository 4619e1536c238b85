"""Which engine runs a model, for every kind of model, wish and machine."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from lmx.errors import ModelInvalid
from lmx.hub.backends import choose_for_folder, choose_for_gguf, dequantizing_costs, has_gpu, is_llama_installed
from lmx.hub.conversion import GgufFacts
from lmx.hub.inventory import resolve
from tests.models import build_gguf, build_model

PATH = Path("/models/some.gguf")


def facts(**differences: Any) -> GgufFacts:
    exact: dict[str, Any] = {
        "architecture": "llama",
        "context_length": 8192,
        "quantization": "Q4_0",
        "size_bytes": 253_000_000,
        "mlx_refusal": "",
        "sampling": {},
        "inexact": {},
        "parameters": 268_000_000,
        "mlx_bytes": 388_000_000,
    }
    return GgufFacts(**(exact | differences))


EXACT = facts()
K_QUANTS = facts(inexact={"Q4_K": 27, "Q6_K": 9})
FOREIGN = facts(architecture="mamba", mlx_refusal="lmx converts llama, not 'mamba'")


@pytest.mark.parametrize(
    ("found", "wanted", "llama_installed", "gpu", "backend", "reason"),
    [
        (EXACT, "auto", True, True, "mlx", "a GGUF file that MLX reads exactly, on a GPU"),
        (EXACT, "auto", True, False, "llama", "a GGUF file on a CPU"),
        (EXACT, "auto", False, True, "mlx", "a GGUF file that MLX reads exactly, on a GPU"),
        (EXACT, "auto", False, False, "mlx", "llama-cpp-python is not installed"),
        (K_QUANTS, "auto", True, True, "llama", "Q4_K (27), Q6_K (9)"),
        (FOREIGN, "auto", True, True, "llama", "'mamba'"),
        (EXACT, "llama", True, True, "llama", "asked for"),
        (EXACT, "mlx", True, False, "mlx", "asked for"),
        (K_QUANTS, "mlx", False, False, "mlx", "asked for"),
    ],
)
def test_the_choice_for_a_gguf_file(
    found: GgufFacts, wanted: Any, llama_installed: bool, gpu: bool, backend: str, reason: str
) -> None:
    choice = choose_for_gguf(PATH, found, wanted, llama_installed=llama_installed, gpu=gpu)
    assert choice.backend == backend
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("found", "wanted", "messages"),
    [
        (EXACT, "llama", [r"asked for.*pip install 'lmx\[gguf\]'"]),
        (K_QUANTS, "auto", [r"Q4_K \(27\), Q6_K \(9\).*pip install 'lmx\[gguf\]'", 'set backend to "mlx"']),
        (FOREIGN, "auto", [r"'mamba'.*pip install 'lmx\[gguf\]'`\.$"]),
        (FOREIGN, "mlx", [r"cannot run on MLX: .*'mamba'.*backend to \"llama\""]),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(found: GgufFacts, wanted: Any, messages: list[str]) -> None:
    for message in [str(PATH), *messages]:
        with pytest.raises(ModelInvalid, match=message):
            choose_for_gguf(PATH, found, wanted, llama_installed=False, gpu=False)


def test_an_mlx_folder_runs_on_mlx_only() -> None:
    for wanted in ("auto", "mlx"):
        assert choose_for_folder(PATH, wanted).backend == "mlx"
    with pytest.raises(ModelInvalid, match=r"some\.gguf is an MLX folder.*\"auto\""):
        choose_for_folder(PATH, "llama")


def test_a_gpu_is_known_without_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_gpu("darwin", "arm64", tmp_path)
    assert not has_gpu("darwin", "x86_64", tmp_path)
    assert not has_gpu("linux", "x86_64", tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert not has_gpu("linux", "x86_64", tmp_path)  # without MLX's CUDA package
    package = tmp_path / "site" / "mlx_cuda_13-0.32.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-cuda-13\nVersion: 0.32.0\n")
    monkeypatch.setattr(sys, "path", [str(package.parent)])
    assert has_gpu("linux", "x86_64", tmp_path)
    assert not has_gpu("linux", "x86_64", tmp_path / "no-device")


def test_the_machine_is_asked_by_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmx.hub.backends.has_gpu", lambda: False)
    monkeypatch.setattr("lmx.hub.backends.is_llama_installed", lambda: True)
    path = build_gguf(tmp_path / "tiny.gguf", "Q4_1")
    found = resolve(str(path), tmp_path / "cache")
    assert (found.backend, found.path, found.format) == ("llama", path, "gguf")
    assert found.size_bytes == path.stat().st_size
    assert (found.words / "tokenizer.json").is_file()
    assert not (tmp_path / "cache" / "converted").exists()
    monkeypatch.setattr("lmx.hub.backends.has_gpu", lambda: True)
    found = resolve(str(path), tmp_path / "cache")
    assert (found.backend, found.path.parent) == ("mlx", tmp_path / "cache" / "converted")
    with pytest.raises(ModelInvalid, match="is an MLX folder"):
        resolve(str(path.with_suffix(".mlx")), tmp_path / "cache", "llama")


def test_llama_cpp_is_looked_for_and_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not is_llama_installed()
    (tmp_path / "llama_cpp.py").write_text("raise AssertionError")
    assert is_llama_installed()


def test_the_memory_for_dequantised_weights_is_said_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = dequantizing_costs(PATH, K_QUANTS)
    for fact in (str(PATH), "Q4_K (27), Q6_K (9)", "253 MB", "388 MB", "1,072 MB"):
        assert fact in said
    path = build_gguf(tmp_path / "tiny.gguf", "Q5_0")
    with caplog.at_level(logging.WARNING, "lmx"):
        found = resolve(str(path), tmp_path / "cache", "mlx")
    assert [record.name for record in caplog.records if "Q5_0 (23)" in record.message] == ["lmx"]
    assert (found.backend, found.quantization) == ("mlx", "Q5_0")
    build_model("llama", tmp_path / "folder")
    caplog.clear()
    resolve(str(tmp_path / "folder"), tmp_path / "cache", "mlx")
    assert not caplog.records
