"""Reading GGUF files: the header, what is kept of them in the cache, and what is refused before an engine starts."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lmx.errors import ModelInvalid, ModelNotFound
from lmx.hub.conversion import GgufFacts, words_folder
from lmx.hub.convert import convert_words
from lmx.hub.gguf.file import GgufFile
from lmx.hub.gguf.header import read_header
from lmx.hub.gguf.kinds import BLOCKS, Kind
from lmx.hub.gguf.mlx import mlx_folder
from lmx.hub.inventory import EMBEDDED_ID, resolve
from tests.models import CHATML, add_vocabulary, build_gguf, train_tokenizer

Writes = Callable[[Any], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_gguf(tmp_path_factory.mktemp("good") / "good.gguf", "Q4_0")


def rewrite(good: Path, path: Path, position: int, content: bytes) -> Path:
    data = bytearray(good.read_bytes())
    data[position : position + len(content)] = content
    path.write_bytes(data)
    return path


def truncate(path: Path, drop_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - drop_bytes)


# --- the header ---------------------------------------------------------------------------------------


def assert_read_as_gguf_reads_it(path: Path) -> None:
    theirs, ours = gguf.GGUFReader(path), read_header(path)
    assert ours.fields == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert [(t.name, t.kind, list(t.shape), t.offset, t.nbytes) for t in ours.tensors.values()] == [
        (t.name, t.tensor_type, t.shape.tolist()[::-1], t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    brief = read_header(path, words=False)
    assert brief.tensors == ours.tensors
    passed = {key: [] for key, value in ours.fields.items() if key.startswith("tokenizer.") and isinstance(value, list)}
    assert brief.fields == ours.fields | passed


def test_types_are_those_of_the_gguf_package() -> None:
    assert {kind.name: kind for kind in Kind} == {kind.name: kind for kind in gguf.GGMLQuantizationType}
    assert BLOCKS == gguf.GGML_QUANT_SIZES


def test_headers_are_read_as_the_gguf_package_reads_them(tmp_path: Path) -> None:
    assert_read_as_gguf_reads_it(resolve(EMBEDDED_ID, tmp_path).source)

    def every_kind(writer: Any) -> None:
        for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
            getattr(writer, f"add_{kind}")(f"a.{kind}", 100)
        writer.add_float32("a.float32", 0.1)
        writer.add_float64("a.float64", 0.1)
        writer.add_bool("a.bool", True)
        writer.add_string("a.string", "ein 𝄞\n")
        writer.add_array("a.strings", ["", "é", "\n"])
        writer.add_array("a.floats", [0.5, -1.0])
        writer.add_array("a.bools", [True, False])
        writer.add_array("a.integers", [-1, 2**31 - 1])
        writer.add_custom_alignment(64)
        writer.add_tensor("odd", np.zeros((3, 2, 5), np.float32))
        writer.add_tensor("k", np.zeros((2, 144), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_K)

    assert_read_as_gguf_reads_it(build_gguf(tmp_path / "kinds.gguf", "Q8_0", metadata=every_kind))


# --- what is kept -------------------------------------------------------------------------------------


def test_the_words_hold_what_a_server_needs_and_take_no_mlx(good: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lmx.hub.convert import convert_words;"
        "convert_words(Path(sys.argv[1]), Path(sys.argv[2]));"
        "assert not {'mlx', 'llama_cpp', 'transformers'} & sys.modules.keys()"
    )
    words = tmp_path / "words"
    subprocess.run([sys.executable, "-c", code, str(good), str(words)], check=True)
    assert sorted(os.listdir(words)) == ["config.json", "lmx.json", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads((words / "config.json").read_text())["eos_token_id"] == [2, 0]
    assert json.loads((words / "tokenizer_config.json").read_text())["chat_template"] == CHATML
    parameters = sum(tensor.elements for tensor in read_header(good).tensors.values())
    vectors = 7 * 64
    assert GgufFacts(**json.loads((words / "lmx.json").read_text())["gguf"]) == GgufFacts(
        architecture="llama",
        context_length=8192,
        quantization="Q4_0",
        size_bytes=good.stat().st_size,
        mlx_refusal="",
        inexact={},
        sampling={},
        parameters=parameters,
        mlx_bytes=vectors * 4 + (parameters - vectors) // 32 * (16 + 4),
    )


def test_a_changed_file_is_converted_again_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    def convert() -> list[tuple[Path, int]]:
        found = resolve(str(path), tmp_path / "cache", "mlx")
        return [(folder, (folder / "config.json").stat().st_mtime_ns) for folder in (found.words, found.path)]

    path = build_gguf(tmp_path / "tiny.gguf", seed=1)
    first = convert()
    assert convert() == first
    build_gguf(path, seed=2)
    assert not {folder for folder, _ in convert()} & {folder for folder, _ in first}


def test_what_is_damaged_or_half_done_is_made_again(good: Path, tmp_path: Path) -> None:
    found = resolve(str(good), tmp_path, "mlx")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for damaged in (found.words / "tokenizer.json", found.words / "lmx.json", *found.path.glob("*.safetensors")):
        truncate(damaged, 10)
        leftover = damaged.parent.with_name(f".{damaged.parent.name}.unfinished")  # of a converter that was killed
        leftover.mkdir()
        (leftover / damaged.name).write_bytes(b"half")
        assert resolve(str(good), tmp_path, "mlx") == found
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert [path.name for path in after if after[path] != before[path]] == []


def test_the_makers_sampling_is_read_from_the_file(tmp_path: Path) -> None:
    def metadata(writer: Any) -> None:
        writer.add_sampling_temp(0.5)
        writer.add_sampling_top_k(40)
        writer.add_sampling_mirostat(2)

    path = build_gguf(tmp_path / "a.gguf", metadata=metadata)
    assert resolve(str(path), tmp_path / "cache").sampling == {"temperature": 0.5, "top_k": 40}


def test_converters_at_once_agree(good: Path, tmp_path: Path) -> None:
    for arguments in (["words", good, tmp_path / "words"], ["weights", good, tmp_path / "weights", tmp_path / "words"]):
        command = [sys.executable, "-m", "lmx.hub.convert", *map(str, arguments)]
        converters = [subprocess.Popen(command) for _ in range(3)]
        assert [converter.wait() for converter in converters] == [0, 0, 0]
    assert sorted(os.listdir(tmp_path)) == ["weights", "words"]


# --- split files --------------------------------------------------------------------------------------


def test_a_split_file_is_one_model_on_llama_cpp(good: Path, tmp_path: Path) -> None:
    first = build_gguf(tmp_path / "tiny.gguf", "Q4_0", split_max_tensors=12)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    found = resolve(str(first), tmp_path / "cache", "llama")
    assert (found.id, found.path) == ("tiny", first)
    assert found.size_bytes == sum(part.stat().st_size for part in parts)
    resolve(str(good), tmp_path / "cache", "llama")
    assert words_folder(first, tmp_path / "cache")[1].parameters == words_folder(good, tmp_path / "cache")[1].parameters
    with pytest.raises(ModelInvalid, match=r"part 2 of 3\. Name the first: \S+/tiny-00001-of-00003\.gguf"):
        resolve(str(parts[1]), tmp_path / "cache")
    with pytest.raises(ModelInvalid, match=r"split into 3 parts; join them with `llama-gguf-split --merge"):
        resolve(str(first), tmp_path / "cache", "mlx")
    parts[1].unlink()
    with pytest.raises(ModelInvalid, match=r"missing: tiny-00002-of-00003\.gguf"):
        resolve(str(first), tmp_path / "cache")
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelInvalid, match=r"part 1 of 3 .*NAME-00001-of-00003\.gguf"):
        resolve(str(tmp_path / "renamed.gguf"), tmp_path / "cache")


# --- the Hugging Face cache ---------------------------------------------------------------------------


def test_a_repository_of_gguf_files_in_the_hugging_face_cache(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some-org--Tiny-GGUF"
    snapshot = repository / "snapshots" / "abc123"
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    shutil.copy(good, repository / "blobs" / "0123")
    for name in ("Tiny-Q4_0.gguf", "mmproj-Tiny-F16.gguf"):
        (snapshot / name).symlink_to("../../blobs/0123")
    found = resolve("some-org/Tiny-GGUF", tmp_path / "ours", "llama")
    assert (found.id, found.path, found.format) == ("some-org/Tiny-GGUF", snapshot / "Tiny-Q4_0.gguf", "gguf")
    assert resolve(str(found.path), tmp_path / "ours", "llama").id == "Tiny-Q4_0"

    (snapshot / "Tiny-Q8_0.gguf").symlink_to("../../blobs/0123")
    with pytest.raises(ModelInvalid, match=r"Tiny-Q4_0\.gguf, Tiny-Q8_0\.gguf\. .*by its path, for example /"):
        resolve("some-org/Tiny-GGUF", tmp_path / "ours")
    (repository / "refs" / "main").write_text("gone")
    with pytest.raises(ModelNotFound, match="hf download some-org/Tiny-GGUF"):
        resolve("some-org/Tiny-GGUF", tmp_path / "ours")


# --- bad files ----------------------------------------------------------------------------------------


def bare(
    path: Path, architecture: str, *, weights: bool, vocabulary: Writes = add_vocabulary, context_length: int = 512
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    if context_length:
        writer.add_context_length(context_length)
    vocabulary(writer)
    if weights:
        writer.add_tensor("token_embd.weight", np.zeros((train_tokenizer().get_vocab_size(), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def type_of_first_tensor(good: Path) -> int:
    """Where its type stands: name, dimensions (4), extents (8 each), type."""
    data = good.read_bytes()
    start = data.index(b"output_norm.weight")
    return start + len(b"output_norm.weight") + 4 + 8


BAD: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "empty": (lambda good, path: path.write_bytes(b""), "no GGUF file"),
    "a page": (lambda good, path: path.write_bytes(b"<html>Not found</html>"), "no GGUF file: it begins with b'<htm'"),
    "magic only": (lambda good, path: path.write_bytes(b"GGUF"), "truncated or damaged"),
    "tail missing": (lambda good, path: path.write_bytes(good.read_bytes()[:-50]), "truncated or damaged"),
    "half the header": (lambda good, path: path.write_bytes(good.read_bytes()[:9000]), "truncated or damaged"),
    "few bytes": (lambda good, path: path.write_bytes(good.read_bytes()[:100]), "truncated or damaged"),
    "broken string": (lambda good, path: rewrite(good, path, 32, b"\xff\xfe"), "truncated or damaged"),
    "endless string": (lambda good, path: rewrite(good, path, 24, b"\xff" * 8), "truncated or damaged"),
    "version 1": (lambda good, path: rewrite(good, path, 4, struct.pack("<I", 1)), "version 1; 2 and 3 are read"),
    "version 9": (lambda good, path: rewrite(good, path, 4, struct.pack("<I", 9)), "version 9"),
    "big-endian": (lambda good, path: rewrite(good, path, 4, struct.pack(">I", 3)), "big-endian"),
    "unknown type": (
        lambda good, path: rewrite(good, path, type_of_first_tensor(good), struct.pack("<I", 99)),
        r"output_norm\.weight is of the type 99",
    ),
    "vocabulary only": (lambda good, path: bare(path, "llama", weights=False), "a vocabulary only and no weights"),
    "no context length": (
        lambda good, path: bare(path, "llama", weights=True, context_length=0),
        r"lacks llama\.context_length",
    ),
    "no vocabulary": (
        lambda good, path: bare(path, "llama", weights=True, vocabulary=lambda writer: None),
        "no vocabulary",
    ),
    "a foreign vocabulary": (
        lambda good, path: bare(path, "rwkv7", weights=True, vocabulary=foreign_vocabulary),
        "tokenizer of the kind 'rwkv'",
    ),
    "a foreign pre-tokenizer": (
        lambda good, path: bare(path, "llama", weights=True, vocabulary=lambda w: add_vocabulary(w, "klingon")),
        "'klingon'",
    ),
}


def foreign_vocabulary(writer: Any) -> None:
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(["a", "b"])


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_file_is_refused_and_leaves_nothing_behind(bad: str, good: Path, tmp_path: Path) -> None:
    make, message = BAD[bad]
    path = tmp_path / "bad.gguf"
    make(good, path)
    with pytest.raises(ModelInvalid, match=message) as caught:
        convert_words(path, tmp_path / "cache" / "words")
    assert str(path) in caught.value.message
    assert os.listdir(tmp_path / "cache") == []


def test_the_converters_message_reaches_the_user(tmp_path: Path) -> None:
    path = bare(tmp_path / "bare.gguf", "llama", weights=False)
    with pytest.raises(ModelInvalid, match=rf"^{path} holds a vocabulary only and no weights\. Name"):
        resolve(str(path), tmp_path / "cache")
    assert os.listdir(tmp_path / "cache" / "words") == []


ODD: dict[str, tuple[Writes, str]] = {
    "experts": (lambda w: w.add_expert_count(8), "mixture of experts"),
    "a bias": (
        lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32)),
        r"has besides .* blk\.0\.attn_q\.bias",
    ),
    "longrope": (
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE) or w.add_rope_scaling_factor(4.0),
        "longrope",
    ),
    "rope factors": (
        lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32)),
        "not Llama 3's",
    ),
    "a type without a formula": (
        lambda w: w.add_tensor("k", np.zeros((1, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K),
        "cannot dequantise its tensors of type Q8_K",
    ),
    "a scale": (lambda w: w.add_attention_scale(0.5), r"llama\.attention\.scale"),
    "partly rotated": (lambda w: w.add_key_length(32), "keys have 32 dimensions, its values 16, and 16 are rotated"),
    "layers differ": (
        lambda w: w.add_array("llama.attention.head_count", [4, 4, 2]),
        r"layers differ in llama\.attention\.head_count",
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_mlx_would_compute_otherwise_it_is_not_given(odd: str, tmp_path: Path) -> None:
    metadata, message = ODD[odd]
    path = build_gguf(tmp_path / "odd.gguf", metadata=metadata)
    with pytest.raises(ModelInvalid, match=message):
        mlx_folder(GgufFile(path))


def test_an_architecture_that_lmx_does_not_know_is_left_to_llama_cpp(tmp_path: Path) -> None:
    path = bare(tmp_path / "new.gguf", "mamba9", weights=True)
    found = resolve(str(path), tmp_path / "cache", "llama")
    assert (found.architecture, found.quantization, found.context_length) == ("mamba9", "F32", 512)
    with pytest.raises(
        ModelInvalid, match=r"cannot run on MLX: .*llama, qwen2, qwen3, gemma3, not 'mamba9'. Set backend"
    ):
        resolve(str(path), tmp_path / "cache", "mlx")
    assert not (tmp_path / "cache" / "converted").exists()
