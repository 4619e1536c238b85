"""GGUF weights on MLX: the layout held against llama.cpp itself, and packed values against the gguf package."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from lmx.chat.model import ChatModel
from lmx.hub.gguf.file import raw
from lmx.hub.gguf.header import read_header
from lmx.hub.gguf.weights import pack
from lmx.hub.inventory import ModelFolder, resolve
from tests.backends import needs_llama
from tests.engine_client import engine
from tests.models import CORPUS, GGUF_ARCHITECTURES, build_gguf, train_tokenizer

PROMPT = train_tokenizer().encode(CORPUS.read_text(encoding="utf-8")[:400]).ids[:64]  # two windows of gemma3_text


def mlx_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """(tokens, vocabulary), computed by mlx-lm in float32."""
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model, load_model

    model, _ = load_model(folder)
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([tokens]))[0])


def llama_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """(tokens, vocabulary), computed by llama.cpp with a float32 KV cache."""
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install 'lmx[gguf]'")
    from tests.llama_oracle import llama as load

    float32 = gguf.GGMLQuantizationType.F32
    llama = load(str(path), n_ctx=128, logits_all=True, n_threads=2, type_k=float32, type_v=float32)
    llama.eval(tokens)
    logits = np.array(llama.scores[: len(tokens)])
    llama.close()
    return logits


SCALINGS: list[tuple[str, dict[str, Any] | None]] = [
    *((kind, None) for kind in GGUF_ARCHITECTURES),
    ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    ("qwen2", {"rope_type": "linear", "factor": 4.0}),
    ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),  # of the layers without a window alone
]


@pytest.mark.parametrize(("kind", "rope_scaling"), SCALINGS)
def test_the_layout_is_llama_cpps(kind: str, rope_scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    """Same logits from the original, from its GGUF file on MLX, and from that file on llama.cpp.

    Logits reach 7 (14 with gemma3_text). llama.cpp's differ by 3e-5 at most, and by 0.013 with gemma3_text, whose GELU
    it looks up in a float16 table.
    """
    path = build_gguf(tmp_path / "a.gguf", kind=kind, rope_theta=1e6, rope_scaling=rope_scaling)
    original = mlx_logits(path.with_suffix(".mlx"), PROMPT)
    found = resolve(str(path), tmp_path / "cache", "mlx")
    assert (found.backend, found.architecture) == ("mlx", GGUF_ARCHITECTURES[kind])
    np.testing.assert_allclose(mlx_logits(found.path, PROMPT), original, atol=1e-4)
    tolerance = 0.04 if kind == "gemma3_text" else 2e-4
    np.testing.assert_allclose(llama_logits(path, PROMPT), original, atol=tolerance)


def test_llama_cpp_finds_the_parts_of_a_split_file(tmp_path: Path) -> None:
    first = build_gguf(tmp_path / "a.gguf", split_max_tensors=12)
    found = resolve(str(first), tmp_path / "cache", "llama")
    expected = mlx_logits(tmp_path / "a.mlx", PROMPT)
    np.testing.assert_allclose(llama_logits(found.path, PROMPT), expected, atol=2e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_an_f32_file_comes_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    path = build_gguf(tmp_path / "tiny.gguf", tie_word_embeddings=tied)
    found = resolve(str(path), tmp_path / "cache", "mlx")
    assert (found.id, found.source, found.format, found.quantization) == ("tiny", path, "gguf", "F32")
    [weights], [expected] = (map(load_file, p.glob("*.safetensors")) for p in (found.path, path.with_suffix(".mlx")))
    assert weights.keys() == expected.keys()
    assert ("lm_head.weight" in weights) is not tied
    for name, weight in expected.items():
        np.testing.assert_array_equal(weights[name], weight, err_msg=name)
    ours, theirs = (json.loads((p / "config.json").read_text()) for p in (found.path, path.with_suffix(".mlx")))
    assert ours.pop("rms_norm_eps") == pytest.approx(theirs.pop("rms_norm_eps"))
    assert ours.pop("eos_token_id") == [theirs.pop("eos_token_id"), 0]
    assert ours == ours | theirs


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_packed_tensors_are_repacked_as_mlx_does_it(kind: str, tmp_path: Path) -> None:
    import mlx.core as mx

    quantization = gguf.GGMLQuantizationType[kind]
    matrix = np.random.default_rng(1).standard_normal((6, 128)).astype(np.float32)
    data = gguf.quants.quantize(matrix, quantization)
    packed = dict(zip(("a.weight", "a.scales", "a.biases"), map(mx.array, pack(data, quantization)), strict=True))
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a.weight", data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = mx.load(str(tmp_path / "a.gguf"))
    assert loaded.keys() == packed.keys()
    for name, array in loaded.items():
        assert packed[name].dtype == array.dtype
        assert mx.array_equal(packed[name], array), name
    scales, biases = (packed[name].astype(mx.float32) for name in ("a.scales", "a.biases"))
    values = mx.dequantize(packed["a.weight"], scales, biases, group_size=32, bits=8 if kind == "Q8_0" else 4)
    np.testing.assert_allclose(np.array(values), gguf.quants.dequantize(data, quantization), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_type_keeps_its_values(kind: str, tmp_path: Path) -> None:
    """Exactly, but for float16's rounding: of the types that MLX does not have, and of mx.dequantize's own sums."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model

    path = build_gguf(tmp_path / "tiny.gguf", kind)
    found = resolve(str(path), tmp_path / "cache", "mlx")
    assert found.quantization == kind
    model, config = load_model(found.path)
    assert ("quantization" in config) is (kind in ("Q8_0", "Q4_0", "Q4_1"))
    model = dequantize_model(model)
    half = mx.bfloat16 if kind == "BF16" else mx.float16
    quantization = gguf.GGMLQuantizationType[kind]
    expected = load_file(path.with_suffix(".mlx") / "model.safetensors")
    for name, array in tree_flatten(model.parameters()):
        assert array.dtype == half  # also of norms: one float32 array makes every activation float32 on a GPU
        weight = expected.pop(name)
        tolerance = 2e-3 if kind[0] == "Q" else 0
        if weight.ndim == 2:
            weight = gguf.quants.dequantize(gguf.quants.quantize(weight, quantization), quantization)
        else:
            weight = np.array(mx.array(weight).astype(half).astype(mx.float32))
        np.testing.assert_allclose(
            np.array(array.astype(mx.float32)), weight, rtol=tolerance, atol=tolerance, err_msg=name
        )
    assert not expected


def llama3_factors(head_dim: int, factor: float) -> np.ndarray:
    """llama.cpp's table for Llama 3's scaling, as its converter computes it."""
    factors = []
    for exponent in np.arange(0, head_dim, 2) / head_dim:
        wavelength = 2 * np.pi * 10000.0**exponent
        smooth = (8192 / wavelength - 1) / (4 - 1)
        inside = 8192 / 4 <= wavelength <= 8192 / 1
        factors.append(1 / ((1 - smooth) / factor + smooth) if inside else 1.0 if wavelength < 8192 / 4 else factor)
    return np.array(factors, np.float32)


def test_llama_3_scaling_is_read_from_its_table(tmp_path: Path) -> None:
    factors = llama3_factors(16, 8.0)
    assert len(set(factors.tolist())) > 2
    path = build_gguf(tmp_path / "a.gguf", metadata=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    folder = resolve(str(path), tmp_path / "cache", "mlx").path
    assert json.loads((folder / "config.json").read_text())["rope_scaling"]["factor"] == 8.0
    np.testing.assert_allclose(llama_logits(path, PROMPT), mlx_logits(folder, PROMPT), atol=1e-3)


@pytest.fixture(scope="module")
def gemma(gemma_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFolder]:
    cache = tmp_path_factory.mktemp("cache")
    yield resolve(str(gemma_gguf), cache, "mlx")
    shutil.rmtree(cache)  # 400 MB


def test_gemmas_k_quants_keep_their_values(gemma: ModelFolder) -> None:
    from safetensors import safe_open

    modules = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj", "ffn_gate": "mlp.gate_proj"}
    tensors = read_header(gemma.source).tensors
    assert [tensors[f"blk.0.{name}.weight"].kind.name for name in modules] == ["Q4_K", "Q6_K", "Q5_0"]
    [path] = gemma.path.glob("*.safetensors")
    with safe_open(path, "numpy") as file:
        for name, module in modules.items():
            tensor = tensors[f"blk.0.{name}.weight"]
            expected = gguf.quants.dequantize(raw(tensor), tensor.kind).astype(np.float16)
            np.testing.assert_array_equal(file.get_tensor(f"model.layers.0.{module}.weight"), expected)


def test_gemma_dequantised_says_what_it_says_on_llama_cpp(gemma: ModelFolder) -> None:
    """Logits spread by 5. llama.cpp rounds activations to 8 bits beside quantised weights, which moves its logits by
    0.15 on average; from a float32 file of the same values they differ from MLX's by 0.0045."""
    assert (gemma.architecture, gemma.quantization, gemma.context_length) == ("gemma3", "Q5_0", 32768)
    tokens = Tokenizer.from_file(str(gemma.words / "tokenizer.json")).encode("The capital of France is").ids
    ours, theirs = mlx_logits(gemma.path, tokens), llama_logits(gemma.source, tokens)
    assert np.abs(ours - theirs).mean() < 0.3
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@needs_llama
def test_gemma_runs_on_both_engines(gemma: ModelFolder) -> None:
    """262,144 tokens, sliding windows of 512. A base model: it goes on with a text; on llama.cpp, which is fast enough
    here, also with one longer than the window."""
    model = ChatModel.load(gemma.words)
    sentence, numbers = "Tom counts the birds in the garden.", "1, 2, 3, 4, 5, 6, 7,"
    texts = {"llama": (numbers, " ".join([sentence] * 80)), "mlx": (numbers,)}
    told = []
    for backend, path in (("llama", gemma.source), ("mlx", gemma.path)):
        with engine(path, backend=backend) as client:
            told += map(model.decode, client.run([model.encode_text(text) for text in texts[backend]], 7))
    assert [told[0], told[2]] == [" 8, 9, "] * 2
    assert f" {sentence}".startswith(told[1])
    assert len(told[1]) > 20
