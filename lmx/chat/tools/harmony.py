"""Harmony, which gpt-oss writes: an answer is messages on channels, and a call is a message to ``functions.name``.

``analysis`` is reasoning; ``final``, and ``commentary`` to nobody, are the answer's text. The recipient stands before
or after the channel. A message ends at ``<|end|>``, ``<|call|>`` or ``<|return|>``, which count only where another
message starts or the answer ends: the same words spelled out in a text are text. A call's arguments end where their
JSON does.

Not by openai-harmony: it reads token ids of its own vocabulary, which it downloads. Its rules and gpt-oss's template
are the source of the format. Pure.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

import regex

from lmx.chat.events import CallArguments, CallEnd, CallStart, Content, Event, Malformed, Reasoning
from lmx.chat.forms.grammar import literal
from lmx.chat.forms.schema import json_rule
from lmx.chat.tools.base import Calls, Parser, Tool
from lmx.chat.tools.lark import within
from lmx.chat.tools.literals import space, value
from lmx.chat.tools.patterns import match, until
from lmx.chat.tools.source import Broken, Cut, SourceParser, Steps, unknown

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_END, _CALL, _RETURN = "<|end|>", "<|call|>", "<|return|>"
_FUNCTIONS = "functions."

_MESSAGE_START = regex.compile(r"<\|start\|>\w*+(?=\W)")
_RECIPIENT = regex.compile(r" {0,4}to=(?P<name>[^\s<]++)(?=[\s<])")
_CHANNEL_NAME = regex.compile(r" {0,4}<\|channel\|>(?P<name>\w++)(?=\W)")
_TYPE = regex.compile(r" {0,4}(?:<\|constrain\|> {0,4})?+\w*+ {0,4}<\|message\|>")
_BARE = regex.compile(r"<\|message\|>")
_STOP = regex.compile(r"<\|(?:end|call|return)\|>(?=<\|start\|>)")
_STOPS = (_END, _CALL, _RETURN)


class HarmonyParser(SourceParser):
    def __init__(self, tools: Sequence[Tool]) -> None:
        self._index = 0
        self._recipient: str | None = None
        self._channel = ""
        self._told: set[type[Event]] = set()
        """Of which kinds there was text."""
        super().__init__(tools)

    def _run(self) -> Steps[None]:
        while True:
            self.source.keep()
            self._recipient, self._channel = None, ""
            try:
                yield from self._header()
            except Broken as broken:
                yield from self._text(Content, str(broken))
            except Cut:
                self._cut_header()
                return
            else:
                yield from self._message()

    def _header(self) -> Steps[None]:
        source = self.source
        yield from match(source, _MESSAGE_START)
        before = yield from match(source, _RECIPIENT)
        self._recipient = before and before["name"]
        channel = yield from match(source, _CHANNEL_NAME)
        self._channel = channel["name"] if channel else ""
        if channel and not before:
            after = yield from match(source, _RECIPIENT)
            self._recipient = after and after["name"]
        if (yield from match(source, _TYPE if channel or before else _BARE)) is None:
            raise Broken("a message has no header")

    def _message(self) -> Steps[None]:
        name = (self._recipient or "").removeprefix(_FUNCTIONS)
        if self._recipient is not None and name not in self.names:
            yield from self._text(Content, unknown(name))
            return
        self.source.kept()
        if self._recipient is not None:
            yield from self._call(name)
        else:
            yield from self._text(Reasoning if self._channel == "analysis" else Content)

    def _text(self, kind: type[Content] | type[Reasoning], malformed: str = "") -> Steps[None]:
        """A message of this kind, with what was kept of its header; between two of a kind there is a line break."""
        first = kind in self._told

        def give(text: str) -> None:
            nonlocal first
            if text:
                self._events.append(kind(f"\n{text}" if first else text))
                self._told.add(kind)
                first = False

        if malformed:
            self._events.append(Malformed(malformed))
        give(self.source.kept())
        try:
            yield from until(self.source, _STOP, give)
        except Cut:
            rest = self._rest()
            if not rest.startswith(_STOPS):
                give(rest)

    def _call(self, name: str) -> Steps[None]:
        self._events.append(CallStart(self._index, name))
        self.source.keep()
        try:
            yield from space(self.source)
            if (yield from match(self.source, _STOP)):
                self._arguments("{}")
                self._end()
                return
            if (yield from self.source.peek()) != "{":
                raise Broken("arguments are no object")
            yield from value(self.source, self._arguments)
            self._end()
            yield from until(self.source, _STOP, self._after)
        except Broken as broken:
            self._index += 1
            yield from self._text(Content, f"a call of {name!r} is broken: {broken}")
        except Cut:
            self._after(self._rest())

    def _arguments(self, json: str) -> None:
        self._events.append(CallArguments(self._index, json))
        self.source.keep()

    def _end(self) -> None:
        self._events.append(CallEnd(self._index))
        self._index += 1
        self.source.kept()

    def _after(self, text: str) -> None:
        """What stands behind a call, before its end, is nothing that the format knows."""

    def _cut_header(self) -> None:
        name = (self._recipient or "").removeprefix(_FUNCTIONS)
        self._rest()
        read = self.source.kept()
        if name in self.names:
            self._events.append(CallStart(self._index, name))
        elif read and not any(marker in read for marker in (_START, _CHANNEL, _CONSTRAIN, _MESSAGE)):
            self._events.append(Content(read))

    def _rest(self) -> str:
        rest = self.source.text[self.source.at :]
        self.source.at += len(rest)
        return rest


class _Harmony:
    name = "harmony"
    markers = (_CHANNEL, _START, _MESSAGE, _CONSTRAIN, _END, _CALL, _RETURN)

    def matches(self, template: str, special: Mapping[str, int]) -> bool:
        return _CHANNEL in template and _MESSAGE in template and _START in template

    def parser(self, tools: Sequence[Tool]) -> Parser:
        return HarmonyParser(tools)

    def grammar(self, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool) -> Calls:
        """The calls alone; ``answer`` is what models are held to."""
        special = within(special, self.markers)
        trigger = f"{_CHANNEL}commentary to={_FUNCTIONS}"
        again = f" ({literal(f'{_CALL}{_START}assistant{trigger}', special)} call)*" if parallel else ""
        heads = [json.dumps(tool.name) for tool in tools]
        return Calls(trigger, "\n".join([f"calls: call{again}", *_call_rules(tools, heads, special)]))

    def answer(
        self,
        tools: Sequence[Tool],
        special: Mapping[str, int],
        *,
        choice: Literal["none", "auto", "required"],
        parallel: bool,
        body: str = "",
        thinking: bool = True,
    ) -> str:
        """Calls are on the commentary channel, the recipient before or after it, as gpt-oss's template and its makers
        have it. What ends the last message is an end of generation, or may follow."""
        special = within(special, self.markers)

        def spelled(text: str) -> str:
            return literal(text, special)

        on = spelled(f"{_END}{_START}assistant")
        kinds = ["analysis"] if thinking else []
        ends = []
        if choice != "required":
            ends.append("harmony_final")
        if choice != "none" and tools:
            kinds += [] if body else ["commentary"]  # text before what must be of a form would spoil it
            ends.append("calls")
        before = "harmony_before* " if kinds else ""
        rules = [f"start: {before}({' | '.join(ends)})"]
        if kinds:
            channels = " | ".join(map(json.dumps, kinds))
            rules.append(f"harmony_before: {spelled(_CHANNEL)} ({channels}) {spelled(_MESSAGE)} HARMONY_TEXT? {on}")
        kind = f'(" "? {spelled(_CONSTRAIN)} "json")?' if body else ""
        last = "body" if body else "HARMONY_TEXT?"
        rules.append(f"harmony_final: {spelled(f'{_CHANNEL}final')} {kind} {spelled(_MESSAGE)} {last}")
        rules.append(rf"HARMONY_TEXT: /(.|\n)+/ & ~/(.|\n)*{_SPELLED}(<\|start\|>(.|\n)*)?/")
        if "calls" in ends:
            again = f" ({spelled(f'{_CALL}{_START}assistant')} call)*" if parallel else ""
            channel = spelled(f"{_CHANNEL}commentary")
            heads = []
            for tool in tools:
                recipient = f" to={_FUNCTIONS}{tool.name}"
                heads.append(f"({spelled(f'{_CHANNEL}commentary{recipient}')} | {spelled(recipient)} {channel})")
            rules += [f"calls: call{again} {spelled(_CALL)}?", *_call_rules(tools, heads, special)]
        return "\n".join([*rules, body] if body else rules) + "\n"


_SPELLED = r"<\|(end|call|return)\|>"


def _call_rules(tools: Sequence[Tool], heads: Sequence[str], special: Mapping[str, int]) -> list[str]:
    constrain = literal(_CONSTRAIN, special)
    rules = ["call: " + " | ".join(f"call_{number}" for number in range(len(tools)))]
    rules.append(f'call_type: " "? {constrain} "json" | " json" | ""')
    for number, (tool, head) in enumerate(zip(tools, heads, strict=True)):
        rules.append(f"call_{number}: {head} call_type {literal(_MESSAGE, special)} call_{number}_arguments")
        rules.append(f"call_{number}_arguments: {json_rule(tool.parameters)}")
    return rules


HARMONY = _Harmony()
