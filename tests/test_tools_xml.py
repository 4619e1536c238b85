"""Tool calls that are written as elements: read in pieces, enforced by grammar, against mlx-lm's parsers."""

import importlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmx.chat.forms.grammar import answer_grammar
from lmx.chat.tools.base import Tool
from lmx.chat.tools.deepseek_v32 import DEEPSEEK_V4, DEEPSEEK_V32
from lmx.chat.tools.glm import GLM45, GLM47
from lmx.chat.tools.markup import MarkupFormat
from lmx.chat.tools.minimax_m2 import MINIMAX_M2
from lmx.chat.tools.qwen3_coder import QWEN3_CODER
from tests.tool_calls import (
    Made,
    Walker,
    by_name,
    calls,
    check_calls,
    check_no_call,
    check_walks,
    content,
    every_way,
    in_pieces,
    read,
    whole_calls,
)

FORMATS = [QWEN3_CODER, GLM45, GLM47, MINIMAX_M2, DEEPSEEK_V32, DEEPSEEK_V4]
WRITE = Tool(
    "write_file",
    {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "content": {"type": "string"},
            "mode": {"type": "integer"},
            "force": {"type": "boolean"},
            "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
            "note": {"type": ["string", "null"]},
            "extra": {"$ref": "#/$defs/Extra"},
        },
        "required": ["path", "content"],
        "$defs": {"Extra": {"type": "object", "properties": {"size": {"type": "number"}}}},
    },
)
NOW = Tool("now", {"type": "object", "properties": {}})
TOOLS = [WRITE, NOW]
Arguments = Mapping[str, Any]


def written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write_qwen(name: str, arguments: Arguments) -> str:
    parts = [f"<parameter={key}>\n{written(value)}\n</parameter>\n" for key, value in arguments.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"


def write_glm(gap: str) -> Callable[[str, Arguments], str]:
    def write(name: str, arguments: Arguments) -> str:
        parts = [
            f"<arg_key>{key}</arg_key>{gap}<arg_value>{written(value)}</arg_value>{gap}"
            for key, value in arguments.items()
        ]
        return f"<tool_call>{name}{gap}{''.join(parts)}</tool_call>"

    return write


def write_minimax(name: str, arguments: Arguments) -> str:
    parts = [f'<parameter name="{key}">{written(value)}</parameter>\n' for key, value in arguments.items()]
    return f'<invoke name="{name}">\n{"".join(parts)}</invoke>'


def write_dsml(name: str, arguments: Arguments) -> str:
    parts = [
        f'<｜DSML｜parameter name="{key}" string="{str(isinstance(value, str)).lower()}">{written(value)}'
        "</｜DSML｜parameter>\n"
        for key, value in arguments.items()
    ]
    return f'<｜DSML｜invoke name="{name}">\n{"".join(parts)}</｜DSML｜invoke>'


WRITERS = {
    "qwen3_coder": write_qwen,
    "glm45": write_glm("\n"),
    "glm47": write_glm(""),
    "minimax_m2": write_minimax,
    "deepseek_v32": write_dsml,
    "deepseek_v4": write_dsml,
}


def block(form: MarkupFormat, *made: Made) -> str:
    """As the model's own template writes them."""
    inner = "\n".join(WRITERS[form.name](name, arguments) for name, arguments in made)
    markup = form.markup
    return f"{markup.begin}\n{inner}\n{markup.end}" if markup.several else inner


all_formats = by_name(FORMATS)


@all_formats
def test_calls_after_text_leave_as_json(form: MarkupFormat) -> None:
    arguments = {
        "path": 'a "b"\\c.txt',
        "content": "\nif a < b && c > d:\n\tprint('é 😀 &amp;')\n\n",
        "mode": 420,
        "force": True,
        "tags": ["x", "</y>"],
        "note": None,
        "extra": {"size": 1.5},
    }
    other = {"content": "", "path": "b"}
    made = ("write_file", arguments), ("now", {}), ("write_file", other)
    check_calls(form, TOOLS, block, "Let me write it.\n\n", *made)


@all_formats
def test_strings_may_hold_the_markup(form: MarkupFormat) -> None:
    markers = [form.markup.begin, *form.markers, form.markup.end]
    everything = (
        "a ".join(markers) + "\n" + "\n\n".join(reversed(markers)) + "\n<tool_call>" + form.markup.parameter_end
    )
    # The one thing that cannot be told apart is the closing marker before the next parameter's or the call's end.
    goes_on = "|".join(map(re.escape, filter(None, (form.markup.key[0], form.markup.call_end))))
    everything = re.sub(rf"({re.escape(form.markup.parameter_end)})\s*({goes_on})", r"\1.\2", everything)
    assert form.markup.parameter_end in everything
    arguments = {"path": "p", "content": everything}
    events = every_way(form, block(form, ("write_file", arguments)), TOOLS)
    assert whole_calls(events) == [("write_file", arguments)]
    assert content(events) == ""


@all_formats
def test_a_json_string_inside_a_value_may_hold_all_of_it(form: MarkupFormat) -> None:
    inner = block(form, ("write_file", {"path": "a", "content": "b"}), ("now", {}))
    arguments = {"path": "p", "content": "c", "tags": [inner, '"' + inner]}
    assert whole_calls(every_way(form, block(form, ("write_file", arguments)), TOOLS)) == [("write_file", arguments)]


@all_formats
def test_what_is_no_call_is_content(form: MarkupFormat) -> None:
    check_no_call(form, TOOLS, block, form.markup.begin)


def test_qwen_forgets_what_opens_a_call() -> None:
    call = block(QWEN3_CODER, ("now", {})).removeprefix("<tool_call>\n")
    events = every_way(QWEN3_CODER, f"Now.\n{call} <function=now> and <function=delete></function>", TOOLS)
    assert whole_calls(events) == [("now", {})]
    assert content(events) == "Now. <function=now> and <function=delete></function>"
    for text in ("<function=", "<function= >", "<function=<function="):
        assert content(every_way(QWEN3_CODER, text, TOOLS)) == text


@all_formats
def test_a_call_that_is_cut_has_no_end(form: MarkupFormat) -> None:
    text = block(form, ("write_file", {"path": "ab", "content": "cd"}))
    named = text.index("write_file") + len("write_file" + form.markup.call[1])
    last = text.rindex(form.markup.call_end) + len(form.markup.call_end)
    for cut in range(1, len(text)):
        events = read(form.parser(TOOLS), [text[:cut]])
        if cut < named:
            assert content(events) == text[:cut]
        elif named < cut < last:
            (call,) = calls(events)
            assert not call.whole
            assert content(events) == ""
        elif cut > last:
            assert whole_calls(events) == [("write_file", {"path": "ab", "content": "cd"})]


@all_formats
def test_a_long_string_streams(form: MarkupFormat) -> None:
    text = block(form, ("write_file", {"path": "a", "content": "word < " * 500}))
    parser = form.parser(TOOLS)
    told = [bool(parser.feed(text[at : at + 5])) for at in range(0, len(text), 5)]
    silent = "".join("x" if piece else " " for piece in told).strip().split("x")
    assert max(map(len, silent)) * 5 < 80  # characters: no more than the markup itself


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "integer"}, "12", 12),
        ({"type": "integer"}, "twelve", "twelve"),
        ({"type": "number"}, " 1.5\n", 1.5),
        ({"type": "boolean"}, "True", True),
        ({"type": "string"}, "12", "12"),
        ({"type": "string"}, "null", "null"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "nullable", "nullable"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "7", 7),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "7 a", "7 a"),
        ({"$ref": "#/$defs/N"}, "3", 3),
        ({"allOf": [{"$ref": "#/$defs/N"}]}, "3", 3),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"type": "array"}, "['a', None]", ["a", None]),
        ({"type": "array"}, "[1, 2", "[1, 2"),
        ({"type": "object"}, '{"a": {"b": "</"}}', {"a": {"b": "</"}}),
        ({}, '{"a": 1}', {"a": 1}),
        ({}, "plain", "plain"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"$ref": "#/$defs/Loop"}, "x", "x"),
    ],
)
def test_values_are_typed_by_the_schema(schema: dict[str, Any], text: str, value: object) -> None:
    parameters = {
        "type": "object",
        "properties": {"v": schema},
        "$defs": {"N": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}},
    }
    call = f"<tool_call>\n<function=f>\n<parameter=v>\n{text}\n</parameter>\n</function>\n</tool_call>"
    assert whole_calls(every_way(QWEN3_CODER, call, [Tool("f", parameters)])) == [("f", {"v": value})]


def test_a_number_that_python_does_not_read_is_a_string() -> None:
    digits = "9" * 5000
    (call,) = calls(read(QWEN3_CODER.parser(TOOLS), [block(QWEN3_CODER, ("write_file", {"mode": digits}))]))
    assert json.loads(call.arguments) == {"mode": digits}


STRUCTURED = [
    WRITE,
    NOW,
    Tool(
        "k",
        {
            "type": "object",
            "properties": {
                "bounded": {"type": "integer", "minimum": 5, "maximum": 99},
                "either": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 5}]},
                "choice": {"enum": ["x", "yy", None]},
                "pattern": {"type": "string", "pattern": "^[a-c<]{2,5}$"},
                "short": {"anyOf": [{"type": "string", "minLength": 2, "maxLength": 6}, {"type": "null"}]},
                "inner": {
                    "type": "object",
                    "properties": {"z": {"type": "string"}, "r": {"$ref": "#/$defs/R"}},
                    "required": ["z"],
                    "additionalProperties": False,
                },
                "anything": {},
                "parts": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
            },
            "required": ["pattern", "inner"],
            "additionalProperties": False,
            "$defs": {"R": {"type": "array", "items": {"$ref": "#/$defs/S"}, "maxItems": 2}, "S": {"type": "number"}},
        },
    ),
    Tool("map", {"type": "object", "additionalProperties": {"type": "integer"}}),
]
SPECIAL = {
    "glm45": ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    "glm47": ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    "minimax_m2": ["<minimax:tool_call>", "</minimax:tool_call>"],
    "deepseek_v32": ["｜DSML｜"],
    "deepseek_v4": ["｜DSML｜"],
}


@all_formats
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "one"])
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
def test_what_the_grammar_lets_through_is_read_as_valid_calls(form: MarkupFormat, parallel: bool, tokens: bool) -> None:
    walker = Walker(SPECIAL.get(form.name, ["<tool_call>", "</tool_call>"]) if tokens else [])
    likes = ["".join(form.markers), "</>parmetfuncio=\n"]
    check_walks(form, STRUCTURED, walker, parallel=parallel, seeds=range(4), likes=likes)


@all_formats
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
def test_the_grammar_takes_what_the_template_writes(form: MarkupFormat, tokens: bool) -> None:
    inner = "</x>" if tokens else form.markup.parameter_end
    arguments = {"path": "a < b", "content": f"\n{inner} é\n", "mode": 3, "note": None}
    if form.name.startswith("deepseek"):
        arguments["note"] = "null"  # which the markup lets say
    text = block(form, ("write_file", arguments), ("now", {}))
    walker = Walker(SPECIAL.get(form.name, ["<tool_call>", "</tool_call>"]) if tokens else [])
    grammar = answer_grammar(special=walker.special, format=form, tools=TOOLS, choice="auto")
    for whole in (text, f"Let me see: a < b.\n\n{text}\n", "a < b, </x> and <tool"):
        assert walker.takes(grammar, whole), whole
    assert not walker.takes(grammar, text.replace("write_file", "delete"))
    assert not walker.takes(grammar, text.replace("3", "three"))


@all_formats
def test_keys_and_choices_need_not_be_ascii(form: MarkupFormat) -> None:
    schema = {"type": "object", "properties": {"größe": {"enum": ["é 😀", "｜"]}}, "required": ["größe"]}
    tools = [Tool("f", schema)]
    text = block(form, ("f", {"größe": "é 😀"}))
    grammar = form.grammar(tools, {}, parallel=False)
    assert Walker([]).takes(f"start: calls\n{grammar.rules}", text.removeprefix(form.markup.begin).strip(" "))
    assert whole_calls(every_way(form, text, tools)) == [("f", {"größe": "é 😀"})]


MARKUP = "</parameter> <parameter=path> </function> </tool_call> <tool_call> </arg_value> <arg_key> </invoke> < null"
fragments = st.sampled_from(
    [*MARKUP.split(), '<parameter name="x">', "</｜DSML｜parameter>", "</｜DSML｜invoke>", *' \n"\\']
)
strings = st.lists(fragments | st.text(max_size=4), max_size=8).map("".join)


@all_formats
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_the_template_writes_is_read_again(form: MarkupFormat, data: st.DataObject) -> None:
    one = st.fixed_dictionaries(
        {"path": strings, "content": strings},
        optional={
            "mode": st.integers(),
            "force": st.booleans(),
            "tags": st.none() | st.lists(strings, max_size=3),
            "note": st.none() | strings.filter(lambda text: text.strip() != "null"),
            "extra": st.fixed_dictionaries({}, optional={"size": st.floats(allow_nan=False, allow_infinity=False)}),
        },
    )
    made = [("write_file", arguments) for arguments in data.draw(st.lists(one, min_size=1, max_size=2))]
    goes_on = "|".join(map(re.escape, (form.markup.key[0], form.markup.call_end)))
    ambiguous = re.compile(rf"{re.escape(form.markup.parameter_end)}\s*({goes_on})")
    for _, arguments in made:
        assume(not any(isinstance(value, str) and ambiguous.search(value) for value in arguments.values()))
    text = block(form, *made)
    size = data.draw(st.integers(1, 40))
    assert whole_calls(read(form.parser(TOOLS), in_pieces(text, size))) == made


@pytest.mark.parametrize(
    ("form", "module"), [(QWEN3_CODER, "qwen3_coder"), (GLM47, "glm47"), (MINIMAX_M2, "minimax_m2")]
)
def test_mlx_lm_reads_the_same(form: MarkupFormat, module: str) -> None:
    arguments = {"path": "a/b.txt", "content": "two\nlines < & é", "mode": 3, "force": True, "tags": ["x"]}
    text = block(form, ("write_file", arguments))
    begin, end = form.markup.begin, form.markup.end or form.markup.call_end
    tools = [{"type": "function", "function": {"name": tool.name, "parameters": tool.parameters}} for tool in TOOLS]
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{module}")
    theirs = parser.parse_tool_call(text.removeprefix(begin).removesuffix(end).strip(), tools)
    assert whole_calls(every_way(form, text, TOOLS)) == [(theirs["name"], theirs["arguments"])]
