"""POST /admin/recycle: fresh engine processes for models that stay as they are.

Thin over ``lmx.serving.engine``. Whoever goes away while it waits takes nothing back.
"""

from typing import Any

import trio
from pydantic import Field
from quart import Blueprint
from quart_schema import document_request

from lmx.api.admin.bodies import AdminRequest, Name, receive
from lmx.api.core.call import current_call
from lmx.api.errors import raise_single
from lmx.errors import LmxError
from lmx.serving.models import AnyServed, Models

WAIT_S = 60.0


class RecycleRequest(AdminRequest):
    model: Name | None = Field(None, description="Left out: every model whose engine runs.")
    wait: float | None = Field(None, ge=0, description="Seconds until it answers in any case; left out: 60.")


def blueprint(models: Models) -> Blueprint:
    """The route over ``models``."""
    routes = Blueprint("admin_recycling", __name__)

    @routes.post("/admin/recycle")
    @document_request(RecycleRequest)
    async def recycle() -> tuple[dict[str, Any], int]:
        """Replace engine processes by fresh ones, at once: requests finish in time or go on in the fresh one, and none
        is lost. Answers when these are ready; 202 with what is waited for, when that takes longer than `wait`."""
        body = await receive(RecycleRequest)
        if body.model is not None:
            chosen = [models.in_memory(body.model)]
        else:
            chosen = [served for served in models.listing() if served.engine.state in ("ready", "recycling")]
            current_call().audit["model"] = ", ".join(served.id for served in chosen)
        done: dict[str, float] = {}
        errors: dict[str, str] = {}

        async def one(served: AnyServed) -> None:
            began = trio.current_time()
            try:
                await served.engine.recycle()
            except LmxError as error:
                if body.model is not None:
                    raise
                errors[served.id] = error.message  # of several the others are none the worse for it
                return
            done[served.id] = trio.current_time() - began

        try:
            with trio.move_on_after(WAIT_S if body.wait is None else body.wait):
                async with trio.open_nursery() as nursery:
                    for served in chosen:
                        nursery.start_soon(one, served)
        except BaseExceptionGroup as group:
            raise_single(group)
        told = [
            {
                "id": served.id,
                "state": served.engine.state,
                "seconds": done.get(served.id),
                "waits_for": "" if served.id in done else served.engine.recycling_waits_for,
                "error": errors.get(served.id),
                "pid": served.engine.pid,
            }
            for served in chosen
        ]
        return {"models": told}, 200 if len(done) + len(errors) == len(chosen) else 202

    return routes
