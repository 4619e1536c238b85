"""The quantising child: plain safetensors in, an MLX folder out, whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmx.errors import InvalidRequest
from lmx.hub.folder import inspect_folder
from lmx.hub.quantize import Request, check


def quantize(source: Path, models: Path, **more: Any) -> tuple[Request, list[dict[str, Any]]]:
    """Run the child; its lines."""
    low_disk_bytes = more.pop("low_disk_bytes", 0)
    model = more.pop("model", f"maker/{source.name}")
    request = Request(
        model=model, source=str(source), models_path=str(models), low_disk_bytes=low_disk_bytes, **check(model, **more)
    )
    command = [sys.executable, "-P", "-m", "lmx.hub.quantize", json.dumps(request.as_json())]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert result.returncode == ("done" not in lines[-1]), result.stderr
    return request, lines


def test_plain_weights_become_mlx_weights(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "Tiny"
    source.mkdir()
    for path in tiny_model.iterdir():
        (source / path.name).symlink_to(path)  # as in the Hugging Face cache
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    models = tmp_path / "models"
    request, lines = quantize(source, models, bits=4, group_size=32, dtype="float16")
    folder = Path(lines[-1]["done"])
    assert folder == request.folder == models / "maker" / "Tiny-4bit"
    facts = inspect_folder(folder)
    assert (facts.quantization, facts.architecture, facts.context_length) == ("4-bit", "llama", 8192)
    assert facts.sampling == {"temperature": 0.5}
    assert facts.size_bytes < inspect_folder(source).size_bytes / 5
    assert (folder / "1_Pooling" / "config.json").is_file()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    last = next(line for line in reversed(lines) if "total_bytes" in line)
    assert 0 < last["total_bytes"] <= last["done_bytes"] < last["total_bytes"] + 20_000
    assert [line["message"] for line in lines if "message" in line][:2] == ["reading the weights", "quantising"]
    assert list((models / ".downloads").iterdir()) == []

    # The weights are the source's, as far as four bits tell.
    import mlx.core as mx

    name = "model.layers.0.mlp.up_proj"
    small = mx.load(str(folder / "model.safetensors"))
    parts = [small[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
    assert parts[1].dtype == mx.float16
    unpacked = np.array(mx.dequantize(*parts, group_size=32, bits=4).astype(mx.float32))
    weights = np.array(mx.load(str(source / "model.safetensors"))[f"{name}.weight"])
    assert np.abs(unpacked - weights).max() < np.ptp(weights) / 15

    assert quantize(source, models, bits=4, group_size=32, dtype="float16")[1][-2]["message"] == "it was there already"
    error = quantize(source, models, bits=4, group_size=64)[1][-1]["error"]
    assert error["message"].startswith(f"{folder} is there already. Delete that model, or give this one another name")
    error = quantize(folder, models)[1][-1]["error"]
    assert "is quantised already (4-bit)" in error["message"]


def test_what_cannot_be_made_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    request, lines = quantize(tiny_model, tmp_path, low_disk_bytes=2**62)
    assert lines[-1]["error"]["code"] == "insufficient_disk"
    assert not request.folder.exists()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama"}')
    request, lines = quantize(broken, tmp_path)
    assert "has no weights" in lines[-1]["error"]["message"]
    assert not request.folder.exists()


def test_options() -> None:
    default = {"bits": 4, "group_size": 64, "mode": "affine", "dtype": "", "name": "m-4bit"}
    assert check("org/m") == default
    assert check("m", bits=8, group_size=32) == {**default, "bits": 8, "group_size": 32, "name": "m-8bit"}
    assert check("m", mode="mxfp4") == {**default, "group_size": 32, "mode": "mxfp4", "name": "m-mxfp4"}
    assert check("m", dtype="bfloat16") == {**default, "bits": 0, "dtype": "bfloat16", "name": "m-bf16"}
    assert check("m", dtype="float16", bits=4, name="x") == {**default, "dtype": "float16", "name": "x"}
    assert check("org/M-BF16@lmstudio")["name"] == check("M-f32:x")["name"] == "M-4bit"
    wrong: list[dict[str, Any]] = [
        {"bits": 7},
        {"bits": 0},
        {"group_size": 63},
        {"mode": "fp3"},
        {"mode": "mxfp4", "bits": 8},
        {"dtype": "int8"},
        {"name": "../x"},
        {"name": ".x"},
        {"name": "a\0b"},
    ]
    for options in wrong:
        with pytest.raises(InvalidRequest) as caught:
            check("m", **options)
        assert caught.value.param in options


def test_folders_of_results() -> None:
    def folder(model: str) -> str:
        request = Request(model, "/source", "/models", 4, 64, "affine", "", "x-4bit", 0)
        return str(request.folder)

    assert folder("org/x") == "/models/org/x-4bit"
    assert folder("x") == folder("a/b/x") == folder("../x") == "/models/local/x-4bit"
