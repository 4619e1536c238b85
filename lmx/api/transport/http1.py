"""HTTP/1.1 as Hypercorn speaks it, without its changes of protocol, and with errors in the API's own format.

An upgrade (to WebSocket, to h2c) is an offer that a server may pass over (RFC 9110, 7.8): every request is answered as
an ordinary one, so that whoever offers something else gets the app's JSON. Called by Hypercorn, through
``lmx.api.transport.http``.
"""

import json

import h11
from hypercorn.protocol.events import Request
from hypercorn.protocol.h11 import STREAM_ID, H2ProtocolAssumedError, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream

REASONS = {
    431: "The request's line and headers are longer than the {limit} bytes this server takes.",
    501: "Of transfer encodings this server takes chunked only.",
}
OTHERWISE = "What was sent is not valid HTTP/1.1 (nor HTTP/2 by prior knowledge); this server does not speak TLS."


class Http1(H11Protocol):  # type: ignore[misc]
    async def _check_protocol(self, event: h11.Request) -> None:
        if event.method == b"PRI" and event.target == b"*" and event.http_version == b"2.0":
            raise H2ProtocolAssumedError(b"PRI * HTTP/2.0\r\n\r\n" + self.connection.trailing_data[0])

    async def _create_stream(self, request: h11.Request) -> None:
        self.stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        version, method = request.http_version.decode(), request.method.decode().upper()
        headers = list(request.headers)
        await self.stream.handle(Request(STREAM_ID, headers, version, method, request.target, self.connection_state))
        await self.context.mark_request()

    async def _send_error_response(self, status_code: int) -> None:
        message = REASONS.get(status_code, OTHERWISE).format(limit=self.config.h11_max_incomplete_size)
        status_code = 431 if status_code == 431 else 400  # h11's 501 would read as a failure of ours
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_http"}
        body = json.dumps({"error": error}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        await self._send_h11_event(h11.Response(status_code=status_code, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())
