"""GET /admin/requests: what is being served now; POST /admin/requests/{id}/cancel ends one of them."""

from typing import Any

import trio
from quart import Blueprint

from lmx.api.core.call import current_call
from lmx.api.core.calls import Calls, RequestCancelled, described


def blueprint(calls: Calls) -> Blueprint:
    """The routes over ``calls``."""
    routes = Blueprint("admin_requests", __name__)

    @routes.get("/admin/requests")
    async def requests() -> dict[str, Any]:
        """The requests that a model works for, or that wait for one, oldest first."""
        now = trio.current_time()
        return {"requests": [described(call, now) for call in calls.answering()]}

    @routes.post("/admin/requests/<path:request_id>/cancel")
    async def cancel(request_id: str) -> dict[str, Any]:
        """End a request, by its x-request-id: its client gets an error, and what it held is free when this answers. Of
        several with the same id all are ended."""
        audit = current_call().audit
        audit["request"] = request_id
        ended = await calls.cancel(request_id, RequestCancelled("The request was cancelled by the server's operator."))
        audit["model"] = ", ".join(sorted({call.model for call in ended} - {""}))
        return {"id": request_id, "cancelled": True, "count": len(ended)}

    return routes
