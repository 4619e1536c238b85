"""Everything that lmx takes from mlx-lm, and what must be put right around it, in one place.

mlx-lm moves fast; the tested range stands in pyproject.toml, and no other module imports ``mlx_lm``. Loads a model
folder, holds its weights as the device wants them, tells which caches its layers ask for, and splits the output head
from the trunk. Called by the MLX back end on the engine's one thread.
"""

import json
import math
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import psutil
from mlx.utils import tree_flatten

from lmx.engine.mlx import cpu
from lmx.errors import ModelInvalid

if shutil.which("g++") is None and not mx.metal.is_available():
    # MLX compiles fused CPU kernels with g++ at run time, and mlx-lm's activations ask for them.
    os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
    mx.disable_compile()
cpu.speed_up()

# Importing mlx_lm.utils sets RLIMIT_NOFILE to (2048, 4096); a lowered hard limit cannot be raised again without
# privileges, so the call must not happen at all.
_setrlimit, resource.setrlimit = resource.setrlimit, lambda *_: None
try:
    from mlx_lm.models.base import scaled_dot_product_attention
    from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache
    from mlx_lm.utils import _get_classes, dequantize_model, load_model
finally:
    resource.setrlimit = _setrlimit

__all__ = [
    "ArraysCache",
    "AttentionShape",
    "CacheList",
    "LayerKind",
    "LoadedModel",
    "layer_kinds",
    "load",
    "make_prompt_cache",
    "parts",
    "refusal",
    "scaled_dot_product_attention",
    "whole",
    "wire",
]

# A model that would take more than this share of the free memory as float32 stays packed on the CPU.
_FLOAT32_MEMORY_SHARE = 0.6

# mlx-lm's choice, then the smallest that MLX's kernels know.
_GROUP_SIZES = (64, 32)
# What configurations call the longest context, GPT-2's and other older ones last.
_CONTEXT_NAMES = (
    "max_position_embeddings",
    "model_max_length",
    "max_seq_len",
    "max_context_length",
    "n_positions",
    "n_ctx",
    "block_size",
)
# Code of mlx-lm that is right for rows of different lengths only below a length that the load probe does not reach.
# (tests/test_architectures.py runs every architecture beyond such lengths.)
_LONG_ROWS_ALONE = {
    "minimax_m3_vl": "its sparse attention counts blocks from the end of the longest row",
}


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What one layer keeps of a sequence: keys and values of each position, or a recurrent state."""

    kind: Literal["kv", "state", "own"]
    """"own": a cache that only mlx-lm understands, for one sequence at a time."""
    window: int | None
    """For a sliding layer, how many positions a query sees."""
    shapes: tuple[tuple[int, ...], ...]
    """kv: of keys and values without batch and positions, (heads, width); state: of each array without batch."""
    dtypes: tuple[mx.Dtype, ...]
    list_of: int | None = None
    """Which of mlx-lm's caches it is a part of, where that one holds several (``CacheList``)."""
    grouped: bool = False
    """The model's own attention has an axis for the query heads that share keys, (B, KV heads, group, L, S): a mask of
    several rows needs it, too (Gemma 2)."""
    bits: int = 16
    """Of a value that is kept: 8 or 4 are packed, with a scale and a bias for each ``group_size`` of them; 16: as the
    model gives it."""

    @property
    def group_size(self) -> int:
        """Neighbours of one vector that can share a scale, in keys and in values; 0: they cannot be packed."""
        return next((size for size in _GROUP_SIZES if all(shape[-1] % size == 0 for shape in self.shapes)), 0)

    @property
    def buffers(self) -> list[list[tuple[tuple[int, ...], mx.Dtype]]]:
        """Shape and type of what keeps each of ``shapes``: one array, or packed values, scales and biases."""
        found = []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            if self.bits < 16:
                scales = ((*shape[:-1], shape[-1] // self.group_size), dtype)
                found.append([((*shape[:-1], shape[-1] * self.bits // 32), mx.uint32), scales, scales])
            else:
                found.append([(shape, dtype)])
        return found

    @property
    def nbytes(self) -> int:
        """For each position (kv) or each sequence (state)."""
        return sum(dtype.size * math.prod(shape) for kept in self.buffers for shape, dtype in kept)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a layer asks of MLX's attention."""

    heads: int
    """Of the queries."""
    kv_heads: int
    width: int
    """Of queries and keys."""
    value_width: int
    dtype: mx.Dtype


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: nn.Module
    architecture: str
    context_length: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    weights_bytes: int
    dtype: str
    attention: frozenset[AttentionShape]
    """Of all layers; empty for code that computes its attention itself."""
    head: Callable[[mx.array], mx.array] | None
    """The output head alone, when head(trunk(x)) was checked to be model(x); the trunk is ``model.model``."""

    @property
    def query_heads(self) -> int:
        """Of each attention layer; 1 where they differ, or compute it themselves."""
        heads = {shape.heads for shape in self.attention}
        return heads.pop() if len(heads) == 1 else 1

    def hidden(self, tokens: mx.array, caches: list[Any]) -> mx.array:
        """(B, L) ids → what ``logits`` takes, (B, L, ...); lazy, so logits that nobody reads are not computed."""
        trunk = self.model.model if self.head else self.model
        hidden: mx.array = trunk(tokens, cache=caches)
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """(B, L, ...) → (B, L, V)."""
        return self.head(hidden) if self.head else hidden


def load(folder: Path, *, headless: bool = False) -> LoadedModel:
    """Load a model folder. On the CPU the weights become float32, if memory allows: MLX's CPU kernels for packed and
    half precision weights are many times slower (18 against 8 tok/s in decode, 150 against 10 in prefill, SmolLM2).

    ``headless``: its files may hold the trunk alone, under the trunk's own names, as those of embedding models do.

    Raises ModelInvalid with what is wrong with the folder.
    """
    try:
        model, config = load_model(folder, get_model_classes=_headless_classes if headless else _get_classes)
    except Exception as error:
        raise refusal(f"{folder} cannot be loaded by mlx-lm", error) from error
    except SystemExit as error:  # mlx_lm.models.olmo, without the package that it needs
        raise ModelInvalid(
            f"{folder} cannot be loaded by mlx-lm: its code for this model_type ends the process that imports it; it "
            "prints why (most likely a package that is not installed).",
            param="model",
        ) from error
    dtype = _describe_dtype(config, model)
    if mx.default_device() == mx.cpu:
        dtype = _to_float32(model, dtype)
    mx.eval(model.parameters())
    text = {**config, **(config.get("text_config") or {})}
    try:
        probe, attention = _first_pass(model)
        mx.eval(probe)
    except Exception as error:
        # Some models are written for Metal alone.
        raise refusal(f"{folder} does not run on this device ({mx.default_device().type.name})", error) from error
    return LoadedModel(
        model=model,
        architecture=str(config.get("model_type", "unknown")),
        context_length=int(_first(text, *_CONTEXT_NAMES, default=32768)),
        vocab_size=probe.shape[-1],
        eos_ids=_eos_ids(folder, config),
        weights_bytes=sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        dtype=dtype,
        attention=attention,
        head=_find_head(model),
    )


def _headless_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
    model_class, args_class = _get_classes(config)

    class Headless(model_class):  # type: ignore[misc, valid-type]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            if not any(name.startswith("model.") for name in weights):
                weights = {f"model.{name}": array for name, array in weights.items()}
            # A head that nobody asks; any matrix of its shape will do.
            embedding = weights.get("model.embed_tokens.weight")
            if "lm_head" in self and "lm_head.weight" not in weights and embedding is not None:
                weights["lm_head.weight"] = embedding
            return super().sanitize(weights) if hasattr(model_class, "sanitize") else weights

    return Headless, args_class


def _first_pass(model: nn.Module) -> tuple[mx.array, frozenset[AttentionShape]]:
    """The logits of one token, and what its layers ask of MLX's attention: configurations name that in many ways."""
    shapes: set[AttentionShape] = set()
    attention = mx.fast.scaled_dot_product_attention

    def seen(queries: mx.array, keys: mx.array, values: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        shape = AttentionShape(queries.shape[1], keys.shape[1], queries.shape[3], values.shape[3], queries.dtype)
        shapes.add(shape)
        return attention(queries, keys, values, *args, **kwargs)

    mx.fast.scaled_dot_product_attention = seen  # type: ignore[assignment]
    try:
        logits = model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))
    finally:
        mx.fast.scaled_dot_product_attention = attention
    return logits, frozenset(shapes)


def refusal(what: str, error: Exception) -> Exception:
    """The model's fault, which no restart mends; unless the memory was short, which the next start may find free."""
    text = f"{type(error).__name__}: {error}"
    if "allocate" in text or "Insufficient Memory" in text or isinstance(error, MemoryError):
        return error
    return ModelInvalid(f"{what}: {text}", param="model")


def _first(config: dict[str, Any], *names: str, default: int) -> int:
    return next((config[name] for name in names if config.get(name)), default)


def _describe_dtype(config: dict[str, Any], model: nn.Module) -> str:
    if quantization := config.get("quantization"):
        return f"{quantization['bits']}-bit, group {quantization['group_size']}"
    floats = {array.dtype for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)}
    return "/".join(sorted(str(dtype).removeprefix("mlx.core.") for dtype in floats))


def _to_float32(model: nn.Module, dtype: str) -> str:
    parameters = sum(
        module.weight.size * (32 // module.bits if hasattr(module, "bits") else 1)
        for _, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), mx.array)
    )
    if parameters * 4 > _FLOAT32_MEMORY_SHARE * psutil.virtual_memory().available:
        return dtype
    dequantize_model(model)
    model.set_dtype(mx.float32)
    return "float32" if dtype == "float32" else f"float32 (from {dtype})"


def _eos_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    found: set[int] = set()
    generation = folder / "generation_config.json"
    sources = [config, config.get("text_config") or {}]
    if generation.is_file():
        sources.append(json.loads(generation.read_text(encoding="utf-8")))
    for source in sources:
        value = source.get("eos_token_id")
        found.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
    return tuple(sorted(found))


def _find_head(model: nn.Module) -> Callable[[mx.array], mx.array] | None:
    """Most of mlx-lm's models are ``head(self.model(tokens))``; some scale or cap their logits. Believed only when it
    gives the very same logits."""
    trunk = getattr(model, "model", None)
    embedding = getattr(trunk, "embed_tokens", None)
    head = model["lm_head"] if "lm_head" in model else getattr(embedding, "as_linear", None)
    if trunk is None or head is None:
        return None
    tokens = mx.array([[1, 2, 3]])
    try:
        split = head(trunk(tokens, cache=make_prompt_cache(model)))
        whole = model(tokens, cache=make_prompt_cache(model))
        same = split.shape == whole.shape and bool(mx.all(split == whole).item())
    except (TypeError, ValueError, AttributeError):
        return None
    return head if same else None


def layer_kinds(model: nn.Module) -> list[LayerKind] | str:
    """What each layer keeps, from the caches mlx-lm makes and a forward pass of one token through them. A cache that
    holds several counts as so many layers.

    A text instead of a list says why the model cannot run in arenas.
    """
    if reason := _LONG_ROWS_ALONE.get(type(model).__module__.rpartition(".")[2]):
        return reason
    caches = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, 1), mx.int32), cache=caches))
    kinds = []
    for index, cache in enumerate(caches):
        for part in cache.caches if type(cache) is CacheList else [cache]:
            kind = _layer_kind(part, index if type(cache) is CacheList else None)
            if isinstance(kind, str):
                return kind
            kinds.append(kind)
    return kinds


def _layer_kind(cache: Any, list_of: int | None) -> LayerKind | str:
    # The exact classes: a subclass may keep more than its base.
    if type(cache) is ArraysCache:
        arrays = list(cache.cache)
        if any(array is None for array in arrays):
            return "a recurrent layer leaves part of its state empty"
        shapes = tuple(tuple(array.shape[1:]) for array in arrays)
        return LayerKind("state", None, shapes, tuple(array.dtype for array in arrays), list_of)
    window = cache.max_size if type(cache) is RotatingKVCache and cache.keep == 0 else None
    if window is None and type(cache) is not KVCache:
        return f"its layers need {type(cache).__name__}"
    if cache.keys is None:
        # A cache that the model makes for a layer without attention (nemotron-nas).
        return LayerKind("kv", window, ((1, 0), (1, 0)), (mx.float32, mx.float32), list_of)
    arrays = [cache.keys, cache.values]
    shapes = tuple((array.shape[1], array.shape[3]) for array in arrays)
    return LayerKind("kv", window, shapes, tuple(array.dtype for array in arrays), list_of)


def parts(caches: Sequence[Any]) -> list[Any]:
    """mlx-lm's caches, one for each of ``layer_kinds``."""
    return [part for cache in caches for part in (cache.caches if type(cache) is CacheList else [cache])]


def whole(kinds: Sequence[LayerKind], parts: Sequence[Any]) -> list[Any]:
    """The opposite: what stands for each part, as the model's code wants it."""
    caches: list[Any] = []
    lists = [None, *(kind.list_of for kind in kinds)]
    for before, kind, part in zip(lists, kinds, parts, strict=False):
        if kind.list_of is None:
            caches.append(part)
        elif kind.list_of == before:
            caches[-1].caches = (*caches[-1].caches, part)
        else:
            caches.append(CacheList(part))
    return caches


def wire(limit_bytes: int = -1) -> None:
    """Wire what is alive now, the weights, or what this engine may of them (-1: all; Metal only): unwired large models
    run 40× slower, and wiring buffers that come and go is the known cause of kernel panics. mlx-lm's own calls wire all
    that the system recommends and are never reached."""
    if mx.metal.is_available():
        # MLX fills the wired set from all buffers, pooled ones too: those would later be given to KV, which comes and
        # goes, and leave some weights outside (resident.cpp).
        mx.clear_cache()
        most = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(min(mx.get_active_memory(), most if limit_bytes < 0 else min(most, limit_bytes)))
