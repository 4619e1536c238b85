"""The body of an admin request: small JSON, checked against its model. Called by every POST of the admin face."""

from typing import TypeVar

from werkzeug.exceptions import RequestEntityTooLarge

from lmx.api.body import read_body
from lmx.api.core.call import current_call
from lmx.api.core.parse import parse_object, validate
from lmx.api.core.schemas import Request
from lmx.errors import BodyTooLarge

MOST_BYTES = 64 * 1024
"""Read and checked in the event loop, in 5 ms at most."""

Body = TypeVar("Body", bound=Request)


async def receive(kind: type[Body]) -> Body:
    """The current request's body; none is an empty object.

    Raises InvalidRequest, BodyTooLarge, UnsupportedEncoding, or Quart's RequestTimeout. Cancelled: nothing is kept.
    """
    try:
        raw = b"".join(await read_body(MOST_BYTES))
    except RequestEntityTooLarge:
        raise BodyTooLarge(f"The body of a request to /admin has {MOST_BYTES} bytes at most.") from None
    body = validate(kind, parse_object(raw) if raw else {})
    if body.model:
        current_call().audit["model"] = body.model
    return body
