"""Builds small models of real architectures with seeded random weights, for tests and benchmarks.

``build_model`` goes through mlx-lm's own model classes, so that what the engine loads is what mlx-lm expects; the
weights are scaled so that greedy output changes from token to token. ``build_gguf`` writes a llama model as llama.cpp
would. The tokenizer is a byte-level BPE trained on ``tests/data/corpus.txt``. The same seed gives the same files. MLX
is imported inside the functions only: a test of the server side can import this module without it.
"""

import functools
import json
import math
import shutil
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = Path(__file__).parent / "data" / "corpus.txt"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": _MOE,
    # Two sliding layers, then a full one; the window is shorter than most test prompts.
    "gemma3_text": {"sliding_window": 32, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16},
    # Short convolutions with one attention layer between them.
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 3,
        "conv_bias": False,
        "norm_eps": 1e-5,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    # Gated delta rule (recurrent state) with one attention layer, and experts.
    "qwen3_next": {
        **_MOE,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 3,
        "shared_expert_intermediate_size": 64,
        "partial_rotary_factor": 0.5,
    },
    # Multi-head latent attention; the first layer dense, the others with routed and shared experts.
    "deepseek_v2": {
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
        },
    },
}


@functools.cache
def train_tokenizer(vocab_size: int = 1500) -> Tokenizer:
    """Byte-level BPE over every byte; GPT-2's pattern; the special tokens have the ids 0, 1, 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS.read_text(encoding="utf-8")], trainer)
    return tokenizer


def write_tokenizer(folder: Path, *, chat_template: str | None = CHATML) -> None:
    train_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def build_model(kind: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a model of architecture ``kind`` (a key of KINDS) into ``folder`` and return it. float32.

    ``overrides`` are fields of mlx-lm's ModelArgs (``num_hidden_layers=8, hidden_size=512``). Where the heads are not
    named, the width is cut into heads of 64 above a width of 256, and the MLP gets twice the width.
    """
    # mlx_lm.utils lowers the hard limit of open files of the whole process, which only a privileged one can undo.
    with unittest.mock.patch("resource.setrlimit"):
        from mlx_lm.utils import _get_classes
    import mlx.core as mx
    from mlx.utils import tree_flatten

    width = overrides.get("hidden_size", _COMMON["hidden_size"])
    sizes: dict[str, Any] = {}
    if width != _COMMON["hidden_size"]:
        head_dim = 64 if width > 256 else 32
        sizes = {"intermediate_size": 2 * width, "head_dim": head_dim, "num_attention_heads": width // head_dim}
        sizes["num_key_value_heads"] = max(1, width // head_dim // 2)
    vocab_size = train_tokenizer().get_vocab_size()
    config = {"model_type": kind, "vocab_size": vocab_size, **_COMMON, **KINDS[kind], **sizes, **overrides}
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))

    key = mx.random.key(seed)
    weights: dict[str, Any] = {}
    # Under tied embeddings an untrained residual stream mostly repeats its input; small ones let the layers speak.
    embedding_scale = 0.1 / math.sqrt(width) if kind == "gemma3_text" else 0.1
    for name, initial in tree_flatten(model.parameters()):
        key, subkey = mx.random.split(key)
        noise = mx.random.normal(initial.shape, key=subkey)
        if initial.ndim == 1:
            weights[name] = initial + 0.1 * noise
        elif "embed_tokens" in name:
            weights[name] = embedding_scale * noise
        else:
            fan_in = math.prod(initial.shape[2 if "switch_mlp" in name else 1 :])
            weights[name] = 1.5 / math.sqrt(fan_in) * noise

    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config["eos_token_id"] = train_tokenizer().token_to_id("<|im_end|>")
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    write_tokenizer(folder)
    return folder


def build_gguf(
    path: Path,
    quantization: str = "F32",
    *,
    seed: int = 0,
    metadata: Callable[[Any], None] = lambda writer: None,
    vocabulary: Callable[[Any], None] | None = None,
    **overrides: Any,
) -> Path:
    """Write a llama model as llama.cpp's converter would (row order of q and k included).

    ``quantization`` names a ``gguf.GGMLQuantizationType``; norms stay F32. The MLX folder that it was made from (the
    same float32 weights, before quantising) stays beside it, as ``path.with_suffix(".mlx")``. ``metadata`` gets the
    ``gguf.GGUFWriter`` to add fields or tensors, ``vocabulary`` to add another tokenizer than the usual one.
    """
    import gguf
    from safetensors.numpy import load_file

    folder = path.with_suffix(".mlx")
    shutil.rmtree(folder, ignore_errors=True)
    build_model("llama", folder, seed=seed, **overrides)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = gguf.GGMLQuantizationType[quantization]

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    metadata(writer)
    (vocabulary or _add_vocabulary)(writer)

    names: list[tuple[str, str, Callable[[Any], Any]]] = [
        ("model.embed_tokens", "token_embd", lambda w: w),
        ("model.norm", "output_norm", lambda w: w),
        ("lm_head", "output", lambda w: w),
    ]
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in _LAYER_TENSORS.items():
            heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(theirs)
            order = functools.partial(_interleave, heads=heads) if heads else lambda w: w
            names.append((f"model.layers.{layer}.{ours}", f"blk.{layer}.{theirs}", order))
    weights = load_file(folder / "model.safetensors")
    for ours, theirs, order in names:
        weight = weights.get(f"{ours}.weight")
        if weight is None:
            continue
        weight = order(weight)
        if weight.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{theirs}.weight", weight)
        else:
            writer.add_tensor(f"{theirs}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _interleave(weight: Any, *, heads: int) -> Any:
    """The row order llama.cpp keeps q and k in: within a head, the two RoPE halves alternate row by row."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _add_vocabulary(writer: Any) -> None:
    import gguf

    tokenizer = train_tokenizer()
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    types = [gguf.TokenType.CONTROL if t in SPECIAL_TOKENS else gguf.TokenType.NORMAL for t in tokens]
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
