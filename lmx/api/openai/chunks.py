"""An answer as OpenAI's stream of chunks: the ``Sink`` that both OpenAI faces write through.

An event is built from bytes made once for the stream and the JSON of its text; nothing else may be done for each token
(aim: 3,000 events a second on one core over 8 connections).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lmx.api.core.generation import Choice, Delta, Job, usage
from lmx.api.core.schemas import StreamOptions
from lmx.api.events import DONE, EventWriter
from lmx.api.openai.answer import to_json
from lmx.chat.events import CallArguments, CallStart, Content, Event, Reasoning
from lmx.protocol import Logprobs

ChoiceObject = Callable[[int, str | Event | None, dict[str, Any] | None, str | None], dict[str, Any]]
"""(index, text or event or None for nothing new, logprobs, finish_reason) to the face's entry of ``choices``."""

PLACEHOLDER = "\0"


class ChunkStream:
    """``heading`` is what every chunk repeats; ``first`` is by index what a choice begins with, in a chunk with
    ``first_fields``.

    A choice begins with its first token and never before: benchmark clients take the first chunk with ``choices`` as
    the end of prefill.
    """

    def __init__(
        self,
        job: Job,
        writer: EventWriter,
        heading: dict[str, Any],
        choice_object: ChoiceObject,
        *,
        first: Mapping[int, dict[str, Any]],
        first_fields: Mapping[str, Any] = MappingProxyType({}),
        options: StreamOptions | None,
        format_logprobs: Callable[[int, Sequence[tuple[int, Logprobs | None]]], dict[str, Any]],
    ) -> None:
        self._job = job
        self._writer = writer
        self._heading = heading
        self._choice_object = choice_object
        self._first = dict(first)
        self._first_fields = dict(first_fields)
        self._with_usage = bool(options and options.include_usage)
        self._usage_in_each = bool(self._with_usage and options and options.continuous_usage_stats)
        self._usage: dict[str, object] | None = None
        self._format_logprobs = format_logprobs
        self._frames = [self._frame(index, PLACEHOLDER, 1) for index in range(len(job.requests))]
        self._event_frames: dict[tuple[int, type[Event], int], list[bytes]] = {}

    def _frame(self, index: int, piece: str | Event, places: int) -> list[bytes]:
        """The chunk around ``places`` placeholders, the last ones: the heading holds the client's word for the model,
        whatever that is.
        """
        return self._chunk(self._choice_object(index, piece, None, None)).rsplit(to_json(PLACEHOLDER), places)

    def _chunk(self, choice: dict[str, Any], fields: Mapping[str, Any] = MappingProxyType({})) -> bytes:
        return self._event({"choices": [choice], **({"usage": self._usage} if self._with_usage else {}), **fields})

    def _event(self, fields: dict[str, Any]) -> bytes:
        return b"data: " + to_json(self._heading | fields) + b"\n\n"

    async def begin(self) -> None:
        await self._writer.start()

    async def delta(self, choice: Choice, delta: Delta) -> None:
        index = choice.index
        if self._usage_in_each:  # of this choice, as vLLM counts
            self._usage = usage(self._job, [choice])
        first = self._first.pop(index, None)
        events = self._chunk(first, self._first_fields) if first else b""
        if delta.events:
            events += self._told(index, delta)
        elif (details := self._details(index, delta)) is not None:
            events += self._detailed(index, None if choice.told is not None else delta.text, details)
        elif delta.text and self._usage_in_each:
            events += self._detailed(index, delta.text, None)
        elif delta.text:
            before, after = self._frames[index]
            events += before + json.dumps(delta.text).encode() + after
        if delta.finish:
            events += self._chunk(self._choice_object(index, None, None, delta.finish))
        if events:
            await self._writer.write(events)

    def _told(self, index: int, delta: Delta) -> bytes:
        """A chunk for each of the events, what is told of the tokens with the first."""
        details = self._details(index, delta)
        framed = details is None and not self._usage_in_each
        chunks = []
        for event in delta.events:
            match event:
                case Content(text) if framed:
                    chunks.append(json.dumps(text).encode().join(self._frames[index]))
                case Reasoning(text) | CallArguments(json=text) if framed:
                    chunks.append(json.dumps(text).encode().join(self._event_frame(index, event)))
                case Content() | Reasoning() | CallStart() | CallArguments():
                    chunks.append(self._detailed(index, event, details))
                    details = None
        if details is not None:
            chunks.append(self._detailed(index, None, details))
        return b"".join(chunks)

    def _details(self, index: int, delta: Delta) -> tuple[dict[str, Any] | None, dict[str, Any]] | None:
        """The log-probabilities and ids of the new tokens, as far as they are wanted."""
        ids = {"token_ids": delta.tokens} if self._job.returns_ids and delta.tokens else {}
        if not delta.logprobs and not ids:
            return None
        return self._format_logprobs(index, delta.logprobs) if delta.logprobs else None, ids

    def _detailed(
        self,
        index: int,
        piece: str | Event | None,
        details: tuple[dict[str, Any] | None, dict[str, Any]] | None,
    ) -> bytes:
        logprobs, ids = details or (None, {})
        return self._chunk(self._choice_object(index, piece, logprobs, None) | ids)

    def _event_frame(self, index: int, event: Reasoning | CallArguments) -> list[bytes]:
        call = event.index if isinstance(event, CallArguments) else 0
        key = (index, type(event), call)
        if key not in self._event_frames:
            empty = CallArguments(call, PLACEHOLDER) if isinstance(event, CallArguments) else Reasoning(PLACEHOLDER)
            places = 1 if isinstance(event, CallArguments) else 2
            self._event_frames[key] = self._frame(index, empty, places)
        return self._event_frames[key]

    async def end(self, choices: Sequence[Choice]) -> None:
        """The usage chunk when it was asked for, and [DONE]."""
        last = self._event({"choices": [], "usage": usage(self._job, choices)}) if self._with_usage else b""
        await self._writer.write(last + DONE)
