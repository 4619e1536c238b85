"""The models on this machine: what there is, loading and unloading by hand.

Thin over ``lmx.serving.models`` (what is in memory) and ``lmx.hub.library`` (what is on the disk). A client that goes
away while it waits for a load gives its wait up, and with it the load, if nobody else waits for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field
from quart import Blueprint, Response
from quart_schema import document_request

from lmx.api.admin.bodies import AdminRequest, Name, receive
from lmx.api.admin.description import Descriptions
from lmx.api.admin.progress import Tell, streamed, unheard
from lmx.api.core.call import current_call
from lmx.config import Speculation
from lmx.config.live import Live
from lmx.errors import InvalidRequest, ModelNotFound
from lmx.hub.download.names import read_name
from lmx.serving.models import Models
from lmx.serving.models.options import LoadOptions


class LoadRequest(AdminRequest):
    model: Name
    context_length: int | None = Field(
        None, ge=0, le=2**31 - 1, description="Longest prompt plus answer; 0: what fits, at most the model's own."
    )
    kv_bits: Literal[4, 8, 16] | None = Field(None, description="Of a number of its keys and values.")
    max_batch: int | None = Field(None, ge=1, le=512, description="Requests that are computed together.")
    kv_budget_bytes: int | None = Field(None, ge=0, le=2**63 - 1, description="0: what there is room for.")
    draft_model: Annotated[str, Field(max_length=1000)] | None = Field(
        None, description='A smaller model of the same family that says what this one might write next; "": none.'
    )
    speculation: Speculation | None = Field(
        None, description="Whose drafts are verified: of any source there is, of the request's own text only, nobody's."
    )
    ttl: float | None = Field(None, ge=0, description="Seconds without a request after which it is unloaded; 0: never.")
    pin: bool | None = Field(None, description="Never unload it for another one.")
    wait: bool | None = Field(None, description="false: answer at once, with 202.")
    stream: bool | None = Field(None, description="Server-sent events: each state, then the model.")

    @property
    def options(self) -> LoadOptions:
        return LoadOptions(
            context_length=self.context_length,
            max_rows=self.max_batch,
            kv_bits=self.kv_bits,
            kv_budget_bytes=self.kv_budget_bytes,
            draft_model=self.draft_model,
            speculation=self.speculation,
            ttl_s=self.ttl,
            pin=self.pin,
        )


class UnloadRequest(AdminRequest):
    model: Name
    drain: float | None = Field(
        None, ge=0, description="Seconds for running requests; left out: [memory] drain_s. Then they are ended."
    )


def blueprint(models: Models, descriptions: Descriptions, live: Live) -> Blueprint:
    """The routes over ``models``."""
    routes = Blueprint("admin_models", __name__)

    @routes.get("/admin/models")
    async def list_models() -> dict[str, Any]:
        """Every model: on the disk, loaded, on its way in or out; broken ones with the reason."""
        return {"models": await descriptions.all()}

    @routes.get("/admin/models/<path:name>")
    async def show(name: str) -> dict[str, Any]:
        """One model, by id, alias or path, with what /admin/bench measured of it."""
        return await descriptions.of(name)

    @routes.post("/admin/load")
    @document_request(LoadRequest)
    async def load() -> Response | dict[str, Any] | tuple[dict[str, Any], int]:
        """Load a model; answers when it takes requests. One that is loaded takes over what is asked for, and is loaded
        anew if it must. Refused with the numbers when it does not fit."""
        body = await receive(LoadRequest)
        call = current_call()
        call.model, call.face = body.model, routes.name  # /admin/requests shows it, and may end it
        if body.wait is False:
            with _way_to_download(body.model):
                slot = await models.begin_load(body.model, body.options)
            return await descriptions.of(slot.id), 202

        async def work(tell: Tell) -> dict[str, Any]:
            with _way_to_download(body.model):
                status = await models.load(
                    body.model, body.options, lambda state, message: tell({"state": state, "message": message})
                )
            return await descriptions.of(status.id)

        return streamed(work, live.now.server.sse_comment_s) if body.stream else await work(unheard)

    @routes.post("/admin/unload")
    @document_request(UnloadRequest)
    async def unload() -> dict[str, Any]:
        """Unload a model: nobody gets it any more, its requests may finish in time; answers when its process is
        gone."""
        body = await receive(UnloadRequest)
        unloaded = await models.unload(body.model, body.drain)
        return {"id": unloaded.id, "freed_bytes": unloaded.freed_bytes, "seconds": unloaded.seconds}

    return routes


@contextmanager
def _way_to_download(name: str) -> Iterator[None]:
    """Of what is not here but may be on the Hub, say how to get it."""
    try:
        yield
    except ModelNotFound as error:
        try:
            wanted = read_name(name)
        except InvalidRequest:
            raise error from None
        if not (wanted.publisher or wanted.quantization):
            raise
        raise ModelNotFound(
            f"{error.message} If it is on the Hub, download it first: `lmx pull {name}`, or POST /admin/download.",
            param="model",
        ) from None
