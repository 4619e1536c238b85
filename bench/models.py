"""The models that are measured: float32 folders, made once, the same weights for every contestant."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lmx.engine.mlx.blas import libraries
from lmx.hub.inventory import EMBEDDED_ID, resolve
from tests.models import build_model

CACHE = Path(tempfile.gettempdir()) / f"lmx-bench-{os.getuid()}"
SIZES = {"llama-8x512": (8, 512), "llama-4x128": (4, 128)}
NAMES = ("smollm2", *SIZES)
_DEEP = 3


def with_openblas() -> dict[str, str]:
    """The environment for a process that runs a model without lmx's launcher."""
    return {**os.environ, "LD_PRELOAD": ":".join(libraries())}


def null_engine(step_ms: float) -> dict[str, str]:
    """The environment for an lmx server whose engine draws tokens at no cost, ``step_ms`` apart."""
    return {
        "LMX_ENGINE_COMMAND": json.dumps([sys.executable, "-m", "bench.null_engine"]),
        "LMX_NULL_STEP_MS": str(step_ms),
        "LMX_NULL_FIRST_TOKEN": "300",  # beyond the single bytes of the builder's vocabulary, so each has text
    }


def folder(name: str) -> Path:
    """The folder of a model in NAMES, made once."""
    path = CACHE / name
    if not path.exists():
        unfinished = CACHE / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        # In a process of its own: this one shall not hold MLX's threads while it measures.
        subprocess.run([sys.executable, "-m", "bench.models", name, str(unfinished)], check=True)
        unfinished.rename(path)
    return path


def folder_without_eos(name: str) -> Path:
    """The same model with no end-of-sequence token, for mlx-lm's server, which cannot be told to ignore it."""
    source, path = folder(name), CACHE / f"{name}.no-eos"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for file in source.iterdir():
        if file.name in ("config.json", "tokenizer_config.json"):
            settings = json.loads(file.read_text(encoding="utf-8"))
            settings.pop("eos_token_id" if file.name == "config.json" else "eos_token", None)
            (path / file.name).write_text(json.dumps(settings), encoding="utf-8")
        else:
            (path / file.name).symlink_to(file)
    return path


def draft_folder() -> Path:
    """A draft model for "smollm2": its weights in 4 bits, 64 with a scale, which says the same nine times of ten. On a
    CPU, where packed weights become float32, it is as slow as its target; see ``deep_folder``."""
    return folder("smollm2-4bit")


def deep_folder() -> Path:
    """A target that costs three times as much as "smollm2" and says the same: two thirds of its layers add nothing. So
    ``draft_folder`` is a fitting draft model also where no larger model of the same tokenizer is at hand."""
    return folder("smollm2-deep")


def _make(name: str, path: Path) -> None:
    if name == "smollm2-4bit":
        _quantize(folder("smollm2"), path)
    elif name == "smollm2-deep":
        _deepen(folder("smollm2"), path, times=_DEEP)
    elif name in SIZES:
        layers, width = SIZES[name]
        build_model("llama", path, num_hidden_layers=layers, hidden_size=width)
    else:
        _dequantize(resolve(EMBEDDED_ID, CACHE, "mlx").path, path)


def _dequantize(source: Path, path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model, load_model, save_model

    model, config = load_model(source)
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    save_model(path, model)
    config.pop("quantization", None)
    config.pop("quantization_config", None)
    _copy_words(source, path, config)


def _quantize(source: Path, path: Path) -> None:
    from mlx_lm.utils import load_model, quantize_model, save_model

    model, config = load_model(source)
    model, config = quantize_model(model, config, group_size=64, bits=4)
    save_model(path, model)
    _copy_words(source, path, config)


def _deepen(source: Path, path: Path, times: int) -> None:
    """With each layer's weights so many times, of which the later ones put out nothing."""
    import mlx.core as mx

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"]
    weights: dict[str, mx.array] = {}
    for file in source.glob("*.safetensors"):
        for name, array in mx.load(str(file)).items():
            weights[name] = array
            start, _, rest = name.partition("model.layers.")
            if not rest or start:
                continue
            index, _, part = rest.partition(".")
            silent = part in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            for step in range(1, times):
                weights[f"model.layers.{int(index) + step * layers}.{part}"] = mx.zeros_like(array) if silent else array
    path.mkdir(parents=True)
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    _copy_words(source, path, {**config, "num_hidden_layers": layers * times})


def _copy_words(source: Path, path: Path, config: dict[str, Any]) -> None:
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, path / file)


if __name__ == "__main__":
    _make(sys.argv[1], Path(sys.argv[2]))
