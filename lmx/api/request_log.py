"""One line of the log for each request, when it has ended, however it ended, and a second one, for the audit, where it
was to change something. Called by ``lmx.api.events``.

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

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("lmx.requests")
audit: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("lmx.audit")
logging.getLogger("lmx.audit").setLevel(logging.INFO)  # whatever [server] log_level leaves out


def log_request(method: str, path: str, call: Call) -> None:
    """Costs 30 µs where it is written. What an admin request changed, or wanted to, gets a line of its own."""
    status = call.status or GONE
    if call.audit or (path.startswith("/admin/") and method not in SAFE_METHODS):
        _log_change(method, path, call, status)
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
        if drafted := call.drafts:
            fields |= {"draft_tokens": drafted[0], "accepted_draft_tokens": drafted[1]}
    if call.first_token_at is not None:
        fields["ttft_ms"] = _ms(call.first_token_at - call.started)
    if call.first_token_at is not None and call.completion_tokens > call.choices:
        fields["itl_ms"] = _ms((call.last_token_at - call.first_token_at) / (call.completion_tokens / call.choices - 1))
    if call.prompt is not None:
        fields["prompt"] = call.prompt  # called where the log is written: a long one takes many milliseconds
    logger.log(logging.DEBUG if watched else logging.INFO, f"{method} {path[:200]}", **fields)


def _log_change(method: str, path: str, call: Call, status: int) -> None:
    outcome = "client left" if status == GONE else "done" if status < 400 else "refused" if status < 500 else "failed"
    audit.info(
        f"{method} {path[:200]}",
        who=call.key_name or call.address,
        address=call.address,
        request_id=call.id,
        **call.audit,
        outcome=outcome,
        status=status,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
