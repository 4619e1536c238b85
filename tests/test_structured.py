"""What a request wants of its answer, in every client's spelling, and the grammar of the whole answer around it."""

import json

import pytest

from lmx.chat.forms.grammar import answer_grammar, check
from lmx.chat.forms.structured import MAX_RULES, body_of
from lmx.chat.tools import GENERIC, HERMES, LLAMA3
from lmx.chat.tools.base import Tool
from lmx.errors import GrammarTooComplex, InvalidRequest
from tests.walks import matcher, takes

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


def asked(**fields):
    grammar = answer_grammar(special={}, body=body_of(fields))
    check(grammar)
    return matcher(grammar)


SCHEMA_SPELLINGS = {
    "OpenAI": {"response_format": JSON_SCHEMA},
    "OpenAI strict": {"response_format": {**JSON_SCHEMA, "json_schema": {"schema": SCHEMA, "strict": True}}},
    "strict as a text": {"response_format": {**JSON_SCHEMA, "json_schema": {"schema": SCHEMA, "strict": "true"}}},
    "Responses": {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}},
    "Anthropic": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "json_object with a schema": {"response_format": {"type": "json_object", "schema": SCHEMA}},
    "vLLM": {"structured_outputs": {"json": SCHEMA}},
    "vLLM, as a text": {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    "vLLM, before": {"guided_json": SCHEMA, "guided_regex": None, "response_format": {"type": "text"}},
    "llama-server": {"json_schema": SCHEMA, "grammar": ""},
    "SGLang": {"json_schema": json.dumps(SCHEMA)},
    "Ollama": {"format": SCHEMA},
}


@pytest.mark.parametrize("fields", SCHEMA_SPELLINGS.values(), ids=SCHEMA_SPELLINGS)
def test_every_spelling_of_a_schema(fields):
    start = asked(**fields)
    assert takes(start, '{"a": 1}')
    assert takes(start, '{"a": 1}')
    assert not takes(start, '{"a": "x"}')
    assert not takes(start, '{"a": 1, "b": 2}')


OBJECT_SPELLINGS = {
    "OpenAI": {"response_format": {"type": "json_object"}},
    "a schema left out": {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    "vLLM": {"structured_outputs": {"json_object": True}},
    "vLLM, before": {"guided_json_object": True},
    "Ollama": {"format": "json"},
}


@pytest.mark.parametrize("fields", OBJECT_SPELLINGS.values(), ids=OBJECT_SPELLINGS)
def test_every_spelling_of_an_object(fields):
    start = asked(**fields)
    assert takes(start, '{"a": [1, {"b": null}]}')
    assert not takes(start, "[]")


@pytest.mark.parametrize(
    ("fields", "taken", "refused"),
    [
        ({"guided_choice": ["a b", "c/d\n", "é😀"]}, ["a b", "c/d\n", "é😀"], ["a", "a b "]),
        ({"structured_outputs": {"choice": ["yes"]}}, ["yes"], ["no"]),
        ({"guided_regex": r"\d{3}-/x"}, ["123-/x"], ["12", "١٢٣-/x"]),
        ({"regex": "^(a|b)+$"}, ["abba"], ["", "abc"]),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, ["aa"], ["b"]),
        ({"grammar": 'root ::= "a" restOfIt\nrestOfIt ::= [0-9]+'}, ["a12"], ["a", "12"]),
        ({"ebnf": 'root ::= "a" body\nbody ::= "b"'}, ["ab"], ["b"]),
        ({"guided_grammar": 'start: answer\nanswer: "a" B\nB: /b+/'}, ["abb"], ["a"]),
        ({"grammar": 'start: "<" x ">"\nx: %json {"type": "integer", "minimum": 5}'}, ["<7>"], ["<3>", "<7 >"]),
        ({"response_format": {"type": "grammar", "grammar": 'root ::= "x"'}}, ["x"], ["y"]),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, ['{"a":1}'], ['{"a": 1}']),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "[ ]{0,2}"}}, ['{"a":  1}'], ['{"a":   1}']),
    ],
)
def test_other_constraints(fields, taken, refused):
    start = asked(**fields)
    assert [text for text in (*taken, *refused) if takes(start, text)] == taken


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None, "temperature": 1, "text": {"verbosity": "low"}, "format": "", "grammar": ""},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"guided_json_object": False},
    ],
)
def test_nothing_asked_for(fields):
    assert body_of(fields) is None
    assert answer_grammar(special={}, body=None) == ""


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {"type": "xml"}}, "response_format.type", '"xml"'),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "a schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format.json_schema.schema",
            "type at #/type",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 5}}},
            "response_format.json_schema.strict",
            "got 5",
        ),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "text.format.schema", "schema is an object"),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
        ({"guided_regex": 5}, "guided_regex", "must be a text"),
        ({"guided_choice": []}, "guided_choice", "list of texts"),
        ({"guided_choice": ["a", 5]}, "guided_choice", "list of texts"),
        ({"grammar": "root = x"}, "grammar", "GBNF"),
        ({"ebnf": "root ::= other"}, "ebnf", "'other' not found"),
        ({"grammar": "start: other"}, "grammar", "cannot be used"),
        ({"grammar": 'start: %json {"type": "x"}'}, "grammar", "type at #/type"),
        ({"format": "xml"}, "format", "no JSON"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "tool_choice"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": "a*"}},
            "structured_outputs.whitespace_pattern",
            '"a*"',
        ),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "guided_regex",
            "response_format and guided_regex",
        ),
        (
            {"structured_outputs": {"json": {}, "choice": ["a"]}},
            "structured_outputs.choice",
            "structured_outputs.json and structured_outputs.choice",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(fields, param, said):
    with pytest.raises(InvalidRequest) as raised:
        body_of(fields)
    assert raised.value.param == param
    assert said in raised.value.message


@pytest.mark.parametrize(
    "fields",
    [
        # llguidance follows rules into each other on the stack: at 20,000 the process dies
        {"grammar": "start: r0\n" + "\n".join(f"r{n}: r{n + 1}" for n in range(MAX_RULES)) + f'\nr{MAX_RULES}: "a"'},
        {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
        {"grammar": "root ::= " + " | ".join(f'"{n}"' for n in range(6000))},
        {"guided_regex": "a" * 2**17},
        {"guided_choice": [str(n) for n in range(6000)]},
        # What follows compiles at once, and takes seconds or all memory there is for each mask.
        {"guided_choice": ["x" * 2**17]},
        {"guided_choice": [f"{n} {'x' * 1000}" for n in range(1000)]},
        {"guided_json": {"const": "x" * 2**17}},
        {"guided_json": {"enum": [{"a": n} for n in range(6000)]}},
        {"guided_json": {"type": "string", "pattern": "^((a{100}){100}){100}$"}},
        {"guided_regex": "((a{100}){100}){100}"},
        {"grammar": "start: A\nA: /(b{300}){300}/"},
        {"grammar": 'start: A\nA: (B | "b"){300}\nB: "c"{300}'},
        {"grammar": "start: A0\n" + "\n".join(f"A{n}: A{n + 1} A{n + 1}" for n in range(60)) + '\nA60: "y"'},
    ],
    ids=[
        *("rules", "brackets", "alternatives", "characters", "choices", "a long choice", "long choices"),
        *("a long constant", "objects", "pattern", "regex", "regex in a grammar", "terminals", "doubled terminals"),
    ],
)
def test_grammars_that_would_take_too_long_are_refused_as_that(fields):
    with pytest.raises(GrammarTooComplex):
        body_of(fields)


TOOLS = [Tool("f", SCHEMA)]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
THOUGHT = "hm</think>\n\n"
REASONING = "reasoning: REASONING\nREASONING: /[^<]*<\\/think>/"
TEXTS = {
    "text": "Hi.",
    "call": CALL,
    "text and call": f"Hi. {CALL}",
    "two calls": f"{CALL}\n{CALL}",
    "call and text": f"{CALL} Hi.",
    "broken call": "Hi. <tool_call>x",
    "format": '{"a": 1}',
    "format of another kind": '{"b": 1}',
}


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"tools": TOOLS}, {"text", "call", "text and call", "two calls", "format", "format of another kind"}),
        ({"tools": TOOLS, "parallel": False}, {"text", "call", "text and call", "format", "format of another kind"}),
        ({"tools": TOOLS, "choice": "required"}, {"call", "two calls"}),
        ({"tools": TOOLS, "choice": "required", "parallel": False}, {"call"}),
        ({"tools": TOOLS, "body": SCHEMA}, {"call", "two calls", "format"}),
        ({"tools": TOOLS, "choice": "none", "body": SCHEMA}, {"format"}),
        ({"body": SCHEMA}, {"format"}),
    ],
)
def test_the_whole_answer(given, taken, thinks):
    given = {**given, "body": body_of({"json_schema": given.get("body")})}
    rules = REASONING if thinks else ""
    grammar = answer_grammar(special={}, reasoning_rules=rules, format=HERMES, **given)
    check(grammar)
    start = matcher(grammar)
    thought = THOUGHT if thinks else ""
    assert {name for name, text in TEXTS.items() if takes(start, thought + text)} == taken
    if thinks:
        assert not any(takes(start, text) for text in TEXTS.values())


def test_a_trigger_that_is_common_in_text_counts_only_at_the_start():
    start = matcher(answer_grammar(special={}, format=LLAMA3, tools=TOOLS))
    assert takes(start, 'Use {"a": 1}.')
    assert takes(start, '{"name": "f", "parameters": {"a": 1}}')
    assert not takes(start, '{"name": "g", "parameters": {}}')
    assert not takes(start, ' {"name": 1}')


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"json_schema": SCHEMA}, {'{"a": 1}', '{"a":1}'}),
        ({"format": "json"}, {'{"a": 1}', '{"a":1}', '{"b": [1, 2]}'}),
        ({"grammar": 'root ::= "{" "x"'}, {"{x"}),
    ],
)
def test_calls_that_begin_like_the_format_leave_it_possible(fields, taken):
    start = matcher(answer_grammar(special={}, format=LLAMA3, tools=TOOLS, body=body_of(fields)))
    assert takes(start, '{"name": "f", "parameters": {"a": 1}}')
    assert {text for text in ('{"a": 1}', '{"a":1}', '{"b": [1, 2]}', "{x", "Hi.") if takes(start, text)} == taken


def test_special_tokens_of_a_trigger_are_tokens():
    grammar = answer_grammar(special={"<tool_call>": 7}, format=HERMES, tools=TOOLS)
    assert "<[7]>" in grammar
    assert '"<tool_call>"' not in grammar
    check(grammar)


def test_reasoning_alone_is_a_grammar_only_where_it_is_limited():
    assert answer_grammar(special={}, reasoning_rules=REASONING) == ""
    start = matcher(answer_grammar(special={}, reasoning_rules=REASONING, limits_reasoning=True))
    assert takes(start, THOUGHT + "Hi.")
    assert not takes(start, "Hi.")


def test_a_model_that_knows_no_calls_can_be_made_to_call():
    check(answer_grammar(special={}, format=GENERIC, tools=TOOLS, choice="required"))


def test_a_grammar_that_is_none_is_refused():
    with pytest.raises(InvalidRequest):
        check("start: nothing")
