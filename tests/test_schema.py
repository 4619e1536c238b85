"""A client's JSON schema as a grammar: whatever can be written by it is JSON that validates, and what it asks for can
be written. What cannot be enforced is refused by keyword and place.
"""

import json
import random

import jsonschema
import pytest

from lmx.chat.forms.limits import MAX_DEPTH, MAX_PROPERTIES
from lmx.chat.forms.patterns import none_of, translated
from lmx.chat.forms.schema import json_rule, strict_rule
from lmx.errors import GrammarTooComplex, InvalidRequest
from tests.schemas import CASES, DRAFT7, Case
from tests.walks import matcher, takes, walk

WALKS = 6
LAYOUTS = ({}, {"separators": (",", ":")})


def validator(schema):
    kind = jsonschema.Draft202012Validator
    if isinstance(schema, dict):
        if schema.get("exclusiveMinimum") is True:
            kind = jsonschema.Draft4Validator
        elif schema.get("$schema") == DRAFT7:
            kind = jsonschema.Draft7Validator
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


def grammar(schema):
    return matcher(f"start: {strict_rule(schema, 'format')}")


def spelled(instance, **layout):
    return json.dumps(instance, ensure_ascii=False, **layout).replace("1e-09", "0.000000001")


@pytest.mark.filterwarnings("ignore:Possible (nested set|set)")  # Python's own reading of ECMA brackets
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_schema_is_exactly_what_can_be_written(case: Case):
    checks = validator(case.schema)
    start = grammar(case.schema)
    for instance in case.valid:
        assert checks.is_valid(instance)
        for layout in LAYOUTS:
            assert takes(start, spelled(instance, **layout)), instance
    for instance in case.invalid:
        assert not checks.is_valid(instance)
        assert not takes(start, spelled(instance)), instance
    rng = random.Random(case.name)
    answers = [answer for _ in range(WALKS) if (answer := walk(start, rng)) is not None]
    assert answers
    for answer in answers:
        checks.validate(json.loads(answer))


REFUSED = [
    ("uniqueItems", "#/properties/tags/uniqueItems", {"properties": {"tags": {"items": {}, "uniqueItems": True}}}),
    ("pattern", "#/items/pattern", {"items": {"type": "string", "pattern": "^(?!x)"}}),
    ("pattern", "#/patternProperties/(a", {"patternProperties": {"(a": {}}}),
    ("oneOf", "#/anyOf/1/oneOf", {"anyOf": [{"type": "null"}, {"oneOf": [{"type": "integer"}, {"type": "number"}]}]}),
    ("not", "#/not", {"not": {"type": "string", "pattern": "a"}}),
    ("if", "#/if", {"if": {"items": {"type": "string"}}, "then": {"maxItems": 1}, "else": {"minItems": 3}}),
    ("multipleOf", "#/properties/a~1b/multipleOf", {"properties": {"a/b": {"type": "number", "multipleOf": 0.07}}}),
    # llguidance takes all memory for it
    ("multipleOf", "#/multipleOf", {"type": "integer", "multipleOf": 0.123456789}),
    ("not", "#/not/properties/a", {"not": {"required": ["a"], "properties": {"a": {"pattern": "b"}}}}),
    (
        "$dynamicRef",
        "#/items/$dynamicRef",
        {
            "items": {"$dynamicRef": "#a"},
            "$defs": {"a": {"$dynamicAnchor": "a"}, "b": {"$id": "b", "$dynamicAnchor": "a"}},
        },
    ),
    ("$ref", "#/$ref", {"$ref": "#/$defs/none"}),
    ("$ref", "#/$ref", {"$ref": "https://example.org/schema"}),
    ("$ref", "#/$defs/a", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    ("type", "#/type", {"type": "text"}),
    ("required", "#/required", {"required": [5]}),
    ("properties", "#/properties", {"properties": []}),
    ("minLength", "#/minLength", {"minLength": -1}),
    ("minimum", "#/minimum", {"minimum": "5"}),
    ("enum", "#/enum", {"enum": 5}),
    ("anyOf", "#/anyOf", {"anyOf": {}}),
    ("schema", "#/items", {"items": 5}),
    ("schema", "#", 5),
    ("schema", "#", [{}]),
    ("schema", "#", False),
    ("schema", "#", {"type": "integer", "minimum": 5, "maximum": 4}),
    ("schema", "#", {"allOf": [{"type": "string"}, {"type": "integer"}]}),
    ("minProperties", "#/minProperties", {"properties": {c: {} for c in "abcdefghij"}, "minProperties": 5}),
    ("propertyNames", "#/propertyNames", {"propertyNames": {"format": "uuid"}}),
    ("unevaluatedItems", "#/unevaluatedItems", {"unevaluatedItems": False}),
]


@pytest.mark.parametrize(
    ("keyword", "path", "schema"), REFUSED, ids=[f"{keyword} {path}" for keyword, path, _ in REFUSED]
)
def test_what_cannot_be_enforced_is_refused_by_keyword_and_place(keyword, path, schema):
    with pytest.raises(InvalidRequest) as raised:
        strict_rule(schema, "response_format.json_schema.schema")
    assert raised.value.param == "response_format.json_schema.schema"
    assert f"{keyword} at {path} cannot be enforced: " in raised.value.message


def chain(length, link):
    return {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{n}": link({"$ref": f"#/$defs/d{n + 1}"}) for n in range(length)} | {f"d{length}": {}},
    }


TOO_COMPLEX = {
    # llguidance follows such a chain on the stack: at 2,000 links the process dies
    "a chain of references": chain(3000, lambda ref: {"properties": {"a": ref}}),
    "a chain in one place": chain(3000, lambda ref: {"allOf": [ref]}),
    "properties": {"properties": {f"p{n}": {} for n in range(MAX_PROPERTIES + 1)}},
    "alternatives": {"allOf": [{"anyOf": [{"minLength": n * m} for n in range(20)]} for m in range(9)]},
    "patterns": {"anyOf": [{"pattern": f"a{n}"} for n in range(600)]},
    "patterns of names": {"patternProperties": {f"^a{n}$": {} for n in range(40)}},
    "branches": {"oneOf": [{"const": n} for n in range(2000)]},
    "a million characters": {"description": "x" * 2**20},
    "items": {"type": "array", "minItems": 10**9},
    "a pattern that explodes": {"type": "string", "pattern": "(.*a.{300}b.*){3}", "maxLength": 1000},
}


@pytest.mark.parametrize("schema", TOO_COMPLEX.values(), ids=TOO_COMPLEX)
def test_what_would_take_too_long_is_refused_as_that(schema):
    with pytest.raises(GrammarTooComplex) as raised:
        strict_rule(schema, "format")
    assert raised.value.code == "grammar_too_complex"
    assert json_rule(schema) == json_rule({})  # a tool's arguments are any object then


def test_a_schema_within_the_limits_is_taken():
    deep = chain(MAX_DEPTH - 4, lambda ref: {"properties": {"a": ref}, "type": "object", "additionalProperties": False})
    assert takes(grammar(deep), '{"a": {"a": {}}}')
    nested = {"type": "integer"}
    for _ in range(MAX_DEPTH // 2):
        nested = {"type": "array", "items": nested, "minItems": 1}
    assert takes(grammar(nested), "[" * (MAX_DEPTH // 2) + "1" + "]" * (MAX_DEPTH // 2))
    wide = {"enum": [f"value {n}" for n in range(20_000)]}
    assert takes(grammar(wide), '"value 19999"')
    assert takes(grammar({"type": "string", "maxLength": 2**40}), '"a"')
    assert takes(grammar({"type": "array", "maxItems": 2**40}), "[1, 2]")


def test_properties_that_nobody_speaks_of_are_not_written():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert takes(grammar(schema), '{"a": 1}')
    assert not takes(grammar(schema), '{"a": 1, "b": 2}')
    assert takes(grammar({**schema, "additionalProperties": True}), '{"a": 1, "b": 2}')


def test_white_space_and_digits_come_to_an_end():
    start = grammar({})
    for text in ("{ ", "[\n", "[1 ", "[1,  ", '{"a" ', '{"a":  ', "[1" + "0" * 16, "[0." + "1" * 10, "[1e", "[-"):
        run = start.deep_copy()
        taken = run.try_consume_tokens(list(text.encode()))
        assert taken == len(text) - 1 if text != "[-" else taken == 2, text


@pytest.mark.parametrize(
    "text", ['"\\ud800"', '"\\u0061"', '"\x01"', '"\n"', '{"a": 1, "\\u0061": 2}', '"\\/"', '"\\x"']
)
def test_a_text_has_one_spelling_that_every_parser_reads_alike(text):
    assert not takes(grammar({}), text)


def test_an_object_ends_by_itself():
    start = grammar({"type": "object"})
    rng = random.Random(14)
    answers = [walk(start, rng, hurry=0) for _ in range(20)]
    assert None not in answers
    assert all(isinstance(json.loads(answer), dict) for answer in answers)


def test_digits_in_patterns_are_ascii():
    start = grammar({"type": "string", "pattern": r"^\d+$"})
    assert takes(start, '"12"')
    assert not takes(start, '"١٢"')


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("[[]", r"[\[]"),
        ("[a&&b]", r"[a\&&b]"),
        ("[^]", r"[\s\S]"),
        ("a{,3}", r"a\{,3}"),
        ("a{2,3}", "a{2,3}"),
        (r"[\b]", r"[\x08]"),
        (r"\cA\0\/", r"\x01\x00/"),
        (r"^[^[\]]+$", r"^[^\[\]]+$"),
    ],
)
def test_patterns_are_ecma(pattern, meant):
    assert translated(pattern) == meant


def test_every_text_but_some():
    start = grammar({"type": "string", "pattern": none_of(["a", "ab", "c/d", ""])})
    texts = ["", "a", "ab", "abc", "b", "c", "c/", "c/d", "c/de", "\n", "é"]
    assert [text for text in texts if takes(start, spelled(text))] == ["abc", "b", "c", "c/", "c/de", "\n", "é"]


def test_a_tool_keeps_what_can_be_enforced_and_leaves_the_rest():
    tags = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    start = matcher(
        "start: "
        + json_rule(
            {
                "properties": {"tags": tags, "n": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
                "required": ["n"],
                "additionalProperties": False,
            }
        )
    )
    assert takes(start, '{"tags": ["a", "a"], "n": 1.5}')
    assert not takes(start, '{"tags": [1], "n": 1}')
    assert not takes(start, "{}")
    assert not takes(start, "5")  # arguments are an object, also where the schema does not say so


@pytest.mark.parametrize(
    "schema", [{"type": "string"}, {"properties": 5}, {"type": "object", "required": 5}, {"$ref": "x"}]
)
def test_a_tool_with_a_broken_schema_takes_any_object(schema):
    start = matcher(f"start: {json_rule(schema)}")
    assert takes(start, '{"a": [1, null]}')
    assert not takes(start, '"a"')


def test_refs_beside_the_root_of_a_tool_are_found():
    schema = {"properties": {"a": {"$ref": "#/definitions/n"}}, "definitions": {"n": {"type": "integer"}}}
    start = matcher(f"start: {json_rule(schema)}")
    assert takes(start, '{"a": 1}')
    assert not takes(start, '{"a": "x"}')
