"""Token ids out of a GGUF file equal those of llama.cpp's own tokenizer, on text that tokenizers disagree about."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lmx.chat.model import ChatModel
from lmx.errors import ModelInvalid
from lmx.hub.gguf.file import GgufFile
from lmx.hub.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from lmx.hub.gguf.tokenizer import write_tokenizer
from lmx.hub.inventory import EMBEDDED_ID, resolve
from tests.mixed_text import mixed_lines
from tests.models import CORPUS, build_gguf

pytest.importorskip("llama_cpp", reason="llama-cpp-python, the judge, is not installed: pip install lmx[gguf]")
from tests.llama_vocabulary import LlamaVocabulary, llama_vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


@dataclass(frozen=True, slots=True)
class Pair:
    """Both tokenizers of one file."""

    ours: ChatModel
    theirs: LlamaVocabulary
    control: frozenset[int]
    special: list[str]
    """What a user might spell out."""


def chat_model(file: Any, folder: Path) -> ChatModel:
    folder.mkdir(exist_ok=True)
    ends = write_tokenizer(file, folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    return ChatModel.load(folder)


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if request.param == "smollm2":
        path = resolve(EMBEDDED_ID, tmp_path_factory.mktemp("cache")).source
    else:
        path = request.getfixturevalue("gemma_gguf")
    file = GgufFile(path)
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    special.sort(key=lambda token: "unused" in token)  # Gemma's 6,242 places for tokens to come behind the others
    control = frozenset(index for index, kind in enumerate(types) if kind == CONTROL)
    with llama_vocabulary(path) as theirs:
        yield Pair(chat_model(file, tmp_path_factory.mktemp("tokenizer")), theirs, control, special)


def assert_same_ids(ours: ChatModel, theirs: LlamaVocabulary, lines: list[str], both: tuple[bool, ...]) -> None:
    """``both`` are the values of add_special and of parse_special to try."""
    for line, add_special, parse_special in product(lines, both, both):
        how = {"add_special": add_special, "parse_special": parse_special}
        assert ours.tokenize(line, **how) == theirs.tokenize(line, **how), (line, how)


def test_token_ids_are_llama_cpps(pair: Pair) -> None:
    lines = mixed_lines(2500, pair.special)
    assert len(set(lines)) > 2000
    assert_same_ids(pair.ours, pair.theirs, lines, (False, True))


def test_a_special_token_in_user_text_is_text(pair: Pair) -> None:
    names = {token: pair.ours.token_bytes(token).decode() for token in sorted(pair.control)[:100]}
    for line in mixed_lines(600, list(names.values()), seed=1):
        literal = pair.ours.tokenize(line, add_special=False, parse_special=False)
        assert not pair.control.intersection(literal), line
        text = pair.ours.decode(literal)
        assert [text.count(name) for name in names.values()] == [line.count(name) for name in names.values()]
    for token, name in names.items():
        assert pair.ours.tokenize(name, add_special=False, parse_special=True) == [token]


def test_the_bytes_of_every_token_are_llama_cpps(pair: Pair) -> None:
    assert pair.ours.vocab_size == pair.theirs.size
    for token in range(pair.theirs.size):
        assert pair.ours.token_bytes(token) == pair.theirs.piece(token, special=True), token
        stream = pair.ours.text_stream(continues=True)
        text = stream.feed([token]) + stream.finish()
        assert text == pair.theirs.piece(token, special=False).decode(errors="replace"), token


def test_generations_end_where_llama_cpp_ends_them(pair: Pair) -> None:
    assert pair.ours.eos_ids == pair.theirs.ends()


# --- vocabularies made to measure ---------------------------------------------------------------------


def gguf_with(path: Path, vocabulary: Callable[[Any], None], size: int, name: str = "Test") -> Path:
    return build_gguf(path, vocabulary=vocabulary, vocab_size=size, metadata=lambda writer: writer.add_name(name))


class Renamed:
    """A GGUF file that names another pre-tokenizer."""

    def __init__(self, file: GgufFile, pre_tokenizer: str) -> None:
        self.path, self.need = file.path, file.need
        self._file, self._pre_tokenizer = file, pre_tokenizer

    def get(self, key: str, default: Any = None) -> Any:
        return self._pre_tokenizer if key == "tokenizer.ggml.pre" else self._file.get(key, default)


def revealing_gguf(path: Path, lines: list[str]) -> Path:
    """Every two characters that stand side by side in ``lines`` would merge, so that each cut between them shows.

    Some words are tokens that no merge leads to, and U+001D is none.
    """
    alphabet = byte_alphabet()
    borders = {(a.encode()[-1], b.encode()[0]) for line in lines for a, b in pairwise(line)}
    merges = [(alphabet[a], alphabet[b]) for a, b in sorted(borders) if 0x1D not in (a, b)]
    random.Random(0).shuffle(merges)
    single = [character for byte, character in alphabet.items() if byte != 0x1D]
    tokens = [*single, *map("".join, merges), "Ġdef", "README", "ĠĠĠ", "<s>", "</s>", "õ÷"]

    def vocabulary(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([NORMAL] * (len(tokens) - 3) + [CONTROL, CONTROL, USER_DEFINED])
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(len(tokens) - 3)
        writer.add_eos_token_id(len(tokens) - 2)

    return gguf_with(path, vocabulary, len(tokens))


def byte_alphabet() -> dict[int, str]:
    """The characters that stand for bytes in GPT-2's tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def test_every_known_pre_tokenizer_cuts_as_llama_cpps_does(tmp_path: Path) -> None:
    lines = mixed_lines(500, ("<s>", "</s>", "õ÷"), seed=2)
    path = revealing_gguf(tmp_path / "revealing.gguf", lines)
    file = GgufFile(path)
    compared: set[PreTokenizer] = set()
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        with llama_vocabulary(path, name) as theirs:
            ours = chat_model(Renamed(file, name), tmp_path / name)
            # Names of the same rules need not prove them again.
            assert_same_ids(ours, theirs, lines[: 20 if pre_tokenizer in compared else None], (True,))
            assert ours.token_bytes(ours.vocab_size - 1) == "õ÷".encode()
        compared.add(pre_tokenizer)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    prefix = tmp_path_factory.mktemp("sentencepiece") / "spm"
    sentencepiece.SentencePieceTrainer.train(
        input=str(CORPUS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


EXTRA = (
    *((blanks, NORMAL) for length in range(2, 17) if (blanks := "▁" * length)),
    *(("=" * length, NORMAL) for length in range(2, 17)),
    ("▁X", USER_DEFINED),
    ("<|user|>", CONTROL),
    ("<|end|>", CONTROL),
    ("<|endoftext|>", CONTROL),
    ("<tag>", USER_DEFINED),
    ("\n\n", USER_DEFINED),
)


def sentence_vocabulary(
    oracle: sentencepiece.SentencePieceProcessor, **flags: bool
) -> tuple[Callable[[Any], None], int]:
    """A trained vocabulary, with tokens of equal scores and of every kind added."""
    size = oracle.get_piece_size()
    tokens = [oracle.id_to_piece(index) for index in range(size)]
    kinds = [
        UNKNOWN if oracle.is_unknown(i) else CONTROL if oracle.is_control(i) else BYTE if oracle.is_byte(i) else NORMAL
        for i in range(size)
    ]
    extra = [(token, kind) for token, kind in EXTRA if token not in tokens]
    scores = [oracle.get_score(index) for index in range(size)]

    def write(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*tokens, *(token for token, _ in extra)])
        writer.add_token_types([*kinds, *(kind for _, kind in extra)])
        writer.add_token_scores([*scores, *([-1e6] * len(extra))])
        for flag, value in flags.items():
            writer.add_bool(f"tokenizer.ggml.{flag}", value)

    return write, size + len(extra)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("Llama 2", {}),
        ("Gemma 2", {"add_space_prefix": False}),
        ("Phi-3 mini", {"add_bos_token": False}),
        ("Both ends", {"add_eos_token": True}),
    ],
)
def test_a_sentencepiece_vocabulary_of_every_sort(
    name: str, flags: dict[str, bool], sentences: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    vocabulary, size = sentence_vocabulary(sentences, **flags)
    path = gguf_with(tmp_path / "spm.gguf", vocabulary, size, name)
    lines = mixed_lines(800, [token for token, _ in EXTRA if "<" in token], seed=3)
    if "Phi" in name:
        # Of the blanks that Phi-3's marks swallow, llama.cpp knows ASCII's only; tokenizers, as Phi-3's own, all.
        lines = [line for line in lines if line.isascii() and "\n\n" not in line]
    with llama_vocabulary(path) as theirs:
        ours = chat_model(GgufFile(path), tmp_path / "model")
        assert_same_ids(ours, theirs, lines, (False, True))
        assert ours.eos_ids == theirs.ends()
        for token in range(size):
            # llama.cpp spells a user-defined blank "▁" where it gives a normal one back as it was.
            assert ours.token_bytes(token) == theirs.piece(token, special=True).replace("▁X".encode(), b" X")


def test_gemma_4_merges_each_line_for_itself(sentences: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> None:
    tokens = [sentences.id_to_piece(index) for index in range(sentences.get_piece_size())]
    tokens += ["\n" * length for length in range(1, 8)]
    known = set(tokens)
    cuts = [(token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token))]
    cuts.sort(key=lambda pair: "\n" in pair[0] and -len("".join(pair)))  # longest first, as in Gemma's own file

    def vocabulary(writer: Any) -> None:
        writer.add_tokenizer_model("gemma4")
        writer.add_token_list(tokens)
        kinds = [BYTE if token.startswith("<0x") else NORMAL for token in tokens]
        writer.add_token_types([UNKNOWN, CONTROL, CONTROL, *kinds[3:]])
        writer.add_token_merges([f"{left} {right}" for left, right in cuts if left in known and right in known])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(False)

    path = gguf_with(tmp_path / "gemma4.gguf", vocabulary, len(tokens))
    with llama_vocabulary(path) as theirs:
        ours = chat_model(GgufFile(path), tmp_path / "model")
        assert_same_ids(ours, theirs, mixed_lines(800, seed=4), (False, True))
        assert ours.tokenize("a", add_special=True, parse_special=True)[0] == 1


@pytest.mark.parametrize(
    "names",
    [
        ["<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>"],
        ["<|flush|>", "<|calls|>", "<|end|>"],
        ["<|call|>", "<|end|>"],
        ["<|tool_response>", "<turn|>", "<eos>"],
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"],
        ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "[EOS]", "<｜end▁of▁sentence｜>"],
        ["<|assistant|>"],
    ],
)
def test_ends_are_found_by_name_whatever_type_the_file_gives_them(names: list[str], tmp_path: Path) -> None:
    base = ["<s>", "</s>", *byte_alphabet().values(), "ab"]
    tokens = [*base, *names]

    def vocabulary(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([CONTROL, CONTROL, *([NORMAL] * (len(base) - 2)), *([USER_DEFINED] * len(names))])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(0)

    path = gguf_with(tmp_path / "ends.gguf", vocabulary, len(tokens))
    with llama_vocabulary(path) as theirs:
        ours = chat_model(GgufFile(path), tmp_path / "model")
        assert ours.eos_ids == theirs.ends()
        for name in names:
            how = {"add_special": False, "parse_special": False}
            literal = ours.tokenize(name, **how)
            assert ours.decode(literal) == name
            if ours.eos_ids.issuperset(ours.tokenize(name, add_special=False, parse_special=True)):
                assert literal == theirs.tokenize(name, **how) != [tokens.index(name)]


def small_vocabulary(writer: Any) -> None:
    tokens = ["</s>", *byte_alphabet().values(), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_eos_token_id(0)


@pytest.mark.parametrize("merges", [[], ["ab"], ["a zz"], ["a c"]])
def test_damaged_merges_are_refused(merges: list[str], tmp_path: Path) -> None:
    def vocabulary(writer: Any) -> None:
        small_vocabulary(writer)
        if merges:
            writer.add_token_merges(merges)

    path = gguf_with(tmp_path / "damaged.gguf", vocabulary, 258)
    with pytest.raises(ModelInvalid, match=f"{path}.*{merges[0] if merges else 'no merges'}"):
        write_tokenizer(GgufFile(path), tmp_path)


def test_each_chat_template_of_a_file_is_kept(tmp_path: Path) -> None:
    def vocabulary(writer: Any) -> None:
        small_vocabulary(writer)
        writer.add_token_merges(["a b"])
        names = {"default": "plain", "tool_use": "tools"}
        writer.add_chat_template([{"name": name, "template": template} for name, template in names.items()])

    path = gguf_with(tmp_path / "templates.gguf", vocabulary, 258)
    model = chat_model(GgufFile(path), tmp_path / "model")
    messages = [{"role": "user", "content": "Hi"}]
    assert model.decode(model.encode_chat(messages)) == "plain"
    assert model.decode(model.encode_chat(messages, tools=[{"type": "function"}])) == "tools"
