"""What a model is said to need, against what real engine processes take, and against mlx-lm's own classes; and that
what it is granted suffices."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import _get_classes

from bench.memory_estimates import Case, compare
from bench.memory_table import Model, lines, models
from lmx.hub.estimate import estimate, least_kv
from lmx.hub.inventory import find
from lmx.hub.shape import read_shape
from lmx.serving.models.demand import demand
from lmx.serving.models.options import LoadOptions, options_of
from tests.engine_client import engine
from tests.models import build_gguf, build_model
from tests.models_zoo import live_of

NOISE_BYTES = 24 * 1024**2
DOCS = Path(__file__).parents[1] / "docs" / "memory.md"


@pytest.mark.parametrize("backend", ["mlx", "llama"])
def test_a_tiny_models_process_takes_what_was_estimated(backend: str, tmp_path: Path) -> None:
    """Of one with weights: ``python -m bench memory_estimates``."""
    path = build_gguf(tmp_path / "tiny.gguf") if backend == "llama" else build_model("qwen3_next", tmp_path / "tiny")
    compared = compare(Case("tiny", path, backend))
    difference = compared.estimated_bytes - compared.measured_bytes
    assert abs(difference) <= 0.1 * compared.measured_bytes + NOISE_BYTES, compared
    weights = compared.estimate.weights_bytes
    assert compared.stats.mlx_active_bytes >= (weights if backend == "mlx" else 0)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("context", [512, 1000])
def test_llama_cpp_loads_with_the_least_that_it_is_granted(kind: str, context: int, tmp_path: Path) -> None:
    path = build_gguf(tmp_path / "tiny.gguf", kind=kind)
    found = estimate(read_shape(path), backend="llama", gpu=False, context=context, rows=1)
    budget = least_kv(found, context_asked=True)
    with engine(path, backend="llama", context_length=context, max_rows=1, kv_budget_bytes=budget) as client:
        assert client.ready is not None
        assert client.ready.context_length == context
        assert client.ready.kv_bytes_per_token == found.kv_bytes_per_token


def test_a_model_that_nobody_can_read_is_guessed(tmp_path: Path) -> None:
    path = build_model("llama", tmp_path / "odd")
    config = path / "config.json"
    config.write_text(config.read_text("utf-8").replace('"num_attention_heads": 4', '"num_attention_heads": [4]'))
    settings = live_of(tmp_path, tmp_path).now
    folder = find(str(path), settings.model.cache_path)
    options = options_of(settings, ["odd"], LoadOptions(context_length=2048), jit=True)
    found = demand(folder, options, settings, embeds=False)
    assert "guessed" in found.estimate.notes[0]
    assert found.estimate.weights_bytes == int(1.1 * folder.size_bytes)
    assert found.least_bytes > found.estimate.fixed_bytes > folder.size_bytes


def built_bytes(model: Model) -> int:
    """By mlx-lm's own classes, which are never computed. Numbers that are not packed: of 16 bits."""
    kind, arguments = _get_classes(model.config)[:2]
    built = kind(arguments.from_dict(model.config))
    quantization = model.config["quantization"]
    mode = quantization.get("mode", "affine")

    def is_packed(path: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and (mode == "affine" or isinstance(module, SwitchLinear))

    nn.quantize(built, quantization["group_size"], quantization["bits"], mode=mode, class_predicate=is_packed)
    floats = (mx.float32, mx.float16, mx.bfloat16)
    return sum(
        array.size * (2 if array.dtype in floats else array.dtype.size) for _, array in tree_flatten(built.parameters())
    )


@pytest.mark.parametrize("model", list(models()), ids=lambda model: model.name)
def test_large_models_weights_are_those_of_their_classes(model: Model) -> None:
    assert model.weights_bytes == pytest.approx(built_bytes(model), rel=0.02)


def test_the_table_in_the_docs_is_what_comes_of_the_configurations() -> None:
    assert "\n".join(lines()) in DOCS.read_text("utf-8")
