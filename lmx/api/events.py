"""Server-sent events, written by the handler's own task straight into ASGI.

The headers and a comment go out at once; later comments go by what was *sent*, whatever the reason for the silence:
queued, loading, in prefill, text held back by a stop string. Quart would iterate an async generator, whose leases then
end when the generator is closed; here a coroutine writes, so that leaving it is leaving its leases, and nothing but one
bytes object passes per event. A failure before the first byte is still an ordinary error response; after it, an error
event ends the stream.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from quart import Response
from quart.utils import encode_headers
from quart.wrappers import Request
from quart_trio.asgi import TrioASGIHTTPConnection

from lmx.api.core.call import begin_call, current_call
from lmx.api.errors import contained, error_event, error_response, expected
from lmx.api.request_log import log_request

COMMENT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"

Send = Callable[[Any], Awaitable[None]]


class EventWriter:
    """The open stream. ``write`` returns when the bytes are with the kernel, so a slow reader slows its own request."""

    def __init__(self, send: Send, response: Response) -> None:
        self._send = send
        self._response = response
        self.started = False
        self._writing = 0
        self._sent_at = 0.0

    async def start(self) -> None:
        """Send the headers and a first comment. Cancelled: the headers are sent."""
        with trio.CancelScope(shield=True):  # or nobody knows whether they are sent; Hypercorn only keeps them
            await send_start(self._send, self._response)
        self.started = True
        await self.write(COMMENT)

    async def write(self, events: bytes) -> None:
        self._writing += 1
        try:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})
        finally:
            self._writing -= 1
            self._sent_at = trio.current_time()

    async def comment(self, silence_s: float) -> None:
        """Send a comment whenever nothing was sent for ``silence_s``, until cancelled."""
        while True:
            quiet = self.started and not self._writing
            due = self._sent_at + silence_s
            if quiet and due <= trio.current_time():
                await self.write(COMMENT)
            else:
                await trio.sleep_until(due if quiet else trio.current_time() + silence_s)


async def send_start(send: Send, response: Response) -> None:
    headers = encode_headers(response.headers)
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})


class EventStream(Response):
    """A response whose body is written by ``produce`` once the headers are decided (after_request hooks included)."""

    def __init__(self, produce: Callable[[EventWriter], Awaitable[None]], request_id: str, comment_s: float) -> None:
        super().__init__(b"", content_type="text/event-stream; charset=utf-8")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self.on_end: Callable[[int], None] = lambda status: None
        """Called at the end with 200, or the status of the error that ended it; not when the client went before."""
        self._produce = produce
        self._request_id = request_id
        self._comment_s = comment_s

    async def send_to(self, send: Send) -> None:
        """Run ``produce`` to the stream's end. Cancelled: ``produce`` has unwound, with all it held."""
        writer = EventWriter(send, self)
        status, rest = self.status_code, b""
        try:
            with current_call().cancellable(), contained():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(writer.comment, self._comment_s)
                    await self._produce(writer)
                    nursery.cancel_scope.cancel()
        except Exception as error:
            failure = expected(error, self._request_id)
            status = failure.status
            if writer.started:
                rest = error_event(failure)
            else:
                refusal = error_response(failure)
                rest = await refusal.get_data(as_text=False)
                for name in ("content-type", "cache-control", "x-accel-buffering"):
                    del self.headers[name]
                self.headers.extend(refusal.headers)
                self.status_code = status
                await send_start(send, self)
        self.on_end(status)
        await send({"type": "http.response.body", "body": rest, "more_body": False})


class HTTPConnection(TrioASGIHTTPConnection):  # type: ignore[misc]
    """Quart-Trio's request runner, for which an EventStream writes itself."""

    async def handle_request(self, nursery: trio.Nursery, request: Request, send: Send) -> None:
        call = begin_call(request)
        try:
            with self.app.calls.running(call):
                response = await self.app.handle_request(request)
                if isinstance(response, EventStream):
                    await response.send_to(send)
                else:
                    await self._send_response(send, response)
        finally:
            call.end()
            log_request(request.method, request.path, call)
        nursery.cancel_scope.cancel()
