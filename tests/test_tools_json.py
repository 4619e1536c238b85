"""The tool formats that write JSON or Python's literals: what they read, in whatever pieces it comes, and that their
grammars let nothing through that they do not read as calls."""

import ast
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jsonschema
import llguidance
import llguidance.numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.chat.events import CallArguments, CallEnd, CallStart, Content, Event, Malformed
from lmx.chat.forms.grammar import literal
from lmx.chat.tools import FORMATS, find
from lmx.chat.tools.base import Format, Tool
from lmx.chat.tools.command_r import COMMAND_R, COMMAND_R_OLD
from lmx.chat.tools.generic import GENERIC, ignores_tools, instructions
from lmx.chat.tools.granite import GRANITE
from lmx.chat.tools.hermes import HERMES
from lmx.chat.tools.literals import value
from lmx.chat.tools.llama3 import LLAMA3
from lmx.chat.tools.mistral import MISTRAL, MISTRAL_OLD
from lmx.chat.tools.phi4 import FUNCTOOLS, PHI4
from lmx.chat.tools.pythonic import LFM2, PYTHONIC
from lmx.chat.tools.source import Broken, Source
from lmx.chat.tools.tagged import APRIEL, NEMOTRON

Call = tuple[str, dict[str, Any]]

TOOLS = [
    Tool("get", {"type": "object", "properties": {"key": {"type": "string"}}}),
    Tool("get_weather", {"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool("write_file", {"type": "object", "properties": {"path": {"type": "string"}, "content": {"type": "string"}}}),
    Tool("now", {"type": "object", "properties": {}}),
]


# How the models' own templates write calls.


def _objects(calls: Sequence[Call], arguments: str = "arguments", separator: str = ", ") -> str:
    return separator.join(
        f'{{"name": {json.dumps(name)}, "{arguments}": {json.dumps(given, ensure_ascii=False)}}}'
        for name, given in calls
    )


def _hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{_objects([call])}\n</tool_call>" for call in calls)


def _command_r(calls: Sequence[Call]) -> str:
    written = [
        f'    {{"tool_call_id": "{number}", "tool_name": "{name}", "parameters": {json.dumps(given)}}}'
        for number, (name, given) in enumerate(calls)
    ]
    return "<|START_ACTION|>[\n" + ",\n".join(written) + "\n]<|END_ACTION|>"


def _command_r_old(calls: Sequence[Call]) -> str:
    listed = [{"tool_name": name, "parameters": given} for name, given in calls]
    return f"Action: ```json\n{json.dumps(listed, indent=4)}\n```"


def _python(calls: Sequence[Call]) -> str:
    written = [f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})" for name, given in calls]
    return f"[{', '.join(written)}]"


WRITERS: dict[str, tuple[Format, Callable[[Sequence[Call]], str]]] = {
    "hermes": (HERMES, _hermes),
    "generic": (GENERIC, _hermes),
    "llama3": (LLAMA3, lambda calls: _objects(calls, "parameters", "; ")),
    "llama3 with its token": (LLAMA3, lambda calls: "<|python_tag|>" + _objects(calls, "parameters", "; ")),
    "mistral": (MISTRAL, lambda calls: "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls)),
    "mistral with ids": (
        MISTRAL,
        lambda calls: "".join(f"[TOOL_CALLS]{n}[CALL_ID]a1b2c3d4e[ARGS]{json.dumps(a)}" for n, a in calls),
    ),
    "mistral_old": (MISTRAL_OLD, lambda calls: f"[TOOL_CALLS] [{_objects(calls)}]"),
    "granite": (GRANITE, lambda calls: f"<|tool_call|>[{_objects(calls)}]"),
    "phi4": (PHI4, lambda calls: f"<|tool_call|>[{_objects(calls)}]<|/tool_call|>"),
    "phi4 without its tokens": (PHI4, lambda calls: f"functools[{_objects(calls)}]"),
    "functools": (FUNCTOOLS, lambda calls: f" functools[{_objects(calls)}]"),
    "nemotron": (NEMOTRON, lambda calls: f"<TOOLCALL>[{_objects(calls)}]</TOOLCALL>"),
    "apriel": (APRIEL, lambda calls: f"<tool_calls>[{_objects(calls)}]</tool_calls>"),
    "command_r": (COMMAND_R, _command_r),
    "command_r_old": (COMMAND_R_OLD, _command_r_old),
    "pythonic": (PYTHONIC, _python),
    "pythonic with its tokens": (PYTHONIC, lambda calls: f"<|python_start|>{_python(calls)}<|python_end|>"),
    "lfm2": (LFM2, lambda calls: f"<|tool_call_start|>{_python(calls)}<|tool_call_end|>"),
}
HERE = tuple({form.name: form for form, _ in WRITERS.values()}.values())
writers = pytest.mark.parametrize(("form", "write"), WRITERS.values(), ids=WRITERS)


# What is read.


def read(form: Format, pieces: Sequence[str], tools: Sequence[Tool] = TOOLS) -> list[Event]:
    """The events, put together."""
    parser = form.parser(tools)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    together: list[Event] = []
    for event in events:
        match together[-1:], event:
            case [Content(before)], Content(text):
                together[-1] = Content(before + text)
            case [CallArguments(index, before)], CallArguments(same, text) if index == same:
                together[-1] = CallArguments(index, before + text)
            case _:
                together.append(event)
    return together


def cuts(text: str) -> Iterator[list[str]]:
    yield list(text)
    for middle in range(len(text) + 1):
        yield [text[:middle], text[middle:]]


def calls_of(events: Sequence[Event]) -> list[Call]:
    """The calls of an answer that is whole, whose order and numbers are checked."""
    calls: list[Call] = []
    waiting = iter(event for event in events if not isinstance(event, Content))
    for start in waiting:
        assert isinstance(start, CallStart), events
        assert start.index == len(calls)
        arguments, end = next(waiting), next(waiting)
        assert isinstance(arguments, CallArguments), events
        assert end == CallEnd(arguments.index) == CallEnd(start.index)
        calls.append((start.name, json.loads(arguments.json)))
    return calls


def content_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


MARKERS = sorted({marker for form in FORMATS for marker in form.markers} | {"```", "]", "}", ")", "'", '"', "\\"})
TWO: list[Call] = [
    ("write_file", {"path": 'a "b"\\', "content": "line\n\ttwo 'quoted' naïve 😀 \u2028 ]}\n```"}),
    ("now", {}),
]


@writers
def test_calls_are_the_same_in_whatever_pieces_they_come(form: Format, write: Callable[..., str]) -> None:
    text = "Let me see.\n" + write(TWO)
    whole = read(form, [text])
    assert calls_of(whole) == TWO
    assert content_of(whole) == "Let me see."
    for pieces in cuts(text):
        assert read(form, pieces) == whole
    assert read(form, [text + "\n"]) == whole


@pytest.mark.parametrize(
    "name", ["hermes", "llama3 with its token", "mistral with ids", "mistral_old", "command_r", "lfm2"]
)
def test_every_pair_of_cuts(name: str) -> None:
    form, write = WRITERS[name]
    text = "A" + write([("get", {"key": "é\n"})]) + "B"
    whole = read(form, [text])
    assert content_of(whole).startswith("A")
    assert content_of(whole).endswith("B")
    for first in range(len(text)):
        for second in range(first, len(text)):
            assert read(form, [text[:first], text[first:second], text[second:]]) == whole


@writers
def test_markers_inside_arguments_are_text(form: Format, write: Callable[..., str]) -> None:
    calls: list[Call] = [("write_file", {"path": m, "content": f"x{m}\n{m}{m} {write(TWO)}"}) for m in MARKERS]
    calls.append(("write_file", {"content": "".join(MARKERS)}))
    text = write(calls)
    events = read(form, [text])
    assert calls_of(events) == calls
    assert content_of(events) == ""
    assert read(form, list(text)) == events


@writers
def test_a_call_cut_off_never_ends(form: Format, write: Callable[..., str]) -> None:
    """At whatever length: nothing but the call comes out once its name is there, all of it as text before."""
    text = write([("get_weather", {"city": "Zürich"})])
    for length in range(1, len(text)):
        events = read(form, [text[:length]])
        starts = [event for event in events if isinstance(event, CallStart)]
        if starts:
            assert starts == [CallStart(0, "get_weather")]
            assert content_of(events) == ""
            pieces = "".join(event.json for event in events if isinstance(event, CallArguments))
            pieces = re.sub(r"\s", "", pieces.replace("\\u00fc", "ü"))
            assert '{"city":"Zürich"}'.startswith(pieces)
            assert not any(isinstance(event, Malformed) for event in events)
        else:
            assert content_of(events) == text[:length]
    assert starts


@writers
def test_unknown_tools_are_text(form: Format, write: Callable[..., str]) -> None:
    """With what is inside their arguments, which must not be read as a call."""
    text = "Hm: " + write([("rm", {"path": write([("get", {"key": "x"})])})])
    events = read(form, [text])
    assert content_of(events) == text
    assert "'rm' is none of the tools" in str(events)
    assert not any(isinstance(event, CallStart) for event in events)
    for pieces in cuts(text):
        assert read(form, pieces) == events


@writers
def test_an_unknown_tool_hides_no_other(form: Format, write: Callable[..., str]) -> None:
    calls: list[Call] = [("get", {"key": "1"}), ("rm", {}), ("get", {"key": "2"})]
    events = read(form, [write(calls)])
    assert [event.name for event in events if isinstance(event, CallStart)] == ["get", "get"]
    assert sum(isinstance(event, CallEnd) for event in events) == 2
    assert sum(isinstance(event, Malformed) for event in events) == 1


@writers
def test_arguments_come_while_they_are_written(form: Format, write: Callable[..., str]) -> None:
    text = write([("write_file", {"path": "p", "content": "word " * 50})])
    parser = form.parser(TOOLS)
    seen = [len(parser.feed(character)) for character in text]
    start = text.index("word")
    assert all(seen[start : start + 200])


BROKEN: list[tuple[Format, str, str]] = [
    (HERMES, '<tool_call>\n{"name": "get" "arguments": {}}\n</tool_call>', "stands where"),
    (HERMES, "<tool_call> is a tag", "stands where"),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>', "no name"),
    (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>', "no name"),
    (HERMES, '<tool_call>{"name": "get", "arguments": 5}</tool_call>', "no object"),
    (HERMES, '<tool_call>{"name": "get", "arguments": [1]}</tool_call>', "no object"),
    (HERMES, '<tool_call>{"name": "get", "arguments": "[1]"}</tool_call>', "no object"),
    (HERMES, '<tool_call>{"name": "get", "arguments": "{\\"a\\": "}</tool_call>', "cut off"),
    (HERMES, '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>', "none of the tools"),
    (GRANITE, "<|tool_call|>[]", "stands where"),
    (GRANITE, "<|tool_call|>no", "stands where"),
    (MISTRAL, "[TOOL_CALLS][ARGS]{}", "no name"),
    (MISTRAL, "[TOOL_CALLS]get[ARGS]5", "no object"),
    (MISTRAL, "[TOOL_CALLS]rm[ARGS]{}", "none of the tools"),
    (LLAMA3, '<|python_tag|>print("x")', "stands where"),
    (LLAMA3, 'Say {"name": "Bob", "age": 3}.', "none of the tools"),
    (PYTHONIC, "[get('x')]", "no name"),
    (PYTHONIC, "[rm(a=1)]", "none of the tools"),
    (LFM2, "<|tool_call_start|>[get]<|tool_call_end|>", "name("),
    (LFM2, "<|tool_call_start|>get(a=1)<|tool_call_end|>", "stands where"),
]


@pytest.mark.parametrize(("form", "text", "reason"), BROKEN, ids=lambda given: getattr(given, "name", None))
def test_what_is_no_call_is_text(form: Format, text: str, reason: str) -> None:
    events = read(form, [text])
    assert content_of(events) == text
    assert any(isinstance(event, Malformed) and reason in event.reason for event in events)
    assert not any(isinstance(event, CallStart) for event in events)
    for pieces in cuts(text):
        assert read(form, pieces) == events


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (LLAMA3, 'It is {"x": 1}, {} or { a }, {"names": [1]} or {"na'),
        (PYTHONIC, "See [1], [link](url), [ ] and a[get] and [f(x)]"),
        (COMMAND_R_OLD, "Action: think.\nAction:"),
        (HERMES, "Tags are <tool_cal and <tool_"),
        (FUNCTOOLS, "functools is a module"),
    ],
)
def test_ordinary_text_is_no_attempt(form: Format, text: str) -> None:
    for pieces in [[text], *cuts(text)]:
        assert read(form, pieces) == [Content(text)]


def test_a_call_that_breaks_after_its_start_stays_unfinished() -> None:
    for form, text in (
        (HERMES, '<tool_call>{"name": "get", "arguments": {"key": tru, "b": 1}}' + _hermes([("now", {})])),
        (PYTHONIC, "[get(key=tru, b=1)] " + _python([("now", {})])),
    ):
        events = read(form, [text])
        assert events[:2] == [CallStart(0, "get"), CallArguments(0, '{"key": ')]
        assert CallEnd(0) not in events
        broken = content_of(events)
        assert broken.startswith("tru")
        assert broken in text
        assert "'tru' is no value" in str(events)
        assert events[-3:] == [CallStart(1, "now"), CallArguments(1, "{}"), CallEnd(1)]
        assert read(form, list(text)) == events


READ: list[tuple[Format, str, list[Call]]] = [
    (HERMES, '<tool_call>{"arguments": {"key": "x"}, "name": "get"}</tool_call>', [("get", {"key": "x"})]),
    (HERMES, '<tool_call>{"arguments": "{\\"key\\": \\"\\\\n\\"}", "name": "get"}', [("get", {"key": "\n"})]),
    (HERMES, '<tool_call>{"name": "get", "arguments": " {\\"key\\": 1} "}</tool_call>', [("get", {"key": 1})]),
    (HERMES, '<tool_call>{"name": "now"}</tool_call>', [("now", {})]),
    (HERMES, '<tool_call>{"name": "now", "arguments": null}</tool_call>', [("now", {})]),
    (HERMES, '<tool_call>{"name": "now", "arguments": ""}</tool_call>', [("now", {})]),
    (HERMES, '<tool_call>[{"name": "now"}, {"name": "now"}]</tool_call>', [("now", {}), ("now", {})]),
    (HERMES, '<tool_call>{"name": "now"}\n{"name": "now"}</tool_call>', [("now", {}), ("now", {})]),
    (HERMES, '<tool_call>{"name": "get", "arguments": {"key": "a\nb\tc\x01"}}', [("get", {"key": "a\nb\tc\x01"})]),
    (HERMES, '<tool_call>{"name": "get", "arguments": {"key": "\\ud83d\\ude00"}}', [("get", {"key": "😀"})]),
    (LLAMA3, '{"type": "function", "name": "now", "parameters": {}}', [("now", {})]),
    (LLAMA3, '{ "name" : "get", "parameters" : { "key" : [ 1 , -2.5e3 ] } }', [("get", {"key": [1, -2500.0]})]),
    (LLAMA3, '<|python_start|>{"name": "now", "parameters": {}}<|python_end|>', [("now", {})]),
    (MISTRAL, '[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "a1b2c3d4e"}]', [("now", {})]),
    (MISTRAL, '[TOOL_CALLS]get{"key": "x"}', [("get", {"key": "x"})]),
    (PYTHONIC, "[get(key='\\U0001f600\\x41\\n\\101\\\n' )]", [("get", {"key": "😀A\nA"})]),
    (PYTHONIC, "[get(key='\\ud83d\\ude00')]", [("get", {"key": "😀"})]),
    (
        PYTHONIC,
        "[ get ( key = (1, (2,), (), (3)) , ), now( ), ]".replace("get (", "get("),
        [("get", {"key": [1, [2], [], 3]}), ("now", {})],
    ),
    (
        PYTHONIC,
        "[get(key={'a': [True, False, None, true, false, null],})]",
        [("get", {"key": {"a": [True, False, None] * 2}})],
    ),
    (PYTHONIC, "[get(key='''it's\n\"x\"''')]", [("get", {"key": 'it\'s\n"x"'})]),
    (PYTHONIC, "[get(key='', b=\"\")]", [("get", {"key": "", "b": ""})]),
    (PYTHONIC, "[get(**{'key': 1})]", [("get", {"key": 1})]),
    (LFM2, '<|tool_call_start|>[{"name": "now", "arguments": {}}]<|tool_call_end|>', [("now", {})]),
]


@pytest.mark.parametrize(("form", "text", "calls"), READ, ids=lambda given: getattr(given, "name", None))
def test_other_spellings_are_read(form: Format, text: str, calls: list[Call]) -> None:
    events = read(form, [text])
    assert calls_of(events) == calls
    assert content_of(events) == ""
    for pieces in cuts(text):
        assert read(form, pieces) == events


def test_text_around_calls_keeps_its_own_white_space() -> None:
    call = _hermes([("now", {})])
    assert content_of(read(HERMES, [f" a \n{call}\n\n{call} b \n"])) == " a b \n"
    assert content_of(read(HERMES, [f"\n{call}\n\n{call}\n"])) == ""
    assert content_of(read(HERMES, [" \n"])) == " \n"


def test_nesting_without_end_costs_no_stack() -> None:
    deep = "[" * 20000
    for form, text in ((HERMES, '<tool_call>{"name": "get", "arguments": {"key": '), (PYTHONIC, "[get(key=")):
        events = read(form, [text + deep])
        assert events == [CallStart(0, "get"), CallArguments(0, '{"key": ' + deep)]
    assert "too deep" in str(read(PYTHONIC, ["[get(key=" + "(" * 20000]))
    assert "no value" in str(read(PYTHONIC, ["[get(key=" + "1_" * 20000 + ")]"]))


# Against the parsers of Python's library.


def read_value(text: str, *, python: bool) -> str | None:
    """JSON, or None if it is no value."""
    source, out = Source(), list[str]()
    source.add(text + "\n")
    try:
        for _ in value(source, out.append, python=python):
            return None
    except Broken:
        return None
    return None if source.text[source.at :].strip() else "".join(out)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(json_values, st.booleans(), st.none() | st.integers(0, 3), st.data())
def test_values_are_read_as_json_reads_them(given: Any, ascii: bool, indent: int | None, data: st.DataObject) -> None:
    text = json.dumps(given, ensure_ascii=ascii, indent=indent)
    assert read_value(text, python=False) == text
    if text and data.draw(st.booleans()):  # broken somewhere
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + data.draw(st.sampled_from(["", *'"\\{}[],:0 eu-.t\n'])) + text[at + 1 :]
        try:
            expected = json.loads(text.strip(" \n"), strict=False)
        except ValueError:
            expected = None
            assert read_value(text.strip(" \n"), python=False) is None
        else:
            mine = read_value(text.strip(" \n"), python=False)
            assert mine is not None
            assert json.loads(mine) == expected


@settings(max_examples=200, deadline=None)
@given(json_values, st.sampled_from([repr, partial(json.dumps, ensure_ascii=False)]), st.data())
def test_python_literals_are_read_as_python_reads_them(
    given: Any, write: Callable[[Any], str], data: st.DataObject
) -> None:
    text = write(given)
    mine = read_value(text, python=True)
    assert mine is not None
    assert json.loads(mine) == given
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + data.draw(st.sampled_from(["", *"'\"{}[](),:0 -._"])) + text[at:]
    mine = read_value(text, python=True)
    if mine is not None and write is repr:
        with warnings.catch_warnings(action="ignore"):  # an escape that is none
            assert json.loads(mine) == json.loads(json.dumps(ast.literal_eval(text.strip())))


arguments = st.dictionaries(
    st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda key: key.isidentifier()),
    json_values,
    max_size=3,
)


@writers
@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([tool.name for tool in TOOLS]), arguments), min_size=1, max_size=3), st.data()
)
def test_what_templates_write_is_read(
    form: Format, write: Callable[..., str], calls: list[Call], data: st.DataObject
) -> None:
    text = write(calls)
    pieces = []
    while text:
        size = data.draw(st.integers(1, 12))
        pieces.append(text[:size])
        text = text[size:]
    events = read(form, pieces)
    assert calls_of(events) == calls
    assert content_of(events) == ""


# The grammars.

SCHEMAS = [
    Tool("get", {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}),
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": 'A "city"'},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "unit": {"type": "string", "enum": ["°C", "it's", 'a "b"', "\\"]},
                "exact": {"type": "boolean", "default": False},
                "when": {"anyOf": [{"type": "string", "pattern": "^[0-9]{2}:[0-9]{2}$"}, {"type": "null"}]},
            },
            "required": ["unit", "exact"],
            "additionalProperties": False,
            "$schema": "http://json-schema.org/draft-07/schema#",
        },
    ),
    Tool(
        "edit",
        {
            "$defs": {
                "Edit": {
                    "type": "object",
                    "properties": {"old": {"type": "string"}, "all": {"const": True}},
                    "required": ["old"],
                    "additionalProperties": False,
                }
            },
            "type": "object",
            "properties": {
                "edits": {"type": "array", "items": {"$ref": "#/$defs/Edit"}, "maxItems": 2},
                "grid": {"type": "array", "items": {"type": "array", "items": {"type": ["number", "null"]}}},
                "mode": {"enum": ["x", 1, None, True, 2.5]},
                "rest": {},
            },
            "required": ["edits"],
        },
    ),
    Tool("set-env.v2", {"type": "object", "properties": {"max-size": {"type": "integer"}}, "required": ["max-size"]}),
    Tool(
        "open",
        {"type": "object", "patternProperties": {"^[a-c]{1,2}$": {"type": "boolean"}}, "additionalProperties": False},
    ),
    Tool(
        "choose",
        {
            "type": "object",
            "properties": {
                "list": {"enum": [[1], "a", {"b": None}]},
                "none": {"const": None},
                "day": {"type": "string", "format": "date"},
                "never": False,
                "self": {"$ref": "#/properties/none"},
            },
            "required": ["list", "none", "self"],
        },
    ),
    Tool("either", {"anyOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": {"a": {"type": "integer"}}}),
    Tool("now", {"type": "object", "properties": {}}),
    Tool("any", {"type": "object"}),
]
SPECIAL = ["<|end|>", *sorted({m for form in HERE for m in form.markers} - {"<tool_call>", "</tool_call>"})]
SPECIAL_IDS = {token: 256 + number for number, token in enumerate(SPECIAL)}


class _Bytes:
    """A token for each byte, and the special ones."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [bytes([byte]) for byte in range(256)] + [token.encode() for token in SPECIAL]
    special_token_ids = list(SPECIAL_IDS.values())  # noqa: RUF012

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@pytest.fixture(scope="module")
def tokenizer() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))


def matcher(
    tokenizer: llguidance.LLTokenizer, form: Format, tools: Sequence[Tool], special: dict[str, int], parallel: bool
) -> Any:
    calls = form.grammar(tools, special, parallel=parallel)
    grammar = f"start: {literal(calls.trigger, special)} calls GAP?\nGAP: /[ \\n]+/\n{calls.rules}"
    made = llguidance.LLMatcher(tokenizer, grammar)
    assert not made.get_error()
    return made


def walk(made: Any, chance: random.Random, length: int) -> str:
    """A random text of the grammar: anything it allows, and more and more what closes something."""
    mask = llguidance.numpy.allocate_token_bitmask(1, 256 + len(SPECIAL))
    tokens: list[int] = []
    while True:
        llguidance.numpy.fill_next_token_bitmask(made, mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        assert allowed, made.get_error()
        ending = chance.random() < len(tokens) / length
        closing = [token for token in allowed if token >= 256 or chr(token) in "\"'}])"]
        printable = [token for token in allowed if 0x20 <= token < 0x7F]
        token = chance.choice((ending and closing) or (chance.random() < 0.9 and printable) or allowed)
        if token == 256:
            return b"".join(_Bytes.tokens[token] for token in tokens).decode()
        assert made.consume_token(token)
        tokens.append(token)
        if made.is_stopped():
            return b"".join(_Bytes.tokens[token] for token in tokens).decode()


@pytest.mark.parametrize("special", [{}, SPECIAL_IDS], ids=["text", "tokens"])
@pytest.mark.parametrize("form", HERE, ids=lambda form: form.name)
def test_all_that_a_grammar_allows_is_read_as_calls(
    form: Format, special: dict[str, int], tokenizer: llguidance.LLTokenizer
) -> None:
    chance = random.Random(form.name)
    whole = matcher(tokenizer, form, SCHEMAS, special, True)
    schemas = {tool.name: tool.parameters for tool in SCHEMAS}
    called = set()
    for _ in range(8):
        made = whole.deep_copy()
        text = walk(made, chance, 400)
        events = read(form, [text], SCHEMAS)
        calls = calls_of(events)
        assert calls, text
        assert content_of(events) == ""
        for name, passed in calls:
            jsonschema.validate(passed, schemas[name])
            called.add(name)
        assert read(form, list(text), SCHEMAS) == events
    assert len(called) > 2


def allows(made: Any, text: str, special: dict[str, int]) -> bool:
    tokens: list[int] = []
    while text:
        token = max((token for token in special if text.startswith(token)), key=len, default="")
        tokens += [special[token]] if token else text[0].encode()
        text = text[len(token) or 1 :]
    return bool(made.try_consume_tokens(tokens) == len(tokens) and made.is_accepting())


@pytest.mark.parametrize("name", ["hermes", "llama3", "mistral", "granite", "phi4", "command_r", "pythonic", "lfm2"])
def test_what_templates_write_is_allowed(name: str, tokenizer: llguidance.LLTokenizer) -> None:
    form, write = WRITERS[name]
    calls: list[Call] = [
        ("get", {"key": "naïve\n'\"\\ 😀"}),
        ("get_weather", {"city": "Z", "days": 3, "unit": "it's", "exact": True}),
        ("now", {}),
    ]
    special = {token: index for token, index in SPECIAL_IDS.items() if form is not PYTHONIC}
    for parallel in (False, True):
        made = matcher(tokenizer, form, SCHEMAS, special, parallel)
        for number in range(1, 4):
            text = write(calls[-number:]).replace("\\u00ef", "ï").replace("\\ud83d\\ude00", "😀")
            for end in ("", "\n"):
                assert allows(made.deep_copy(), text + end, special) == (parallel or number == 1), text + end


@pytest.mark.parametrize("form", HERE, ids=lambda form: form.name)
def test_no_arguments_but_the_declared_are_written(form: Format, tokenizer: llguidance.LLTokenizer) -> None:
    """Where the schema does not speak of others."""
    chance = random.Random(3)
    made = matcher(tokenizer, form, [TOOLS[0], TOOLS[3]], SPECIAL_IDS, False)
    for _ in range(8):
        ((name, passed),) = calls_of(read(form, [walk(made.deep_copy(), chance, 60)]))
        assert passed.keys() <= ({"key"} if name == "get" else set())
    any_one = Tool("get", {"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}})
    made = matcher(tokenizer, form, [any_one], SPECIAL_IDS, False)
    assert any(calls_of(read(form, [walk(made.deep_copy(), chance, 60)]))[0][1] for _ in range(8))


def test_a_schema_that_cannot_be_compiled_leaves_any_object(tokenizer: llguidance.LLTokenizer) -> None:
    broken = Tool("get", {"type": "object", "properties": {"key": {"type": "string", "pattern": "(?=x)"}}})
    for form in HERE:
        text = walk(matcher(tokenizer, form, [broken], SPECIAL_IDS, False), random.Random(2), 50)
        assert [name for name, _ in calls_of(read(form, [text], [broken]))] == ["get"]


# Which format a model writes.

DETECTED = {
    "hermes": (
        '<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\\n<tool_call>\\n{\\"name\\": '
        '<function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>',
        ["<|im_start|>", "<|im_end|>"],
    ),
    "llama3": (
        '{%- if tools is not none %}Environment: ipython{% endif %}{{- \'Respond in the format {"name": function name, '
        '"parameters": dictionary of argument name and its value}.\' }}<|python_tag|>',
        ["<|python_tag|>", "<|eom_id|>", "<|eot_id|>"],
    ),
    "pythonic": (
        "{{ 'If you decide to invoke any of the function(s), you MUST put it in the format of [func_name1(params_name1="
        "params_value1, params_name2=params_value2...), func_name2(params)]' }}{{ tools | tojson }}",
        ["<|python_tag|>", "<|python_start|>", "<|python_end|>"],
    ),
    "lfm2": ("List of tools: <|tool_list_start|>[{{ tools }}]<|tool_list_end|>", ["<|tool_call_start|>"]),
    "mistral_old": (
        "[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS]{{- '[TOOL_CALLS][' }}{{ out[:-1] }}', \"id\": \"'",
        ["[INST]", "[TOOL_CALLS]"],
    ),
    "mistral": (
        "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}",
        ["[INST]", "[TOOL_CALLS]", "[ARGS]"],
    ),
    "granite": (
        "<|start_of_role|>available_tools<|end_of_role|>respond only with <|tool_call|> followed by a JSON list",
        ["<|start_of_role|>", "<|tool_call|>"],
    ),
    "phi4": (
        "{{ '<|' + role + '|>' + content + '<|tool|>' + message['tools'] + '<|/tool|>' }}",
        ["<|tool_call|>", "<|/tool_call|>"],
    ),
    "functools": (
        'formatted as functools[{"name": [function name], "arguments": [function arguments as JSON]}, ...]',
        [],
    ),
    "nemotron": ('<TOOLCALL>[{{"name": "tool_name1", "arguments": "tool_args1"}}]</TOOLCALL>', []),
    "apriel": ('in <tool_call></tool_call> XML tags:\\n<tool_calls>[{"name": <function-name>, "arguments": {}}]', []),
    "command_r": ('<|START_ACTION|>[{"tool_call_id": "{{ tool_idx }}", "tool_name": ', ["<|START_ACTION|>"]),
    "command_r_old": (
        "Write \\'Action:\\' followed by a json-formatted list of actions \"tool_name\": title of the tool",
        [],
    ),
    "generic": (
        "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}",
        ["<|im_start|>"],
    ),
}


@pytest.mark.parametrize("name", DETECTED)
def test_a_format_is_told_from_the_template(name: str) -> None:
    template, special = DETECTED[name]
    form, reason = find(template, {token: number for number, token in enumerate(special)})
    assert form.name == name
    assert any(marker in reason for marker in form.markers) or name in reason or form is GENERIC


def test_the_special_tokens_tell_where_the_template_does_not() -> None:
    form, reason = find("{{ messages }}", {"<|tool_call_start|>": 10})
    assert (form, reason) == (LFM2, "its vocabulary has <|tool_call_start|>")


def test_a_setting_decides() -> None:
    assert find(DETECTED["hermes"][0], {}, "llama3") == (LLAMA3, "it is set by tool_format")
    with pytest.raises(ValueError, match=r"'hermes2' is unknown; known are .*hermes.*generic\.$"):
        find("", {}, "hermes2")


def test_every_format_is_found() -> None:
    assert {form.name for form in HERE} == set(DETECTED)
    assert len({form.name for form in FORMATS}) == len(FORMATS)
    assert FORMATS[-1] is GENERIC


def test_the_prompt_explains_what_the_grammar_enforces() -> None:
    tool = {"type": "function", "function": {"name": "now", "description": "Zeit für Uhren", "parameters": {}}}
    text = instructions([tool])
    assert json.dumps(tool["function"], ensure_ascii=False) in text
    example = text[text.index("<tool_call>") :]
    named = Tool("function name", {})
    assert calls_of(read(GENERIC, [example[: example.index("</tool_call>") + 12]], [named]))
    assert ignores_tools("{{ messages }}{{ tool_calls }}")
    assert not ignores_tools("{% if tools %}")
