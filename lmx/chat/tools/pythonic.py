"""Calls written as Python: ``[f(a=1), g(b="x")]``, bare (Llama 3.2, Llama 4 by its makers' prompt) or between LFM2's
markers.

Arguments are Python's literals, and given on as JSON while they come. The grammar writes simple schemas in Python's
own words; a value with any further keyword as JSON text, which is read alike, and the arguments of a schema that
keywords cannot spell as ``f(**{…})``: so every schema is kept to the letter. Pure.
"""

import json
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lmx.chat.grammar import literal
from lmx.chat.schema import LAYOUT, complaint, json_rule
from lmx.chat.tools.base import Calls, Parser, Tool
from lmx.chat.tools.json_calls import read_items
from lmx.chat.tools.literals import space, value
from lmx.chat.tools.reader import CallReader, NoCall
from lmx.chat.tools.source import Broken, Cut, Steps

_NAME = re.compile(r"[\w.-]*")
_KEY = re.compile(r"[^\s=,()\[\]{}'\"*]*")
_WRITABLE = re.compile(r"[A-Za-z_]\w*")
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
_ROOT_ANNOTATIONS = {*_ANNOTATIONS, "$schema", "$defs", "definitions", "strict"}
_FOREIGN_REFERENCE = re.compile(r'"\$ref": "(?!#/(\$defs|definitions)/)')
_STRING = r"""/"([^"\\\x00-\x1f\x7f]|\\[nrtbf"'\\])*"/ | /'([^'\\\x00-\x1f\x7f]|\\[nrtbf"'\\])*'/"""
_LITERALS = {True: "True", False: "False", None: "None"}


@dataclass(frozen=True)
class _Pythonic:
    name: str
    markers: tuple[str, str]
    bare: bool
    """A bracket alone begins calls too, and does where the first marker is no token."""
    template_words: tuple[str, ...]

    def matches(self, template: str, special: Mapping[str, int]) -> bool:
        return any(words in template for words in self.template_words) or (not self.bare and self.markers[0] in special)

    def parser(self, tools: Sequence[Tool]) -> Parser:
        opening = self.markers[0]
        return CallReader(tools, (opening, "[") if self.bare else (opening,), self._read)

    def grammar(self, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool) -> Calls:
        writer = _Writer()
        bodies = [f"{json.dumps(tool.name + '(')} {writer.arguments(tool)} {json.dumps(')')}" for tool in tools]
        rules = [f"call_{number}: {body}" for number, body in enumerate(bodies)]
        call = " | ".join(f"call_{number}" for number in range(len(tools)))
        more = ' (", " call)*' if parallel else ""
        opening, closing = self.markers
        if opening in special or not self.bare:
            trigger, first, closing = opening, '"[" call', "]" + closing
        else:
            # As much of the first call as every tool's name begins with.
            common = os.path.commonprefix([f"{tool.name}(" for tool in tools])  # noqa: RUF071
            trigger, first, closing = "[" + common, "call_first", "]"
            rests = [f"{tool.name}("[len(common) :] for tool in tools]
            heads = [f"{json.dumps(rest)} " if rest else "" for rest in rests]
            firsts = [head + body.split(" ", 1)[1] for head, body in zip(heads, bodies, strict=True)]
            rules += [f"call_first_{number}: {body}" for number, body in enumerate(firsts)]
            rules.append("call_first: " + " | ".join(f"call_first_{number}" for number in range(len(tools))))
        rules = [f"calls: {first}{more} {literal(closing, special)}", f"call: {call}", *rules, *writer.rules]
        return Calls(trigger, "\n".join(rules) + "\n", at_start=not trigger.strip("["))

    def _read(self, reader: CallReader, trigger: str) -> Steps[None]:
        source = reader.source
        bare = trigger == "["
        if not bare:
            yield from space(source)
            yield from source.expect("[")
        yield from space(source)
        if not bare and (yield from source.peek()) == "{":  # LFM2, if a prompt asks it to
            yield from read_items(reader)
        else:
            yield from _read_calls(reader, bare)
        yield from reader.closing("" if bare else self.markers[1])


def _read_calls(reader: CallReader, bare: bool) -> Steps[None]:
    source = reader.source
    while True:
        yield from _read_call(reader, bare)
        bare = False
        yield from space(source)
        if not (yield from source.accept(",")):
            break
        yield from space(source)
        if (yield from source.peek()) == "]":
            break
    yield from source.expect("]")
    if reader.between:
        source.keep()


def _read_call(reader: CallReader, bare: bool) -> Steps[None]:
    """``bare``: nothing but a bracket says that it is a call, so its beginning must."""
    source = reader.source
    if not bare:
        reader.begin()
    name = yield from source.run(_NAME)
    if not name or (yield from source.peek()) != "(":
        raise NoCall if bare else Broken("a call does not begin with name(")
    source.at += 1
    bare = bare and name not in reader.names
    if not bare:
        reader.begin()
    key = ""
    try:
        yield from space(source)
        empty = (yield from source.peek()) == ")"
        whole = not empty and (yield from source.accept("**"))
        if not empty and not whole:
            key = yield from _key(reader, bare)
    except Cut:
        reader.start(name)
        raise
    reader.start(name)
    if empty:
        reader.arguments("{}")
    elif whole:
        yield from space(source)
        if (yield from source.peek()) != "{":
            raise Broken("** stands before no dict")
        yield from value(source, reader.arguments, python=True)
        yield from space(source)
    else:
        yield from _read_arguments(reader, key)
    yield from source.expect(")")
    reader.end()


def _read_arguments(reader: CallReader, key: str) -> Steps[None]:
    source = reader.source
    opening = "{"
    while True:
        reader.arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: ")
        yield from value(source, reader.arguments, python=True)
        yield from space(source)
        if not (yield from source.accept(",")):
            break
        yield from space(source)
        if (yield from source.peek()) == ")":
            break
        key = yield from _key(reader, False)
        opening = ", "
    reader.arguments("}")


def _key(reader: CallReader, bare: bool) -> Steps[str]:
    """A keyword and its ``=``."""
    source = reader.source
    key = yield from source.run(_KEY)
    yield from space(source)
    if not key or not (yield from source.accept("=")):
        raise NoCall if bare else Broken("an argument has no name")
    yield from space(source)
    return key


class _Writer:
    """Makes the rules of arguments."""

    def __init__(self) -> None:
        self.rules: list[str] = []

    def arguments(self, tool: Tool) -> str:
        """What stands between the call's brackets."""
        schema = tool.parameters
        properties = schema.get("properties")
        if properties is None and not set(schema) - {*_ROOT_ANNOTATIONS, "type"}:
            return f'("**" {self._rule(json_rule(schema))})?'
        if properties is None or not _spelled_by_keywords(schema):
            return f'"**" {self._rule(json_rule(schema))}'
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        required = schema.get("required", ())
        first = rest = ""  # what may follow, as the first argument or behind another
        for name, admitted in reversed(list(properties.items())):
            written = self._rule(f"{json.dumps(name + '=')} {self._value(admitted, definitions)}")
            one = f"{written} {rest}".rstrip()
            if name in required:
                first, rest = one, f'", " {one}'
            else:
                first, rest = f"({one} | {first})" if first else f"({one})?", f'(", " {written})? {rest}'.rstrip()
            first, rest = self._rule(first), self._rule(rest)
        return first

    def _rule(self, expression: str) -> str:
        name = f"call_part_{len(self.rules)}"
        self.rules.append(f"{name}: {expression}")
        return name

    def _value(self, schema: Any, definitions: Mapping[str, Any]) -> str:
        if not isinstance(schema, Mapping):
            return self._json({}, definitions)
        schema = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        kind = schema.get("type")
        match sorted(schema):
            case ["enum"] | ["enum", "type"] if words := _words(schema["enum"], kind):
                return f"({words})"
            case ["const"] | ["const", "type"] if words := _words([schema["const"]], kind):
                return f"({words})"
            case ["type"] if kind == "boolean":
                return '("True" | "False")'
            case ["type"] if kind == "null":
                return '"None"'
            case ["type"] if kind == "string":
                return f"({_STRING})"
            case ["type"] if isinstance(kind, list) and kind:
                return self._any([{"type": one} for one in kind], definitions)
            case ["anyOf"] if isinstance(schema["anyOf"], list) and schema["anyOf"]:
                return self._any(schema["anyOf"], definitions)
            case ["items", "type"] if kind == "array":
                item = self._rule(self._value(schema["items"], definitions))
                return f'("[" ({item} (", " {item})*)? "]")'
        return self._json(schema, definitions)

    def _any(self, schemas: Sequence[Any], definitions: Mapping[str, Any]) -> str:
        return "(" + " | ".join(self._value(schema, definitions) for schema in schemas) + ")"

    def _json(self, schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
        return self._rule(_json(json.dumps({**schema, **definitions, "x-guidance": LAYOUT})))


@lru_cache(maxsize=1024)
def _json(schema: str) -> str:
    """The value as JSON: any, where the schema cannot be compiled."""
    expression = f"%json {schema}"
    return f"%json {json.dumps({'x-guidance': LAYOUT})}" if complaint(f"start: {expression}") else expression


def _spelled_by_keywords(schema: Mapping[str, Any]) -> bool:
    """Whether ``f(a=…)`` says all that there is to say of these arguments."""
    properties = schema.get("properties", {})
    return (
        not set(schema) - {*_ROOT_ANNOTATIONS, "type", "properties", "required", "additionalProperties"}
        and isinstance(properties, Mapping)
        and (bool(properties) or schema.get("additionalProperties") in (None, False))
        and all(_WRITABLE.fullmatch(name) and value is not False for name, value in properties.items())
        and set(schema.get("required", ())) <= set(properties)
        and not _FOREIGN_REFERENCE.search(json.dumps(schema))
    )


def _words(values: Sequence[Any], kind: Any) -> str:
    """The values as Python writes them, if they are simple and of the type ``kind``; "" otherwise."""
    kinds = {"string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float), None: (object,)}
    words: list[str] = []
    for given in values:
        if isinstance(given, (list, dict)) or not isinstance(given, kinds.get(kind, ())):
            return ""
        if isinstance(given, bool) and kind in ("integer", "number"):
            return ""
        if isinstance(given, str):
            quoted = json.dumps(given, ensure_ascii=False)
            words.append(quoted)
            if "'" not in given and quoted == f'"{given}"':
                words.append(f"'{given}'")
        else:
            words.append(_LITERALS[given] if given is None or isinstance(given, bool) else json.dumps(given))
    return " | ".join(map(json.dumps, words))


LFM2 = _Pythonic(
    name="lfm2",
    markers=("<|tool_call_start|>", "<|tool_call_end|>"),
    bare=False,
    template_words=("<|tool_call_start|>", "<|tool_list_start|>"),
)
PYTHONIC = _Pythonic(
    name="pythonic",
    markers=("<|python_start|>", "<|python_end|>"),
    bare=True,
    template_words=("[func_name1(",),
)
