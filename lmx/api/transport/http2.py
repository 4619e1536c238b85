"""HTTP/2 in which one stream's trouble is that stream's alone.

Hypercorn 0.18 and h2 end the whole connection, with every answer on it, when one request is malformed, when one stream
is not read, or when a body goes on after its answer. Here such a stream is reset and its siblings never notice. What
breaks the connection's own state (framing, HPACK, flow control) still ends it. Called by Hypercorn, through
``lmx.api.transport.http``; it knows nothing of what is served.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote_from_bytes

import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, PriorityUpdated, RequestReceived, StreamReset
from h2.exceptions import InvalidBodyLengthError, ProtocolError
from h2.settings import SettingCodes
from h2.settings import Settings as H2Settings
from h2.utilities import HeaderValidationFlags, validate_headers
from hpack.exceptions import HPACKError
from hypercorn.protocol.events import Body, Data, EndBody, EndData, Request
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, H2Protocol, StreamBuffer
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.utils import filter_pseudo_headers
from priority.priority import PriorityTree

REQUEST = HeaderValidationFlags(is_client=False, is_trailer=False, is_response_header=False, is_push_promise=False)
PATH_CHARACTERS = "".join(map(chr, range(0x21, 0x7F)))
"""What stays as it is in a path; anything else is percent-encoded, as it should have come."""


class Stalled(Exception):
    """The client has taken no byte of a stream for too long."""


class _Connection(H2Connection):
    """h2's, without the verdict that a malformed request ends the connection (RFC 9113, 8.1.1: a stream error)."""

    def _receive_headers_frame(self, frame: Any) -> Any:
        return self._receive_on_stream(super()._receive_headers_frame, frame)

    def _receive_data_frame(self, frame: Any) -> Any:
        return self._receive_on_stream(super()._receive_data_frame, frame)

    def _receive_on_stream(self, receive: Callable[[Any], Any], frame: Any) -> Any:
        try:
            return receive(frame)
        except ProtocolError as error:
            # A header block that cannot be decoded leaves the two ends with different tables.
            ours = type(error) in (ProtocolError, InvalidBodyLengthError) and frame.stream_id in self.streams
            if not ours or isinstance(error.__cause__, HPACKError | IndexError | TypeError | UnicodeDecodeError):
                raise
        self.reset_stream(frame.stream_id, ErrorCodes.PROTOCOL_ERROR)
        return [], [StreamReset(stream_id=frame.stream_id, error_code=ErrorCodes.PROTOCOL_ERROR, remote_reset=False)]


class _Buffer(StreamBuffer):  # type: ignore[misc]
    """What waits for a stream's flow-control window.

    Who writes waits while it is full (Hypercorn's lets an answer to a full window pile up without end), and gives up
    when the client takes nothing for ``patience_s``, however much it took before.
    """

    def __init__(self, event_class: Any, patience_s: float) -> None:
        super().__init__(event_class)
        self._patience_s = patience_s
        self._taken = trio.Event()

    async def push(self, data: bytes) -> None:
        if self._complete:
            raise BufferCompleteError
        self.buffer += data
        if len(self.buffer) >= BUFFER_HIGH_WATER:
            await self._shrunk_to(BUFFER_LOW_WATER)

    async def drain(self) -> None:
        await self._shrunk_to(0)

    async def _shrunk_to(self, size: float) -> None:
        while len(self.buffer) > size:
            with trio.move_on_after(self._patience_s) as limit:
                await self._taken.wait()
            if limit.cancelled_caught:
                raise Stalled

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if data:
            self._notify()
        return data

    async def close(self) -> None:
        self._complete = True
        self.buffer.clear()
        self._notify()

    def _notify(self) -> None:
        self._taken.set()
        self._taken = trio.Event()


class Http2(H2Protocol):  # type: ignore[misc]
    def __init__(self, app: Any, config: Any, *rest: Any) -> None:
        super().__init__(app, config, *rest)
        # Headers are checked in _receive_request, where a verdict is about one stream.
        checked_later = H2Configuration(client_side=False, header_encoding=None, validate_inbound_headers=False)
        self.connection = _Connection(checked_later)
        self.connection.DEFAULT_MAX_INBOUND_FRAME_SIZE = config.h2_max_inbound_frame_size
        limits = {
            SettingCodes.MAX_CONCURRENT_STREAMS: config.h2_max_concurrent_streams,
            SettingCodes.MAX_HEADER_LIST_SIZE: config.h2_max_header_list_size,
        }
        self.connection.local_settings = H2Settings(client=False, initial_values=limits)
        # A reset stream leaves the tree a little later than h2's count of open streams.
        self.priority = PriorityTree(maximum_streams=4 * config.h2_max_concurrent_streams)

    async def _handle_events(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case RequestReceived() if not self.context.terminated.is_set():
                    await self._receive_request(event)
                case DataReceived():
                    await self._receive_body(event)
                case PriorityUpdated():  # deprecated by RFC 9113; one could fill the tree with idle streams
                    pass
                case _:
                    await super()._handle_events([event])
        await self._flush()

    async def _receive_request(self, event: RequestReceived) -> None:
        try:
            headers = dict(validate_headers(event.headers, REQUEST))
            method = headers[b":method"].decode("ascii").upper()
        except (ProtocolError, UnicodeDecodeError):
            self.connection.reset_stream(event.stream_id, ErrorCodes.PROTOCOL_ERROR)
            return
        stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            event.stream_id,
        )
        self.streams[event.stream_id] = stream
        self.stream_buffers[event.stream_id] = _Buffer(self.context.event_class, self.config.write_timeout_s)
        self.priority.insert_stream(event.stream_id)
        self.priority.block(event.stream_id)
        path = quote_from_bytes(headers.get(b":path", b"*"), safe=PATH_CHARACTERS).encode()
        fields = filter_pseudo_headers(event.headers)
        await stream.handle(Request(event.stream_id, fields, "2", method, path, self.connection_state))
        await self.context.mark_request()

    async def _receive_body(self, event: DataReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:  # else it has its answer already
            await stream.handle(Body(stream_id=event.stream_id, data=event.data))
        with suppress(ProtocolError):  # the stream was reset meanwhile
            self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    async def stream_send(self, event: Any) -> None:
        if isinstance(event, Body | Data | EndBody | EndData) and event.stream_id not in self.stream_buffers:
            await trio.lowlevel.checkpoint()  # nobody reads it; who writes without end must notice
            return
        try:
            await super().stream_send(event)
        except Stalled:
            await self._reset(event.stream_id)

    async def _reset(self, stream_id: int) -> None:
        """The answer is given up; who writes it is told by http.disconnect."""
        with suppress(ProtocolError):  # closed already
            self.connection.reset_stream(stream_id, ErrorCodes.CANCEL)
        await self._forget(stream_id)
        await self._flush()
        await self._close_stream(stream_id)

    async def _forget(self, stream_id: int) -> None:
        buffer = self.stream_buffers.pop(stream_id, None)
        if buffer is not None:
            await buffer.close()
            self.priority.remove_stream(stream_id)

    async def _send_data(self, stream_id: int) -> None:
        buffer = self.stream_buffers[stream_id]
        try:
            room = min(self.connection.local_flow_control_window(stream_id), self.connection.max_outbound_frame_size)
            data = await buffer.pop(max(0, room))
            if data:
                self.connection.send_data(stream_id, data)
                await self._flush()
            else:
                self.priority.block(stream_id)
            if buffer.complete:
                self.connection.end_stream(stream_id)
                await self._flush()
                await self._forget(stream_id)
        except ProtocolError:  # the stream, or the connection, was closed
            await self._forget(stream_id)
