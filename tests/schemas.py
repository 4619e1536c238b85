"""JSON schemas as clients send them, with instances that they admit and that they do not. Used by tests/test_schema.py.

Written after what pydantic, zod, instructor, OpenClaw and the drafts' own test suites look like.
"""

from typing import Any, NamedTuple


class Case(NamedTuple):
    name: str
    schema: Any
    valid: tuple[Any, ...] = ()
    """What the grammar must take, as JSON laid out in two ways."""
    invalid: tuple[Any, ...] = ()


DRAFT7 = "http://json-schema.org/draft-07/schema#"
DRAFT2020 = "https://json-schema.org/draft/2020-12/schema"
SAFE = 9007199254740991


def obj(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), **more}


CLOSED = {"additionalProperties": False}
STR = {"type": "string"}
INT = {"type": "integer"}
TREE = {
    "$defs": {
        "Node": obj(
            {"value": INT, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}], "default": None}},
            "value",
            title="Node",
            **CLOSED,
        )
    },
    "$ref": "#/$defs/Node",
}

CASES = [
    # pydantic
    Case(
        "pydantic model",
        obj(
            {
                "name": {"title": "Name", "type": "string"},
                "age": {"title": "Age", "type": "integer", "exclusiveMinimum": 0},
                "email": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Email"},
            },
            "name",
            "age",
            title="User",
            **CLOSED,
        ),
        ({"name": "Ann", "age": 3}, {"name": "", "age": 1, "email": None}, {"name": 'ü\n"', "age": 1, "email": "x"}),
        ({"name": "Ann"}, {"name": "Ann", "age": 0}, {"name": "Ann", "age": 1, "x": 1}, {"name": 5, "age": 1}, []),
    ),
    Case("pydantic recursive model", TREE, ({"value": 1, "next": {"value": 2, "next": None}},), ({"next": None}, {})),
    Case(
        "pydantic enum and literal",
        {
            "$defs": {"Color": {"enum": ["red", "green"], "title": "Color", "type": "string"}},
            **obj({"color": {"$ref": "#/$defs/Color"}, "kind": {"const": "a", "type": "string"}}, "color", "kind"),
        },
        ({"color": "red", "kind": "a"},),
        ({"color": "blue", "kind": "a"}, {"color": "red", "kind": "b"}),
    ),
    Case(
        "pydantic discriminated union",
        {
            "$defs": {
                "Cat": obj({"type": {"const": "cat", "type": "string"}, "lives": INT}, "type", "lives"),
                "Dog": obj({"type": {"const": "dog", "type": "string"}, "good": {"type": "boolean"}}, "type", "good"),
            },
            **obj(
                {
                    "pet": {
                        "discriminator": {"mapping": {"cat": "#/$defs/Cat"}, "propertyName": "type"},
                        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                    }
                },
                "pet",
            ),
        },
        ({"pet": {"type": "cat", "lives": 9}}, {"pet": {"type": "dog", "good": True}}),
        ({"pet": {"type": "cat", "good": True}}, {"pet": {"type": "cow"}}),
    ),
    Case(
        "pydantic constrained fields",
        obj(
            {
                "short": {"type": "string", "minLength": 2, "maxLength": 4},
                "code": {"type": "string", "pattern": r"^[A-Z]{2}\d{3}$"},
                "ratio": {"type": "number", "minimum": 0, "maximum": 1},
                "tags": {"type": "array", "items": STR, "minItems": 1, "maxItems": 3},
            },
            "short",
            "code",
            "ratio",
            "tags",
            **CLOSED,
        ),
        ({"short": "abc", "code": "AB123", "ratio": 0.25, "tags": ["a"]},),
        (
            {"short": "a", "code": "AB123", "ratio": 0.25, "tags": ["a"]},
            {"short": "abc", "code": "AB12", "ratio": 0.25, "tags": ["a"]},
            {"short": "abc", "code": "AB123", "ratio": 1.5, "tags": ["a"]},
            {"short": "abc", "code": "AB123", "ratio": 0.5, "tags": []},
        ),
    ),
    Case(
        "pydantic tuple",
        obj(
            {
                "pair": {
                    "type": "array",
                    "prefixItems": [INT, STR],
                    "minItems": 2,
                    "maxItems": 2,
                }
            },
            "pair",
        ),
        ({"pair": [1, "a"]},),
        ({"pair": [1]}, {"pair": ["a", 1]}, {"pair": [1, "a", 2]}),
    ),
    Case(
        "pydantic dict of lists",
        obj({"scores": {"type": "object", "additionalProperties": {"type": "array", "items": INT}}}, "scores"),
        ({"scores": {}}, {"scores": {"a": [1, 2], "b": []}}),
        ({"scores": {"a": ["x"]}}, {"scores": {"a": 1}}),
    ),
    Case(
        "pydantic dates",
        obj({"day": {"format": "date", "type": "string"}, "at": {"format": "date-time", "type": "string"}}, "day"),
        ({"day": "2024-02-29"}, {"day": "2024-01-31", "at": "2024-01-31T10:00:00Z"}),
        ({"day": "tomorrow"}, {"day": "2024-13-01"}),
    ),
    Case(
        "pydantic uuid and url",
        obj(
            {"id": {"format": "uuid", "type": "string"}, "url": {"format": "uri", "minLength": 1, "type": "string"}},
            "id",
        ),
        ({"id": "123e4567-e89b-12d3-a456-426614174000", "url": "https://a.b/c?d=e"},),
        ({"id": "x"},),
    ),
    Case("pydantic path, an unknown format", {"type": "string", "format": "file-path"}, ("/a/b", ""), (5,)),
    Case(
        "pydantic Decimal",
        {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^(?:\d+|\d*\.\d+)$"}]},
        (1, 1.5, "2.50", ".5"),
        ("a", None),
    ),
    # zod
    Case(
        "zod integer bounds",
        {
            "$schema": DRAFT2020,
            **obj({"n": {"type": "integer", "minimum": -SAFE, "maximum": SAFE}}, "n", **CLOSED),
        },
        ({"n": SAFE}, {"n": -SAFE}, {"n": 0}),
        ({"n": SAFE + 1}, {"n": 0.5}),
    ),
    Case(
        "zod record",
        {
            "$schema": DRAFT2020,
            "type": "object",
            "propertyNames": {"type": "string"},
            "additionalProperties": {"type": "number"},
        },
        ({}, {"a": 1, "b c": -2.5}),
        ({"a": "x"},),
    ),
    Case(
        "zod record of an enum",
        {
            "type": "object",
            "propertyNames": {"type": "string", "enum": ["a", "b"]},
            "additionalProperties": {"type": "number"},
            "required": ["a"],
        },
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"c": 1}, {"a": 1, "c": 2}, {"b": 1}),
    ),
    Case(
        "zod discriminated union",
        {
            "oneOf": [
                obj({"status": {"type": "string", "const": "ok"}, "data": STR}, "status", "data", **CLOSED),
                obj({"status": {"type": "string", "const": "failed"}, "error": STR}, "status", "error", **CLOSED),
            ]
        },
        ({"status": "ok", "data": ""}, {"status": "failed", "error": "e"}),
        ({"status": "ok", "error": "e"},),
    ),
    Case(
        "zod nullable and default",
        {
            "$schema": DRAFT7,
            **obj(
                {
                    "a": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "b": {"type": ["string", "null"], "default": "x"},
                    "c": {"default": 10, "type": "number", "exclusiveMinimum": 0, "maximum": SAFE},
                },
                "a",
                "b",
                **CLOSED,
            ),
        },
        ({"a": None, "b": None}, {"a": "x", "b": "y", "c": 1.5}),
        ({"a": None}, {"a": None, "b": None, "c": 0}),
    ),
    Case(
        "zod patternProperties",
        {"type": "object", "patternProperties": {"^.*$": {"type": "string"}}},
        ({}, {"a": "b", "": ""}),
        ({"a": 1},),
    ),
    Case(
        "zod email",
        {
            "type": "string",
            "format": "email",
            "pattern": r"^(?:[A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
        },
        ("a.b@example.org",),
        ("a.b", "@", ""),
    ),
    Case(
        "zod intersection", {"allOf": [obj({"a": STR}, "a"), obj({"b": INT}, "b")]}, ({"a": "", "b": 1},), ({"a": ""},)
    ),
    Case(
        "zod tuple, draft-07",
        {"$schema": DRAFT7, "type": "array", "items": [STR, INT], "minItems": 2, "additionalItems": False},
        (["a", 1],),
        (["a"], ["a", 1, 2], [1, "a"]),
    ),
    Case(
        "zod lazy, draft-07",
        {"$schema": DRAFT7, **obj({"kids": {"type": "array", "items": {"$ref": "#"}}}, "kids")},
        ({"kids": [{"kids": []}]},),
        ({"kids": [1]},),
    ),
    # instructor, LangChain, OpenClaw, agents
    Case(
        "instructor with examples",
        obj(
            {
                "reasoning": {"description": "Think!", "examples": ["a"], "type": "string"},
                "answer": {"type": "string", "enum": ["yes", "no"]},
            },
            "reasoning",
            "answer",
            description="Correctly extracted `Answer`",
            title="Answer",
        ),
        ({"reasoning": "…", "answer": "yes"},),
        ({"reasoning": "…", "answer": "maybe"},),
    ),
    Case(
        "OpenClaw tool, required before properties",
        {
            "type": "object",
            "required": ["command"],
            "properties": {
                "command": {"type": "string", "description": "Shell command"},
                "timeout": {"type": "number", "description": "Seconds"},
                "env": {"type": "object", "patternProperties": {"^(.*)$": {"type": "string"}}},
                "pty": {"type": "boolean"},
            },
        },
        (
            {"command": "ls"},
            {"command": "ls", "timeout": 1.5, "env": {"A": "b"}, "pty": True},
            {"command": ""},
        ),
        ({}, {"command": "ls", "env": {"A": 1}}),
    ),
    Case("tool without properties", {"properties": {}, "type": "object"}, ({}, {"a": [None, {"b": 1.5}]}), ([], "x")),
    Case("closed tool without properties", {"properties": {}, "type": "object", **CLOSED}, ({},), ({"a": 1},)),
    Case(
        "edit tool",
        obj(
            {
                "path": STR,
                "edits": {
                    "type": "array",
                    "minItems": 1,
                    "items": obj({"oldText": STR, "newText": STR}, "oldText", "newText", **CLOSED),
                },
            },
            "path",
            "edits",
            **CLOSED,
        ),
        ({"path": "a", "edits": [{"oldText": "x", "newText": '</tool_call>\t\\ "y"'}]},),
        ({"path": "a", "edits": []},),
    ),
    Case(
        "draft-07 definitions",
        {
            "$schema": DRAFT7,
            "definitions": {"item": obj({"sku": {"type": "string", "pattern": "^[a-z]+-[0-9]+$"}}, "sku", **CLOSED)},
            "type": "array",
            "items": {"$ref": "#/definitions/item"},
            "maxItems": 2,
        },
        ([], [{"sku": "a-1"}]),
        ([{"sku": "A-1"}], [{"sku": "a-1"}] * 3),
    ),
    Case(
        "ref to a property",
        obj({"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}, "b"),
        ({"a": 1, "b": 2},),
        ({"b": "x"},),
    ),
    Case(
        "ref by id and anchor",
        {
            "$id": "https://example.org/root.json",
            "$defs": {
                "one": {
                    "$id": "one.json",
                    "type": "integer",
                    "$defs": {"deep": {"$anchor": "deep", "type": "boolean"}},
                },
                "two": {"$anchor": "two", "type": "string"},
            },
            **obj({"a": {"$ref": "one.json"}, "b": {"$ref": "#two"}, "c": {"$ref": "one.json#deep"}}, "a", "b", "c"),
        },
        ({"a": 1, "b": "x", "c": True},),
        ({"a": "x", "b": "x", "c": True}, {"a": 1, "b": 1, "c": True}, {"a": 1, "b": "", "c": 1}),
    ),
    Case(
        "ref with escapes",
        {
            "$defs": {"a/b": INT, "c~d": STR, "e%f": {"type": "null"}},
            "anyOf": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/$defs/c~0d"}, {"$ref": "#/$defs/e%25f"}],
        },
        (1, "x", None),
        (True, []),
    ),
    Case(
        "mutual recursion with siblings",
        {
            "$defs": {
                "expression": {
                    "anyOf": [INT, {"$ref": "#/$defs/sum", "description": "nested"}],
                },
                "sum": obj(
                    {"left": {"$ref": "#/$defs/expression"}, "right": {"$ref": "#/$defs/expression"}},
                    "left",
                    "right",
                    **CLOSED,
                ),
            },
            "$ref": "#/$defs/expression",
        },
        (1, {"left": 1, "right": {"left": 2, "right": 3}}),
        ({"left": 1}, "x"),
    ),
    Case(
        "recursion and a constraint beside it",
        {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node", "maxProperties": 1}}},
                    **CLOSED,
                }
            },
            "$ref": "#/$defs/node",
        },
        ({}, {"kids": [{}, {"kids": []}]}),
        ({"kids": [1]}, {"x": 1}),
    ),
    # test-suite-like
    Case("true", True, (1, "x", None, {"a": [True]}, -2.5)),
    Case("empty", {}, (1, "x", None, {"a": [True]}, [[]])),
    Case("string", STR, ("", 'a"\\\n\u00e9\U0001f600'), (1, None)),
    Case("integer", INT, (0, -5, 9223372036854774784), (0.5, "1")),
    Case("number", {"type": "number"}, (0, -5.25, 1e-9, 123456789.5), ("1",)),
    Case("boolean", {"type": "boolean"}, (True, False), (0, "true")),
    Case("null", {"type": "null"}, (None,), (0, "null")),
    Case("several types", {"type": ["integer", "null", "array"], "minimum": 5, "maxItems": 0}, (5, None, []), (4, [1])),
    Case(
        "enum of everything",
        {"enum": [1, "1", None, True, 1.5, {"a": 1}, [1, "x"]]},
        (1, "1", None, True, 1.5, {"a": 1}, [1, "x"]),
        (2, False, {}, []),
    ),
    Case("enum within a type", {"type": "integer", "enum": [1, "a", 2.5, 3]}, (1, 3), ("a", 2.5)),
    Case("enum within bounds", {"enum": [1, 5, 9, "abc", "a"], "minimum": 4, "minLength": 2}, (5, 9, "abc"), (1, "a")),
    Case("enum within a pattern", {"enum": ["ab", "cd", "ae"], "pattern": "^a"}, ("ab", "ae"), ("cd",)),
    Case(
        "const object",
        {"const": {"a": [1, {"b": None}], "c": "x"}},
        ({"a": [1, {"b": None}], "c": "x"},),
        ({"a": [1]},),
    ),
    Case("const with odd characters", {"const": 'a"b\\c\n\t/é😀'}, ('a"b\\c\n\t/é😀',), ("a",)),
    Case(
        "number bounds", {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25}, (-1.5, 0, 2.24), (-1.6, 2.25, 3)
    ),
    Case(
        "exclusive bounds, draft 4",
        {"type": "integer", "minimum": 1, "exclusiveMinimum": True, "maximum": 9},
        (2, 9),
        (1, 10),
    ),
    Case("one-sided bounds", {"type": "integer", "minimum": 17}, (17, 123456789), (16, -17)),
    Case("multipleOf", {"type": "integer", "multipleOf": 5, "minimum": 1}, (5, 100), (0, 7)),
    Case("multipleOf a fraction", {"type": "number", "multipleOf": 0.25}, (0.25, -1.75, 3), (0.3,)),
    Case("unanchored pattern", {"type": "string", "pattern": "[b-y]"}, ("abbzz", "bc"), ("za", "")),
    Case("ECMA brackets", {"type": "string", "pattern": r"^[[&&]+[^\]]$"}, ("[&x",), ("x", "[]")),
    Case(
        "pattern and lengths",
        {"type": "string", "pattern": "^[ab]*$", "minLength": 2, "maxLength": 3},
        ("ab", "aab"),
        ("a", "abab", "xy"),
    ),
    Case("two patterns", {"allOf": [{"type": "string", "pattern": "a"}, {"pattern": "b"}]}, ("ab", "bxa"), ("a", "b")),
    Case("array of arrays", {"type": "array", "items": {"type": "array", "items": INT}}, ([], [[1], []]), ([1],)),
    Case(
        "prefixItems and items",
        {"prefixItems": [INT], "items": STR, "type": "array"},
        ([], [1], [1, "a", "b"]),
        (["a"], [1, 2]),
    ),
    Case(
        "contains",
        {"type": "array", "items": {"type": ["integer", "string"]}, "contains": INT},
        ([1], [1, "a", 2]),
        ([], ["a"]),
    ),
    Case(
        "maxContains",
        {"type": "array", "items": {"enum": ["a", "b"]}, "contains": {"const": "a"}, "maxContains": 1},
        (["a"], ["a", "b"]),
        (["b"], ["a", "a"]),
    ),
    Case(
        "unique constants",
        {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True},
        ([], ["c", "a"]),
        (["a", "a"],),
    ),
    Case("required without properties", {"type": "object", "required": ["a"]}, ({"a": 1},), ({}, {"b": 1})),
    Case("minProperties", {"type": "object", "minProperties": 2}, ({"a": 1, "b": 2},), ({}, {"a": 1})),
    Case(
        "minProperties of optional ones",
        obj({"a": INT, "b": INT}, minProperties=1, **CLOSED),
        ({"a": 1}, {"b": 1}, {"a": 1, "b": 2}),
        ({},),
    ),
    Case(
        "minProperties, open",
        obj({"a": INT}, minProperties=1, additionalProperties=True),
        ({"a": 1}, {"x": None}, {"a": 1, "x": 2}),
        ({},),
    ),
    Case(
        "maxProperties of optional ones",
        obj({"a": INT, "b": INT, "c": INT}, maxProperties=2, additionalProperties=True),
        ({}, {"a": 1, "c": 1}, {"b": 1, "x": 1}),
        ({"a": 1, "b": 1, "c": 1}, {"a": 1, "x": 1, "y": 1}),
    ),
    Case(
        "patternProperties beside properties",
        {"type": "object", "properties": {"xa": {"minimum": 5}}, "patternProperties": {"^x": INT}, **CLOSED},
        ({"xa": 5, "xb": 1},),
        ({"xa": 1}, {"xb": "a"}, {"y": 1}),
    ),
    Case(
        "propertyNames by pattern",
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": INT},
        ({"ab": 1},),
        ({"A": 1}, {"ab": "x"}),
    ),
    Case(
        "propertyNames by length", {"type": "object", "propertyNames": {"maxLength": 2}}, ({"ab": 1}, {}), ({"abc": 1},)
    ),
    Case(
        "dependentRequired",
        obj({"card": INT, "address": STR}, dependentRequired={"card": ["address"]}, **CLOSED),
        ({}, {"address": ""}, {"card": 1, "address": ""}),
        ({"card": 1},),
    ),
    Case(
        "dependencies, draft-07",
        {
            "$schema": DRAFT7,
            **obj(
                {"a": INT, "b": INT}, dependencies={"a": ["b"], "b": {"properties": {"b": {"minimum": 5}}}}, **CLOSED
            ),
        },
        ({}, {"b": 5}, {"a": 1, "b": 6}),
        ({"a": 1}, {"b": 4}),
    ),
    Case(
        "if, then, else",
        {
            **obj({"country": {"enum": ["US", "NL"]}, "code": STR}, "country", "code", **CLOSED),
            "if": {"properties": {"country": {"const": "US"}}},
            "then": {"properties": {"code": {"pattern": "^[0-9]{5}$"}}},
            "else": {"properties": {"code": {"pattern": "^[A-Z]+$"}}},
        },
        ({"country": "US", "code": "12345"}, {"country": "NL", "code": "AB"}),
        ({"country": "US", "code": "AB"}, {"country": "NL", "code": "12345"}),
    ),
    Case(
        "not a constant", {"type": "string", "not": {"enum": ["a", "abc", ""]}}, ("b", "ab", "abcd"), ("a", "abc", "")
    ),
    Case("not a type", {"not": {"type": ["string", "object", "array"]}}, (1, None, True), ("a", {}, [])),
    Case("not required", {"type": "object", "not": {"required": ["a"]}}, ({}, {"b": 1}), ({"a": 1},)),
    Case(
        "oneOf required",
        {**obj({"a": INT, "b": INT}, **CLOSED), "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        ({"a": 1}, {"b": 1}),
        ({}, {"a": 1, "b": 1}),
    ),
    Case(
        "oneOf ranges",
        {"oneOf": [{"type": "integer", "maximum": 5}, {"type": "integer", "minimum": 3}]},
        (2, 6),
        (3, 4, 5),
    ),
    Case("oneOf types", {"oneOf": [STR, INT, {"type": "null"}]}, ("a", 1, None), (True, [])),
    Case(
        "anyOf within a type",
        {"type": "object", "properties": {"a": INT}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        ({"a": 1}, {"b": "x"}),
        ({},),
    ),
    Case(
        "unevaluatedProperties",
        {"allOf": [obj({"a": INT}, "a")], "properties": {"b": STR}, "type": "object", "unevaluatedProperties": False},
        ({"a": 1, "b": ""},),
        ({"a": 1, "c": 1},),
    ),
    Case(
        "allOf of refs",
        {
            "$defs": {"base": obj({"id": INT}, "id")},
            "allOf": [{"$ref": "#/$defs/base"}, {"properties": {"name": STR}, "required": ["name"]}],
        },
        ({"id": 1, "name": "x"},),
        ({"id": 1}, {"name": "x"}),
    ),
    Case("boolean subschemas", obj({"a": True, "b": False}, "a"), ({"a": None},), ({"a": 1, "b": 1},)),
    Case("unknown keywords", {"type": "integer", "x-order": 1, "example": 5, "deprecated": True}, (1,), ("x",)),
    Case(
        "property names with quotes",
        obj({'a"b\\': INT, "c\n": STR, "😀": INT}, 'a"b\\', **CLOSED),
        ({'a"b\\': 1, "c\n": "x", "😀": 2},),
        ({"c\n": ""},),
    ),
]
