"""From the bytes of a request body to a validated pydantic model, or to an InvalidRequest that names the field.

Called by every POST route. Must never block the event loop for long: large bodies are parsed in a thread.
"""

import json
from typing import Any, TypeVar

import trio
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from quart import request

from lmx.errors import InvalidRequest

THREAD_FROM_BYTES = 128 * 1024
SHOWN_CHARACTERS = 80

Model = TypeVar("Model", bound=BaseModel)


async def read_body(model: type[Model]) -> Model:
    """The current request's body as a ``model``.

    Raises InvalidRequest, or Quart's RequestEntityTooLarge and RequestTimeout. Cancelled: nothing is kept.
    """
    raw = await request.get_data(cache=False, as_text=False, parse_form_data=False)
    if len(raw) < THREAD_FROM_BYTES:
        return parse(model, raw)
    return await trio.to_thread.run_sync(parse, model, raw, abandon_on_cancel=True)


def parse(model: type[Model], raw: bytes) -> Model:
    """Raises InvalidRequest."""
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        shown = raw[:SHOWN_CHARACTERS].decode(errors="replace")
        raise InvalidRequest(
            f"The request body is not valid JSON in UTF-8: {error}. It begins with {shown!r}."
        ) from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"The request body must be a JSON object, not {shorten(body)}.")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False), body) from None


def _invalid(errors: list[ErrorDetails], body: dict[str, Any]) -> InvalidRequest:
    first = errors[0]
    if first["type"] == "value_error":  # a model_validator's: its message says it all, and begins with the field
        message = str(first["ctx"]["error"])
        return InvalidRequest(f"{message}.", param=message.split()[0])
    # A union gives one error for each of its members: the deepest is the one that fits what was sent.
    same_field = [error for error in errors if error["loc"][0] == first["loc"][0]]
    param, value = max((_locate(error["loc"], body) for error in same_field), key=lambda found: len(found[0]))
    about = [error for error in same_field if _locate(error["loc"], body)[0] == param]
    if about[0]["type"] == "missing":
        return InvalidRequest(f"{param} is required.", param=param)
    problems = dict.fromkeys(error["msg"][:1].lower() + error["msg"][1:] for error in about)
    return InvalidRequest(f"{param}: {', or '.join(problems)} (got {shorten(value)}).", param=param)


def _locate(location: tuple[int | str, ...], body: dict[str, Any]) -> tuple[str, Any]:
    """A path like ``messages[0].content`` and what was sent there; pydantic's names of union members left out."""
    path = ""
    value: Any = body
    for step, part in enumerate(location):
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and part in value:
            path, value = f"{path}.{part}" if path else str(part), value[part]
        elif step == len(location) - 1 and isinstance(value, dict):  # what is missing
            path = f"{path}.{part}" if path else str(part)
    return path, value


def shorten(value: Any) -> str:
    """``value`` as JSON, cut so that an error message stays a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}… ({len(text)} characters)"
