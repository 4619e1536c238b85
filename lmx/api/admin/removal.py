"""DELETE /admin/models/{name} and POST /admin/cleanup: models that go from the disk. Thin over
``lmx.serving.removal``."""

from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, Field
from quart import Blueprint
from quart_schema import document_querystring, document_request

from lmx.api.admin.bodies import AdminRequest, receive
from lmx.api.admin.description import Descriptions
from lmx.api.admin.queries import switch
from lmx.api.core.call import current_call
from lmx.config.live import Live
from lmx.errors import InvalidRequest
from lmx.serving.removal import Removals


class DeleteQuery(BaseModel):
    force: bool = Field(False, description="Also what is loaded, and what is not lmx's own.")
    dry_run: bool = Field(False, description="Only tell what would go.")


class CleanupRequest(AdminRequest):
    days: int | None = Field(
        None, ge=1, le=36_500, description="Models unused for so long; left out: [hub] cleanup_days."
    )
    dry_run: bool = Field(True, description="false: really remove them.")


def blueprint(descriptions: Descriptions, removals: Removals, live: Live) -> Blueprint:
    """The routes over ``removals``."""
    routes = Blueprint("admin_removal", __name__)

    @routes.delete("/admin/models/<path:name>")
    @document_querystring(DeleteQuery)
    async def delete(name: str) -> dict[str, Any]:
        """Remove a model from the disk, whole or broken."""
        force, dry_run = switch("force"), switch("dry_run")
        entry = descriptions.on_disk(name)
        current_call().audit |= {"model": entry.id, "force": force, "dry_run": dry_run}
        removed = await (removals.plan(entry) if dry_run else removals.remove(entry, force=force))
        return {"id": removed.id, "freed_bytes": removed.freed_bytes, "paths": [str(path) for path in removed.paths]}

    @routes.post("/admin/cleanup")
    @document_request(CleanupRequest)
    async def cleanup() -> dict[str, Any]:
        """Models that nobody has used for so many days, and, unless it is a dry run, remove them. Never what is loaded,
        pinned or named in lmx.toml, and only from lmx's own folder and the Hugging Face cache."""
        body = await receive(CleanupRequest)
        days = body.days or live.now.hub.cleanup_days
        if not days:
            raise InvalidRequest("days is required, since [hub] cleanup_days is 0.", param="days")
        found = await removals.clean_up(days, dry_run=body.dry_run)
        return {
            "models": [asdict(model) for model in found],
            "freed_bytes": sum(model.size_bytes for model in found),
            "dry_run": body.dry_run,
        }

    return routes
