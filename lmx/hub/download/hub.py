"""Asking the Hub: huggingface_hub's client with one rule for trying again, and its errors in words with the way out.

The client's own retries wait as long as any ``Retry-After`` says, know no 5xx where it matters (the transfer itself)
and tell nobody. So a response hook takes what is worth another try out of their hands, and ``Patience`` tries again,
within limits and saying so. Only the fetching child imports this. Everything blocks.
"""

import email.utils
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from lmx.errors import Forbidden, InvalidRequest, LmxError, ModelNotFound
from lmx.hub.download.names import endpoint

T = TypeVar("T")

TIMEOUT_S = 30.0
"""Of connecting, and of a silence in a transfer; HF_HUB_DOWNLOAD_TIMEOUT wins."""
LONGEST_WAIT_S = 30.0
LONGEST_RETRY_AFTER_S = 900.0
"""A Hub that asks for more time is not waited for: the job says when to try again."""
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


class HubUnreachable(LmxError):
    """No network, a proxy that refuses, a Hub that is down."""

    status = 502
    code = "hub_unreachable"


class HubBusy(LmxError):
    """The Hub limits us (429) or fails (5xx), for longer than is waited."""

    status = 503
    code = "hub_busy"


class Answered(Exception):
    """A status that is worth another try. ``after_s``: what ``Retry-After`` says; None: nothing."""

    def __init__(self, status: int, after_s: float | None) -> None:
        super().__init__(status)
        self.status = status
        self.after_s = after_s


def open_hub() -> HfApi:
    """Once, before anything is asked. Variables (HF_TOKEN, HF_ENDPOINT, HTTPS_PROXY, ...) are the client's business.
    Raises HubUnreachable where HF_HUB_OFFLINE is set."""
    if constants.is_offline_mode():
        raise HubUnreachable("HF_HUB_OFFLINE forbids to ask the Hub. Unset it in the server's environment.")
    timeout_s = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or TIMEOUT_S)
    set_client_factory(
        lambda: httpx2.Client(follow_redirects=True, timeout=timeout_s, event_hooks={"response": [_check]})
    )
    return HfApi(library_name="lmx")


def _check(response: httpx2.Response) -> None:
    if response.status_code in _AGAIN:
        raise Answered(response.status_code, _retry_after(response))


def _retry_after(response: httpx2.Response) -> float | None:
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    said = response.headers.get("Retry-After", "").strip()
    if said.isdigit():
        return float(said)
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


class Patience:
    """How often something is tried again. One for a whole download: what any file gets counts for all of them."""

    def __init__(self, first_wait_s: float, give_up_s: float, tell: Callable[[str], None]) -> None:
        self._first_wait_s = first_wait_s
        self._give_up_s = give_up_s
        self._tell = tell
        self._last_success = time.monotonic()

    def succeeded(self) -> None:
        """Bytes have come."""
        self._last_success = time.monotonic()

    def run(self, ask: Callable[[], T]) -> T:
        """``ask`` until it does not fail in a way that time heals. Raises LmxError, or what else ``ask`` raises."""
        started = time.monotonic()
        wait_s = self._first_wait_s
        while True:
            attempt = time.monotonic()
            asked_for_s: float | None = None
            try:
                return ask()
            except Answered as answer:
                problem, status, asked_for_s = f"the Hub answered {answer.status}", answer.status, answer.after_s
            except httpx2.TransportError as error:
                problem, status = f"no connection to {endpoint()} ({_words(error)})", None
            if self._last_success > attempt:
                wait_s = self._first_wait_s
            pause_s = max(wait_s, asked_for_s or 0.0)
            silent_s = time.monotonic() - max(self._last_success, started)
            if (asked_for_s or 0.0) > LONGEST_RETRY_AFTER_S or silent_s + wait_s > self._give_up_s:
                raise _given_up(problem, status, asked_for_s)
            self._tell(f"{problem}; trying again in {pause_s:.0f} s")
            time.sleep(pause_s)
            wait_s = min(wait_s * 2, LONGEST_WAIT_S)


def _given_up(problem: str, status: int | None, asked_for_s: float | None) -> LmxError:
    kept = "What has come is kept: ask for the model again, and the download goes on from there."
    if status is None:
        return HubUnreachable(
            f"{problem}. Check the network, and HTTPS_PROXY and HF_ENDPOINT in the server's environment. {kept}"
        )
    if status == 429:
        return HubBusy(
            f"The Hub limits requests from here (429). Wait {asked_for_s or 60:.0f} s, or set HF_TOKEN: limits are "
            f"higher with an account. {kept}",
            retry_after_s=asked_for_s,
        )
    return HubBusy(f"{problem} until lmx gave up; it may be down. {kept}", retry_after_s=asked_for_s)


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def explain(error: Exception, repo: str, revision: str = "") -> LmxError:
    """A library's error as one of lmx's, with the way out."""
    if isinstance(error, LmxError):
        return error
    if isinstance(error, GatedRepoError):
        return Forbidden(
            f"{repo} is gated: accept its licence at {endpoint()}/{repo}, and set HF_TOKEN in the server's environment "
            "to a token of that account (with read access to gated repositories).",
            param="model",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(
            f"{repo} has no revision {revision[:100]!r}. Name a branch, a tag or a commit of {endpoint()}/{repo}.",
            param="revision",
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(
            f"The Hub has no model {repo}, or it is private: then set HF_TOKEN in the server's environment.",
            param="model",
        )
    if isinstance(error, EntryNotFoundError):
        return ModelNotFound(f"A file of {repo} is gone from the Hub: {_words(error)}", param="model")
    if isinstance(error, HFValidationError):
        return InvalidRequest(f"The Hub cannot have a model of this name: {_words(error)}", param="model")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return Forbidden(
                f"The Hub refuses {repo} ({status}): HF_TOKEN in the server's environment is missing, wrong, or lacks "
                f"the rights. See {endpoint()}/settings/tokens, and accept the licence at {endpoint()}/{repo} if it "
                "asks for that.",
                param="model",
            )
        return HubUnreachable(f"The Hub answered {status} for {repo}: {_words(error)}")
    if isinstance(error, httpx2.TooManyRedirects):
        return HubUnreachable(f"{endpoint()} redirects without end. Check HF_ENDPOINT and HTTPS_PROXY.")
    return HubUnreachable(f"The Hub's answer for {repo} makes no sense: {type(error).__name__}: {_words(error)}")
