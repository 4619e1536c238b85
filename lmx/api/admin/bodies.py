"""The body of an admin request: small JSON, checked against its model. Called by every POST of the admin face."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from werkzeug.exceptions import RequestEntityTooLarge

from lmx.api.body import read_body
from lmx.api.core.call import current_call
from lmx.api.core.parse import parse_object, validate
from lmx.errors import BodyTooLarge

MOST_BYTES = 64 * 1024
"""Read and checked in the event loop, in 5 ms at most."""

Name = Annotated[str, Field(min_length=1, max_length=1000, description="Id, alias or path of the model.")]


class AdminRequest(BaseModel):
    """Strict types, unknown fields ignored, as in ``lmx.api.core.schemas``."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


Body = TypeVar("Body", bound=BaseModel)


async def receive(kind: type[Body]) -> Body:
    """The current request's body; none is an empty object. The model that it names is in the audit's line.

    Raises InvalidRequest, BodyTooLarge, UnsupportedEncoding, or Quart's RequestTimeout. Cancelled: nothing is kept.
    """
    try:
        raw = b"".join(await read_body(MOST_BYTES))
    except RequestEntityTooLarge:
        raise BodyTooLarge(f"The body of a request to /admin has {MOST_BYTES} bytes at most.") from None
    body = validate(kind, parse_object(raw) if raw else {})
    if model := getattr(body, "model", None):
        current_call().audit["model"] = model
    return body
