"""Tool calls written as elements, one for each parameter: ``<parameter=path>a.txt</parameter>``.

Strings stand there as they are, neither quoted nor escaped; whatever else is JSON, and only the tool's schema tells the
two apart. They leave as JSON, strings while they come. Pure; ``markup`` makes formats of it and of ``markup_grammar``.

A string may hold the markup itself. The marker that closes a parameter counts only where, after white space at most,
either a parameter opens that the tool has and the call has not yet, or the call closes. In a value that is no string it
counts only outside JSON strings. White space between markers is at most eight characters.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import regex

from lmx.chat.tools.base import Tool
from lmx.chat.tools.parameters import TYPES, Parameters, escaped, value
from lmx.chat.tools.patterns import JsonScan, match, until
from lmx.chat.tools.reader import CallReader
from lmx.chat.tools.source import Broken, Cut, Steps

SPACE = r"[ \t\r\n]{0,8}"


@dataclass(frozen=True)
class Markup:
    """How a family writes calls."""

    begin: str
    """Opens a block of calls: the trigger."""
    call: tuple[str, str]
    """Around the name. Where nothing follows it, it ends at white space or a tag."""
    key: tuple[str, str]
    """Around the key of a parameter."""
    parameter_end: str
    call_end: str
    value: str = ""
    """Opens the value, where the key does not."""
    end: str = ""
    """Closes the block. Empty: a block is one call, which closes it."""
    several: bool = False
    """Whether a block holds several calls. Otherwise each has a block of its own."""
    forgotten: bool = False
    """Models forget what opens a block: a call of a tool is one without it."""
    newlines: bool = False
    """A value stands on lines of its own: one line break before and one after it belong to the markup."""
    gap: str = "\n"
    """What stands between markers."""
    typed: str | None = None
    """What follows the key of a value that is no string, where the markup says so: ``key[1]`` is then of strings."""


class MarkupReading:
    """Reads blocks of calls for a ``CallReader``."""

    def __init__(self, markup: Markup, tools: Sequence[Tool]) -> None:
        self._markup = markup
        self._tools = {tool.name: tool.parameters for tool in tools}

    def read(self, reader: CallReader, trigger: str) -> Steps[None]:
        pattern = _call(self._markup, begun=trigger != self._markup.begin)
        while True:
            reader.begin()
            yield from self._call(reader, pattern)
            reader.end()
            if not (self._markup.several and (yield from match(reader.source, _next_call(self._markup)))):
                break
            pattern = _call(self._markup, begun=False)
        yield from reader.closing(self._markup.end)

    def _call(self, reader: CallReader, pattern: "regex.Pattern[str]") -> Steps[None]:
        opened = yield from match(reader.source, pattern)
        if opened is None:
            raise Broken("a block of calls begins with none")
        name = opened["name"]
        parameters = Parameters.of(self._tools.get(name, {}))
        keys = dict.fromkeys(parameters.properties)
        anything = not keys or parameters.others is not None
        any_step = _step(self._markup, tuple(keys), anything=True)
        try:
            step = yield from match(reader.source, any_step)
        except Cut:
            reader.start(name)
            raise
        if step is None:
            raise Broken(f"the name {name[:64]!r} is followed by neither a parameter nor the end of the call")
        reader.start(name)
        lead = "{"
        while step is not None and (key := step["key"]) is not None:
            keys.pop(key, None)
            reader.arguments(f"{lead}{json.dumps(key, ensure_ascii=False)}: ")
            lead = ", "
            types = self._types(parameters, key, string=step["string"] is not None)
            if self._markup.newlines:
                yield from match(reader.source, _LINE)
            yield from _value(reader, types, _closing(self._markup, tuple(keys), anything=anything))
            step = yield from match(reader.source, any_step)
        reader.arguments("{}" if lead == "{" else "}")

    def _types(self, parameters: Parameters, key: str, *, string: bool) -> frozenset[str]:
        schema = parameters.properties.get(key, parameters.others)
        types = TYPES if schema is None else parameters.types(schema)
        if self._markup.typed is None:
            return types
        if string:
            return types & {"string"} or types
        return types - {"string"} or TYPES - {"string"}


def _value(reader: CallReader, types: frozenset[str], closing: "regex.Pattern[str]") -> Steps[None]:
    if types <= {"string", "null"} and "string" in types:
        yield from _string(reader, closing, may_be_null="null" in types)
        return
    parts: list[str] = []
    if "string" in types:
        yield from until(reader.source, closing, parts.append)
    else:
        scan = JsonScan()

        def give(text: str) -> None:
            parts.append(text)
            scan.skim(text)

        yield from until(reader.source, closing, give, counts=lambda: not scan.in_string)
    reader.arguments(value("".join(parts), types))


def _string(reader: CallReader, closing: "regex.Pattern[str]", *, may_be_null: bool) -> Steps[None]:
    held = ""  # while it may still be null

    def give(text: str) -> None:
        nonlocal held, may_be_null
        if may_be_null:
            held += text
            may_be_null = "null".startswith(held.strip())
            if may_be_null:
                return
            text = '"' + escaped(held)
        else:
            text = escaped(text)
        reader.arguments(text)

    if not may_be_null:
        reader.arguments('"')
    yield from until(reader.source, closing, give)
    reader.arguments(value(held, frozenset(("string", "null"))) if may_be_null else '"')


# Patterns, each of which ends in something certain.

_LINE = regex.compile(r"\n?+(?=.)", regex.DOTALL)


@lru_cache(maxsize=64)
def _call(markup: Markup, *, begun: bool) -> "regex.Pattern[str]":
    """What opens a call, up to its name's end. ``begun``: what stands before the name is read."""
    before, after = map(re.escape, markup.call)
    opening = "" if begun else SPACE + before
    name_end = after or r"(?=[\s<])"
    return regex.compile(rf'{opening}(?P<name>[^\s<>"]+){name_end}')


@lru_cache(maxsize=64)
def _next_call(markup: Markup) -> "regex.Pattern[str]":
    return regex.compile(f"{SPACE}(?={re.escape(markup.call[0])})")


@lru_cache(maxsize=1024)
def _step(markup: Markup, keys: tuple[str, ...], *, anything: bool) -> "regex.Pattern[str]":
    """A parameter's opening, of one of ``keys`` or of ``anything``, or the call's end."""
    escape = re.escape
    names = [*map(escape, keys), *([r"[^<>\n]+?"] if anything else [])]
    after = f"(?P<string>{escape(markup.key[1])})"
    if markup.typed is not None:
        after = f"(?:{after}|{escape(markup.typed)})"
    opening = f"{escape(markup.key[0])}(?P<key>{'|'.join(names) or '(?!)'}){after}"
    if markup.value:
        opening += SPACE + escape(markup.value)
    return regex.compile(f"{SPACE}(?:{opening}|{escape(markup.call_end)})")


@lru_cache(maxsize=1024)
def _closing(markup: Markup, keys: tuple[str, ...], *, anything: bool) -> "regex.Pattern[str]":
    """What closes a value that a parameter of ``keys``, or of ``anything``, or the call's end follows."""
    line = "\n?" if markup.newlines else ""
    return regex.compile(f"{line}{re.escape(markup.parameter_end)}(?={_step(markup, keys, anything=anything).pattern})")
