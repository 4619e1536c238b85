"""GET /v1/models and /v1/models/{id} (ids may hold slashes); vLLM's and llama-server's /tokenize, /detokenize."""

from typing import Any

from quart import Blueprint, Response
from quart_schema import document_request

from lmx.api.body import receive
from lmx.api.core.formats import formats
from lmx.api.core.schemas import DetokenizeRequest, TokenizeRequest
from lmx.config.live import Live
from lmx.hub.library import Entry
from lmx.serving.models import AnyServed, Models


def blueprint(models: Models, live: Live) -> Blueprint:
    """The routes that tell of ``models`` and their tokens."""
    routes = Blueprint("models", __name__)

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models that can be asked for."""
        listed = [*map(_model_object, models.listing()), *map(_entry_object, models.available())]
        return {"object": "list", "data": listed}

    @routes.get("/v1/models/<path:model_id>")
    async def get_model(model_id: str) -> dict[str, Any]:
        """One model, by id or alias."""
        found = models.look_up(model_id)
        return _entry_object(found) if isinstance(found, Entry) else _model_object(found)

    @routes.post("/tokenize")
    @document_request(TokenizeRequest)
    async def tokenize() -> Response:
        """The token ids of a text, in which special tokens are taken as such, or of a conversation."""
        _, _, prepared = await receive(TokenizeRequest, models, live)
        return Response(prepared.answer, content_type="application/json")

    @routes.post("/detokenize")
    @document_request(DetokenizeRequest)
    async def detokenize() -> Response:
        """The text of token ids."""
        _, _, prepared = await receive(DetokenizeRequest, models, live)
        return Response(prepared.answer, content_type="application/json")

    return routes


def _model_object(served: AnyServed) -> dict[str, Any]:
    return {
        "id": served.id,
        "object": "model",
        "created": served.created,
        "owned_by": "lmx",
        "type": served.kind,
        "state": served.engine.state,
        "max_model_len": served.context_length,
        "backend": served.folder.backend,
        "backend_reason": served.folder.backend_reason,
        **formats(served),
    }


def _entry_object(entry: Entry) -> dict[str, Any]:
    """Of a model on the disk, which a request would load."""
    return {
        "id": entry.id,
        "object": "model",
        "created": int(entry.modified),
        "owned_by": "lmx",
        "type": entry.kind,
        "state": "not loaded",
        "max_model_len": entry.context_length,
    }
