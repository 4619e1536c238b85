"""A text that comes in pieces, for a parser that is written as if it were whole.

A parser is a generator: where it needs more text it yields, and goes on when there is more. Since it never sees where
the pieces end, what it gives is the same for every split. When the text is over, ``Cut`` is raised where it waits.
Pure; the parsers of this package use it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Final, TypeVar

from lmx.chat.events import Event
from lmx.chat.tools.base import Tool

_SHOWN_CHARACTERS: Final = 64
_Result = TypeVar("_Result")
Steps = Generator[None, None, _Result]
"""A part of a parser: yields where the text is used up."""


class Cut(Exception):
    """The text is over, here."""


class Broken(Exception):
    """What is read is not what it looked like; its text says why."""


class Source:
    """``text[at:]`` is what has come and is not yet read."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self._kept: list[str] | None = None
        self._kept_from = 0

    def add(self, text: str) -> None:
        if self._kept is not None:
            self._kept.append(self.text[self._kept_from : self.at])
        self._kept_from = 0
        self.text, self.at = self.text[self.at :] + text, 0

    def keep(self) -> None:
        """From here on, what is read is remembered."""
        self._kept, self._kept_from = [], self.at

    def kept(self) -> str:
        """What was read since ``keep``, which is no longer remembered."""
        if self._kept is None:
            return ""
        text = "".join([*self._kept, self.text[self._kept_from : self.at]])
        self._kept = None
        return text

    def peek(self) -> Steps[str]:
        """The next character, not yet read."""
        while self.at == len(self.text):
            yield
        return self.text[self.at]

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """The longest run of the characters of ``pattern``, which matches any run of them. It ends before another
        character, so not before that has come."""
        parts = []
        while True:
            match = pattern.match(self.text, self.at)
            if match:
                parts.append(match[0])
                self.at = match.end()
            if self.at < len(self.text):
                return "".join(parts)
            yield

    def accept(self, string: str) -> Steps[bool]:
        """Read ``string`` if it comes next; nothing otherwise."""
        while not self.text.startswith(string, self.at):
            if len(self.text) - self.at >= len(string) or not string.startswith(self.text[self.at :]):
                return False
            yield
        self.at += len(string)
        return True

    def expect(self, string: str) -> Steps[None]:
        """Read ``string``. Raises Broken where something else comes."""
        for character in string:
            found = yield from self.peek()
            if found != character:
                raise Broken(f"{found!r} stands where {string!r} is expected")
            self.at += 1


class SourceParser(ABC):
    """A ``Parser`` that is written so: ``_run`` reads ``source``, and puts what it reads into ``_events``."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        """Begins to read: a subclass has its own fields by then."""
        self.source = Source()
        self.names = frozenset(tool.name for tool in tools)
        self._events: list[Event] = []
        self._steps = self._run()
        next(self._steps)

    @abstractmethod
    def _run(self) -> Steps[None]:
        """Ends where the text does, not before."""

    def feed(self, text: str) -> list[Event]:
        self.source.add(text)
        next(self._steps)
        return self._taken()

    def finish(self) -> list[Event]:
        try:
            while True:  # each place where it waits, until none does
                self._steps.throw(Cut)
        except StopIteration:
            return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def unknown(name: str) -> str:
    """Why a call of this name is none."""
    return f"{name[:_SHOWN_CHARACTERS]!r} is none of the tools"
