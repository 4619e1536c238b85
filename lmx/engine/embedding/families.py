"""Reads an encoder's folder: what BERT, RoBERTa (XLM-R, CamemBERT), ModernBERT and nomic-bert call their parts, in
Hugging Face's files and in MLX's conversions of them (quantised ones are unpacked).

Called once, at load. Raises ModelInvalid for what is not there or not built.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from lmx.engine.embedding.encoder import Encoder, Layer, Linear, Norm, Shape
from lmx.engine.embedding.kernels import gelu
from lmx.engine.embedding.pooling import Classifier
from lmx.errors import ModelInvalid

_PREFIXES = ("bert.", "roberta.", "nomic_bert.", "model.")
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "swiglu": "silu",
    "geglu": "gelu",
    "relu": "relu",
}


class Weights:
    """The arrays of a model folder by name, without the prefix that a task's class puts before them."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        arrays: dict[str, mx.array] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            loaded: Any = mx.load(str(path))
            arrays.update(loaded)
        self._folder = folder
        self._config = config
        self._arrays = arrays
        self._prefix = next((p for p in _PREFIXES if any(name.startswith(p + "emb") for name in arrays)), "")

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._arrays or name in self._arrays

    def __call__(self, name: str) -> mx.array:
        full = self._prefix + name if self._prefix + name in self._arrays else name
        if full not in self._arrays:
            raise ModelInvalid(f"{self._folder} has no weights {name!r}, which its model_type has.", param="model")
        array = self._arrays[full]
        stem = full.removesuffix(".weight")
        if f"{stem}.scales" in self._arrays:
            packing = self._config["quantization"]
            array = mx.dequantize(
                array,
                self._arrays[f"{stem}.scales"],
                self._arrays.get(f"{stem}.biases"),
                group_size=packing["group_size"],
                bits=packing["bits"],
                mode=packing.get("mode", "affine"),
            )
        return array.astype(mx.float32) if mx.default_device() == mx.cpu else array

    def optional(self, name: str) -> mx.array | None:
        return self(name) if name in self else None

    def linear(self, *names: str) -> Linear:
        """One layer of those called ``names``, side by side."""
        weight = mx.concatenate([self(f"{name}.weight") for name in names])
        biases = [self.optional(f"{name}.bias") for name in names]
        bias = None if biases[0] is None else mx.concatenate([bias for bias in biases if bias is not None])
        return Linear(mx.contiguous(weight.T), bias)

    def norm(self, name: str, eps: float) -> Norm:
        return Norm(self(f"{name}.weight"), self.optional(f"{name}.bias"), eps)


def load_encoder(folder: Path, config: dict[str, Any]) -> tuple[Encoder, Weights]:
    """The encoder, and its weights for what stands behind it (a classifier). Raises ModelInvalid."""
    weights = Weights(folder, config)
    return FAMILIES[config["model_type"]](weights, config), weights


def load_classifier(weights: Weights, config: dict[str, Any], *, sigmoid: bool) -> Classifier:
    """The head of a cross-encoder. Raises ModelInvalid."""
    layers: list[Callable[[mx.array], mx.array]]
    match config["model_type"]:
        case "bert":
            layers = [weights.linear("pooler.dense"), mx.tanh, weights.linear("classifier")]
        case "roberta" | "xlm-roberta" | "camembert":
            layers = [weights.linear("classifier.dense"), mx.tanh, weights.linear("classifier.out_proj")]
        case "modernbert":
            norm = weights.norm("head.norm", config.get("norm_eps", 1e-5))
            layers = [weights.linear("head.dense"), gelu, norm, weights.linear("classifier")]
        case other:
            raise ModelInvalid(f"cross-encoders of {other} are not built.", param="model.embedding")
    mean = config["model_type"] == "modernbert" and config.get("classifier_pooling") == "mean"
    return Classifier(layers, mean=mean, sigmoid=sigmoid)


def _activation(config: dict[str, Any], name: str, default: str) -> str:
    asked = config.get(name, default)
    if asked not in _ACTIVATIONS:
        raise ModelInvalid(f"{name} = {asked!r}: lmx knows {', '.join(sorted(_ACTIVATIONS))}.", param="model")
    return _ACTIVATIONS[asked]


def _bert(weights: Weights, config: dict[str, Any]) -> Encoder:
    return _classic(weights, config, first_position=0)


def _roberta(weights: Weights, config: dict[str, Any]) -> Encoder:
    return _classic(weights, config, first_position=config.get("pad_token_id", 1) + 1)


def _classic(weights: Weights, config: dict[str, Any], *, first_position: int) -> Encoder:
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ModelInvalid(
            f"position_embedding_type = {config['position_embedding_type']!r}: lmx knows absolute positions.",
            param="model",
        )
    eps = config.get("layer_norm_eps", 1e-12)
    layers = []
    for index in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{index}"
        layers.append(
            Layer(
                qkv=weights.linear(*(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))),
                out=weights.linear(f"{name}.attention.output.dense"),
                up=weights.linear(f"{name}.intermediate.dense"),
                down=weights.linear(f"{name}.output.dense"),
                attention_norm=weights.norm(f"{name}.attention.output.LayerNorm", eps),
                mlp_norm=weights.norm(f"{name}.output.LayerNorm", eps),
                rope_base=None,
                window=None,
            )
        )
    words = weights("embeddings.word_embeddings.weight")
    positions = weights("embeddings.position_embeddings.weight")
    return Encoder(
        shape=Shape(
            heads=config["num_attention_heads"],
            norm_first=False,
            gated=False,
            activation=_activation(config, "hidden_act", "gelu"),
            first_position=first_position,
            context_length=positions.shape[0] - first_position,
            vocab_size=words.shape[0],
        ),
        words=words,
        positions=positions,
        types=weights.optional("embeddings.token_type_embeddings.weight"),
        norm=weights.norm("embeddings.LayerNorm", eps),
        layers=tuple(layers),
        last_norm=None,
    )


def _modernbert(weights: Weights, config: dict[str, Any]) -> Encoder:
    eps = config.get("norm_eps", 1e-5)
    every = config.get("global_attn_every_n_layers", 3)
    count = config["num_hidden_layers"]
    kinds = config.get("layer_types") or ["sliding" if index % every else "full" for index in range(count)]
    ropes = config.get("rope_parameters") or {}
    bases = {
        "full": (ropes.get("full_attention") or {}).get("rope_theta") or config.get("global_rope_theta", 160_000.0),
        "sliding": (ropes.get("sliding_attention") or {}).get("rope_theta") or config.get("local_rope_theta", 10_000.0),
    }
    layers = []
    for index, kind in enumerate(kinds):
        name, kind = f"layers.{index}", kind.removesuffix("_attention")
        layers.append(
            Layer(
                qkv=weights.linear(f"{name}.attn.Wqkv"),
                out=weights.linear(f"{name}.attn.Wo"),
                up=weights.linear(f"{name}.mlp.Wi"),
                down=weights.linear(f"{name}.mlp.Wo"),
                attention_norm=weights.norm(f"{name}.attn_norm", eps) if index else None,
                mlp_norm=weights.norm(f"{name}.mlp_norm", eps),
                rope_base=float(bases[kind]),
                window=config.get("local_attention", 128) // 2 if kind == "sliding" else None,
            )
        )
    words = weights("embeddings.tok_embeddings.weight")
    return Encoder(
        shape=Shape(
            heads=config["num_attention_heads"],
            norm_first=True,
            gated=True,
            activation=_activation(config, "hidden_activation", "gelu"),
            first_position=0,
            context_length=config.get("max_position_embeddings", 8192),
            vocab_size=words.shape[0],
        ),
        words=words,
        positions=None,
        types=None,
        norm=weights.norm("embeddings.norm", eps),
        layers=tuple(layers),
        last_norm=weights.norm("final_norm", eps),
    )


def _nomic(weights: Weights, config: dict[str, Any]) -> Encoder:
    """In the names of its makers' files, or in those of transformers 5."""
    if config.get("num_experts", 0) or config.get("moe_every_n_layers", 0):
        raise ModelInvalid("nomic-bert with experts (nomic-embed v2) is not built.", param="model")
    makers = "emb_ln.weight" in weights
    eps = config.get("layer_norm_epsilon") or config.get("layer_norm_eps", 1e-12)
    rope = config.get("rope_parameters") or {}
    base = float(config.get("rotary_emb_base") or rope.get("rope_theta", 1000.0))
    if config.get("rotary_emb_fraction", 1.0) != 1.0 or config.get("rotary_emb_interleaved") or config.get("prenorm"):
        raise ModelInvalid("nomic-bert with partial or interleaved rotary positions is not built.", param="model")
    layers = []
    for index in range(config.get("n_layer") or config["num_hidden_layers"]):
        if makers:
            name = f"encoder.layers.{index}"
            qkv, out = weights.linear(f"{name}.attn.Wqkv"), weights.linear(f"{name}.attn.out_proj")
            up, down = weights.linear(f"{name}.mlp.fc12", f"{name}.mlp.fc11"), weights.linear(f"{name}.mlp.fc2")
            norms = f"{name}.norm1", f"{name}.norm2"
        else:
            name = f"layers.{index}"
            qkv = weights.linear(*(f"{name}.self_attn.{part}_proj" for part in "qkv"))
            out = weights.linear(f"{name}.self_attn.o_proj")
            up = weights.linear(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
            down = weights.linear(f"{name}.mlp.down_proj")
            norms = f"{name}.post_attention_layernorm", f"{name}.post_mlp_layernorm"
        attention_norm, mlp_norm = (weights.norm(norm, eps) for norm in norms)
        layers.append(Layer(qkv, out, up, down, attention_norm, mlp_norm, base, None))
    words = weights("embeddings.word_embeddings.weight")
    trained = config.get("n_positions") or config.get("max_position_embeddings", 2048)
    if config.get("rotary_scaling_factor"):  # beyond it rotary positions are stretched, which is not built
        trained = config.get("max_trained_positions", 2048)
    return Encoder(
        shape=Shape(
            heads=config.get("n_head") or config["num_attention_heads"],
            norm_first=False,
            gated=True,
            activation=_activation(config, "activation_function" if makers else "hidden_act", "silu"),
            first_position=0,
            context_length=trained,
            vocab_size=words.shape[0],
        ),
        words=words,
        positions=None,
        types=weights.optional("embeddings.token_type_embeddings.weight"),
        norm=weights.norm("emb_ln" if makers else "embeddings.LayerNorm", eps),
        layers=tuple(layers),
        last_norm=None,
    )


FAMILIES: dict[str, Callable[[Weights, dict[str, Any]], Encoder]] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "modernbert": _modernbert,
    "nomic_bert": _nomic,
}
