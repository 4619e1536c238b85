"""One answer's text as the events that a face tells: reasoning, calls, and content, which alone stop strings cut.

Pure; whatever the pieces, the events put together are the same. ``lmx.api.core.generation`` holds one for each
choice whose answer may be more than text.
"""

from collections.abc import Container, Sequence

from lmx.chat.answer import AnswerParser
from lmx.chat.events import CallArguments, CallStart, Content, Event, Malformed, Reasoning
from lmx.chat.plan import Plan
from lmx.chat.text import StopStrings


class AnswerEvents:
    def __init__(
        self, parser: AnswerParser, stop: Sequence[str], plan: Plan, *, keep_stop: bool, end_markers: Container[int]
    ) -> None:
        self.stopped = False
        """A stop string was met; everything after it is dropped."""
        self.calls = 0
        """That have begun."""
        self.reasoning_tokens = 0
        self.end_markers = end_markers
        """Tokens that the parser is to see even where they end the answer."""
        self._parser = parser
        self._plan = plan
        self._strings = stop
        self._keep_stop = keep_stop
        self._stop = StopStrings(stop, keep=keep_stop)
        self._answering = not plan.reasons
        """What comes is no reasoning any more."""
        self._within = False
        """The content is inside the reasoning that it holds."""

    @property
    def counts(self) -> bool:
        """Tokens must come one by one, since they may be reasoning."""
        return not self._answering

    def feed(self, text: str, *, stops: bool = True) -> list[Event]:
        """The events of one token's text; of several, where nothing ``counts`` them. Without ``stops`` no stop string
        begins in it, as in ``TextStream``.
        """
        if self._answering:
            events = self._parser.feed(text) if text else []
        else:
            thinking = self._parser.thinking
            events = self._parser.feed(text)
            thinking = thinking or self._parser.thinking or any(isinstance(event, Reasoning) for event in events)
            self.reasoning_tokens += thinking
        return self._cut(events, stops=stops) if events else events

    def finish(self, text: str) -> list[Event]:
        """The sequence ended: ``text`` and what was held back."""
        events = self._cut([*self._parser.feed(text), *self._parser.finish()])
        return events if self.stopped else [*events, *self._release()]

    def _cut(self, events: Sequence[Event], *, stops: bool = True) -> list[Event]:
        result: list[Event] = []
        for event in events:
            if isinstance(event, Reasoning):
                result += self._thought(event)
                continue
            if isinstance(event, Malformed):
                result.append(event)
                continue
            self._answering = True
            if self._within:
                self._within = False
                result.append(Content(f"{self._plan.thought_markers[1]}\n"))
            if isinstance(event, Content):
                text = self._stop.feed(event.text) if self._strings and stops else event.text
                result += [Content(text)] if text else []
                self.stopped = self._stop.stopped
            else:
                result += self._release()
                if not self.stopped:
                    self.calls += isinstance(event, CallStart)
                    result.append(event)
            if self.stopped:
                break
        return result

    def _thought(self, event: Reasoning) -> list[Event]:
        if self._plan.thoughts == "apart":
            return [event]
        if self._plan.thoughts == "hidden":
            return []
        begin = "" if self._within else f"{self._plan.thought_markers[0]}\n"
        self._within = True
        return [Content(begin + event.text)]

    def _release(self) -> list[Event]:
        """What is held back for a stop string that does not come: the content is over, or something else follows."""
        if not self._strings:
            return []
        text = self._stop.feed("", final=True)
        self.stopped = self._stop.stopped
        if not self.stopped:
            self._stop = StopStrings(self._strings, keep=self._keep_stop)
        return [Content(text)] if text else []


def merged(events: list[Event]) -> list[Event]:
    """The same with neighbours of one kind as one: an event to send each."""
    if len(events) < 2:
        return events
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        match last, event:
            case (Content(), Content()):
                result[-1] = Content(last.text + event.text)
            case (Reasoning(), Reasoning()):
                result[-1] = Reasoning(last.text + event.text)
            case (CallArguments(), CallArguments()):  # of one call: between two there are an end and a start
                result[-1] = CallArguments(event.index, last.json + event.json)
            case _:
                result.append(event)
    return result
