"""Calls written as Python: ``[f(a=1), g(b="x")]``, bare (Llama 3.2, Llama 4 by its makers' prompt) or between LFM2's
markers.

Arguments are Python's literals, and given on as JSON while they come. The grammar writes simple schemas in Python's
own words; a value with any further keyword as JSON text, which is read alike, and the arguments of a schema that
keywords cannot spell as ``f(**{…})``: so every schema is kept to the letter. Pure.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from lmx.chat.forms.grammar import literal
from lmx.chat.forms.limits import Refused, TooComplex
from lmx.chat.forms.schema import ANY_OBJECT, LAYOUT, complaint, json_rule
from lmx.chat.forms.writing import rewritten
from lmx.chat.tools.base import Calls, Parser, Tool
from lmx.chat.tools.json_calls import closed, read_items
from lmx.chat.tools.literals import space, value
from lmx.chat.tools.reader import CallReader, NoCall
from lmx.chat.tools.source import Broken, Cut, Steps

_NAME = re.compile(r"[\w.-]*")
_KEY = re.compile(r"[^\s=,()\[\]{}'\"*]*")
_WRITABLE = re.compile(r"[A-Za-z_]\w*")
_SPELLED = {"type", "properties", "required", "additionalProperties", "$defs"}
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
        heads = [f"{tool.name}(" for tool in tools]
        tails = [f'{writer.arguments(tool)} ")"' for tool in tools]
        more = ' (", " call)*' if parallel else ""
        opening, closing = self.markers
        rules = _alternatives("call", heads, tails)
        if opening in special or not self.bare:
            trigger, first, closing = opening, '"[" call', "]" + closing
        else:
            # As much of the first call as every tool's begins with.
            same = takewhile(lambda characters: len(set(characters)) == 1, zip(*heads, strict=False))
            common = "".join(character for character, *_ in same)
            trigger, first, closing = "[" + common, "call_first", "]"
            rules += _alternatives("call_first", [head[len(common) :] for head in heads], tails)
        rules = [f"calls: {first}{more} {literal(closing, special)}", *rules, *writer.rules]
        return Calls(trigger, "\n".join(rules) + "\n", at_start=trigger == "[")

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


def _alternatives(name: str, heads: Sequence[str], tails: Sequence[str]) -> list[str]:
    rules = [f"{name}_{n}: {json.dumps(head)} {tails[n]}" for n, head in enumerate(heads)]
    return [f"{name}: {' | '.join(f'{name}_{n}' for n in range(len(heads)))}", *rules]


class _Writer:
    """Makes the rules of arguments, from schemas that ``rewritten`` has made plain."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self._definitions: Mapping[str, Any] = {}

    def arguments(self, tool: Tool) -> str:
        """What stands between the call's brackets."""
        parameters = closed(tool.parameters)
        schema = _plain(json.dumps(parameters))
        properties = {
            name: admitted for name, admitted in schema.get("properties", {}).items() if admitted is not False
        }
        required: list[str] = schema.get("required", [])
        if (
            set(schema) - _SPELLED
            or not all(map(_WRITABLE.fullmatch, properties))
            or not properties.keys() >= set(required)
        ):
            return f'"**" {self._rule(json_rule(parameters))}'
        if not properties and schema.get("additionalProperties"):
            return f'("**" {self._rule(json_rule(parameters))})?'
        self._definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
        first = rest = ""  # what may follow, as the first argument or behind another
        for name, admitted in reversed(properties.items()):
            written = self._rule(f"{json.dumps(name + '=')} {self._value(admitted)}")
            one = f"{written} {rest}"
            if name in required:
                first, rest = one, f'", " {one}'
            else:
                first, rest = f"({one} | {first})" if first else f"({one})?", f'(", " {written})? {rest}'
            first, rest = self._rule(first), self._rule(rest)
        return first

    def _rule(self, expression: str) -> str:
        name = f"call_part_{len(self.rules)}"
        self.rules.append(f"{name}: {expression}")
        return name

    def _value(self, schema: Mapping[str, Any]) -> str:
        match schema:
            case {"enum": values} if len(schema) == 1 and (words := _words(values)):
                return f"({words})"
            case {"type": "boolean"} if len(schema) == 1:
                return '("True" | "False")'
            case {"type": "null"} if len(schema) == 1:
                return '"None"'
            case {"type": "string"} if len(schema) == 1:
                return f"({_STRING})"
            case {"type": "array", "items": items} if len(schema) == 2 and isinstance(items, Mapping):
                item = self._rule(self._value(items))
                return f'("[" ({item} (", " {item})*)? "]")'
            case {"anyOf": schemas} if len(schema) == 1:
                return f"({' | '.join(map(self._value, schemas))})"
        return self._rule(_json(json.dumps({**schema, **self._definitions, "x-guidance": LAYOUT})))


@lru_cache(maxsize=1024)
def _plain(text: str) -> dict[str, Any]:
    """The schema in few keywords, or, where it cannot be, with one that Python has no words for."""
    try:
        written = rewritten(json.loads(text), within=ANY_OBJECT, lenient=True)
    except (Refused, TooComplex, RecursionError):
        written = False
    return written if isinstance(written, dict) else {"not": {}}


@lru_cache(maxsize=1024)
def _json(schema: str) -> str:
    """The value as JSON: any, where the schema cannot be compiled."""
    expression = f"%json {schema}"
    return f"%json {json.dumps({'x-guidance': LAYOUT})}" if complaint(f"start: {expression}") else expression


def _words(values: Sequence[Any]) -> str:
    """The values as Python writes them, if they are simple; "" otherwise."""
    words: list[str] = []
    for given in values:
        if isinstance(given, (list, dict)):
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
