"""/admin/cache: what is kept of prefixes on the disk, and deleting it.

Read from the folder by a thread, not asked of engines, which may be busy: what they hold in memory is in /admin/status.
"""

from typing import Any

import trio
from quart import Blueprint, request

from lmx.api.core.parse import parse_object
from lmx.config.live import Live
from lmx.errors import InvalidRequest
from lmx.prefix_disk import report


def blueprint(live: Live) -> Blueprint:
    """The routes over the folder of the settings."""
    routes = Blueprint("prefix_cache", __name__)

    @routes.get("/admin/cache")
    async def stats() -> dict[str, Any]:
        """What is kept on the disk of prompts and answers, model by model."""
        return await trio.to_thread.run_sync(
            report.document, live.now.prefix_path, live.now.engine.prefix_disk_bytes, abandon_on_cancel=True
        )

    @routes.post("/admin/cache/clear")
    async def clear() -> dict[str, Any]:
        """Delete what is kept on the disk: of `model` (an id or fingerprint) alone, or of all models."""
        raw: bytes = await request.data
        model = parse_object(raw).get("model") if raw else None
        if model is not None and not isinstance(model, str):
            raise InvalidRequest("`model` must be a string: a model's id or fingerprint.", param="model")
        names = [] if model is None else [model]
        # Not abandoned: half of it would be no answer to "is it gone?".
        return await trio.to_thread.run_sync(report.clear, live.now.prefix_path, names)

    return routes
