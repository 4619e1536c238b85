"""Reads answers whose calls begin at a trigger: the parser that the JSON and pythonic formats share.

It finds triggers in the text and runs a format's own reading behind them; it keeps what a call was read from until its
name is certain, so that nothing is lost when it turns out to be none. White space before a call, and after the last,
belongs to the format and not to the text. Pure; ``Format.parser`` makes one for each answer.
"""

import re
from collections.abc import Callable, Sequence

from lmx.chat.events import CallArguments, CallEnd, CallStart, Content, Malformed
from lmx.chat.tools.base import Tool
from lmx.chat.tools.literals import space, value
from lmx.chat.tools.source import Broken, Cut, SourceParser, Steps, unknown

_SPACE = " \t\r\n"


class NoCall(Broken):
    """The trigger's text was ordinary text: nothing to report."""


class CallReader(SourceParser):
    """``read`` reads the calls behind a trigger, which is given to it, with the methods below."""

    def __init__(
        self, tools: Sequence[Tool], triggers: Sequence[str], read: "Callable[[CallReader, str], Steps[None]]"
    ) -> None:
        self._triggers = tuple(triggers)
        self._pattern = re.compile("|".join(map(re.escape, triggers)))
        self._read = read
        self._space = ""
        """White space at the end of the text so far: the text's if more text follows."""
        self._index = 0
        self._open = False
        """CallStart was given, and not yet CallEnd."""
        self.between = False
        """A call has ended, and no other has begun; nor has text."""
        self._begun = False
        self._refused = ""
        """Why the call that is being read is none."""
        super().__init__(tools)

    # What a format's reading calls, in this order for each call.

    def begin(self) -> None:
        """What follows looks like a call: if it is none, that is worth a word."""
        self.between, self._begun = False, True

    def start(self, name: str) -> None:
        if name in self.names:
            self.source.kept()
            self._open, self._space = True, ""
            self._events.append(CallStart(self._index, name))
        else:
            self._refused = unknown(name)

    def arguments(self, json: str) -> None:
        if self._open and json:
            self._events.append(CallArguments(self._index, json))
            self.source.keep()  # to be text if the next piece is broken

    def end(self) -> None:
        if self._open:
            self._events.append(CallEnd(self._index))
            self._close()
            self.between = True
        else:
            self._refuse(self._refused)
        self._begun = False
        self.source.keep()

    # What the readings of some formats share.

    def call(self, name: str, opening: Steps[None] | None = None) -> Steps[None]:
        """A call whose name is read: ``opening``, which must not have begun, and its arguments, a JSON object."""
        try:
            if opening is not None:
                yield from opening
            yield from space(self.source)
            if (yield from self.source.peek()) != "{":
                raise Broken("arguments are no object")
        except Cut:
            self.start(name)
            raise
        self.start(name)
        yield from value(self.source, self.arguments)
        self.end()

    def another(self, end: str, begin: str) -> Steps[bool]:
        """Behind a call: its ``end``, which models forget, and whether the next one's ``begin`` follows."""
        yield from space(self.source)
        yield from self.source.accept(end)
        if self.between:
            self.source.keep()  # what is read by now is the call's
        yield from space(self.source)
        return (yield from self.source.accept(begin))

    def closing(self, marker: str) -> Steps[None]:
        """Behind the last call: white space and ``marker``, which models forget."""
        while (yield from self.source.peek()) in _SPACE:
            self.source.at += 1
        found = bool(marker) and (yield from self.source.accept(marker))
        read = self.source.kept()
        if not (found and self.between):
            self._say(read)

    # The rest is its own.

    def _run(self) -> Steps[None]:
        while trigger := (yield from self._text()):
            self.source.keep()
            self.source.at += len(trigger)
            self.between = self._begun = False
            try:
                yield from self._read(self, trigger)
                self._say(self.source.kept())
            except Broken as broken:
                self._refuse("" if isinstance(broken, NoCall) else f"a call is broken: {broken}")
            except Cut:
                self._cut()
        if self._space and not self.between:
            self._events.append(Content(self._space))

    def _text(self) -> Steps[str]:
        """Give text until a trigger comes, which is not read; "" where the text is over."""
        source = self.source
        while True:
            match = self._pattern.search(source.text, source.at)
            end = match.start() if match else self._certain(source.text, source.at)
            self._say(source.text[source.at : end])
            source.at = end
            if match:
                return match[0]
            try:
                yield
            except Cut:
                self._say(source.text[source.at :])
                return ""

    def _certain(self, text: str, start: int) -> int:
        """Up to where ``text`` cannot be a trigger's beginning."""
        end = len(text)
        for trigger in self._triggers:
            at = max(start, len(text) - len(trigger) + 1)
            while (at := text.find(trigger[0], at, end)) >= 0:
                if trigger.startswith(text[at:]):
                    end = at
                    break
                at += 1
        return end

    def _say(self, text: str) -> None:
        text = self._space + text
        certain = text.rstrip(_SPACE)
        self._space = text[len(certain) :]
        if certain:
            self._events.append(Content(certain))
            self.between = False

    def _refuse(self, reason: str) -> None:
        self._say(self.source.kept())
        if reason:
            self._events.append(Malformed(reason))
        if self._open:
            self._close()
        self._refused = ""

    def _close(self) -> None:
        self._open = False
        self._index += 1

    def _cut(self) -> None:
        source = self.source
        text = source.kept() + source.text[source.at :]
        source.at = len(source.text)
        if self._open or self.between:  # half an escape, half a closing marker
            return
        self._say(text)
        if self._begun:
            self._refuse(self._refused or "the answer ended inside a call")
