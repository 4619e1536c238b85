"""The requests that are being served: what /admin/requests tells of them, and how an operator ends one.

One ``Calls`` for each app. Its calls are added by ``lmx.api.events``, whatever their face.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from lmx.api.core.call import Call
from lmx.errors import LmxError


class RequestCancelled(LmxError):
    """An operator ended it. A status that no client library tries again by itself."""

    status = 410
    type = "invalid_request_error"
    code = "request_cancelled"


class RequestNotFound(LmxError):
    status = 404
    type = "invalid_request_error"
    code = "request_not_found"


class Calls:
    def __init__(self) -> None:
        self._running: dict[int, Call] = {}

    @contextmanager
    def running(self, call: Call) -> Iterator[None]:
        """It is served inside the block."""
        self._running[id(call)] = call
        try:
            yield
        finally:
            del self._running[id(call)]

    def answering(self) -> list[Call]:
        """Those that a model works for, or that wait for one, oldest first."""
        return [call for call in self._running.values() if call.face and not call.status]

    async def cancel(self, request_id: str, error: LmxError) -> list[Call]:
        """End every request of that id with ``error``; returns when they hold nothing any more. Cancelled: they end all
        the same.

        Raises RequestNotFound.
        """
        found = [call for call in self.answering() if call.id == request_id]
        if not found:
            raise RequestNotFound(
                f"No request {request_id[:128]!r} is being served; GET /admin/requests lists those that are.",
                param="id",
            )
        async with trio.open_nursery() as nursery:
            for call in found:
                nursery.start_soon(call.cancel, error)
        return found


def described(call: Call, now: float) -> dict[str, Any]:
    """For /admin/requests; ``now`` on Trio's clock."""
    return {
        "id": call.id,
        "model": call.model,
        "state": call.state,
        "client": call.asker or call.key_name or call.address,
        "face": call.face,
        "age_s": round(now - call.started, 3),
        "prompt_tokens": call.prompt_tokens,
        "cached_tokens": sum(stream.cached_tokens for stream in call.streams),
        "completion_tokens": call.completion_tokens,
    }
