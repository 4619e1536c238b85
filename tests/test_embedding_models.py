"""Vectors against those of other implementations, stored in tests/data/embeddings.json (made by embeddings_reference.py
beside it): each architecture, each kind of pooling, whatever is computed together."""

import json
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from lmx.engine.embedding import families, kernels
from lmx.engine.embedding.backend import ENCODERS, Input
from lmx.engine.embedding.embedder import MLXEmbedder
from lmx.engine.embedding.pooling import MODES
from lmx.errors import ModelInvalid
from lmx.hub import sentence
from lmx.hub.sentence import read_sentence
from lmx.protocol import Load, Pooling
from tests.backends import needs_llama
from tests.data.embeddings_reference import CONFIGS, IDS, TEXTS, weight
from tests.models import build_gguf
from tests.server import serve

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "embeddings.json").read_text())
SECOND = 2
"""Where the second text of each of IDS begins, for the cross-encoders."""
Vectors = npt.NDArray[np.float32]


def inputs(ids: list[list[int]], second: int = 0) -> list[Input]:
    return [Input(np.array(tokens, np.int32), second) for tokens in ids]


def write(folder: Path, name: str, rename: dict[str, str] | None = None, prefix: str = "", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | config))
    arrays = {key: weight(key, tuple(shape)) for key, shape in REFERENCE[name]["shapes"].items()}
    for old, new in (rename or {}).items():
        arrays = {key.replace(old, new): array for key, array in arrays.items()}
    save_file({prefix + key: array for key, array in arrays.items()}, folder / "model.safetensors")
    return folder


def load(folder: Path, pooling: Pooling) -> MLXEmbedder:
    return MLXEmbedder.load(Load(str(folder), embedding=pooling))


def test_every_encoder_that_is_recognised_can_be_read() -> None:
    assert families.FAMILIES.keys() == ENCODERS
    assert set(sentence.ENCODERS) >= ENCODERS


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "nomic", "qwen3"])
def test_an_architecture_gives_transformers_vectors(name: str, tmp_path: Path) -> None:
    embedder = load(write(tmp_path, name), Pooling("last" if name == "qwen3" else "mean"))
    expected = np.array(REFERENCE[name]["vectors"])
    assert embedder.facts.dimension == 32
    together = embedder.embed(inputs(IDS))
    np.testing.assert_allclose(together, expected, atol=2e-5)
    for index, ids in enumerate(IDS):
        np.testing.assert_allclose(embedder.embed(inputs([ids]))[0], expected[index], atol=2e-5)


@pytest.mark.parametrize("name", ["rank", "rank_roberta"])
def test_a_cross_encoder_scores_pairs(name: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    pooling = read_sentence(tmp_path).pooling
    assert pooling == Pooling("rank", normalize=True)
    scores = load(tmp_path, pooling).embed(inputs(IDS, SECOND))
    np.testing.assert_allclose(scores, REFERENCE[name]["vectors"], atol=2e-5)


def test_nomic_in_its_makers_names(tmp_path: Path) -> None:
    """Fused query, key and value; gate and up the other way round."""
    names = REFERENCE["nomic"]["shapes"]
    arrays = {key: weight(key, tuple(shape)) for key, shape in names.items()}
    made: dict[str, npt.NDArray[np.float32]] = {}
    for key in names:
        if ".self_attn." in key:
            continue
        new = key.replace("embeddings.LayerNorm", "emb_ln").replace("post_attention_layernorm", "norm1")
        new = new.replace("post_mlp_layernorm", "norm2").replace("gate_proj", "fc12").replace("up_proj", "fc11")
        new = new.replace("down_proj", "fc2")
        made[("encoder." if new.startswith("layers") else "") + new] = arrays[key]
    for index in range(4):
        attention_ = f"layers.{index}.self_attn"
        fused = np.concatenate([arrays[f"{attention_}.{part}_proj.weight"] for part in "qkv"])
        made[f"encoder.layers.{index}.attn.Wqkv.weight"] = fused
        made[f"encoder.layers.{index}.attn.out_proj.weight"] = arrays[f"{attention_}.o_proj.weight"]
    save_file(made, tmp_path / "model.safetensors")
    config = {
        "model_type": "nomic_bert", "n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48, "n_positions": 64,
        "activation_function": "swiglu", "layer_norm_epsilon": 1e-12, "rotary_emb_base": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load(tmp_path, Pooling("mean")).embed(inputs(IDS))
    np.testing.assert_allclose(found, REFERENCE["nomic"]["vectors"], atol=2e-5)


def test_a_decoder_with_its_head_and_prefix(tmp_path: Path) -> None:
    folder = write(tmp_path, "qwen3", prefix="model.")
    found = load(folder, Pooling("last")).embed(inputs(IDS))
    np.testing.assert_allclose(found, REFERENCE["qwen3"]["vectors"], atol=2e-5)


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_whatever_stands_beside_an_input_its_vector_is_the_same(name: str, tmp_path: Path) -> None:
    embedder = load(write(tmp_path, name), Pooling("mean"))
    draw = np.random.default_rng(3)
    ids = [draw.integers(2, 96, length).tolist() for length in draw.integers(1, 60, 40)]
    together = embedder.embed(inputs(ids))
    for index in (0, 7, 21, 39):
        np.testing.assert_allclose(embedder.embed(inputs([ids[index]]))[0], together[index], atol=1e-6)
    order = draw.permutation(40)
    np.testing.assert_allclose(embedder.embed(inputs([ids[i] for i in order])), together[order], atol=1e-6)


def test_padding_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where inputs of like length are padded to the longest."""
    monkeypatch.setattr("lmx.engine.embedding.embedder._PADDING_SHARE", (0.99, 0.99))
    for name in ("bert", "modernbert", "nomic", "qwen3"):
        embedder = load(write(tmp_path, name), Pooling("last" if name == "qwen3" else "mean"))
        embedder._shares = 1
        np.testing.assert_allclose(embedder.embed(inputs(IDS)), REFERENCE[name]["vectors"], atol=2e-5)


def test_a_token_that_makes_a_vector_not_finite_reaches_no_other(tmp_path: Path) -> None:
    folder = write(tmp_path, "bert")
    arrays = {key: weight(key, tuple(shape)) for key, shape in REFERENCE["bert"]["shapes"].items()}
    arrays["embeddings.word_embeddings.weight"][95] = np.nan
    save_file(arrays, folder / "model.safetensors")
    found = load(folder, Pooling("mean")).embed(inputs([IDS[1], [5, 95, 31, 6], IDS[0], IDS[2]]))
    assert not np.isfinite(found[1]).any()
    expected = [REFERENCE["bert"]["vectors"][index] for index in (1, 0, 2)]
    np.testing.assert_allclose(found[[0, 2, 3]], expected, atol=2e-5)


def test_minilm_gives_sentence_transformers_vectors(minilm: Path) -> None:
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    facts = read_sentence(minilm)
    assert (facts.pooling, facts.max_tokens) == (Pooling("mean", normalize=True), 256)
    found = load(minilm, facts.pooling).embed(inputs([tokenizer.encode(text).ids for text in TEXTS]))
    cosines = (found * np.array(REFERENCE["minilm"], np.float32)).sum(1)
    assert cosines.min() > 0.99999


def test_pooling(tmp_path: Path) -> None:
    hidden = mx.array(np.arange(24, dtype=np.float32).reshape(2, 4, 3))
    lengths = mx.array([4, 2])
    first, second = np.arange(12).reshape(4, 3), np.arange(12, 18).reshape(2, 3)
    weights = np.arange(1, 5)[:, None]
    expected = {
        "mean": [first.mean(0), second.mean(0)],
        "cls": [first[0], second[0]],
        "last": [first[-1], second[-1]],
        "max": [first.max(0), second.max(0)],
        "mean_sqrt_len": [first.sum(0) / 2, second.sum(0) / 2**0.5],
        "weighted_mean": [(first * weights).sum(0) / 10, (second * weights[:2]).sum(0) / 3],
    }
    assert expected.keys() == MODES.keys()
    for mode, vectors in expected.items():
        np.testing.assert_allclose(MODES[mode](hidden, lengths), vectors, rtol=1e-6)


def modules(folder: Path, *kinds: str, **pooling: Any) -> None:
    listed = []
    for index, kind in enumerate(kinds):
        path = "" if kind == "Transformer" else f"{index}_{kind}"
        (folder / path).mkdir(exist_ok=True)
        listed.append({"idx": index, "path": path, "type": f"sentence_transformers.models.{kind}"})
        if kind == "Pooling":
            (folder / path / "config.json").write_text(json.dumps(pooling))
        if kind == "Dense":
            config = {"activation_function": "torch.nn.modules.activation.Tanh"}
            (folder / path / "config.json").write_text(json.dumps(config))
            save_file({"linear.weight": weight("dense", (8, 32))}, folder / path / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(listed))


def test_dense_layers_and_several_poolings_are_as_the_files_say(tmp_path: Path) -> None:
    write(tmp_path, "bert")
    modules(tmp_path, "Transformer", "Pooling", "Dense", pooling_mode_mean_tokens=True)
    pooling = read_sentence(tmp_path).pooling
    assert (pooling.mode, pooling.normalize, len(pooling.dense)) == ("mean", False, 1)
    plain = load(tmp_path, Pooling("mean", normalize=False)).embed(inputs(IDS))
    embedder = load(tmp_path, pooling)
    assert embedder.facts.dimension == 8
    np.testing.assert_allclose(embedder.embed(inputs(IDS)), np.tanh(plain @ weight("dense", (8, 32)).T), atol=1e-5)
    modules(tmp_path, "Transformer", "Pooling", "Normalize", pooling_mode=["cls", "max"])
    both = load(tmp_path, read_sentence(tmp_path).pooling)
    assert both.facts.dimension == 64
    np.testing.assert_allclose(np.linalg.norm(both.embed(inputs(IDS)), axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("kinds", "pooling", "named"),
    [
        (("Transformer", "LSTM", "Pooling"), {"pooling_mode": "mean"}, "LSTM"),
        (("Transformer", "Pooling"), {"pooling_mode": "median"}, "median"),
        (("Transformer",), {}, "Pooling"),
    ],
)
def test_a_module_that_is_not_built_is_named(
    tmp_path: Path, kinds: tuple[str, ...], pooling: dict[str, Any], named: str
) -> None:
    modules(tmp_path, *kinds, **pooling)
    with pytest.raises(ModelInvalid, match=named):
        read_sentence(tmp_path)


def test_what_a_folder_says_beside_its_modules(tmp_path: Path) -> None:
    config = {"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1, "matryoshka_dims": [64]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    texts = {"prompts": {"query": "Q: ", "document": ""}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(texts))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1e30}))
    facts = read_sentence(tmp_path)
    assert (facts.max_tokens, facts.dimensions, facts.default_prompt) == (512, (64,), "query")
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128, "do_lower_case": True}))
    assert (read_sentence(tmp_path).max_tokens, read_sentence(tmp_path).lowercase) == (128, True)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    write(tmp_path, "bert", {"encoder.layer.3.output.dense": "gone"})
    with pytest.raises(ModelInvalid, match=r"encoder\.layer\.3\.output\.dense\.weight"):
        load(tmp_path, Pooling("mean"))


def test_the_kernels_of_the_cpu() -> None:
    x = np.linspace(-12, 12, 40_000, dtype=np.float32).reshape(200, 200)
    for name in ("gelu", "gelu_tanh", "silu", "relu"):
        activate = getattr(kernels, name)
        np.testing.assert_allclose(activate(x), activate(mx.array(x)), atol=1e-5)
    draw = np.random.default_rng(5)
    x = draw.normal(0, 2, (200, 200)).astype(np.float32)
    weight, bias = draw.normal(0, 2, (2, 200)).astype(np.float32)
    for some in (bias, None):
        found = kernels.layer_norm(x, weight, some, 1e-5)
        like = None if some is None else mx.array(some)
        np.testing.assert_allclose(found, kernels.layer_norm(mx.array(x), mx.array(weight), like, 1e-5), atol=1e-5)
    queries, keys, values = draw.normal(0, 2, (3, 3, 4, 300, 8)).astype(np.float32)
    np.testing.assert_allclose(kernels.rope(queries, 1e4), kernels.rope(mx.array(queries), 1e4), atol=1e-4)
    mask = (np.arange(300) < np.array([300, 1, 170])[:, None])[:, None, None, :]
    for given in (None, mask):
        found = kernels.attention(queries, keys, values, scale=0.5, mask=given)
        arrays = (mx.array(array) for array in (queries, keys, values))
        expected = kernels.attention(*arrays, scale=0.5, mask=None if given is None else mx.array(given))
        np.testing.assert_allclose(found, expected, atol=2e-5)


def write_gguf(minilm: Path, path: Path) -> Path:
    """MiniLM as llama.cpp's converter would write it, float32."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((minilm / "config.json").read_text())
    vocabulary = json.loads((minilm / "tokenizer.json").read_text())["model"]["vocab"]
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(2)
    special = {token for token in vocabulary if token[0] == "[" and token[-1] == "]" and len(token) > 2}
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_token_list([w if w in special else w[2:] if w[:2] == "##" and len(w) > 2 else f"▁{w}" for w in words])
    writer.add_token_types([3 if word in special else 1 for word in words])
    names = {
        "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
        "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
        "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
        "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
        "encoder.layer": "blk",
    }  # fmt: skip
    for name, array in load_file(minilm / "model.safetensors").items():
        if name.startswith("pooler") or "position_ids" in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_llama
def test_an_encoder_as_a_gguf_file(minilm: Path, tiny_model: Path, tmp_path: Path) -> None:
    """On llama.cpp, with the words out of the file: special tokens, pieces of words, lower case, accents."""
    path = write_gguf(minilm, tmp_path / "minilm.gguf")
    settings = {"model": {"embedding": str(path), "cache_dir": str(tmp_path / "cache")}}
    with serve(tmp_path, "--model", str(tiny_model), settings=settings) as server:
        server.line(r"lmx: model minilm ready \(bert")
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": [*TEXTS, "a"]}, timeout=60).json()
        found = np.array([item["embedding"] for item in answer["data"]])
        # llama.cpp computes GELU from a table of half precision.
        assert (found[:-1] * np.array(REFERENCE["minilm"])).sum(1).min() > 0.9999
        assert httpx.get(f"{server.url}/v1/models/minilm").json()["backend"] == "llama"


@needs_llama
@pytest.mark.parametrize("mode", ["last", "mean"])
def test_a_decoder_as_a_gguf_file_gives_what_mlx_gives(mode: str, tmp_path: Path) -> None:
    from lmx.engine.embedding.llama import LlamaEmbedder

    path = build_gguf(tmp_path / "model.gguf")
    draw = np.random.default_rng(2)
    some = inputs([draw.integers(3, 1000, length).tolist() for length in (5, 1, 40, 17)])
    llama = LlamaEmbedder.load(Load(str(path), backend="llama", context_length=512, embedding=Pooling(mode)))
    found = llama.embed(some)
    assert (found * load(path.with_suffix(".mlx"), Pooling(mode)).embed(some)).sum(1).min() > 0.9999
    np.testing.assert_allclose(llama.embed(some[2:3])[0], found[2], atol=1e-5)
