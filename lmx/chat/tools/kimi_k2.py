"""Kimi K2: ``functions.name:0`` and the arguments as JSON between tokens; the number counts the conversation's calls.

Whatever a JSON string holds, the arguments end where their JSON does. Pure.
"""

import re
from collections.abc import Mapping, Sequence

from lmx.chat.forms.grammar import literal
from lmx.chat.tools.base import Calls, Parser, Tool
from lmx.chat.tools.json_calls import call_rules
from lmx.chat.tools.lark import within
from lmx.chat.tools.literals import space
from lmx.chat.tools.reader import CallReader
from lmx.chat.tools.source import Steps

_CALLS, _CALLS_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ID = re.compile(r"[\w.:/-]*")
_NUMBER = re.compile(r":[0-9]+$")


class _KimiK2:
    name = "kimi_k2"
    markers = (_CALLS, _CALL, _ARGUMENTS, _CALL_END, _CALLS_END)

    def matches(self, template: str, special: Mapping[str, int]) -> bool:
        return _CALLS in template

    def parser(self, tools: Sequence[Tool]) -> Parser:
        return CallReader(tools, (_CALLS,), _read)

    def grammar(self, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool) -> Calls:
        special = within(special, self.markers)
        begin, end, arguments = (literal(token, special) for token in (_CALL, _CALL_END, _ARGUMENTS))
        heads = [f"{literal(f'functions.{tool.name}:', special)} /[0-9]{{1,4}}/ {arguments}" for tool in tools]
        more = f" ({begin} call)*" if parallel else ""
        return Calls(
            _CALLS, f"calls: {begin} call{more} {literal(_CALLS_END, special)}\n{call_rules(tools, heads, end)}"
        )


def _read(reader: CallReader, trigger: str) -> Steps[None]:
    source = reader.source
    yield from space(source)
    yield from source.expect(_CALL)
    while True:
        reader.begin()
        yield from space(source)
        name = _NUMBER.sub("", (yield from source.run(_ID))).removeprefix("functions.")
        yield from space(source)
        yield from source.expect(_ARGUMENTS)
        yield from reader.call(name)
        if not (yield from reader.another(_CALL_END, _CALL)):
            break
    yield from reader.closing(_CALLS_END)


KIMI_K2 = _KimiK2()
