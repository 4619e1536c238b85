"""What answers of both OpenAI faces share: their heading, and the sink that collects an answer sent in one piece."""

import hashlib
import json
import time
import uuid
from typing import Any

from quart import Response

from lmx import __version__
from lmx.api.generation import Choice, Delta, Job
from lmx.protocol import Logprobs
from lmx.serving.models import Served


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


def json_response(body: dict[str, Any]) -> Response:
    return Response(to_json(body), content_type="application/json")


class Collected:
    """The ``Sink`` for an answer in one piece."""

    def __init__(self, job: Job) -> None:
        self._texts: list[list[str]] = [[] for _ in job.requests]
        self._logprobs: list[list[tuple[int, Logprobs]]] = [[] for _ in job.requests]

    async def begin(self) -> None:
        pass

    async def delta(self, choice: Choice, delta: Delta) -> None:
        self._texts[choice.index].append(delta.text)
        self._logprobs[choice.index].extend(delta.logprobs)

    def text(self, choice: Choice) -> str:
        return "".join(self._texts[choice.index])

    def logprobs(self, choice: Choice) -> list[tuple[int, Logprobs]]:
        return self._logprobs[choice.index]
