"""What answers of both OpenAI faces share: their heading, and the sink that collects an answer sent in one piece."""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import trio
from quart import Response

from lmx import __version__
from lmx.api.core.generation import Choice, Delta, Job
from lmx.api.openai.logprobs import prompt_logprobs
from lmx.chat.events import Content, Event
from lmx.protocol import Logprobs
from lmx.serving.models import Served

FormatLogprobs = Callable[[int, Sequence[tuple[int, Logprobs | None]]], dict[str, Any]]
"""The index of a choice, and its new tokens, to the face's ``logprobs`` object: lists that go on from call to call."""


def heading(prefix: str, kind: str, model: str, job: Job) -> dict[str, Any]:
    """The fields that every chunk of one answer repeats. ``model`` is the client's own word for it.

    ``seed`` is ours to add: the way to repeat an answer whose request gave none.
    """
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": _fingerprint(job.served),
        "seed": job.seed,
    }


def _fingerprint(served: Served) -> str:
    """Changes with the model's files and this program: what OpenAI says answers with equal seeds are compared under."""
    folder = served.folder
    facts = (folder.id, folder.architecture, folder.quantization, folder.size_bytes, __version__)
    return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def to_json(value: Any) -> bytes:
    """Compact, ASCII only."""
    return json.dumps(value, separators=(",", ":")).encode()


class Collected:
    """The ``Sink`` for an answer in one piece.

    Log-probabilities become JSON as they come: those of a long answer are megabytes, which would hold the event loop at
    its end.
    """

    def __init__(self, job: Job, format_logprobs: FormatLogprobs) -> None:
        self._job = job
        self._filled_in: dict[bytes, bytes] = {}
        self._returns_ids = job.returns_ids
        self._ids: list[list[int]] = [[] for _ in job.requests]
        self._texts: list[list[str]] = [[] for _ in job.requests]
        self._events: list[list[Event]] = [[] for _ in job.requests]
        self._format_logprobs = format_logprobs
        self._logprobs: list[dict[str, list[bytes]]] = [{} for _ in job.requests]

    async def begin(self) -> None:
        pass

    async def delta(self, choice: Choice, delta: Delta) -> None:
        self._texts[choice.index].append(delta.text)
        self._events[choice.index] += delta.events
        if self._returns_ids:
            self._ids[choice.index] += delta.tokens
        if delta.logprobs:
            for name, values in self._format_logprobs(choice.index, delta.logprobs).items():
                if isinstance(values, list):
                    self._logprobs[choice.index].setdefault(name, []).append(to_json(values)[1:-1])

    def text(self, choice: Choice) -> str:
        return "".join(self._texts[choice.index])

    def events(self, choice: Choice) -> list[Event]:
        """The same where more than text is told apart."""
        return self._events[choice.index] or [Content(self.text(choice))]

    async def prompt_logprobs(self, choice: Choice) -> dict[str, str]:
        """vLLM's field for them, for ``response`` to fill in: made in a thread, for a long prompt has many."""
        mark = uuid.uuid4().hex
        prompt = self._job.requests[choice.index].prompt

        def make() -> bytes:
            return to_json(prompt_logprobs(self._job.served.chat, prompt, choice.prompt_logprobs))

        self._filled_in[to_json(mark)] = await trio.to_thread.run_sync(make)
        return {"prompt_logprobs": mark}

    def ids(self, choice: Choice) -> dict[str, list[int]]:
        """vLLM's field of a choice for them, where they are wanted."""
        return {"token_ids": self._ids[choice.index]} if self._returns_ids else {}

    def response(
        self,
        answer: dict[str, Any],
        made: Sequence[Choice],
        choices: list[dict[str, Any]],
        *,
        with_logprobs: bool,
    ) -> Response:
        """``answer`` with ``choices``, the objects of those ``made``, each with its ``logprobs``."""
        mark = uuid.uuid4().hex
        if with_logprobs:
            choices = [choice | {"logprobs": mark} for choice in choices]
        first, *others = to_json(answer | {"choices": choices}).split(b'"%s"' % mark.encode())
        pieces = [first]
        for choice, other in zip(made, others, strict=False):
            pieces += [*self._logprobs_json(choice.index), other]
        body = b"".join(pieces)
        for place, value in self._filled_in.items():
            body = body.replace(place, value)
        return Response(body, content_type="application/json")

    def _logprobs_json(self, index: int) -> Iterator[bytes]:
        """In the order of a format without tokens."""
        separator = b"{"
        for name, nothing in self._format_logprobs(index, ()).items():
            yield separator + to_json(name) + b":"
            if isinstance(nothing, list):
                yield b"[" + b",".join(self._logprobs[index].get(name, ())) + b"]"
            else:
                yield to_json(nothing)
            separator = b","
        yield b"}"
