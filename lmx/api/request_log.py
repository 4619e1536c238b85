"""One line of the log for each request, when it has ended, however it ended. Called by ``lmx.api.events``.

Prompts and answers stay out of it, unless ``[server] log_prompts`` asks for the prompt.
"""

import logging
from typing import Any

import structlog
import trio

from lmx.api.core.call import Call

WATCHED = frozenset(
    {"/", "/health", "/metrics", "/admin/health", "/admin/metrics"}
    | {"/admin/status", "/admin/models", "/admin/requests", "/admin/jobs"}
)
"""What monitors and the page at /ui ask every few seconds: told at level debug while all is well."""
GONE = 499
"""The client left before its answer was whole (nginx's word for it; it is never sent)."""

logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("lmx.requests")


def log_request(method: str, path: str, call: Call) -> None:
    """Costs 30 µs where it is written."""
    status = call.status or GONE
    watched = path in WATCHED and status < 400
    fields: dict[str, Any] = {
        "status": status,
        "request_id": call.id,
        "client": call.asker or call.client(None),
        "duration_ms": _ms(trio.current_time() - call.started),
    }
    if call.model:
        fields |= {"model": call.model, "route": call.route, "finish": call.finish or "none"}
        fields |= {"prompt_tokens": call.prompt_tokens, "cached_tokens": call.cached_tokens}
        fields["completion_tokens"] = call.completion_tokens
        fields |= call.broke or {}
    if call.first_token_at is not None:
        fields["ttft_ms"] = _ms(call.first_token_at - call.started)
    if call.first_token_at is not None and call.completion_tokens > call.choices:
        fields["itl_ms"] = _ms((call.last_token_at - call.first_token_at) / (call.completion_tokens / call.choices - 1))
    if call.prompt is not None:
        fields["prompt"] = call.prompt  # called where the log is written: a long one takes many milliseconds
    logger.log(logging.DEBUG if watched else logging.INFO, f"{method} {path[:200]}", **fields)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
