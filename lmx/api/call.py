"""The facts of the HTTP request being served that its handlers need: its id, who asks, and until when."""

import math
import re
import uuid
from dataclasses import dataclass

from quart import g, request

from lmx.config import ServerSettings
from lmx.errors import InvalidRequest


@dataclass(slots=True)
class Call:
    id: str
    """Sent back as x-request-id: the client's own, or a fresh one."""
    started: float
    """On Trio's clock."""
    address: str
    key_name: str = ""
    """The API key's name, "" without keys."""
    model: str = ""
    """Whose answer it is, and how that ended, for the metrics; "" until it is known."""
    finish: str = ""

    def client(self, user: str | None) -> str:
        """Whom fair scheduling counts the tokens for."""
        return self.key_name or user or self.address

    def deadline(self, timeout_s: float | None, settings: ServerSettings) -> float:
        """On Trio's clock: the request's own field, else its x-request-timeout header, else the setting; or inf.

        Raises InvalidRequest for a header that is no positive number.
        """
        header = request.headers.get("x-request-timeout")
        if timeout_s is None and header is not None:
            timeout_s = _positive(header)
        return self.started + (timeout_s or settings.request_timeout_s or math.inf)


def _positive(header: str) -> float:
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(
            f"x-request-timeout must be a positive number of seconds, not {header[:40]!r}.", param="x-request-timeout"
        )
    return seconds


def request_id() -> str:
    """The client's x-request-id where it can be repeated safely, else a fresh one."""
    given = request.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else f"req_{uuid.uuid4().hex}"


def current_call() -> Call:
    call: Call = g.call
    return call
