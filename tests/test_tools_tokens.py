"""Tool calls between tokens of their own: DeepSeek's and Kimi's JSON, Gemma's notation."""

import importlib
import json
from collections.abc import Callable, Sequence

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.chat.events import Malformed
from lmx.chat.tools import FORMATS, find
from lmx.chat.tools.base import Format, Tool
from lmx.chat.tools.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from lmx.chat.tools.gemma import FUNCTION_GEMMA, GEMMA4
from lmx.chat.tools.kimi_k2 import KIMI_K2
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

WRITE = Tool(
    "write_file",
    {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "content": {"type": "string"},
            "mode": {"type": "integer"},
            "tags": {"type": ["array", "null"], "items": {"type": "string"}},
            "extra": {
                "type": "object",
                "properties": {"size": {"type": "number"}, "deep": {"$ref": "#/$defs/Deep"}},
                "additionalProperties": False,
            },
        },
        "required": ["path", "content"],
        "additionalProperties": False,
        "$defs": {"Deep": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/Deep"}}, {"enum": ["end", None]}]}},
    },
)
NOW = Tool("now", {"type": "object", "properties": {}, "additionalProperties": False})
STRUCTURED = [
    WRITE,
    NOW,
    Tool(
        "k",
        {
            "type": "object",
            "properties": {
                "pattern": {"type": "string", "pattern": "^[a-c<]{2,5}$"},
                "either": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "integer", "minimum": 5}]},
                "pair": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
                "map": {"type": "object", "additionalProperties": {"type": "integer"}},
                "anything": {},
                "free": {"type": "object"},
            },
            "required": ["pattern"],
            "additionalProperties": False,
        },
    ),
]
TOOLS = [WRITE, NOW]
FORMS: list[Format] = [DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2, FUNCTION_GEMMA, GEMMA4]


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def write_v3(made: Sequence[Made]) -> str:
    parts = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dumps(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in made
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(parts) + "<｜tool▁calls▁end｜>"


def write_v31(made: Sequence[Made]) -> str:
    parts = [f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumps(given)}<｜tool▁call▁end｜>" for name, given in made]
    return "<｜tool▁calls▁begin｜>" + "".join(parts) + "<｜tool▁calls▁end｜>"


def write_kimi(made: Sequence[Made]) -> str:
    parts = [
        f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{dumps(arguments)}<|tool_call_end|>"
        for number, (name, arguments) in enumerate(made)
    ]
    return "<|tool_calls_section_begin|>" + "".join(parts) + "<|tool_calls_section_end|>"


def write_gemma(begin: str, end: str, quote: str) -> Callable[[Sequence[Made]], str]:
    def written(value: object) -> str:
        match value:
            case str():
                return f"{quote}{value}{quote}"
            case list():
                return f"[{','.join(map(written, value))}]"
            case dict():
                return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in sorted(value.items())) + "}"
        return dumps(value)

    return lambda made: "".join(f"{begin}call:{name}{written(arguments)}{end}" for name, arguments in made)


WRITERS = {
    "deepseek_v3": write_v3,
    "deepseek_v31": write_v31,
    "kimi_k2": write_kimi,
    "function_gemma": write_gemma("<start_function_call>", "<end_function_call>", "<escape>"),
    "gemma4": write_gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
}
all_formats = by_name(FORMS)


def write(form: Format, *made: Made) -> str:
    return WRITERS[form.name](made)


@all_formats
def test_calls_after_text(form: Format) -> None:
    arguments = {
        "path": 'a "b"\\c.txt',
        "content": "\nif a < b && c > d: {[\n\tprint('é 😀 &amp;'), ```}]\n\n",
        "mode": 420,
        "tags": ["x", "}, y:"],
        "extra": {"size": -1.5e3, "deep": [[], ["end"]]},
    }
    other = {"content": "", "path": "b"}
    made = ("write_file", arguments), ("now", {}), ("write_file", other)
    check_calls(form, TOOLS, write, "Let me write it.\n", *made)


@all_formats
def test_strings_may_hold_the_markers(form: Format) -> None:
    everything = "a ".join(form.markers) + "\n" + "\n```".join(reversed(form.markers)) + " }"
    arguments = {"path": "a", "content": everything, "tags": ["b", everything]}
    events = every_way(form, write(form, ("write_file", arguments)), TOOLS)
    assert whole_calls(events) == [("write_file", arguments)]
    assert content(events) == ""


@all_formats
def test_what_is_no_call_is_content(form: Format) -> None:
    check_no_call(form, TOOLS, write, form.markers[0])


@all_formats
def test_a_call_that_is_cut_has_no_end(form: Format) -> None:
    text = write(form, ("write_file", {"path": "ab", "content": "cd"}))
    opened = text.index("{") + 1
    closed = text.rindex("}") + 1
    for cut in range(1, len(text)):
        events = read(form.parser(TOOLS), [text[:cut]])
        if "write_file" not in text[:cut]:
            assert content(events) == text[:cut]
        if opened <= cut < closed:
            assert [call.whole for call in calls(events)] == [False]
            assert content(events) == ""
        if cut > closed:
            assert whole_calls(events) == [("write_file", {"path": "ab", "content": "cd"})]
            assert content(events) == ""


@by_name([DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2])
@pytest.mark.parametrize("broken", ['["a"]', "a", '{"path": }', '{"path" 1}', "{path: 1}"])
def test_what_is_broken_is_not_lost(form: Format, broken: str) -> None:
    text = write(form, ("write_file", {"path": "a"})).replace('{"path": "a"}', broken)
    events = every_way(form, text, TOOLS)
    assert [event for event in events if isinstance(event, Malformed)]
    found = calls(events)
    assert not any(call.whole for call in found)
    said = "".join(call.arguments for call in found) + content(events)
    assert said.endswith(text[text.index(broken) :])


@by_name([FUNCTION_GEMMA, GEMMA4])
@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("{}", {}),
        ("{mode:12}", {"mode": 12}),
        ("{mode:Q12Q}", {"mode": 12}),
        ("{path:12}", {"path": "12"}),
        ("{path:a b.txt}", {"path": "a b.txt"}),
        ('{path:"a, }"}', {"path": "a, }"}),
        ('{"path":Qa}Q}', {"path": "a}"}),
        ("{QpathQ: QaQ , mode : 3 }", {"path": "a", "mode": 3}),
        ("{tags:[QaQ, Q,bQ],extra:{size:1,deep:null}}", {"tags": ["a", ",b"], "extra": {"size": 1, "deep": None}}),
        ("{tags:[]}", {"tags": []}),
        ("{mode:}", None),
        ("{mode:1 path:QbQ}", None),
        ("{extra:" + "[" * 100 + "}", None),
        ("[]", None),
    ],
)
def test_gemmas_notation(form: Format, written: str, arguments: object) -> None:
    begin, end, quote = form.markers
    text = f"{begin}call:write_file{written.replace('Q', quote)}{end}"
    events = every_way(form, text, TOOLS)
    if arguments is None:
        assert not any(call.whole for call in calls(events))
        assert [event for event in events if isinstance(event, Malformed)]
        assert text.endswith(content(events))
        assert content(events)
    else:
        assert whole_calls(events) == [("write_file", arguments)]


@all_formats
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "one"])
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
def test_what_the_grammar_lets_through_is_read_as_valid_calls(form: Format, parallel: bool, tokens: bool) -> None:
    walker = Walker(form.markers if tokens else [])
    likes = ["".join(form.markers), '{}[]",:aet', "}"]
    check_walks(form, STRUCTURED, walker, parallel=parallel, seeds=range(6), likes=likes)


@all_formats
def test_the_grammar_takes_what_the_template_writes(form: Format) -> None:
    arguments = {
        "content": "a < b {'x'} é\n",
        "path": "p",
        "mode": 3,
        "tags": ["a"],
        "extra": {"deep": [[None], "end"]},
    }
    if form not in (FUNCTION_GEMMA, GEMMA4):  # which sort
        arguments = {key: arguments[key] for key in ("path", "content", "mode", "tags", "extra")}
    grammar = form.grammar(TOOLS, {}, parallel=True)
    matcher = llguidance.LLMatcher(Walker([]).tokenizer, f"start: calls\n{grammar.rules}")
    written = write(form, ("write_file", arguments), ("now", {})).removeprefix(grammar.trigger).encode()
    assert matcher.validate_tokens(list(written)) == len(written)
    matcher.consume_tokens(list(written))
    assert matcher.is_accepting()


@all_formats
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_the_template_writes_is_read_again(form: Format, data: st.DataObject) -> None:
    fragments = st.sampled_from([*form.markers[:-1], form.markers[-1][:-1], "{", '"', "\\", "\n", "<", "null"])
    strings = st.lists(fragments | st.text(max_size=4), max_size=6).map("".join)
    one = st.fixed_dictionaries(
        {"path": strings, "content": strings},
        optional={
            "mode": st.integers(),
            "tags": st.none() | st.lists(strings, max_size=3),
            "extra": st.fixed_dictionaries({}, optional={"size": st.floats(allow_nan=False, allow_infinity=False)}),
        },
    )
    made = [("write_file", arguments) for arguments in data.draw(st.lists(one, min_size=1, max_size=2))]
    text = write(form, *made)
    size = data.draw(st.integers(1, 40))
    assert whole_calls(read(form.parser(TOOLS), in_pieces(text, size))) == made


@by_name([KIMI_K2, FUNCTION_GEMMA, GEMMA4])
def test_mlx_lm_reads_the_same(form: Format) -> None:
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{form.name}")
    text = write(form, ("write_file", {"path": "a/b.txt", "content": "two\nlines < & é", "mode": 3}))
    theirs = parser.parse_tool_call(text.removeprefix(parser.tool_call_start).removesuffix(parser.tool_call_end), None)
    (one,) = theirs if isinstance(theirs, list) else [theirs]
    assert whole_calls(every_way(form, text, TOOLS)) == [(one["name"], one["arguments"])]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + name + '\\n```json\\n'",
            "deepseek_v3",
        ),
        ("'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments", "deepseek_v31"),
        ('<｜DSML｜function_calls>\n<{{ dsml_token }}invoke name="', "deepseek_v32"),
        ("{%- set dsml_token = '｜DSML｜' -%}<{{ dsml_token }}tool_calls>", "deepseek_v4"),
        ("<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>", "glm45"),
        ("<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>", "glm47"),
        ("<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>", "qwen3_coder"),
        ("{%- set toolcall_begin_token = '<minimax:tool_call>' -%}", "minimax_m2"),
        ("<|tool_calls_section_begin|>\n<|tool_call_begin|>{{ formatted_id }}", "kimi_k2"),
        ("'<start_function_call>call:' + name + '{' + '<escape>'", "function_gemma"),
        ("'<|tool_call>call:' + function['name'] + '{' + '<|\"|>'", "gemma4"),
        ("<|start|>assistant to=functions.x<|channel|>commentary json<|message|>", "harmony"),
    ],
)
def test_the_template_says_which_format_it_is(template: str, name: str) -> None:
    form, why = find(template, {})
    assert form.name == name
    assert why
    assert find("", {}, name)[0] is form


def test_names_are_unique() -> None:
    assert len({form.name for form in FORMATS}) == len(FORMATS)
