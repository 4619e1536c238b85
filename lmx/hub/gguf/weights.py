"""Writes a GGUF file's tensors as the weights of an MLX folder, never more than a shard of them in memory.

The only part of the converter that needs MLX. Not with ``mx.load``: for the whole file at once it makes float16 of BF16
and of K-quants without a word, and fails on Q5_0 (mlx 0.32). Here Q4_0, Q4_1 and Q8_0 stay packed and BF16, F16 and F32
stay what they are, all with the same values. What MLX has no form for becomes float16: half of float32's memory, and
its rounding (2⁻¹¹ of a value) is far below a quantisation step (a 32nd of the largest value in Q6_K, the finest). On
the CPU the engine makes float32 of it all.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from lmx.hub.gguf.file import GgufFile, raw
from lmx.hub.gguf.header import Tensor
from lmx.hub.gguf.mlx import BITS, GROUP_SIZE

_SHARD_BYTES = 1024**3  # or one tensor, if that is larger
_CHUNK_BYTES = 64 * 1024 * 1024


def write_weights(file: GgufFile, config: dict[str, Any], names: dict[str, str], folder: Path) -> dict[str, Any]:
    """Write model-*.safetensors and their index; what they add to the configuration."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    vector_dtype = _vector_dtype(file)
    bits: dict[str, int] = {}
    shards = _Shards(folder)
    for name, target in names.items():
        tensor = file.tensors[name]
        data = raw(tensor)
        if file.architecture == "llama" and name.split(".")[-2] in heads:
            data = data[_rotary_order(len(data), heads[name.split(".")[-2]])]
        if len(tensor.shape) == 1:
            vector = gguf.quants.dequantize(data, tensor.kind)
            if file.architecture == "gemma3":
                vector = vector - 1  # a norm's weight; llama.cpp keeps the 1 that mlx-lm adds
            shards.add({target: mx.array(vector).astype(vector_dtype)})
        elif tensor.kind.name in BITS:
            module = target.removesuffix(".weight")
            bits[module] = BITS[tensor.kind.name]
            parts = zip(("weight", "scales", "biases"), pack(data, tensor.kind), strict=True)
            shards.add({f"{module}.{part}": mx.array(array) for part, array in parts})
        else:
            shards.add({target: _matrix(data, tensor)})
    shards.finish()
    return {"vocab_size": file.tensors["token_embd.weight"].shape[0], **_quantization(bits)}


def pack(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, bytes) in blocks of Q4_0, Q4_1 or Q8_0 → MLX's weight (uint32), scales and biases (float16).

    A block is 32 columns: scale, perhaps minimum, then the integers. Scales times 8 and 128 are exact in float16.
    """
    blocks = data.reshape(len(data), -1, gguf.GGML_QUANT_SIZES[kind][1])
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    if kind == gguf.GGMLQuantizationType.Q8_0:
        integers = blocks[..., 2:] ^ 0x80  # int8 → the same plus 128, uint8
        biases = scales * np.float16(-128)
    else:
        low, high = blocks[..., -16:] & 0x0F, blocks[..., -16:] >> 4  # columns 0-15 and 16-31
        columns = np.concatenate([low, high], axis=-1)
        integers = columns[..., 0::2] | columns[..., 1::2] << 4
        if kind == gguf.GGMLQuantizationType.Q4_0:
            biases = scales * np.float16(-8)
        else:
            biases = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0]
    return np.ascontiguousarray(integers).reshape(len(data), -1).view(np.uint32), scales, biases


def _matrix(data: np.ndarray, tensor: Tensor) -> mx.array:
    kind = tensor.kind.name
    if kind == "BF16":
        return mx.array(data.view(np.uint16)).view(mx.bfloat16)
    if kind in ("F16", "F32"):
        return mx.array(data.view(np.float16 if kind == "F16" else np.float32))
    matrix = np.empty(tensor.shape, np.float16)
    rows = max(1, _CHUNK_BYTES // (4 * tensor.shape[-1]))
    for start in range(0, len(matrix), rows):
        matrix[start : start + rows] = gguf.quants.dequantize(data[start : start + rows], tensor.kind)
    return mx.array(matrix)


def _vector_dtype(file: GgufFile) -> mx.Dtype:
    """For norms and biases, which GGUF keeps as float32: beside matrices of half precision, they would make every
    activation float32 on a GPU."""
    kinds = {tensor.kind.name for tensor in file.tensors.values()}
    if kinds == {"F32"}:
        return mx.float32
    return mx.bfloat16 if kinds == {"F32", "BF16"} else mx.float16


def _rotary_order(rows: int, heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order of q and k: a head's two RoPE halves, stored row by row in turn, apart again."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _quantization(bits: dict[str, int]) -> dict[str, Any]:
    """The ``quantization`` entry as mlx-lm reads it: the commonest width, and each module that differs from it."""
    if not bits:
        return {}
    [(common, _)] = Counter(bits.values()).most_common(1)
    others = {name: {"group_size": GROUP_SIZE, "bits": width} for name, width in bits.items() if width != common}
    return {"quantization": {"group_size": GROUP_SIZE, "bits": common, **others}}


class _Shards:
    """Collects arrays and writes a file whenever there is enough for one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: dict[str, mx.array] = {}
        self._weight_map: dict[str, str] = {}
        self._files = 0

    def add(self, arrays: dict[str, mx.array]) -> None:
        self._arrays |= arrays
        if sum(array.nbytes for array in self._arrays.values()) >= _SHARD_BYTES:
            self._write()

    def _write(self) -> None:
        self._files += 1
        name = f"model-{self._files:05}.safetensors"
        mx.save_safetensors(str(self._folder / name), self._arrays, metadata={"format": "mlx"})
        self._weight_map |= dict.fromkeys(self._arrays, name)
        self._arrays = {}

    def finish(self) -> None:
        if self._arrays:
            self._write()
        index = json.dumps({"metadata": {}, "weight_map": self._weight_map}, indent=1)
        (self._folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
