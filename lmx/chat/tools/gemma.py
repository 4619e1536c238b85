"""FunctionGemma and Gemma 4: ``call:name{key:value}`` between tokens, values in a notation of their own.

Keys are bare; strings stand between two of one token, neither escaped nor quoted; numbers, words, lists and objects are
as in JSON. A string may hold the token that ends it: it counts only before a comma or a closing bracket. Pure.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import regex

from lmx.chat.tools import literals, parameters
from lmx.chat.tools.base import Calls, Parser, Tool
from lmx.chat.tools.gemma_grammar import AFTER, gemma_calls
from lmx.chat.tools.lark import within
from lmx.chat.tools.literals import space
from lmx.chat.tools.parameters import TYPES, Parameters, escaped
from lmx.chat.tools.patterns import until
from lmx.chat.tools.reader import CallReader
from lmx.chat.tools.source import Broken, Cut, Source, Steps

_NAME = re.compile(r"[\w.:/-]*")
_KEY = re.compile(r"[^:{}\[\],<\"\s]*")
_BARE = re.compile(r"[^{}\[\],<]*")
_DEEPEST = 64


@dataclass(frozen=True)
class _Gemma:
    name: str
    begin: str
    end: str
    quote: str

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin, self.end, self.quote)

    def matches(self, template: str, special: Mapping[str, int]) -> bool:
        return f"{self.begin}call:" in template and self.quote in template

    def parser(self, tools: Sequence[Tool]) -> Parser:
        return CallReader(tools, (self.begin,), _Reading(self, tools).read)

    def grammar(self, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool) -> Calls:
        markers = (self.begin, self.end, self.quote)
        special = within(special, markers)
        return Calls(self.begin, gemma_calls(markers, tools, special, parallel=parallel))


FUNCTION_GEMMA = _Gemma("function_gemma", "<start_function_call>", "<end_function_call>", "<escape>")
GEMMA4 = _Gemma("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>')


class _Reading:
    """Reads calls for a ``CallReader``."""

    def __init__(self, form: _Gemma, tools: Sequence[Tool]) -> None:
        self._form = form
        self._tools = {tool.name: Parameters.of(tool.parameters) for tool in tools}
        self._string_end = regex.compile(f"{regex.escape(form.quote)}(?={AFTER})")

    def read(self, reader: CallReader, trigger: str) -> Steps[None]:
        source = reader.source
        yield from space(source)
        yield from source.expect("call:")
        reader.begin()
        name = yield from source.run(_NAME)
        yield from space(source)
        try:
            if not (yield from source.accept("{")):
                raise Broken("a name is followed by no '{'")
            yield from source.peek()
        except Cut:
            reader.start(name)
            raise
        reader.start(name)
        yield from self._object(reader, self._tools.get(name), 0)
        reader.end()
        yield from reader.closing(self._form.end)

    def _object(self, reader: CallReader, own: Parameters | None, depth: int) -> Steps[None]:
        """What follows the opening bracket. ``own``: the properties, where they are known."""
        source, lead = reader.source, "{"
        yield from space(source)
        while not (yield from source.accept("}")):
            key = yield from self._key(source)
            reader.arguments(f"{lead}{json.dumps(key, ensure_ascii=False)}: ")
            lead = ", "
            schema = own and own.properties.get(key, own.others)
            types = TYPES if own is None or schema is None else own.types(schema)
            yield from self._value(reader, types, depth)
            yield from space(source)
            if (yield from source.accept(",")):
                yield from space(source)
            elif (yield from source.peek()) != "}":
                raise Broken(f"{source.text[source.at]!r} stands where ',' or '}}' is expected")
        reader.arguments("{}" if lead == "{" else "}")

    def _key(self, source: Source) -> Steps[str]:
        if (yield from source.accept(self._form.quote)):
            parts: list[str] = []
            yield from until(source, regex.compile(f"{regex.escape(self._form.quote)}(?=:)"), parts.append)
            key = "".join(parts)
        elif (yield from source.peek()) == '"':
            key = yield from literals.text(source)
        else:
            key = yield from source.run(_KEY)
        yield from space(source)
        yield from source.expect(":")
        return key

    def _value(self, reader: CallReader, types: frozenset[str], depth: int) -> Steps[None]:
        source = reader.source
        yield from space(source)
        if (yield from source.accept(self._form.quote)):
            yield from self._string(reader, types)
            return
        character = yield from source.peek()
        if character in "{[" and depth == _DEEPEST:
            raise Broken("arguments are nested too deep")
        if character == "{":
            source.at += 1
            yield from self._object(reader, None, depth + 1)
        elif character == "[":
            source.at += 1
            yield from self._list(reader, depth + 1)
        elif character == '"':
            yield from literals.value(source, reader.arguments)
        else:
            bare = yield from source.run(_BARE)
            if not bare.strip():
                raise Broken("a value is missing")
            reader.arguments(parameters.value(bare.strip(), types))

    def _string(self, reader: CallReader, types: frozenset[str]) -> Steps[None]:
        if "string" in types:
            reader.arguments('"')
            yield from until(reader.source, self._string_end, lambda text: reader.arguments(escaped(text)))
            reader.arguments('"')
            return
        parts: list[str] = []
        yield from until(reader.source, self._string_end, parts.append)
        reader.arguments(parameters.value("".join(parts), types))

    def _list(self, reader: CallReader, depth: int) -> Steps[None]:
        source, lead = reader.source, "["
        yield from space(source)
        while not (yield from source.accept("]")):
            reader.arguments(lead)
            lead = ", "
            yield from self._value(reader, TYPES, depth)
            yield from space(source)
            if (yield from source.accept(",")):
                yield from space(source)
            elif (yield from source.peek()) != "]":
                raise Broken(f"{source.text[source.at]!r} stands where ',' or ']' is expected")
        reader.arguments("[]" if lead == "[" else "]")
