"""The grammar of calls in Gemma's notation: what ``gemma`` reads, and nothing it would read otherwise.

A schema becomes rules here, since its values are no JSON. Keys come in the order of the alphabet, as the templates
write them; those that are not required may be left out. Pure.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmx.chat.forms.grammar import literal
from lmx.chat.tools.base import Tool
from lmx.chat.tools.lark import ANY, count, json_value, may_be_empty, plain, quoted, string_body
from lmx.chat.tools.parameters import TYPES, Parameters, Schema

AFTER = r"[ \t\r\n]{0,8}[,}\]]"
"""What follows a string: only before that is the token that ends one an end."""

_MOST_RULES = 5000
"""Schemas can be written that unfold without end; from here on, values are of any kind."""


def gemma_calls(
    markers: tuple[str, str, str], tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool
) -> str:
    """The rules of calls after the marker that begins the first. ``markers``: begin, end, quote."""
    return "\n".join(_Rules(markers, special).calls(tools, parallel=parallel))


class _Rules:
    def __init__(self, markers: tuple[str, str, str], special: Mapping[str, int]) -> None:
        self._begin, self._end, self._quote = (literal(marker, special) for marker in markers)
        self._quote_text = markers[2]
        self._special = special
        self._rules: dict[str, str] = {}
        self._known: dict[str, str] = {}
        """Rules of schemas by their text: references may go round in a circle."""

    def calls(self, tools: Sequence[Tool], *, parallel: bool) -> Iterator[str]:
        yield "calls: call" + (f" ({self._begin} call)*" if parallel else "")
        yield "call: " + " | ".join(f"call_{number}" for number in range(len(tools)))
        for number, tool in enumerate(tools):
            arguments = self._object(Parameters.of(tool.parameters), f"call_{number}_arguments")
            yield f"call_{number}: {quoted(f'call:{tool.name}')} {arguments} {self._end}"
        yield from (f"{name}: {rule}" for name, rule in self._rules.items())

    def _object(self, own: Parameters, name: str) -> str:
        """The rule of an object. Properties that are not required may be left out."""
        properties = sorted(own.properties.items(), key=lambda item: item[0].lower())
        if not properties:
            return self._map(own, name)
        self._rules[name] = f'"{{" {name}_f0'
        # One way through while nothing is written yet, one behind commas; both end where nothing more is required.
        for way, lead in (("f", ""), ("r", ",")):
            for place, (key, _) in enumerate(properties):
                given = f"{quoted(f'{lead}{key}:')} {name}_{place} {name}_r{place + 1}"
                skipped = "" if key in own.required else f" | {name}_{way}{place + 1}"
                self._rules[f"{name}_{way}{place}"] = given + skipped
            self._rules[f"{name}_{way}{len(properties)}"] = '"}"'
        for place, (_, schema) in enumerate(properties):
            self._rules[f"{name}_{place}"] = self._value(own, schema, f"{name}_{place}")
        return name

    def _map(self, own: Parameters, name: str) -> str:
        """An object whose keys have no names."""
        if own.others is None and not self._free(own.schema):
            self._rules[name] = '"{}"'
            return name
        item = "call_any" if own.others is None else f"{name}_v"
        if own.others is None:
            self._any()
        else:
            self._rules[item] = self._value(own, own.others, item)
        self._rules["call_key"] = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"
        self._rules[name] = f'"{{}}" | "{{" call_key ":" {item} ("," call_key ":" {item})* "}}"'
        return name

    @staticmethod
    def _free(schema: Schema) -> bool:
        """An object of which nothing is said, not even that it has no properties."""
        return "properties" not in schema and schema.get("additionalProperties") is not False

    def _value(self, own: Parameters, schema: Any, name: str) -> str:
        """The expression of a value; what else it needs are rules whose names begin with ``name``."""
        text = json.dumps(schema, sort_keys=True)
        if text in self._known and '"$ref"' in text:
            return self._known[text]
        if len(self._rules) > _MOST_RULES:
            return self._any()
        self._known[text] = name
        ways = [
            way
            for number, branch in enumerate(own.branches(schema))
            for way in self._branch(own, branch, f"{name}b{number}")
        ]
        return " | ".join(dict.fromkeys(ways))

    def _branch(self, own: Parameters, branch: Schema, name: str) -> Iterator[str]:
        root = own.schema if own.root is None else own.root
        if "const" in branch or isinstance(branch.get("enum"), list):
            for choice in [branch["const"]] if "const" in branch else branch["enum"]:
                yield self._written(choice)
            return
        types = own.types(branch)
        if types == TYPES:
            yield self._any()
        elif types == {"object"}:
            yield self._object(Parameters(branch, root), name)
        elif types == {"array"}:
            yield self._array(own, branch, name)
        elif types == {"string"}:
            yield self._string(branch)
        else:
            for kind in sorted(types):
                yield from (
                    self._branch(own, {**branch, "type": kind}, name + kind[0])
                    if kind in ("object", "array", "string")
                    else [json_value(own.rooted({**branch, "type": kind}))]
                )

    def _array(self, own: Parameters, branch: Schema, name: str) -> str:
        items = branch.get("items", {})
        self._rules[f"{name}_i"] = self._value(own, items if isinstance(items, Mapping) else {}, f"{name}_i")
        least, most = (count(branch.get(key)) for key in ("minItems", "maxItems"))
        least = least or 0
        if most == 0:
            return '"[]"'
        more = f"{{{max(least - 1, 0)},{'' if most is None else max(most - 1, 0)}}}"
        empty = '"[]" | ' if not least else ""
        self._rules[name] = f'{empty}"[" {name}_i ("," {name}_i){more} "]"'
        return name

    def _string(self, schema: Schema) -> str:
        body = string_body(schema)
        quote = plain(self._quote_text)
        text = f"({body or f'/{ANY}/'}) & ~/{ANY}"
        if self._quote_text in self._special:
            lexeme = self._lexeme(f"{text}{quote}{AFTER}{ANY}/")
            return f"{self._quote} {lexeme}{'?' if may_be_empty(schema) else ''} {self._quote}"
        # The lexeme ends as soon as it may, with the quote.
        lexeme = self._lexeme(f"({text}{quote}{ANY}/) /{quote}/" if body else f"/{ANY}{quote}/")
        lazy = f"call_{lexeme.lower()}"
        self._rules[f"{lazy}[lazy]"] = lexeme
        return f"{self._quote} {lazy}"

    def _lexeme(self, expression: str) -> str:
        for name, rule in self._rules.items():
            if rule == expression:
                return name
        name = f"CALL{len(self._rules)}"
        self._rules[name] = expression
        return name

    def _any(self) -> str:
        if "call_any" not in self._rules:
            self._rules["call_any"] = ""
            self._rules["call_key"] = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"
            scalar = json_value({"type": ["number", "boolean", "null"]})
            self._rules["call_any"] = (
                f'{self._string({})} | {scalar} | "[]" | "[" call_any ("," call_any)* "]" | "{{}}"'
                ' | "{" call_key ":" call_any ("," call_key ":" call_any)* "}"'
            )
        return "call_any"

    def _written(self, choice: object) -> str:
        match choice:
            case str():
                return f"{self._quote} {quoted(choice)} {self._quote}"
            case list():
                items = ' "," '.join(map(self._written, choice))
                return f'"[" {items} "]"'
            case dict():
                items = ' "," '.join(f"{quoted(f'{key}:')} {self._written(v)}" for key, v in sorted(choice.items()))
                return f'"{{" {items} "}}"'
        return quoted(json.dumps(choice))
