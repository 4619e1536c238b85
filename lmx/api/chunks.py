"""An answer as OpenAI's stream of chunks: the ``Sink`` that both OpenAI faces write through.

An event is built from bytes made once for the stream and the JSON of its text; nothing else may be done for each token
(aim: 3,000 events a second on one core over 8 connections).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lmx.api.answer import to_json
from lmx.api.events import DONE, EventWriter
from lmx.api.generation import Choice, Delta, Job, usage
from lmx.protocol import Logprobs

ChoiceObject = Callable[[int, str | None, dict[str, Any] | None, str | None], dict[str, Any]]
"""(index, text or None for none, logprobs, finish_reason) to the face's entry of ``choices``."""

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
        with_usage: bool,
        format_logprobs: Callable[[int, Sequence[tuple[int, Logprobs]]], dict[str, Any]],
    ) -> None:
        self._job = job
        self._writer = writer
        self._heading = heading
        self._choice_object = choice_object
        self._first = dict(first)
        self._first_fields = dict(first_fields)
        self._with_usage = with_usage
        self._format_logprobs = format_logprobs
        # Split at the last placeholder: the heading holds the client's word for the model, whatever that is.
        frames = [self._chunk(choice_object(i, PLACEHOLDER, None, None)) for i in range(len(job.requests))]
        self._frames = [frame.rsplit(to_json(PLACEHOLDER), 1) for frame in frames]

    def _chunk(self, choice: dict[str, Any], fields: Mapping[str, Any] = MappingProxyType({})) -> bytes:
        return self._event({"choices": [choice], **({"usage": None} if self._with_usage else {}), **fields})

    def _event(self, fields: dict[str, Any]) -> bytes:
        return b"data: " + to_json(self._heading | fields) + b"\n\n"

    async def begin(self) -> None:
        await self._writer.start()

    async def delta(self, choice: Choice, delta: Delta) -> None:
        index = choice.index
        first = self._first.pop(index, None)
        events = self._chunk(first, self._first_fields) if first else b""
        if delta.logprobs or (self._job.returns_ids and delta.tokens):
            logprobs = self._format_logprobs(index, delta.logprobs) if delta.logprobs else None
            ids = {"token_ids": delta.tokens} if self._job.returns_ids else {}
            events += self._chunk(self._choice_object(index, delta.text, logprobs, None) | ids)
        elif delta.text:
            before, after = self._frames[index]
            events += before + json.dumps(delta.text).encode() + after
        if delta.finish:
            events += self._chunk(self._choice_object(index, None, None, delta.finish))
        if events:
            await self._writer.write(events)

    async def end(self, choices: Sequence[Choice]) -> None:
        """The usage chunk when it was asked for, and [DONE]."""
        last = self._event({"choices": [], "usage": usage(self._job, choices)}) if self._with_usage else b""
        await self._writer.write(last + DONE)
