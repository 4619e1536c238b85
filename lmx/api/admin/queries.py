"""The query parameters of admin requests."""

from quart import request

from lmx.errors import InvalidRequest


def switch(name: str) -> bool:
    """A parameter that is true or false; without a value it is true, left out false. Raises InvalidRequest."""
    value = request.args.get(name, "false").lower()
    if value not in ("", "1", "0", "true", "false"):
        raise InvalidRequest(f"{name} must be true or false (got {value[:40]!r}).", param=name)
    return value in ("", "1", "true")
