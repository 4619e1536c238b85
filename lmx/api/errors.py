"""Errors become HTTP here and nowhere else: the OpenAI error object, as a response or as an SSE event.

A client never sees a stack trace: what was not raised on purpose is logged with the request's id and answered with a
plain 500. Nothing that a library raises on a client's data may end more than that request, whatever it is derived
from. Called by the app's error handlers, by streams that have begun, and around each handler.
"""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio
from quart import Response
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge, RequestTimeout
from werkzeug.routing import RequestRedirect

from lmx.errors import BodyTooLarge, InvalidRequest, LmxError

logger = logging.getLogger("lmx.api")


class UnknownPath(LmxError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class MethodRefused(LmxError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTimeout(LmxError):
    status = 408
    type = "invalid_request_error"
    code = "timeout"


class ForeignHost(LmxError):
    """The Host header names neither this machine nor an allowed host (DNS rebinding)."""

    status = 421
    type = "invalid_request_error"
    code = "foreign_host"


class InternalError(LmxError):
    code = "internal_error"


class LibraryFailure(Exception):
    """A library raised what is no ``Exception``: a panic in Rust, for instance."""


@contextmanager
def contained() -> Iterator[None]:
    """Around work on a client's data: what must not end the program comes out as an ``Exception``.

    pyo3's PanicException is a BaseException, which no handler of Quart, Hypercorn or Trio stops. What is meant to go
    further (Cancelled, and a signal's KeyboardInterrupt or SystemExit) goes on as it is.
    """
    try:
        yield
    except (Exception, trio.Cancelled, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseExceptionGroup as group:
        # A task that fails has its siblings cancelled. Should it be the other way round, then their Cancelled may be
        # left out too: who is cancelled is told again at the next checkpoint.
        _, rest = group.split(trio.Cancelled)
        if rest is None or rest.subgroup((KeyboardInterrupt, SystemExit, GeneratorExit)) is not None:
            raise
        if isinstance(rest, ExceptionGroup):
            raise rest from None
        raise LibraryFailure("a library gave up in a task") from rest
    except BaseException as error:
        raise LibraryFailure(f"a library gave up: {type(error).__name__}") from error


def expected(error: BaseException, request_id: str) -> LmxError:
    """The LmxError that ``error`` is or holds (a nursery wraps what its tasks raise); a bug of ours is logged."""
    leaf = error
    while isinstance(leaf, BaseExceptionGroup):
        known = leaf.subgroup(LmxError)
        leaf = (known or leaf).exceptions[0]
    if isinstance(leaf, LmxError):
        return leaf
    logger.error("request %s failed", request_id, exc_info=error)
    return InternalError(f"The server made an error; its log has the details under request id {request_id}.")


def raise_single(group: BaseExceptionGroup[BaseException]) -> None:
    """Raise the one error that matters out of a nursery's group: not the Cancelled of the tasks it took with it."""
    _, rest = group.split(trio.Cancelled)
    while isinstance(rest, BaseExceptionGroup):
        known = rest.subgroup(LmxError)
        inner = (known or rest).exceptions[0]
        if not isinstance(inner, BaseExceptionGroup):
            raise inner from None
        rest = inner
    raise group


def from_http(error: HTTPException, method: str, path: str, max_body_bytes: int) -> LmxError:
    """Quart's own refusals (404, 405, 408, 413 …) with our words."""
    if isinstance(error, RequestEntityTooLarge):
        return BodyTooLarge(
            f"The request body is larger than the {max_body_bytes} bytes this server takes; send less, or raise "
            "[server] max_body_bytes in lmx.toml."
        )
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted(error.valid_methods or ()))
        return MethodRefused(f"{method} is not allowed on {path}; it takes {allowed}.")
    if isinstance(error, RequestTimeout):
        return BodyTimeout("The rest of the request body did not come in time; send it without pauses.")
    if isinstance(error, NotFound | RequestRedirect):
        return UnknownPath(f"Unknown path: {method} {path[:200]}. GET /openapi.json lists what there is.")
    return InvalidRequest(error.description or error.name)


def error_object(error: LmxError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: LmxError) -> Response:
    response = Response(json.dumps(error_object(error)), status=error.status, content_type="application/json")
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def error_event(error: LmxError) -> bytes:
    """The last event of a stream that fails after it has begun; no [DONE] follows."""
    return b"data: " + json.dumps(error_object(error)).encode() + b"\n\n"
