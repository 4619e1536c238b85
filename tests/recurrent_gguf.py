"""Small GGUF models with recurrent states, random weights: Mamba, and Jamba, which has an attention layer between."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from tests.models import add_vocabulary, train_tokenizer

WIDTH, INNER, STATE, RANK, CONV, HEADS = 64, 128, 16, 8, 4, 4
LAYERS = {"mamba": (0, 0), "jamba": (0, 2, 0)}
"""KV heads of each layer; 0: it is recurrent."""


def build_recurrent_gguf(path: Path, kind: str) -> Path:
    """Write a model of ``kind``, a key of LAYERS. The same weights every time."""
    import gguf

    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(len(LAYERS[kind]))
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(list(LAYERS[kind]))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(RANK)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_vocabulary(writer)
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", _normal(random, 1.5 / math.sqrt(columns), rows, columns))

    def norm(name: str, size: int = WIDTH) -> None:
        writer.add_tensor(f"{name}.weight", 1 + _normal(random, 0.1, size))

    writer.add_tensor("token_embd.weight", _normal(random, 0.1, train_tokenizer().get_vocab_size(), WIDTH))
    matrix("output", train_tokenizer().get_vocab_size(), WIDTH)
    norm("output_norm")
    for index, kv_heads in enumerate(LAYERS[kind]):
        layer = f"blk.{index}"
        norm(f"{layer}.attn_norm")
        if kv_heads:
            head = WIDTH // HEADS
            for part, size in (("q", WIDTH), ("k", kv_heads * head), ("v", kv_heads * head), ("output", WIDTH)):
                matrix(f"{layer}.attn_{part}", size, WIDTH)
        else:
            matrix(f"{layer}.ssm_in", 2 * INNER, WIDTH)
            matrix(f"{layer}.ssm_conv1d", INNER, CONV)
            matrix(f"{layer}.ssm_x", RANK + 2 * STATE, INNER)
            matrix(f"{layer}.ssm_dt", INNER, RANK)
            matrix(f"{layer}.ssm_out", WIDTH, INNER)
            writer.add_tensor(f"{layer}.ssm_conv1d.bias", _normal(random, 0.1, INNER))
            writer.add_tensor(f"{layer}.ssm_dt.bias", _normal(random, 0.1, INNER))
            writer.add_tensor(f"{layer}.ssm_a", -np.exp(_normal(random, 0.5, INNER, STATE)))
            writer.add_tensor(f"{layer}.ssm_d", 1 + _normal(random, 0.1, INNER))
        if kind == "jamba":
            if not kv_heads:
                norm(f"{layer}.ssm_dt_norm", RANK)
                norm(f"{layer}.ssm_b_norm", STATE)
                norm(f"{layer}.ssm_c_norm", STATE)
            norm(f"{layer}.ffn_norm")
            matrix(f"{layer}.ffn_gate", 2 * WIDTH, WIDTH)
            matrix(f"{layer}.ffn_up", 2 * WIDTH, WIDTH)
            matrix(f"{layer}.ffn_down", WIDTH, 2 * WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _normal(random: np.random.Generator, scale: float, *shape: int) -> Any:
    return (scale * random.standard_normal(shape)).astype(np.float32)
