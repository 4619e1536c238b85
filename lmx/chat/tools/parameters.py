"""A tool's parameters as the formats need them that write each for itself: which there are, and of which types.

JSON schemas in, looked through ``$ref``, ``anyOf`` and the like; values as models write them in, JSON text out. Pure;
``markup_parser``, ``markup_grammar`` and ``gemma`` use it.
"""

import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Final, NoReturn

Schema = Mapping[str, Any]
TYPES: Final = frozenset(("string", "integer", "number", "boolean", "null", "object", "array"))
_DEPTH: Final = 16
_PARTS: Final = 64
"""References may lead to as many parts as one likes: so many are looked at."""
_NESTED: Final = 64
_ANNOTATIONS: Final = frozenset(("type", "title", "description", "default", "examples", "nullable", "$schema", "$id"))


@dataclass(frozen=True)
class Parameters:
    """The parameters of one tool, or the properties of an object among them."""

    schema: Schema
    root: Schema | None = None
    """Where its references lead, if that is not itself."""

    @classmethod
    def of(cls, schema: Schema) -> "Parameters":
        """Of a tool's schema; one that is nested too deep to be looked through says nothing."""
        level: list[Any] = [schema]
        for _ in range(_NESTED):
            level = [inner for value in level for inner in _inner(value)]
            if not level:
                return cls(schema)
        return cls({})

    @cached_property
    def properties(self) -> Mapping[str, Schema]:
        """Name → schema, in the schema's order; required ones that it does not describe come last."""
        found: dict[str, Schema] = {}
        for part in self._all_parts:
            for name, schema in _mapping(part.get("properties")).items():
                found.setdefault(name, schema if isinstance(schema, Mapping) else {})
        return found | {name: {} for name in sorted(self.required) if name not in found}

    @cached_property
    def required(self) -> frozenset[str]:
        return frozenset(
            name for part in self._all_parts for name in _list(part.get("required")) if isinstance(name, str)
        )

    @cached_property
    def others(self) -> Schema | None:
        """The schema of parameters that have no name of their own; None where there can be none of them.

        A schema that only does not forbid them (most do not) means that there are none, if it names any.
        """
        for part in self._all_parts:
            patterns = _mapping(part.get("patternProperties")).values()
            for schema in [part.get("additionalProperties"), *patterns]:
                if schema is True:
                    return {}
                if isinstance(schema, Mapping):
                    return schema
        return None

    def resolve(self, schema: Any) -> Schema:
        """``schema``, or what its ``$ref`` stands for. One that stands for nothing allows anything."""
        for _ in range(_DEPTH):
            if not isinstance(schema, Mapping):
                return {}
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                return schema
            if not reference.startswith("#"):
                return {}
            target: Any = self.schema if self.root is None else self.root
            for key in filter(None, reference[1:].split("/")):
                key = key.replace("~1", "/").replace("~0", "~")
                target = target.get(key) if isinstance(target, Mapping) else None
            schema = target
        return {}

    def branches(self, schema: Any) -> Iterator[Schema]:
        """The alternatives that a schema is made of, each without anyOf, oneOf and a list of types."""
        return islice(self._branches(schema, _DEPTH), _PARTS)

    def _branches(self, schema: Any, depth: int) -> Iterator[Schema]:
        schema = self.resolve(schema)
        inner = next((schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)), None)
        if inner is None and len(_list(schema.get("allOf"))) == 1:
            inner = schema["allOf"]
        if inner is not None and depth:
            outer = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf", "allOf")}
            for part in inner:
                yield from self._branches({**outer, **self.resolve(part)}, depth - 1)
        elif isinstance(schema.get("type"), list):
            for name in schema["type"]:
                yield {**schema, "type": name}
        elif schema.get("type") == "string" and (schema.get("pattern") == "^$" or schema.get("maxLength") == 0):
            yield {"const": ""}
        else:
            yield schema
        if schema.get("nullable") is True:
            yield {"type": "null"}

    def types(self, schema: Any, *, nested: bool = False) -> frozenset[str]:
        """The JSON types that a value may have."""
        found: set[str] = set()
        for branch in self.branches(schema):
            if "const" in branch or isinstance(branch.get("enum"), list):
                values = [branch["const"]] if "const" in branch else branch["enum"]
                found |= {_type(value) for value in values}
            elif branch.get("type") in TYPES:
                found.add(branch["type"])
            elif "properties" in branch:
                found.add("object")
            elif "items" in branch:
                found.add("array")
            elif _list(branch.get("allOf")) and not nested:
                parts = [self.types(part, nested=True) for part in branch["allOf"][:8]]
                found |= frozenset.intersection(*parts) or TYPES
            elif not branch.keys().isdisjoint(("pattern", "minLength", "maxLength")):
                found.add("string")
            else:
                return TYPES
        return frozenset(found) or TYPES

    def rooted(self, schema: Schema) -> Schema:
        """``schema`` by itself: its references lead to a copy of the whole, which it carries."""
        if '"$ref"' not in json.dumps(schema):
            return schema
        own: dict[str, Any] = _moved(schema)
        root = self.schema if self.root is None else self.root
        own["$defs"] = {**_mapping(own.get("$defs")), "tool": _moved(root)}
        return own

    @cached_property
    def _all_parts(self) -> Sequence[Schema]:
        return list(islice(self._parts(self.schema), _PARTS))

    def _parts(self, schema: Any, depth: int = _DEPTH) -> Iterator[Schema]:
        """An object's schema and those it is put together from: all of ``allOf``, the first of an alternative."""
        schema = self.resolve(schema)
        yield schema
        if depth:
            for part in [*_list(schema.get("allOf")), *_list(schema.get("anyOf"))[:1], *_list(schema.get("oneOf"))[:1]]:
                yield from self._parts(part, depth - 1)


def unconstrained(branch: Schema) -> bool:
    """Whether any value of its type will do."""
    return _ANNOTATIONS.issuperset(branch)


def value(text: str, types: frozenset[str]) -> str:
    """A value as a model wrote it, without quotes, as JSON text of one of ``types``; what is none of them, as a string.

    Models write JSON; some templates show them Python (``True``, ``{'a': None}``).
    """
    stripped = text.strip()
    if types - {"string"} and stripped and (stripped[0] != '"' or "string" not in types):
        try:
            if _fits(json.loads(stripped, parse_constant=_refuse), types):
                return stripped
        except (ValueError, RecursionError):
            pass
        if types != TYPES and (stripped in _PYTHON or stripped[0] in "{["):
            try:
                written = ast.literal_eval(stripped)
                if _fits(written, types):
                    return json.dumps(written, ensure_ascii=False, allow_nan=False)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                pass
    return json.dumps(text, ensure_ascii=False)


def escaped(text: str) -> str:
    """A piece of a string as JSON writes it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


_PYTHON: Final = {"True", "False", "None"}


def _fits(written: object, types: frozenset[str]) -> bool:
    name = _type(written)
    return name in types or (name == "integer" and "number" in types)


def _type(written: object) -> str:
    match written:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case int():
            return "integer"
        case float():
            return "integer" if written.is_integer() else "number"
        case list():
            return "array"
        case dict():
            return "object"
    return ""


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _moved(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        return {
            key: f"#/$defs/tool{inner[1:]}"
            if key == "$ref" and isinstance(inner, str) and inner.startswith("#")
            else _moved(inner)
            for key, inner in schema.items()
        }
    return [_moved(inner) for inner in schema] if isinstance(schema, list) else schema


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
