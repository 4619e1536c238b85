"""Long work of the admin face, told while it goes on: server-sent events with what it reports, then with its result.

A failure before the first report is an ordinary error response, a later one the error event that ends every stream.
Whoever goes away cancels the work.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar, cast

import trio

from lmx.api.core.call import current_call
from lmx.api.errors import raise_single
from lmx.api.events import EventStream, EventWriter

UNSENT_EVENTS = 64
"""Of a client that reads slowly; what comes after them is not told."""

T = TypeVar("T")
Tell = Callable[[dict[str, Any]], None]
Work = Callable[[Tell], Awaitable[dict[str, Any]]]


def unheard(event: dict[str, Any]) -> None:
    """For work that nobody wants to be told of."""


def frame(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def streamed(work: Work, comment_s: float) -> EventStream:
    """The response that runs ``work`` and tells of it; its result is told as ``done``."""
    return EventStream(partial(_produce, work), current_call().id, comment_s)


def followed(changes: AsyncIterator[T], shown: Callable[[T], dict[str, Any]], comment_s: float) -> EventStream:
    """The response that tells what ``changes`` (an async generator) gives, until it ends. Whoever goes away ends
    nothing but that."""

    async def produce(writer: EventWriter) -> None:
        async with aclosing(cast("AsyncGenerator[T, None]", changes)) as given:
            async for change in given:
                await _write(writer, shown(change))

    return EventStream(produce, current_call().id, comment_s)


async def _produce(work: Work, writer: EventWriter) -> None:
    send, receive = trio.open_memory_channel[dict[str, Any]](UNSENT_EVENTS)

    def tell(event: dict[str, Any]) -> None:
        with suppress(trio.WouldBlock):
            send.send_nowait(event)

    async def pass_on() -> None:
        async for event in receive:
            await _write(writer, event)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pass_on)
            with send:
                done = await work(tell)
    except BaseExceptionGroup as group:
        raise_single(group)
    await _write(writer, {"done": done})


async def _write(writer: EventWriter, event: dict[str, Any]) -> None:
    if not writer.started:
        await writer.start()
    await writer.write(frame(event))
