"""From an HTTP request to a checked request, the model that it names, and its token ids.

Called by every POST route. It must never hold the event loop: small bodies cost little, all others are read by another
process (``lmx.serving.readers``).
"""

import math
import zlib
from typing import Any, TypeVar

import trio
from quart import request
from werkzeug.exceptions import RequestEntityTooLarge, RequestTimeout

from lmx.api.core.call import current_call
from lmx.api.core.parse import parse_object, validate, wishes
from lmx.api.core.prepare import Prepared, check_length, prepare
from lmx.api.core.prepare_embeddings import prepare_embeddings
from lmx.api.core.schemas import Request
from lmx.config.live import Live
from lmx.errors import DeadlineExceeded, InvalidRequest, LmxError
from lmx.serving.models import AnyServed, Models, Served, ServedEmbedding

SMALL_BYTES = 64 * 1024
"""Parsing and checking takes 5 ms at most, templating and tokenising 60 ms of a thread, of which the GIL is free for
two thirds. A prompt of 15,000 tokens."""
PLAIN_MARKS = 1000
PIECE_BYTES = 64 * 1024
UNPACK_BYTES = 256 * 1024

Kind = TypeVar("Kind", bound=Request)
Model = TypeVar("Model", Served, ServedEmbedding)


class UnsupportedEncoding(LmxError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_encoding"


async def receive(kind: type[Kind], models: Models, live: Live) -> tuple[Kind, Served, Prepared]:
    """The current request's body as a ``kind``; fields that only ``prepare`` needs may be None in it.

    Raises InvalidRequest, ModelNotFound, UnsupportedEncoding, or Quart's RequestEntityTooLarge and RequestTimeout.
    Cancelled: nothing is kept, and the work ends.
    """
    return await _receive(kind, models, live, Served)


async def receive_embedding(kind: type[Kind], models: Models, live: Live) -> tuple[Kind, ServedEmbedding, Prepared]:
    """As ``receive``, for a model that makes embeddings."""
    return await _receive(kind, models, live, ServedEmbedding)


async def _receive(
    kind: type[Kind], models: Models, live: Live, served_kind: type[Model]
) -> tuple[Kind, Model, Prepared]:
    if (request.content_length or 0) > SMALL_BYTES:
        await models.readers.warm()
    pieces = await read_body(live.now.server.max_body_bytes)
    if sum(map(len, pieces)) > SMALL_BYTES:
        if _is_plain(pieces):
            await trio.to_thread.run_sync(_refuse_early, kind, pieces, models, served_kind, abandon_on_cancel=True)
        return await _receive_large(kind, pieces, models, live, served_kind)
    given = parse_object(b"".join(pieces))
    body = validate(kind, given)
    served = await _take(models, live, body.model, served_kind, *wishes(body))
    prepared = await trio.to_thread.run_sync(_prepare, body, given, served, abandon_on_cancel=True)
    return body, served, prepared


async def _take(
    models: Models,
    live: Live,
    name: str | None,
    kind: type[Model],
    timeout_s: float | None,
    ttl_s: float | None,
    draft_model: str | None,
) -> Model:
    """The model that is asked for, held until the request ends; waits for its words, not for its engine."""
    call = current_call()
    with trio.move_on_at(call.deadline(timeout_s, live.now.server)):
        lease = await models.take(name, kind, ttl_s, draft_model)
        call.releases.append(lease.release)
        call.model = lease.slot.id
        served = await lease.served()
        assert isinstance(served, kind)
        return served
    raise DeadlineExceeded("The request's time is up, and its model is not there yet.")


def _prepare(body: Request, given: dict[str, Any], served: AnyServed) -> Prepared:
    if isinstance(served, Served):
        return prepare(body, given, served.chat, served.context_length)
    return prepare_embeddings(body, served.encoder, served.context_length)


async def read_body(limit: int) -> list[bytes]:
    """The current request's body, unpacked, of ``limit`` bytes at most.

    Raises UnsupportedEncoding, InvalidRequest, or Quart's RequestEntityTooLarge and RequestTimeout.
    """
    pieces = await _read(limit)
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return pieces
    return await trio.to_thread.run_sync(_unpack, pieces, encoding, limit)


async def _read(limit: int) -> list[bytes]:
    """In pieces: copying 30 MB in one go would hold the event loop for 10 ms each time. None is tiny."""
    pieces, rest, size = [], bytearray(), 0
    with trio.move_on_after(request.body_timeout or math.inf) as patience:
        async for piece in request.body:
            size += len(piece)
            if size > limit:
                raise RequestEntityTooLarge
            rest += piece
            if len(rest) >= PIECE_BYTES:
                pieces.append(bytes(rest))
                rest.clear()
    if patience.cancelled_caught:
        raise RequestTimeout
    return [*pieces, bytes(rest)]


def _is_plain(pieces: list[bytes]) -> bool:
    """A few long strings of ASCII: whatever their length, parsing takes 1 ms for 3 MB."""
    marks = 0
    for piece in pieces:
        marks += piece.count(b'"') + piece.count(b"\\")
        if marks > PLAIN_MARKS or not piece.isascii():
            return False
    return True


def _refuse_early(kind: type[Kind], pieces: list[bytes], models: Models, served_kind: type[Model]) -> None:
    """Refuse a plain body for a text that is certainly too long, without a reader. Blocking. Raises InvalidRequest."""
    raw = b"".join(pieces)
    outside_strings = raw.split(b'"')[::2]
    if sum(map(len, outside_strings)) <= SMALL_BYTES:
        given = parse_object(raw)
        body = validate(kind, given)
        served = models.peek(body.model, served_kind)
        if isinstance(served, Served):
            check_length(body, given, served.chat, served.context_length)


async def _receive_large(
    kind: type[Kind], pieces: list[bytes], models: Models, live: Live, served_kind: type[Model]
) -> tuple[Kind, Model, Prepared]:
    served, refusal = None, None
    async with models.readers.reader() as reader:
        await reader.send(kind.__name__)
        await reader.send_bytes(pieces)
        pieces.clear()
        answer = await reader.receive()
        if answer[0] == "model":
            try:
                served = await _take(models, live, answer[1], served_kind, *answer[2:])
            except LmxError as error:
                refusal = error
                await reader.send(None)
            else:
                await reader.send((served.source, served.context_length))
                answer = await reader.receive()
    if refusal is not None:
        raise refusal
    match answer:
        case ("done", body, prepared):
            assert served is not None
            return body, served, prepared
        case ("error", error):
            raise error
    raise RuntimeError(f"the reader failed:\n{answer[1]}")


def _unpack(pieces: list[bytes], encoding: str, limit: int) -> list[bytes]:
    """Blocking; releases the GIL. Never holds more than ``limit`` bytes of the result, whatever they unpack to.

    Raises UnsupportedEncoding, InvalidRequest, RequestEntityTooLarge.
    """
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedEncoding(
            f"Content-Encoding {encoding[:80]!r} is not supported; send gzip, deflate or the body as it is.",
            param="content-encoding",
        )
    head = b"".join(pieces[:2])[:2]
    # "deflate" is zlib's format, but some send bare deflate data.
    bare = encoding == "deflate" and (len(head) < 2 or head[0] & 0x0F != 8 or int.from_bytes(head, "big") % 31 != 0)
    stream = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
    unpacked, size = [], 0
    try:
        for piece in pieces:
            while not stream.eof:
                part = stream.decompress(piece, UNPACK_BYTES)
                piece = stream.unconsumed_tail
                unpacked.append(part)
                size += len(part)
                if size > limit:
                    raise RequestEntityTooLarge
                if not piece and len(part) < UNPACK_BYTES:
                    break
        if not stream.eof:
            raise zlib.error("the data end too early")
    except zlib.error as error:
        raise InvalidRequest(
            f"The request body is not {encoding}, as its Content-Encoding says: {error}.", param="content-encoding"
        ) from None
    return unpacked
