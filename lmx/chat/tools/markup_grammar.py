"""The grammar of calls that are written as elements: what ``markup_parser`` reads, and nothing it would read otherwise.

Parameters come in the schema's order; those that are not required may be left out. A string is one lexeme, which goes
up to the marker that closes it and the one after that, as the parser's rule needs it: ``callmore`` up to the next
parameter, ``callend`` up to the call's end. Where one of the two must not come, a string must not contain it. A lexeme
ends at the first of them (``lazy``), unless the markers are special tokens, which no text matches. Pure.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

from lmx.chat.forms.grammar import literal
from lmx.chat.tools.base import Tool
from lmx.chat.tools.lark import ANY, json_value, may_be_empty, plain, quoted, string_body
from lmx.chat.tools.markup_parser import SPACE, Markup
from lmx.chat.tools.parameters import Parameters, Schema, unconstrained

_OTHER = "[A-Za-z_][A-Za-z0-9_.-]{0,63}"
"""A key that the schema does not name."""


def markup_calls(markup: Markup, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool) -> str:
    """The rules of a block of calls, after the marker that begins it."""
    return "\n".join(_Rules(markup, special).block(tools, parallel=parallel))


class _Ways(NamedTuple):
    """How a value may be written."""

    strings: list[str]
    """Literally one of these,"""
    json: Schema | None
    """as JSON of this schema,"""
    text: str | None = None
    """as text of this terminal expression; empty: any text."""
    empty: bool = False
    """The text may be empty."""


class _Rules:
    def __init__(self, markup: Markup, special: Mapping[str, int]) -> None:
        self._markup = markup
        close, after = markup.parameter_end, (markup.key[0], markup.call_end)
        found = [close.index(token) for token in special if token in close]
        self._head = close[: min(found)] if found else None
        """What text ends in before the special token that closes it; None: what closes it is text."""
        self._more, self._end = (f"{plain(close)}{SPACE}{plain(marker)}" for marker in after)
        self._lexemes: dict[str, str] = {}
        self._literal = cache(partial(literal, special=special))

    def block(self, tools: Sequence[Tool], *, parallel: bool) -> Iterator[str]:
        markup = self._markup
        again = "*" if parallel else ""
        end = self._literal(markup.gap + markup.end) if markup.end else ""
        between = markup.begin if not markup.several else ""
        if markup.several:
            yield f"calls: call{'+' if parallel else ''} {end}"
        elif parallel:
            yield f"calls: call {end} ({self._literal(chr(10) + between)} call {end}){again}"
        else:
            yield f"calls: call {end}"
        yield "call: " + " | ".join(f"call{number}" for number in range(len(tools)))
        for number, tool in enumerate(tools):
            yield from self._call(number, tool)
        yield from (f"{name}: {rule}" for name, rule in self._lexemes.items())

    def _call(self, number: int, tool: Tool) -> Iterator[str]:
        markup = self._markup
        parameters = Parameters.of(tool.parameters)
        properties = list(parameters.properties.items())
        needed = [key in parameters.required for key, _ in properties]
        lead = markup.gap if markup.call[0] else ""
        name = self._literal(f"{lead}{markup.call[0]}{tool.name}{markup.call[1]}")
        free = parameters.others if not properties else None
        ways = []
        if properties or free is not None:
            ways.append(f"{self._literal(markup.gap + markup.key[0])} call{number}p0")
        if not any(needed):
            ways.append(self._literal(markup.gap + markup.call_end))
        yield f"call{number}: {name} ({' | '.join(ways)})"
        if free is not None:
            key = self._lexeme(f"/{_OTHER}/", terminal=True)
            yield f"call{number}p0: " + self._value(parameters, free, key, f"call{number}p0", end=True, earlier=None)
        for place in range(len(properties)):
            later = "" if needed[place] or place + 1 == len(needed) else f" | call{number}p{place + 1}"
            yield f"call{number}p{place}: call{number}v{place}{later}"
            key, schema = properties[place]
            optional = [name for name, _ in properties[:place] if name not in parameters.required]
            yield f"call{number}v{place}: " + self._value(
                parameters,
                schema,
                quoted(key),
                f"call{number}p{place + 1}" if place + 1 < len(properties) else "",
                end=not any(needed[place + 1 :]),
                earlier=None if parameters.others is not None else optional,
            )

    def _value(
        self,
        parameters: Parameters,
        schema: Schema,
        key: str,
        more: str,
        *,
        end: bool,
        earlier: Sequence[str] | None,
    ) -> str:
        """From the key on: the value, what closes it, and what may follow: the rule ``more``, the call's ``end``.

        ``earlier``: keys before this one that the call may lack, None where it may have any.
        """
        markup = self._markup
        line = "\n" if markup.newlines else ""
        inner = f"{markup.gap}{markup.value}" if markup.value else ""
        opened = self._literal(markup.key[1] + inner + line)
        opened_other = opened if markup.typed is None else self._literal(markup.typed + inner + line)
        follow = [f"{self._literal(markup.gap + markup.key[0])} {more}"] if more else []
        follow += [self._literal(markup.gap + markup.call_end)] if end else []
        closed = f"{self._literal(line + markup.parameter_end)} ({' | '.join(follow)})"

        split = _ways(parameters, schema, typed=markup.typed is not None)
        ways = []
        if split.strings:
            ways.append(f"{opened} ({' | '.join(map(quoted, split.strings))}) {closed}")
        if split.json is not None:
            ways.append(f"{opened_other} {json_value(parameters.rooted(split.json))} {closed}")
        if split.text is not None:
            ways += [f"{opened} {way}" for way in self._text(split, more, follow, end=end, earlier=earlier)]
        return f"{key} ({' | '.join(ways)})"

    def _text(
        self, split: _Ways, more: str, follow: Sequence[str], *, end: bool, earlier: Sequence[str] | None
    ) -> Iterator[str]:
        """A string as text, what closes it, and what follows."""
        markup, body = self._markup, split.text
        line = r"\n" if markup.newlines and body else ""
        if self._head is not None:
            free = f"~/{ANY}({self._more}|{self._end}){ANY}/"
            head = plain(("\n" if markup.newlines else "") + self._head)
            inner = f"({body} & {free})" if body else f"(/{ANY}/ & {free})"
            lexeme = self._lexeme(f"{inner} /{head}/" if head else inner, terminal=True)
            rest = self._literal(markup.parameter_end[len(self._head) :])
            yield f"{lexeme}{'?' if split.empty and not head else ''} {rest} ({' | '.join(follow)})"
            return
        for marker, other, goes_on in ((self._more, self._end, more), (self._end, self._more, "" if end else None)):
            if goes_on is None or (marker == self._more and not more):
                continue
            forbidden = []
            if marker == self._more and not end:
                forbidden.append(other)
            if marker == self._end and not more and earlier is None:
                forbidden.append(other)
            elif marker == self._end and not more and earlier:
                forbidden.append(f"{other}({'|'.join(map(plain, earlier))}){plain(markup.key[1])}")
            unlike = "".join(f" & ~/{ANY}({pattern}){ANY}/" for pattern in forbidden)
            if not body:
                rule = f"/{ANY}{marker}/{unlike}"
            else:
                rule = f"(({body}) & ~/{ANY}({self._more}|{self._end}){ANY}/) /{line}{marker}/"
            yield f"{self._lexeme(rule)} {goes_on}"

    def _lexeme(self, expression: str, *, terminal: bool = False) -> str:
        """The name of a rule, which ends as soon as it may, or of a terminal, for ``expression``."""
        known = next((name for name, rule in self._lexemes.items() if rule == expression), None)
        if known is None:
            known = f"CALL{len(self._lexemes)}"
            self._lexemes[known] = expression
        if terminal:
            return known
        lazy = f"call_{known.lower()}[lazy]"
        self._lexemes[lazy] = known
        return lazy.removesuffix("[lazy]")


def _ways(parameters: Parameters, schema: Schema, *, typed: bool) -> _Ways:
    """How a value of ``schema`` may be written.

    Text that looks like another type is read as that (``parameters.value``), unless the markup says which it is. So it
    must not look like one of which not every value will do; of the others it is just one more way to write them.
    """
    if "string" not in parameters.types(schema):
        return _Ways([], schema)
    strings: list[str] = []
    others: list[Schema] = []
    texts: list[str] = []
    any_text = empty = False
    for branch in parameters.branches(schema):
        types = parameters.types(branch)
        values = [branch["const"]] if "const" in branch else branch.get("enum")
        if isinstance(values, list):
            strings += [value for value in values if isinstance(value, str)]
            rest = [value for value in values if not isinstance(value, str)]
            others += [{"enum": rest}] if rest else []
        elif types == {"string"}:
            body = string_body(branch)
            any_text = any_text or body is None
            texts += [f"({body})"] if body else []
            empty = empty or may_be_empty(branch)
        elif "string" in types:
            any_text = True
            others.append({"type": sorted(types - {"string"})})
        else:
            others.append(branch)
    if any_text:
        texts, strings = [], []
    if not typed:
        simple = [
            branch
            for branch in others
            if unconstrained(branch) and (any_text or parameters.types(branch) <= _WORDS.keys())
        ]
        others = [branch for branch in others if branch not in simple]
        if texts:
            texts += [f"/{_WORDS[name]}/" for branch in simple for name in parameters.types(branch)]
        elif not any_text:
            others += simple
    if texts:
        texts += [f"/{plain(string)}/" for string in strings if string]
        empty = empty or "" in strings
        strings = []
    body = " | ".join(texts) if any_text or texts else None
    if body is not None and others and not typed:
        first = {character for branch in others for name in parameters.types(branch) for character in _FIRST[name]}
        allowed = rf"/[ \t\r\n]*([^ \t\r\n{plain(''.join(sorted(first)))}]{ANY})?/"
        body = f"({body}) & {allowed}" if body else allowed
    union = None if not others else others[0] if len(others) == 1 else {"anyOf": others}
    return _Ways(list(dict.fromkeys(strings)), union, body, empty or any_text)


_WORDS = {
    "null": "null",
    "boolean": "true|false",
    "integer": "-?(0|[1-9][0-9]{0,15})",
    "number": r"-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,16})?",
}
_FIRST = {
    "null": "nN",
    "boolean": "tfTF",
    "integer": "-0123456789",
    "number": "-0123456789",
    "object": "{",
    "array": "[",
}
