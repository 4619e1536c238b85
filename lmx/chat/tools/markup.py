"""A format whose calls are elements: ``markup_parser`` reads them, ``markup_grammar`` enforces them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmx.chat.tools.base import Calls, Parser, Tool
from lmx.chat.tools.lark import within
from lmx.chat.tools.markup_grammar import markup_calls
from lmx.chat.tools.markup_parser import Markup, MarkupReading
from lmx.chat.tools.reader import CallReader


@dataclass(frozen=True)
class MarkupFormat:
    name: str
    markup: Markup
    signs: tuple[str, ...]
    """What a template of the family holds, all of it,"""
    without: tuple[str, ...] = ()
    """and what it does not."""

    tokens: tuple[str, ...] = ()
    """Parts of its markers that are tokens by themselves."""

    @property
    def markers(self) -> tuple[str, ...]:
        m = self.markup
        own = (m.call[0], m.key[0], m.begin, m.key[1], m.value, m.parameter_end, m.call_end, m.end)
        return tuple(dict.fromkeys([*self.tokens, *(marker for marker in own if marker.startswith("<"))]))

    def matches(self, template: str, special: Mapping[str, int]) -> bool:
        return all(sign in template for sign in self.signs) and not any(sign in template for sign in self.without)

    def parser(self, tools: Sequence[Tool]) -> Parser:
        triggers = (self.markup.begin, self.markup.call[0]) if self.markup.forgotten else (self.markup.begin,)
        return CallReader(tools, triggers, MarkupReading(self.markup, tools).read)

    def grammar(self, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool) -> Calls:
        special = within(special, self.markers)
        return Calls(self.markup.begin, markup_calls(self.markup, tools, special, parallel=parallel))
