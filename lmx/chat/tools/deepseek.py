"""DeepSeek V3, R1 and V3.1: calls between ``<｜tool▁…｜>`` tokens, the arguments as JSON, which V3 and R1 fence.

The parser reads both. Whatever a JSON string holds, the arguments end where their JSON does. Pure.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmx.chat.forms.grammar import literal
from lmx.chat.tools.base import Calls, Parser, Tool
from lmx.chat.tools.json_calls import call_rules
from lmx.chat.tools.lark import within
from lmx.chat.tools.literals import space
from lmx.chat.tools.reader import CallReader
from lmx.chat.tools.source import Cut, Source, Steps

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_WORD = re.compile(r"[\w.:/-]*")


@dataclass(frozen=True)
class _DeepSeek:
    name: str
    fenced: bool
    """``function``, the name, and the arguments as a block of Markdown; otherwise the name and the arguments."""
    markers = (_CALLS, _CALL, _SEPARATOR, _CALL_END, _CALLS_END)

    def matches(self, template: str, special: Mapping[str, int]) -> bool:
        return _CALLS in template and ("```json" in template) == self.fenced

    def parser(self, tools: Sequence[Tool]) -> Parser:
        return CallReader(tools, (_CALLS,), _read)

    def grammar(self, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool) -> Calls:
        if self.fenced:
            before, after, end, between = f"function{_SEPARATOR}", "\n```json\n", f"\n```{_CALL_END}", f"\n{_CALL}"
        else:
            before, after, end, between = "", _SEPARATOR, _CALL_END, _CALL
        special = within(special, self.markers)
        heads = [literal(f"{before}{tool.name}{after}", special) for tool in tools]
        more = f" ({literal(between, special)} call)*" if parallel else ""
        rules = call_rules(tools, heads, literal(end, special))
        return Calls(_CALLS, f"calls: {literal(_CALL, special)} call{more} {literal(_CALLS_END, special)}\n{rules}")


def _read(reader: CallReader, trigger: str) -> Steps[None]:
    source = reader.source
    yield from space(source)
    yield from source.expect(_CALL)
    while True:
        reader.begin()
        name = yield from source.run(_WORD)
        yield from source.expect(_SEPARATOR)
        try:
            fenced = (yield from source.peek()) != "{"
        except Cut:
            if name != "function":
                reader.start(name)
            raise
        if fenced:
            name = yield from source.run(_WORD)
        yield from reader.call(name, _fence(source))
        yield from space(source)
        yield from source.accept("```")
        if not (yield from reader.another(_CALL_END, _CALL)):
            break
    yield from reader.closing(_CALLS_END)


def _fence(source: Source) -> Steps[None]:
    yield from space(source)
    if (yield from source.accept("```")):
        yield from source.accept("json")


DEEPSEEK_V3 = _DeepSeek("deepseek_v3", fenced=True)
DEEPSEEK_V31 = _DeepSeek("deepseek_v31", fenced=False)
