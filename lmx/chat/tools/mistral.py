"""Mistral: ``[TOOL_CALLS]`` and a JSON list (old), or one such marker for each ``name[ARGS]{…}`` (new)."""

import json
import re
from collections.abc import Mapping, Sequence

from lmx.chat.forms.grammar import literal
from lmx.chat.tools.base import Calls, Parser, Tool
from lmx.chat.tools.json_calls import JsonFormat, call_rules, read_list
from lmx.chat.tools.literals import space
from lmx.chat.tools.reader import CallReader
from lmx.chat.tools.source import Broken, Source, Steps

_CALLS, _ARGS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[\w.:/-]*")


class _Mistral:
    """The new form; its parser reads both."""

    name = "mistral"
    markers = (_CALLS, _ARGS, _ID)

    def matches(self, template: str, special: Mapping[str, int]) -> bool:
        return _CALLS in template and (_ARGS in template or _ARGS in special)

    def parser(self, tools: Sequence[Tool]) -> Parser:
        return CallReader(tools, (_CALLS,), _read)

    def grammar(self, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool) -> Calls:
        more = f" ({literal(_CALLS, special)} call)*" if parallel else ""
        heads = [f"{json.dumps(tool.name)} {literal(_ARGS, special)}" for tool in tools]
        return Calls(_CALLS, f"calls: call{more}\n{call_rules(tools, heads, '')}")


class _MistralOld(JsonFormat):
    def parser(self, tools: Sequence[Tool]) -> Parser:
        return CallReader(tools, (_CALLS,), _read)


def _read(reader: CallReader, trigger: str) -> Steps[None]:
    source = reader.source
    yield from space(source)
    if (yield from source.peek()) == "[" and not (yield from source.accept(_ARGS)):
        yield from read_list(reader)
        return
    reader.begin()
    name = yield from source.run(_NAME)
    if not name:
        raise Broken("a call has no name")
    yield from reader.call(name, _markers(source))


def _markers(source: Source) -> Steps[None]:
    yield from space(source)
    if (yield from source.accept(_ID)):
        yield from source.run(_NAME)
    yield from source.accept(_ARGS)


def _detect_old(template: str, special: Mapping[str, int]) -> bool:
    return _CALLS in template


MISTRAL = _Mistral()
MISTRAL_OLD = _MistralOld(
    name="mistral_old",
    markers=MISTRAL.markers,
    detect=_detect_old,
    trigger=_CALLS,
    opening=(re.compile(r" ?\[\{"), '"name": '),
    after=(re.compile(r'\}|, "id": "[a-zA-Z0-9]{9}"\}'),),
    between=(', {"name": ',),
    closing=("]",),
)
