"""``python -m lmx.hub.convert SOURCE.gguf FOLDER``: turns a GGUF file of the llama architecture into an MLX folder.

A process of its own, started by ``lmx.hub.conversion``, because it needs MLX and the server never loads MLX. Packed
weights stay packed and keep their values. The folder appears whole or not at all, also with two converters at work.
"""

import fcntl
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from lmx.errors import ModelInvalid
from lmx.hub.conversion import FACTS_FILE, REFUSED, is_whole
from lmx.hub.folder import inspect_folder
from lmx.hub.gguf_file import GgufFile
from lmx.hub.gguf_tokenizer import write_tokenizer

_GROUP_SIZE = 32  # of all of GGUF's Q4_0, Q4_1 and Q8_0
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path) -> None:
    """Convert ``source`` into ``folder`` unless that is done already. Raises ModelInvalid."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it when its holder dies
        if is_whole(folder):
            return
        unfinished = folder.parent / f".{folder.name}.unfinished"
        for leftover in (unfinished, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir()
        try:
            _write(GgufFile(source), unfinished)
            inspect_folder(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _write(file: GgufFile, folder: Path) -> None:
    config = _config(file)
    weights = _weights(file, config)
    _add_quantization(config, weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config["vocab_size"] = weights["model.embed_tokens.weight"].shape[0]
    config["eos_token_id"] = write_tokenizer(file, folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / FACTS_FILE, {"source": str(file.path), "quantization": file.quantization})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def _config(file: GgufFile) -> dict[str, Any]:
    heads = int(file.need("attention.head_count"))
    width = int(file.need("embedding_length"))
    head_dim = int(file.own("attention.key_length", width // heads))
    rotated = int(file.own("rope.dimension_count", head_dim))
    if rotated != head_dim:
        raise ModelInvalid(
            f"{file.path} rotates {rotated} of {head_dim} dimensions of a head; mlx-lm's llama rotates all."
        )
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": int(file.need("block_count")),
        "intermediate_size": int(file.need("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.own("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "rms_norm_eps": float(file.need("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(file.own("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(file),
        "max_position_embeddings": int(file.need("context_length")),
        "tie_word_embeddings": "output.weight" not in file.tensor_types,
    }


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensor_types:
        return None  # _llama3_scaling reads it from the tensor
    kind = file.own("rope.scaling.type", "linear" if file.own("rope.scale_linear") else "none")
    factor = float(file.own("rope.scaling.factor", file.own("rope.scale_linear", 1.0)))
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = int(file.own("rope.scaling.original_context_length", file.need("context_length")))
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ModelInvalid(f"{file.path} scales RoPE by {kind!r}; lmx converts none, linear, yarn and Llama 3's.")


def _llama3_scaling(file: GgufFile, factors: mx.array, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, from the table of divisors that llama.cpp stores instead of its parameters.

    All released models use the parameters below and differ in ``factor`` only, the table's largest entry; whether that
    is so here is checked by computing the table again.
    """
    factor, low, high, original = max(cast(list[float], factors.tolist())), 1.0, 4.0, 8192
    exponents = mx.arange(0, config["head_dim"], 2, dtype=mx.float32) / config["head_dim"]
    wavelengths = 2 * mx.pi * config["rope_theta"] ** exponents
    smooth = mx.clip((original / wavelengths - low) / (high - low), 0, 1)
    if not mx.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3).item():
        raise ModelInvalid(f"{file.path} has a table of RoPE factors (rope_freqs.weight) that is not Llama 3's.")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _weights(file: GgufFile, config: dict[str, Any]) -> dict[str, mx.array]:
    loaded = cast(dict[str, mx.array], mx.load(str(file.path), format="gguf"))
    if "rope_freqs.weight" in loaded:
        config["rope_scaling"] = _llama3_scaling(file, loaded.pop("rope_freqs.weight"), config)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    all_float32 = set(file.tensor_types.values()) == {"F32"}
    weights: dict[str, mx.array] = {}
    for name, array in loaded.items():
        module, _, part = name.rpartition(".")
        _, layer, tensor = module.split(".", 2) if module.startswith("blk.") else ("", "", module)
        target = f"model.layers.{layer}.{_LAYER_MODULES.get(tensor)}" if layer else _MODULES.get(tensor)
        # ".bias" is an additive bias; ".biases" belongs to a packed weight.
        if target is None or target.endswith(".None") or part == "bias":
            raise ModelInvalid(f"{file.path} has a tensor {name}, which mlx-lm's llama does not know.")
        if tensor in heads:
            array = array[_rotary_order(array.shape[0], heads[tensor])]
        if array.ndim == 1 and not all_float32:
            # A float32 norm beside half-precision weights would make every activation float32 on a GPU.
            array = array.astype(mx.float16)
        weights[f"{target}.{part}"] = array
    return weights


def _rotary_order(rows: int, heads: int) -> mx.array:
    """Undoes llama.cpp's row order of q and k: a head's two RoPE halves, stored row by row in turn, apart again.

    Rows are what packed weights, their scales and biases have in common, so one index serves all three.
    """
    return mx.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _add_quantization(config: dict[str, Any], weights: dict[str, mx.array]) -> None:
    """The ``quantization`` entry as mlx-lm reads it: the commonest width, and each module that differs from it."""
    bits = {}
    for name, scales in weights.items():
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            columns = scales.shape[-1] * _GROUP_SIZE
            bits[module] = weights[f"{module}.weight"].shape[-1] * 32 // columns
    if not bits:
        return
    [(common, _)] = Counter(bits.values()).most_common(1)
    config["quantization"] = {
        "group_size": _GROUP_SIZE,
        "bits": common,
        **{name: {"group_size": _GROUP_SIZE, "bits": width} for name, width in bits.items() if width != common},
    }


def main() -> int:
    source, folder = map(Path, sys.argv[1:])
    try:
        convert(source, folder)
    except ModelInvalid as error:
        print(error.message, file=sys.stderr)
        return REFUSED
    except OSError as error:
        print(f"{error.filename or folder}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
