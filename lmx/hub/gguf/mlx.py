"""Says which MLX folder a GGUF file becomes: mlx-lm's configuration, and mlx-lm's name for each tensor.

Part of the converter process; imports no MLX, so that the words of a file can say whether MLX could run it, and NumPy
only where tensors are looked at (the server asks ``mlx_bytes``). What mlx-lm would compute differently from llama.cpp
is refused, with a clause that ``lmx.hub.backends`` puts into a sentence. Sources: the converters in llama.cpp, its
graphs in src/models, and mlx_lm/models/{llama,qwen2,qwen3,gemma3_text}.py.
"""

from collections import Counter
from typing import Any

from lmx.errors import ModelInvalid
from lmx.hub.gguf.file import GgufFile, raw
from lmx.hub.gguf.header import Tensor
from lmx.hub.gguf.kinds import BLOCKS, Kind

BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Types that MLX holds packed with the same values: groups of GROUP_SIZE with a float16 scale and bias."""
GROUP_SIZE = 32
_PLAIN = {"F32": 4, "F16": 2, "BF16": 2}  # bytes
_DEQUANTIZED_BYTES = 2  # float16

_MODEL_TYPES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_HEAD_NORMS = {"attn_q_norm.weight": "self_attn.q_norm.weight", "attn_k_norm.weight": "self_attn.k_norm.weight"}
_OWN_LAYER = {
    "qwen2": {f"attn_{name}.bias": f"self_attn.{name}_proj.bias" for name in "qkv"},
    "qwen3": _HEAD_NORMS,
    "gemma3": _HEAD_NORMS
    | {
        "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    },
}
_ROPE_FACTORS = "rope_freqs.weight"


def mlx_folder(file: GgufFile) -> tuple[dict[str, Any], dict[str, str]]:
    """config.json without what follows from the weights, and {tensor: mlx-lm's parameter}.

    Raises ModelInvalid whose message is a clause: why MLX cannot run the file.
    """
    if file.architecture not in _MODEL_TYPES:
        raise ModelInvalid(f"lmx converts the architectures {', '.join(_MODEL_TYPES)}, not {file.architecture!r}")
    if file.own("expert_count", 0) > 0:
        raise ModelInvalid("it is a mixture of experts, which lmx gives to MLX from MLX folders only")
    if len(file.parts) > 1:
        raise ModelInvalid(
            f"it is split into {len(file.parts)} parts; join them with "
            f"`llama-gguf-split --merge {file.path} OUTPUT.gguf`"
        )
    for kind in inexact_types(file):
        if not _is_dequantizable(Kind[kind]):
            raise ModelInvalid(f"the gguf package cannot dequantise its tensors of type {kind}")
    for key in ("attention.scale", "final_logit_softcapping", "attn_logit_softcapping", "logit_scale"):
        if file.own(key, 0.0) != 0.0:
            raise ModelInvalid(f"mlx-lm does not know its {file.architecture}.{key}")
    config = _config(file)
    return config, _names(file, config["num_hidden_layers"])


def inexact_types(file: GgufFile) -> dict[str, int]:
    """The types that MLX has no exact form for, the commonest first."""
    kinds = Counter(t.kind.name for t in file.tensors.values() if t.kind.name not in BITS and t.kind.name not in _PLAIN)
    return dict(kinds.most_common())


def _is_dequantizable(kind: Kind) -> bool:
    import gguf
    import numpy as np

    try:
        gguf.quants.dequantize(np.zeros((1, BLOCKS[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def mlx_bytes(file: GgufFile) -> int:
    """What the weights take on MLX."""
    return sum(_mlx_bytes(tensor) for tensor in file.tensors.values())


def _mlx_bytes(tensor: Tensor) -> int:
    elements, kind = tensor.elements, tensor.kind.name
    if kind in BITS:
        return elements * BITS[kind] // 8 + elements // GROUP_SIZE * 4
    return elements * _PLAIN.get(kind, _DEQUANTIZED_BYTES)


def _integer(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.need(key) if default is None else file.own(key, default)
    if not isinstance(value, int):
        raise ModelInvalid(f"its layers differ in {file.architecture}.{key}, which mlx-lm does not know")
    return value


def _config(file: GgufFile) -> dict[str, Any]:
    model_type, class_name = _MODEL_TYPES[file.architecture]
    heads, width = _integer(file, "attention.head_count"), _integer(file, "embedding_length")
    natural = width // heads
    head_dim = _integer(file, "attention.key_length", natural)
    others = (_integer(file, "attention.value_length", natural), _integer(file, "rope.dimension_count", head_dim))
    if others != (head_dim, head_dim) or (file.architecture == "qwen2" and head_dim != natural):
        raise ModelInvalid(
            f"a head's keys have {head_dim} dimensions, its values {others[0]}, and {others[1]} are rotated, which "
            f"mlx-lm's {model_type} does not know"
        )
    layers = _integer(file, "block_count")
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [class_name],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": _integer(file, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": float(file.need("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(file.own("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(file),
        "max_position_embeddings": _integer(file, "context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if _ROPE_FACTORS in file.tensors:
        config["rope_scaling"] = _llama3_scaling(file, config)
    if file.architecture == "gemma3":
        # llama.cpp tells the 27B model, the only one that scales its queries by the width, by its 62 layers.
        config["query_pre_attn_scalar"] = natural if layers == 62 else head_dim
        config["rope_local_base_freq"] = float(file.own("rope.freq_base_swa", 10000.0))
        config["sliding_window"] = _integer(file, "attention.sliding_window", 0) or config["max_position_embeddings"]
        config["sliding_window_pattern"] = _window_pattern(file, layers)
    return config


def _window_pattern(file: GgufFile, layers: int) -> int:
    """n: every n-th layer sees everything, the others a window."""
    if not file.own("attention.sliding_window", 0):
        return 1
    pattern = file.own("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        slides = [bool(value) for value in pattern[:layers]]
        pattern = slides.index(False) + 1 if False in slides else 0
        if pattern == 0 or slides != [index % pattern != pattern - 1 for index in range(layers)]:
            raise ModelInvalid("its sliding layers follow no pattern that mlx-lm's gemma3_text knows")
    if not 1 <= pattern <= layers:
        raise ModelInvalid(f"none of its {layers} layers sees everything, and mlx-lm's gemma3_text needs one")
    return int(pattern)


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    kind = file.own("rope.scaling.type", "linear" if file.own("rope.scale_linear") else "none")
    factor = float(file.own("rope.scaling.factor", file.own("rope.scale_linear", 1.0)))
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and file.architecture != "gemma3":
        original = int(file.own("rope.scaling.original_context_length", file.need("context_length")))
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ModelInvalid(f"it scales RoPE by {kind!r}, and lmx converts none, linear, yarn and Llama 3's")


def _llama3_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, from the table of divisors that llama.cpp stores instead of its parameters.

    All released models use the parameters below and differ in ``factor`` only, the table's largest entry; whether that
    is so here is checked by computing the table again.
    """
    import gguf
    import numpy as np

    tensor = file.tensors[_ROPE_FACTORS]
    factors = gguf.quants.dequantize(raw(tensor), tensor.kind)
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, config["head_dim"], 2) / config["head_dim"])
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if file.architecture != "llama" or factors.shape != expected.shape or not np.allclose(expected, factors, rtol=1e-3):
        raise ModelInvalid(f"its table of RoPE factors ({_ROPE_FACTORS}) is not Llama 3's")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _names(file: GgufFile, layers: int) -> dict[str, str]:
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(layers):
        for name, target in (_LAYER | _OWN_LAYER.get(file.architecture, {})).items():
            names[f"blk.{layer}.{name}"] = f"model.layers.{layer}.{target}"
    missing = sorted(names.keys() - file.tensors.keys())
    names["output.weight"] = "lm_head.weight"
    unknown = sorted(file.tensors.keys() - names.keys() - {_ROPE_FACTORS})
    for what, found in (("lacks", missing), ("has besides what mlx-lm knows", unknown)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ModelInvalid(f"it {what} the tensors {', '.join(found[:3])}{more}")
    return {name: target for name, target in names.items() if name in file.tensors}
