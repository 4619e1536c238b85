"""GET and POST /admin/log: the log's level; GET /admin/log/lines: its last lines, and those to come."""

import json
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import trio
from pydantic import BaseModel, Field
from quart import Blueprint, Response, request
from quart_schema import document_querystring, document_request

from lmx.api.admin.bodies import AdminRequest, receive
from lmx.api.core.call import current_call
from lmx.api.core.parse import validate
from lmx.api.events import EventStream, EventWriter
from lmx.config.live import Live
from lmx.logs import RECENT_LINES, recent

MOST_AT_ONCE = 100
"""Lines in an event."""


class LogRequest(AdminRequest):
    level: Literal["debug", "info", "warning", "error"]


class LinesQuery(BaseModel):
    n: int = Field(200, ge=0, le=RECENT_LINES, description="How many of the last lines.")
    follow: bool = Field(False, description="Send what comes after them as server-sent events.")


def blueprint(live: Live) -> Blueprint:
    """The routes over this process's log."""
    routes = Blueprint("admin_log", __name__)

    @routes.get("/admin/log")
    async def level() -> dict[str, Any]:
        """How much is logged."""
        return {"level": live.now.server.log_level}

    @routes.post("/admin/log")
    @document_request(LogRequest)
    async def set_level() -> dict[str, Any]:
        """Log more or less, until the server ends. Engines follow when their model is next loaded."""
        body = await receive(LogRequest)
        current_call().audit["level"] = body.level
        await live.change({"server.log_level": body.level})
        return {"level": live.now.server.log_level}

    @routes.get("/admin/log/lines")
    @document_querystring(LinesQuery)
    async def lines() -> Response | dict[str, Any]:
        """The log's last lines. With `follow`, events of `lines`, and of how many were `lost` to a slow reader."""
        given = {name: value for name, value in request.args.items() if name in LinesQuery.model_fields}
        query = validate(LinesQuery, given | ({"follow": True} if given.get("follow") == "" else {}))
        if query.follow:
            return EventStream(partial(_follow, query.n), current_call().id, live.now.server.sse_comment_s)
        return {"lines": recent.last(query.n)[0]}

    return routes


async def _follow(count: int, writer: EventWriter) -> None:
    """Until the client goes. Who reads slowly loses what the log does not keep that long."""
    token, arrived = trio.lowlevel.current_trio_token(), trio.Event()

    def wake() -> None:
        arrived.set()

    def listener() -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(wake, idempotent=True)

    lost, (lines, following) = 0, recent.last(count)
    with recent.listening(listener):
        await writer.start()
        while True:
            for begin in range(0, max(len(lines), bool(lost)), MOST_AT_ONCE):
                event: dict[str, Any] = {"lines": lines[begin : begin + MOST_AT_ONCE]}
                if lost:
                    event["lost"], lost = lost, 0
                await writer.write(b"data: " + json.dumps(event, ensure_ascii=False).encode(errors="replace") + b"\n\n")
            arrived = trio.Event()
            lines, lost, following = recent.since(following)
            if not lines:
                await arrived.wait()
