"""What of a model decides how much memory it takes, read from config.json and the headers of its weights, or from GGUF
metadata: no weight is read, nothing is loaded, MLX is not imported.

Called by the lifecycle before a load, in a thread; ``lmx.hub.estimate`` makes bytes of it.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmx.errors import ModelInvalid
from lmx.hub import layers
from lmx.hub.folder import read_json
from lmx.hub.layers import Layer, first

# What mlx-lm's ``sanitize`` throws away: other senses than text, and heads that predict further tokens.
_DROPPED = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|vit|audio_tower|embed_vision|embed_audio|multi_modal_projector|mm_projector"
    r"|image_newline|patch_merger|vision_projection|mtp|rotary_emb\.inv_freq|position_ids)(\.|$)"
)
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_CONTEXT = ("max_position_embeddings", "max_sequence_length", "model_max_length", "max_seq_len", "n_positions", "n_ctx")


@dataclass(frozen=True, slots=True)
class Shape:
    architecture: str
    weights_bytes: int
    """As they are in the files."""
    mlx_bytes: int
    """As MLX holds them on a GPU: as they are, but for GGUF types that it has no form of."""
    parameters: int
    """As numbers, however they are packed."""
    layers: tuple[Layer, ...]
    heads: int
    """Of the queries."""
    width: int
    """Of the hidden states."""
    inner_width: int
    """Of the widest product of a layer; with experts, of those that a token passes through."""
    vocab_size: int
    context_length: int
    """The model's own; 0: it names none."""
    half: bool = True
    """Weights, and so keys and values, are numbers of 16 bits where nothing makes them wider."""
    packed: bool = False
    """Weights are quantised."""
    experts: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], weights_bytes: int, parameters: int = 0) -> "Shape":
        """``parameters``: as counted from the headers; 0: as many as such weights have by the configuration's
        quantisation."""
        text = {**config, **(config.get("text_config") or {})}
        quantization = config.get("quantization") or config.get("quantization_config") or {}
        half = str(first(text, "torch_dtype", "dtype", default="bfloat16")) != "float32"
        bits = quantization.get("bits")
        # Scales and biases (mxfp4: one byte) belong to the weights.
        of_one = (2 if half else 4) if bits is None else bits / 8 + _overhead(quantization)
        return cls(
            architecture=str(text.get("model_type", "")),
            weights_bytes=weights_bytes,
            mlx_bytes=weights_bytes,
            parameters=parameters or int(weights_bytes / of_one),
            layers=layers.of_config(text),
            heads=layers.heads(text),
            width=layers.width(text),
            inner_width=_inner_width(text),
            vocab_size=int(first(text, "vocab_size", "padded_vocab_size")),
            context_length=int(first(text, *_CONTEXT)),
            half=half,
            packed=bits is not None,
            experts=bool(first(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
        )


def _overhead(quantization: Mapping[str, Any]) -> float:
    """Bytes a number for what a group of them shares."""
    shared = 1 if str(quantization.get("mode", "affine")).startswith(("mx", "nv")) else 4
    return shared / int(quantization.get("group_size") or 64)


def _inner_width(text: Mapping[str, Any]) -> int:
    dense = int(first(text, "intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim") or 4 * layers.width(text))
    chosen = first(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k")
    expert = first(text, "moe_intermediate_size", "expert_ffn_hidden_size", default=dense)
    if chosen and isinstance(chosen, int) and isinstance(expert, int):
        return max(dense, chosen * expert)
    return dense


def read_shape(path: Path) -> Shape:
    """Of a folder with config.json and safetensors files, or of a GGUF file (of a split one the first part). Blocking.
    Raises ModelInvalid."""
    return _of_folder(path) if path.is_dir() else _of_gguf(path)


def _of_folder(folder: Path) -> Shape:
    config = read_json(folder / "config.json", why="it says what the model's layers keep")
    tensors: dict[str, tuple[str, list[int], int]] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors.update(_header(shard))
    text = {**config, **(config.get("text_config") or {})}
    kept = {name: tensor for name, tensor in tensors.items() if _is_kept(name, text)}
    weights = sum(nbytes for _, _, nbytes in kept.values())
    shape = Shape.from_config(config, weights, _parameters(kept, config))
    floats = {dtype for dtype, _, _ in kept.values() if dtype in ("F32", "F16", "BF16")}
    packed = any(name.endswith(".scales") for name in kept)
    return replace(shape, half=bool(floats & {"F16", "BF16"}) if floats else shape.half, packed=packed)


def _header(path: Path) -> dict[str, tuple[str, list[int], int]]:
    """Type, shape and bytes of each tensor."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        return {
            name: (entry["dtype"], entry["shape"], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except OSError as error:
        raise ModelInvalid(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
        raise ModelInvalid(f"{path} has a damaged safetensors header ({error!r}). Download the file again.") from None


def _is_kept(name: str, text: Mapping[str, Any]) -> bool:
    if _DROPPED.search(name) or (text.get("tie_word_embeddings") and name.startswith("lm_head.")):
        return False
    layer = _LAYER.search(name)
    # DeepSeek's further layer, which predicts the token after the next.
    return not (layer and 0 < layers.count(text) <= int(layer[2]))


def _parameters(tensors: Mapping[str, tuple[str, list[int], int]], config: Mapping[str, Any]) -> int:
    quantization = config.get("quantization") or {}
    found = 0
    for name, (_, shape, _) in tensors.items():
        base, _, last = name.rpartition(".")
        if last in ("scales", "biases") and f"{base}.weight" in tensors:
            continue
        if last == "weight" and f"{base}.scales" in tensors:
            own = quantization.get(base)
            group = (own if isinstance(own, dict) else quantization).get("group_size") or 64
            found += math.prod(tensors[f"{base}.scales"][1]) * int(group)
        else:
            found += math.prod(shape)
    return found


def _of_gguf(path: Path) -> Shape:
    from lmx.hub.gguf.file import GgufFile
    from lmx.hub.gguf.mlx import mlx_bytes

    file = GgufFile(path, words=False)
    architecture = file.architecture
    tensors = file.tensors.values()
    embedding = file.tensors.get("token_embd.weight")
    quantised = [tensor for tensor in tensors if tensor.kind.name not in ("F32", "F16", "BF16")]
    experts = int(file.own("expert_used_count", 0))
    return Shape(
        architecture=architecture,
        weights_bytes=sum(tensor.nbytes for tensor in tensors),
        mlx_bytes=mlx_bytes(file),
        parameters=sum(tensor.elements for tensor in tensors),
        layers=layers.of_gguf(architecture, file.own),
        heads=_largest(file.own("attention.head_count", 1)),
        width=int(file.own("embedding_length", 0)),
        inner_width=max(
            _largest(file.own("feed_forward_length", 0)), experts * int(file.own("expert_feed_forward_length", 0))
        ),
        vocab_size=embedding.shape[0] if embedding else 0,
        context_length=int(file.own("context_length", 0)),
        half=bool(quantised) or any(tensor.kind.name in ("F16", "BF16") for tensor in tensors),
        packed=bool(quantised),
        experts=experts > 0,
    )


def _largest(value: int | Iterable[int]) -> int:
    return int(value) if isinstance(value, int) else max(map(int, value), default=0)
