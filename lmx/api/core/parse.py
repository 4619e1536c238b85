"""From the bytes of a request body to a validated pydantic model, or to an InvalidRequest that names the field.

Pure. Called for every POST route, in the server for small bodies and in ``lmx.api.reader`` for others, so it must not
import the web framework. Whatever it is given, it may cost no more than a multiple of the body.
"""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from lmx.api.core.shorten import SHOWN_CHARACTERS, shorten
from lmx.api.core.unbuilt import refuse_unbuilt
from lmx.errors import InvalidRequest

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], raw: bytes) -> Model:
    """Raises InvalidRequest."""
    return validate(model, parse_object(raw))


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``: UTF-8, with or without a byte order mark, nested 200 deep at most.

    Raises InvalidRequest.
    """
    raw = raw.removeprefix(BYTE_ORDER_MARK)
    try:
        body = from_json(raw, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        shown = raw[:SHOWN_CHARACTERS].decode(errors="replace")
        raise InvalidRequest(
            f"The request body is not valid JSON in UTF-8: {error}. It begins with {shown!r}."
        ) from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"The request body must be a JSON object, not {shorten(body)}.")
    return body


def validate(model: type[Model], body: dict[str, Any]) -> Model:
    """Raises InvalidRequest, also for fields that would change the answer and are not built (``unbuilt``)."""
    refuse_unbuilt(body, frozenset(model.model_fields))
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False, include_context=False), body) from None


def _invalid(errors: list[ErrorDetails], body: dict[str, Any]) -> InvalidRequest:
    first = errors[0]
    # A union gives one error for each of its members: the deepest is the one that fits what was sent.
    same_field = [error for error in errors if error["loc"][0] == first["loc"][0]]
    param, value = max((_locate(error, body) for error in same_field), key=lambda found: len(found[0]))
    about = [error for error in same_field if _locate(error, body)[0] == param]
    if about[0]["type"] == "missing":
        return InvalidRequest(f"{param} is required.", param=param)
    problems = dict.fromkeys(error["msg"][:1].lower() + error["msg"][1:] for error in about)
    return InvalidRequest(f"{param}: {', or '.join(problems)} (got {shorten(value)}).", param=param)


def _locate(error: ErrorDetails, body: dict[str, Any]) -> tuple[str, Any]:
    """A path like ``messages[0].content`` and what was sent there; pydantic's names of union members left out."""
    path = ""
    value: Any = body
    for step, part in enumerate(error["loc"], 1):
        name = str(part)[:SHOWN_CHARACTERS]
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and part in value:
            path, value = f"{path}.{name}" if path else name, value[part]
        elif error["type"] == "missing" and step == len(error["loc"]) and isinstance(value, dict):
            path = f"{path}.{name}" if path else name
    return path, value


def wishes(body: BaseModel) -> tuple[float | None, float | None, str | None]:
    """What a request says of its time, and of how its model is loaded if it must be: timeout, ttl, draft_model."""
    return getattr(body, "timeout", None), getattr(body, "ttl", None), getattr(body, "draft_model", None)
