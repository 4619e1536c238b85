"""The facts of the HTTP request being served that its handlers need: its id, who asks, and until when."""

import math
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field

import trio
from quart import request
from quart.wrappers import Request

from lmx.config import ServerSettings
from lmx.errors import InvalidRequest, LmxError
from lmx.serving.lease import State, Stream

SESSION_HEADERS = ("x-session-affinity", "x-session-id", "x-claude-code-session-id", "session-id", "thread-id")
"""opencode's, Claude Code's and Codex's."""
SESSION_CHARACTERS = 256


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
    status: int = 0
    """Of the response, or of the error that ended its stream; 0 while there is none."""
    asker: str = ""
    """Whom fair scheduling counted the tokens for."""
    route: str = ""
    """How the model was chosen; "" where none is needed."""
    prompt: Callable[[], str] | None = None
    """Its text, for the log when that is asked for."""
    choices: int = 1
    prompt_tokens: int = 0
    cached_tokens: int = 0
    broke: dict[str, object] | None = None
    """Where and why what was cached of the prompt ended, in the log's words; None: not known yet."""
    completion_tokens: int = 0
    first_token_at: float | None = None
    """Of all choices, like the next; on Trio's clock."""
    last_token_at: float = 0.0
    face: str = ""
    """Whose answer a model makes; "" for a request that needs none."""
    streams: list[Stream] = field(default_factory=list)
    """Of its sequences that had a lease."""
    audit: dict[str, object] = field(default_factory=dict)
    """What it wants to change, for the log."""
    _scope: trio.CancelScope | None = None
    """Of the work that goes on."""
    _unwound: trio.Event = field(default_factory=trio.Event)
    """That work has given back all that it held."""
    _cancelled: LmxError | None = None
    releases: list[Callable[[], None]] = field(default_factory=list)
    """What gives back what the request holds beyond its handler, such as the lease on its model."""

    def end(self) -> None:
        """It is over, however it ended."""
        while self.releases:
            self.releases.pop()()

    @contextmanager
    def cancellable(self) -> Iterator[None]:
        """Around its work: ``cancel`` ends that, and the error is raised when the block is left."""
        self._unwound = trio.Event()
        with trio.CancelScope() as scope:
            self._scope = scope
            if self._cancelled is not None:
                scope.cancel()
            try:
                yield
            finally:
                self._scope = None
                self._unwound.set()
        if scope.cancelled_caught and self._cancelled is not None:
            raise copy(self._cancelled)

    async def cancel(self, error: LmxError) -> None:
        """End it with ``error``, told to its client; returns when it holds nothing any more. Cancelled: it ends all the
        same."""
        self._cancelled = self._cancelled or error
        if self._scope is not None:
            self._scope.cancel()
            await self._unwound.wait()
        self.end()  # before its client has read why

    @property
    def drafts(self) -> tuple[int, int] | None:
        """Drafts that were verified for all its sequences, and those that were right; None: there were none."""
        found = [counts for stream in self.streams for counts in stream.drafts.values()]
        return (sum(drafted for drafted, _ in found), sum(accepted for _, accepted in found)) if found else None

    @property
    def state(self) -> State:
        """Of the sequence that is furthest."""
        states = {stream.state for stream in self.streams}
        return next((state for state in ("decode", "prefill") if state in states), "queued")

    def took(self, tokens: int, now: float) -> None:
        """A choice got so many tokens."""
        self.completion_tokens += tokens
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now

    def client(self, user: str | None) -> str:
        """Whom fair scheduling counts the tokens for."""
        self.asker = self.key_name or user or self.address
        return self.asker

    def session(self, cache_key: str | None) -> str:
        """Which conversation the request belongs to, by what clients send for that; "" where they do not."""
        named = next(filter(None, map(request.headers.get, SESSION_HEADERS)), "")
        return (cache_key or named)[:SESSION_CHARACTERS]

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


_current: ContextVar[Call] = ContextVar("call")


def begin_call(request: Request) -> Call:
    """The call of this request, which is the current one of the task that serves it."""
    call = Call(_request_id(request), trio.current_time(), request.remote_addr or "")
    _current.set(call)
    return call


def _request_id(request: Request) -> str:
    """The client's x-request-id where it can be repeated safely, else a fresh one."""
    given = request.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else f"req_{uuid.uuid4().hex}"


def current_call() -> Call:
    return _current.get()
