"""Messages to token ids and token ids to text, with the tokenizer and template of SmolLM2 and of our small models."""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lmx.chat.model import ChatModel
from lmx.chat.text import TextStream
from lmx.errors import InvalidRequest, ModelInvalid
from lmx.hub.inventory import EMBEDDED_ID, resolve
from tests.models import CORPUS, SPECIAL_TOKENS, train_tokenizer, write_tokenizer

USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return ChatModel.load(resolve(EMBEDDED_ID, tmp_path_factory.mktemp("cache")).words)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    return folder


@pytest.fixture(scope="module")
def chat(base: Path) -> ChatModel:
    return ChatModel.load(base)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "chat"))


def with_template(folder: Path, template: str, **settings: Any) -> ChatModel:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return ChatModel.load(folder)


def rendered(model: ChatModel, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return b"".join(map(model.token_bytes, model.encode_chat(messages, **kwargs))).decode()


# --- templates ----------------------------------------------------------------------------------------


def test_smollm2_renders_its_own_template(smollm2: ChatModel) -> None:
    assert rendered(smollm2, USER) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.eos_ids == {0, 2, 4}  # <|endoftext|>, <|im_end|> and, as llama.cpp has it, <reponame>
    assert smollm2.vocab_size == 49152


def test_messages_stay_in_place_and_developer_means_system(chat: ChatModel) -> None:
    messages = [
        {"role": "developer", "content": "A"},
        {"role": "user", "content": [{"type": "text", "text": "B"}, {"type": "text", "text": "C"}]},
        {"role": "assistant", "content": None},
        {"role": "system", "content": "D"},
        {"role": "user", "content": "E"},
        {"role": "user", "content": "F"},
    ]
    turns = [("system", "A"), ("user", "B\nC"), ("assistant", ""), ("system", "D"), ("user", "E"), ("user", "F")]
    expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    assert rendered(chat, messages) == expected


def test_a_template_gets_what_transformers_gives_it(folder: Path) -> None:
    template = """
    {%- for message in messages %}
        {%- if loop.index > 1 %}{% break %}{% endif %}
        {% generation %}[{{ message.content }}]{% endgeneration %}
    {%- endfor %}
    {%- if tools %}{{ tools | tojson }}{% endif %}
    {%- if enable_thinking is defined and not enable_thinking %}<off>{% endif %}
    {{- eos_token }}{{ bos_token }}|{{ strftime_now("%Y") | length }}"""
    model = with_template(folder, template, bos_token={"content": "<|endoftext|>", "special": True})
    tools = [{"type": "function", "function": {"name": "é<b>'&"}}]
    two = [*USER, {"role": "user", "content": "not shown"}]
    text = rendered(model, two, tools=tools, template_kwargs={"enable_thinking": False})
    tool_json = '[{"type": "function", "function": {"name": "é<b>\'&"}}]'
    assert text == f"[Hello]{tool_json}<off><|im_end|><|endoftext|>|4"
    assert rendered(model, USER, tools=[]) == "[Hello]<|im_end|><|endoftext|>|4"


def test_tool_calls_arrive_as_objects(folder: Path) -> None:
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }};"
    template += "{% endfor %}{% endfor %}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "user", "content": "", "tool_calls": []},
    ]
    assert rendered(with_template(folder, template), messages) == "Rome;"


def test_a_list_of_templates_is_chosen_from(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    model = ChatModel.load(folder)
    assert (rendered(model, USER), rendered(model, USER, tools=[{"type": "function"}])) == ("plain", "tools")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "\ufeffhere"),
        ("chat_template.json", json.dumps({"chat_template": "here"})),
        ("chat_template.json", json.dumps({"chat_template": {"default": "here", "tool_use": "tools"}})),
        ("processor_config.json", json.dumps({"chat_template": "here"})),
        ("additional_chat_templates/default.jinja", "here"),
    ],
)
def test_a_template_is_found_wherever_transformers_reads_one(file: str, content: str, folder: Path) -> None:
    write_tokenizer(folder, chat_template=None)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(content, encoding="utf-8")
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (folder / "additional_chat_templates" / "._tool_use.jinja").write_bytes(b"\0\5\x16\7 AppleDouble {% if %}")
    model = ChatModel.load(folder)
    assert (rendered(model, USER), rendered(model, USER, tools=[{"type": "function"}])) == ("here", "tools")


def test_templates_of_a_dictionary_are_chosen_from(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    templates = {"default": "plain", "tool_use": "tools"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}), encoding="utf-8-sig")
    model = ChatModel.load(folder)
    assert (rendered(model, USER), rendered(model, USER, tools=[{"type": "function"}])) == ("plain", "tools")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[7].content.strip() }}", "messages|undefined|None"),
        ("{{ 'a' + messages[0] }}", "TypeError"),
        ("{{ messages.append(1) }}", "unsafe|not callable"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_refuses_is_the_clients_error(template: str, message: str, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        with_template(folder, template).encode_chat(USER)
    assert caught.value.param == "messages"


def test_what_cannot_be_rendered_is_refused(chat: ChatModel) -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content\[0\] is of type 'image_url'"):
        chat.encode_chat(image)
    with pytest.raises(InvalidRequest, match="may not set messages") as caught:
        chat.encode_chat(USER, template_kwargs={"messages": []})
    assert caught.value.param == "chat_template_kwargs"
    with pytest.raises(InvalidRequest, match="surrogate"):
        chat.encode_chat([{"role": "user", "content": "a\ud800"}])
    with pytest.raises(InvalidRequest, match="surrogate"):
        chat.encode_text("a\ud800")


def test_a_model_without_a_template_says_so(folder: Path) -> None:
    write_tokenizer(folder, chat_template=None)
    model = ChatModel.load(folder)
    with pytest.raises(InvalidRequest, match=r"no chat template.*/v1/completions"):
        model.encode_chat(USER)
    assert model.decode(model.encode_text("Hello")) == "Hello"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json cannot be used"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer_config.json", '{"chat_template": 3}', "neither a string nor named templates"),
        ("chat_template.jinja", "a\n{% if %}", "does not compile: line 2"),
        ("config.json", "[]", r"config\.json holds a JSON list"),
    ],
)
def test_broken_files_are_refused_at_load(file: str, content: str, message: str, folder: Path) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ModelInvalid, match=message):
        ChatModel.load(folder)


def test_a_model_without_any_end_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelInvalid, match="eos_token_id"):
        ChatModel.load(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert ChatModel.load(folder).eos_ids == {0, 2}


# --- special tokens in messages -----------------------------------------------------------------------

NASTY = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<|im_", "end|>", "<", " ", "\n", "system", "é", "\U000f0000"]), max_size=8
).map("".join)


@given(texts=st.lists(NASTY, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_spelled_out_special_tokens_stay_text(smollm2: ChatModel, texts: list[str]) -> None:
    ids = smollm2.encode_chat([{"role": "system", "content": text} for text in texts])
    assert ids.count(1) == len(texts) + 1
    assert ids.count(2) == len(texts)
    assert 0 not in ids
    expected = "".join(f"<|im_start|>system\n{text}<|im_end|>\n" for text in texts) + "<|im_start|>assistant\n"
    assert b"".join(map(smollm2.token_bytes, ids)).decode() == expected


@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_other_text_gives_the_ids_of_the_plain_rendering(smollm2: ChatModel, texts: list[str]) -> None:
    """Also when one message spells a special token: the others' ids stay the same."""
    messages = [{"role": "system", "content": text} for text in texts]
    plain = "".join(f"<|im_start|>system\n{text}<|im_end|>\n" for text in texts)
    start = smollm2.encode_text(plain)
    assert smollm2.encode_chat(messages)[: len(start)] == start
    assert smollm2.encode_chat([*messages, {"role": "user", "content": "<|im_end|>"}])[: len(start)] == start


def test_tool_results_arguments_and_names_cannot_end_a_turn_either(folder: Path) -> None:
    model = with_template(folder, "{% for m in messages %}{{ m | tojson }}{% endfor %}<|im_end|>{{ tools | tojson }}")
    bad = "<|im_end|>"
    call = {"type": "function", "function": {"name": bad, "arguments": json.dumps({bad: [bad]})}}
    messages = [
        {"role": "tool", "name": bad, "content": bad},
        {"role": "assistant", "content": bad, "tool_calls": [call]},
    ]
    ids = model.encode_chat(messages, tools=[{"type": "function", "function": {"name": bad}}])
    assert ids.count(2) == 1
    assert b"".join(map(model.token_bytes, ids)).count(bad.encode()) == 8


def test_completions_and_tokenize_choose(folder: Path) -> None:
    model = with_template(folder, "x", add_bos_token=True, bos_token="<|endoftext|>")
    assert model.encode_text("<|im_end|>") == [0, 2]
    assert model.tokenize("<|im_end|>", add_special=False, parse_special=True) == [2]
    literal = model.tokenize("<|im_end|>", add_special=False, parse_special=False)
    assert 2 not in literal
    assert model.decode(literal) == "<|im_end|>"


def test_truncation_in_the_tokenizer_file_is_switched_off(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert ChatModel.load(folder).encode_text("a b c d e f g") == train_tokenizer().encode("a b c d e f g").ids


def test_threads_may_encode_at_the_same_time(chat: ChatModel) -> None:
    lines = [line for line in CORPUS.read_text(encoding="utf-8").splitlines() if line]

    def encode(line: str) -> list[int]:
        return chat.encode_chat([{"role": "user", "content": line + "<|im_end|>"}])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, lines)) == [encode(line) for line in lines]


# --- text streams -------------------------------------------------------------------------------------


def chunked(tokens: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    edges = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    return [tokens[begin:end] for begin, end in pairwise(edges)]


def streamed(stream: TextStream, chunks: Sequence[Sequence[int]]) -> str:
    return "".join([*map(stream.feed, chunks), stream.finish()])


TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab \n😀é你")), max_size=60)
CUTS = st.lists(st.integers(0, 200), max_size=20)


@given(text=TEXTS, cuts=CUTS)
@settings(deadline=None)
def test_a_text_comes_back_whatever_the_chunks(chat: ChatModel, text: str, cuts: list[int]) -> None:
    tokens = chat.tokenize(text, add_special=False, parse_special=False)
    assert chat.decode(tokens) == text
    assert streamed(chat.text_stream(), chunked(tokens, cuts)) == text


@given(tokens=st.lists(st.integers(0, 1499), max_size=60), cuts=CUTS)
@settings(deadline=None)
def test_any_tokens_stream_as_the_tokenizer_decodes_them(chat: ChatModel, tokens: list[int], cuts: list[int]) -> None:
    """Random tokens are full of broken UTF-8; special ones give no text."""
    expected = train_tokenizer().decode(tokens, skip_special_tokens=True)
    assert chat.decode(tokens) == expected
    assert streamed(chat.text_stream(), chunked(tokens, cuts)) == expected


def test_a_character_is_sent_when_it_is_whole_and_a_broken_one_once(chat: ChatModel) -> None:
    tokens = [chat.tokenize(byte, add_special=False, parse_special=False) for byte in ("a", "𝄞")]
    assert len(tokens[1]) == 4
    stream = chat.text_stream()
    assert [stream.feed([token]) for token in tokens[0] + tokens[1]] == ["a", "", "", "", "𝄞"]
    assert stream.feed(tokens[1][:3]) == ""
    assert stream.finish() == "\ufffd"
    assert chat.text_stream().feed([2, *tokens[0], 0, 99999]) == "a"


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    return min((text.find(stop) for stop in stops if stop in text), default=None)


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=CUTS,
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_cut_at_the_first_occurrence(text: str, stops: list[str], cuts: list[int]) -> None:
    pieces = [bytes([byte]) for byte in range(256)]
    stream = TextStream(pieces, stops)
    sent = ""
    at = first_stop(text, stops)
    expected = text if at is None else text[:at]
    for chunk in chunked(text.encode(), cuts):
        sent += stream.feed(chunk)
        assert expected.startswith(sent)  # nothing is ever sent that would have to be taken back
    sent += stream.finish()
    assert (sent, stream.stopped) == (expected, at is not None)
    if stream.stopped:
        assert stream.feed(b"more") == ""


def test_a_stop_string_waits_for_one_that_may_begin_earlier() -> None:
    pieces = [bytes([byte]) for byte in range(256)]
    for end, sent in ((b"d", "1a"), (b"X", "1"), (b"", "1a")):
        stream = TextStream(pieces, ["abcX", "bc"])
        assert [stream.feed(bytes([byte])) for byte in b"1abc"] == ["1", "", "", ""]
        assert "1" + stream.feed(end) + stream.finish() == sent
        assert stream.stopped


def test_long_stop_strings_are_found_at_any_overlap() -> None:
    text = "a" * 5000 + "b" + "ab" * 3000 + "c"
    stops = ["a" * 4000 + "ab", "ab" * 2000 + "c", "x" * 4096]
    for size in (1, 7, 4096):
        stream = TextStream([bytes([byte]) for byte in range(256)], stops)
        sent = "".join(stream.feed(text[at : at + size].encode()) for at in range(0, len(text), size))
        assert (sent + stream.finish(), stream.stopped) == ("a" * 999, True)


def test_no_more_is_held_back_than_may_become_a_stop_string(chat: ChatModel) -> None:
    stream = TextStream([bytes([byte]) for byte in range(256)], ["STOP", "\n\nuser:"])
    assert [stream.feed(bytes([byte])) for byte in b"a\nbSTxSTOP!"] == [
        "a",
        "",
        "\nb",
        "",
        "",
        "STx",
        "",
        "",
        "",
        "",
        "",
    ]
    assert stream.stopped
    assert stream.finish() == ""


def sentence_piece(folder: Path, strip: bool) -> ChatModel:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "▁▁"]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return ChatModel.load(folder)


@pytest.mark.parametrize("strip", [True, False])
def test_sentencepiece_spaces_and_bytes(strip: bool, folder: Path) -> None:
    model = sentence_piece(folder, strip)
    oracle = Tokenizer.from_file(str(folder / "tokenizer.json"))
    char = [oracle.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    words = [oracle.token_to_id(piece) for piece in ("▁a", "b", "▁", "▁b", "▁▁", "a", "</s>")]
    for tokens in (words, words[3:], [*char, *words], [*words, *char, *char], words[4:], [words[2], *char]):
        expected = oracle.decode(tokens, skip_special_tokens=True)
        assert model.decode(tokens) == expected
        assert streamed(model.text_stream(), [[token] for token in tokens]) == expected
    assert streamed(model.text_stream(continues=True), [[words[0]]]) == " a"


def test_a_decoder_of_another_kind_is_refused(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelInvalid, match="WordPiece"):
        ChatModel.load(folder)


# --- going on, and filling in -------------------------------------------------------------------------


def test_a_prompt_ends_right_after_the_content_it_goes_on_with(smollm2: ChatModel, folder: Path) -> None:
    last = {"role": "assistant", "content": "Sure: <|im_end|> "}
    assert rendered(smollm2, [*USER, last], continues=True).endswith("<|im_start|>assistant\nSure: <|im_end|> ")
    trims = with_template(folder, "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    assert rendered(trims, [*USER, last | {"content": " A "}], continues=True) == "[Hello][A "
    twice = with_template(folder, "{% for m in messages %}{{ m.content }}|{{ m.content }};{% endfor %}")
    assert rendered(twice, [*USER, last | {"content": "A"}], continues=True) == "Hello|Hello;A|A"
    hides = with_template(folder, "{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}")
    with pytest.raises(InvalidRequest, match="leaves the last message's content out"):
        hides.encode_chat([*USER, last], continues=True)


@pytest.mark.parametrize(
    ("tokens", "expected", "ends"),
    [
        (
            ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"],
            "<|fim_prefix|>a b<|fim_suffix|> c<|fim_middle|>",
            ["<|fim_pad|>", "<|endoftext|>"],
        ),
        (
            ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
            "<fim_prefix>a b<fim_suffix> c<fim_middle>",
            ["<|endoftext|>"],
        ),
        (
            ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
            "<｜fim▁begin｜>a b<｜fim▁hole｜> c<｜fim▁end｜>",
            [],
        ),
        (["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], "▁<PRE>a b▁<SUF> c▁<MID>", ["▁<EOT>"]),
        (["[PREFIX]", "[SUFFIX]"], "[SUFFIX] c[PREFIX]a b", []),
    ],
)
def test_the_middle_is_asked_for_as_the_model_was_trained(
    folder: Path, tokens: list[str], expected: str, ends: list[str]
) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = ChatModel.load(folder)
    found, stops = model.encode_middle("a b", " c", add_special=True)
    assert b"".join(map(model.token_bytes, found)).decode() == expected
    assert [model.token_name(token) for token in stops] == ends
    assert model.encode_middle(model.encode_text("a b"), " c", add_special=False)[0] == found


def test_a_sentencepiece_suffix_begins_in_mid_text(tmp_path: Path) -> None:
    words = ["▁", "☺", "a", "c", "▁a", "▁c", "▁<PRE>", "▁<SUF>", "▁<MID>", "<s>"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["▁<PRE>", "▁<SUF>", "▁<MID>", "<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>", "eos_token": "a"}')
    model = ChatModel.load(tmp_path)
    found, _ = model.encode_middle("a", "c", add_special=True)
    assert [model.token_name(token) for token in found] == ["<s>", "▁<PRE>", "▁a", "▁<SUF>", "c", "▁<MID>"]
