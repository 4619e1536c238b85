"""Reads one answer: what the model thinks, then its text and calls.

Pure and synchronous; one for each choice of each request, fed by the API faces with the text of a ``TextStream`` in
which the formats' markers are spelled out. Whatever the pieces, the events put together are the same.

Line breaks next to the markers belong to them and are dropped; everything else is given as it was written. Calls are
looked for only behind the reasoning.
"""

from lmx.chat.events import Content, Event, Reasoning
from lmx.chat.reasoning import ReasoningFormat
from lmx.chat.tools.base import Parser

_BREAKS = "\r\n"


class AnswerParser:
    """``opened``: the prompt has begun the reasoning. ``calls`` reads what follows it; None: all of it is text.

    Formats that are read whole (harmony) are given as ``calls``, without a reasoning format.
    """

    def __init__(self, reasoning: ReasoningFormat | None, *, opened: bool = False, calls: Parser | None = None) -> None:
        self._calls = calls
        self._held = ""
        self._begin = self._end = self._opening = self._closing = ""
        if reasoning is not None:
            self._begin, self._end = reasoning.begin, reasoning.end
            self._opening, self._closing = reasoning.wrap
        self._read = self._answer if reasoning is None else self._thoughts if opened else self._start
        self._given = False
        """Some of the reasoning was given; before, line breaks are the marker's."""
        self._wrapped = False
        """The end of what is around the answer is still to come."""

    @property
    def thinking(self) -> bool:
        """What comes next is reasoning, so far as is known."""
        return self._read == self._thoughts

    def feed(self, text: str) -> list[Event]:
        """The events that ``text`` makes certain. Text that may still begin a marker is held back."""
        return self._take(text, final=False)

    def finish(self) -> list[Event]:
        """The answer ended: what was held back. Unfinished reasoning stays reasoning. Call it once, last."""
        events = self._take("", final=True)
        return events + self._calls.finish() if self._calls else events

    def _take(self, text: str, *, final: bool) -> list[Event]:
        self._held += text
        events: list[Event] = []
        read = None
        while read != self._read:  # each leaves to the next what is not its own
            read = self._read
            events += read(final)
        return events

    def _start(self, final: bool) -> list[Event]:
        text = self._held.lstrip()
        if text.startswith(self._begin):
            self._held, self._read = text.removeprefix(self._begin), self._thoughts
        elif self._opening and text.startswith(self._opening):
            self._read = self._before_answer
        elif final or not (self._begin.startswith(text) or self._opening.startswith(text)):
            self._read = self._answer
        return []

    def _thoughts(self, final: bool) -> list[Event]:
        text, found, rest = self._held.partition(self._end)
        if not self._given:
            text = text.lstrip(_BREAKS)
        if found:
            thought, self._held, self._read = text.rstrip(_BREAKS), rest, self._before_answer
        else:
            thought = text if final else _certain(text, self._end)
            self._held = text[len(thought) :]
        self._given = self._given or bool(thought)
        return [Reasoning(thought)] if thought else []

    def _before_answer(self, final: bool) -> list[Event]:
        text = self._held.lstrip()
        if self._opening and text.startswith(self._opening):
            self._held = self._held.lstrip().removeprefix(self._opening)
            self._opening, self._wrapped = "", True
        elif not final and (not text or self._opening.startswith(text)):
            return []
        else:
            self._wrapped = bool(self._closing) and (self._wrapped or not self._opening)
        self._held = self._held.lstrip(_BREAKS)
        if self._held or final:
            self._read = self._answer
        return []

    def _answer(self, final: bool) -> list[Event]:
        text, self._held = self._held, ""
        if self._wrapped:
            head, found, rest = text.partition(self._closing)
            if found:
                text, self._wrapped = head.rstrip(_BREAKS) + rest, False
            elif not final:
                text, whole = _certain(text, self._closing), text
                self._held = whole[len(text) :]
        if not text:
            return []
        return self._calls.feed(text) if self._calls else [Content(text)]


def _certain(text: str, marker: str) -> str:
    """``text`` without what may belong to a ``marker`` that comes: its beginning, and the line breaks before it."""
    longest = min(len(marker) - 1, len(text))
    begun = next((length for length in range(longest, 0, -1) if text.endswith(marker[:length])), 0)
    return text[: len(text) - begun].rstrip(_BREAKS)
