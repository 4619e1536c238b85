"""Calls that are JSON objects, ``{"name": …, "arguments": {…}}``, alone or in a list, behind a trigger.

``JsonFormat`` is a format of this kind by its words; the modules of such formats make one each. It reads more than its
grammar writes: keys in either order, arguments as a string or none at all, a list or objects alone, no closing marker.
Pure.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmx.chat.forms.grammar import literal
from lmx.chat.forms.schema import json_rule
from lmx.chat.tools.base import Calls, Parser, Tool
from lmx.chat.tools.literals import space, text, value
from lmx.chat.tools.reader import CallReader, NoCall
from lmx.chat.tools.source import Broken, Cut, Source, Steps

Written = tuple[str | re.Pattern[str], ...]
"""What the grammar writes: text as it is, and patterns."""

_NAMES = ("name", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters")
_OTHERS = {
    *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties"),
    *("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "dependentRequired", "dependentSchemas"),
    "dependencies",
}
"""Keywords by which a schema speaks of arguments that ``properties`` does not name."""
_KEYS = {*_NAMES, *_ARGUMENTS, "type", "id", "tool_call_id"}


@dataclass(frozen=True, kw_only=True)
class JsonFormat:
    """A format of this kind. Its grammar writes calls exactly as the models' own templates do."""

    name: str
    markers: tuple[str, ...]
    detect: Callable[[str, Mapping[str, int]], bool]
    trigger: str
    opening: Written
    """From the trigger to the first call's name."""
    middle: str = ', "arguments": '
    """From a call's name to its arguments."""
    after: Written = ("}",)
    """From its arguments to its end."""
    between: Written
    """From there to the next call's name. ``closing`` must not begin with the same text: a lexer takes the longer."""
    closing: Written
    """Behind the last call."""
    triggers: tuple[str, ...] = ()
    """What begins calls for the parser, if it is more than the grammar's trigger. A bracket at a trigger's end is the
    list's or object's own."""
    fence: str = ""
    """What stands between the parser's trigger and the list; without it there is no call."""
    end_marker: str = ""
    """For the parser."""

    def matches(self, template: str, special: Mapping[str, int]) -> bool:
        return self.detect(template, special)

    def parser(self, tools: Sequence[Tool]) -> Parser:
        return CallReader(tools, self.triggers or (self.trigger,), self._read)

    def grammar(self, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool) -> Calls:
        def lark(parts: Written) -> str:
            return " ".join(literal(p, special) if isinstance(p, str) else f"/{p.pattern}/" for p in parts)

        more = f" ({lark(self.between)} call)*" if parallel else ""
        heads = [f"{json.dumps(json.dumps(tool.name) + self.middle)}" for tool in tools]
        return Calls(
            self.trigger,
            f"calls: {lark(self.opening)} call{more} {lark(self.closing)}".rstrip()
            + f"\n{call_rules(tools, heads, lark(self.after))}",
        )

    def _read(self, reader: CallReader, trigger: str) -> Steps[None]:
        source = reader.source
        bare = trigger[-1] in "[{"
        if bare:
            source.at -= 1
        yield from space(source)
        if self.fence:
            if not (yield from source.accept(self.fence)):
                raise NoCall
            yield from space(source)
        yield from (read_list if (yield from source.peek()) == "[" else _read_objects)(reader, bare)
        yield from reader.closing(self.end_marker)


def call_rules(tools: Sequence[Tool], heads: Sequence[str], tail: str) -> str:
    """The rule ``call``: each tool's head, its arguments as JSON, and the tail; both are Lark expressions."""
    numbers = range(len(tools))
    rules = [f"call: {' | '.join(f'call_{number}' for number in numbers)}"]
    for number, tool, head in zip(numbers, tools, heads, strict=True):
        rules.append(f"call_{number}: {head} call_{number}_arguments {tail}".rstrip())
        rules.append(f"call_{number}_arguments: {json_rule(closed(tool.parameters))}")
    return "\n".join(rules) + "\n"


def closed(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema of arguments under which no others than the declared ones are written.

    Where the schema does not speak of others it allows any, and small models would go on and on with them. Any schema
    that names properties is closed where it is written (``lmx.chat.forms.writing``); a tool's that names none, too.
    """
    properties = parameters.get("properties")
    if not isinstance(properties, Mapping) or parameters.keys() & _OTHERS:
        return parameters
    required = parameters.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) and name in properties for name in required):
        return parameters
    return {**parameters, "additionalProperties": False}


def read_list(reader: CallReader, bare: bool = False) -> Steps[None]:
    yield from reader.source.expect("[")
    yield from read_items(reader, bare)


def read_items(reader: CallReader, bare: bool = False) -> Steps[None]:
    """The rest of a list, whose bracket is read."""
    source = reader.source
    while True:
        yield from space(source)
        yield from _read_call(reader, bare)
        yield from space(source)
        if not (yield from source.accept(",")):
            break
        bare = False
    yield from source.expect("]")
    if reader.between:
        source.keep()


def _read_objects(reader: CallReader, bare: bool) -> Steps[None]:
    """One call, or several behind one another."""
    source = reader.source
    yield from _read_call(reader, bare)
    while True:
        yield from space(source)
        if (yield from source.accept(";")):
            yield from space(source)
        if (yield from source.peek()) != "{":
            return
        yield from _read_call(reader, False)


def _read_call(reader: CallReader, bare: bool) -> Steps[None]:
    """One object. ``bare``: nothing but a bracket says that it is a call, so its first key must."""
    source = reader.source
    if not bare:
        reader.begin()
    name: str | None = None
    held: list[str] = []
    """Arguments that came before the name."""
    started = found = False
    yield from source.expect("{")
    yield from space(source)
    if bare and (yield from source.peek()) != '"':
        raise NoCall
    try:
        while (yield from source.peek()) != "}":
            key = yield from text(source)
            if bare and key not in _KEYS:
                raise NoCall
            if bare:
                bare = False
                reader.begin()
            yield from space(source)
            yield from source.expect(":")
            yield from space(source)
            character = yield from source.peek()
            if key in _NAMES and name is None and character == '"':
                name = yield from text(source)
                if found:
                    started = _start(reader, name, held)
            elif key in _ARGUMENTS and not found:
                whole = "" if character == "{" else (yield from _whole_arguments(source))
                found = bool(whole) or character == "{"
                if found and name is not None:
                    started = _start(reader, name)
                out = reader.arguments if started else held.append
                if whole:
                    out(whole)
                elif found:
                    yield from value(source, out)
            else:
                yield from value(source, _nothing)
            yield from space(source)
            if (yield from source.peek()) == ",":
                source.at += 1
                yield from space(source)
            elif source.text[source.at] != "}":
                raise Broken(f"{source.text[source.at]!r} stands where ',' or '}}' is expected")
    except Cut:
        if name is not None and not started:
            _start(reader, name)
        raise
    if name is None:
        raise Broken("an object has no name")
    source.at += 1
    if not started:
        _start(reader, name, ["{}"])
    reader.end()


def _start(reader: CallReader, name: str, held: Sequence[str] = ()) -> bool:
    reader.start(name)
    for piece in held:
        reader.arguments(piece)
    return True


def _whole_arguments(source: Source) -> Steps[str]:
    """Arguments that are no object as they stand: one inside a string, or none ("")."""
    if (yield from source.peek()) != '"':
        parts: list[str] = []
        yield from value(source, parts.append)
        if parts != ["null"]:
            raise Broken("arguments are no object")
        return ""
    inside = (yield from text(source)).strip()
    if not inside:
        return ""
    inner = Source()
    inner.add(inside + " ")  # which ends a number
    unwrapped: list[str] = []
    for _ in value(inner, unwrapped.append):
        raise Broken("arguments inside a string are cut off")
    if inner.text[inner.at :] != " " or not unwrapped[0].startswith("{"):
        raise Broken("arguments inside a string are no object")
    return "".join(unwrapped)


def _nothing(json: str) -> None:
    pass
