"""GET /v1/models and /v1/models/{id} (ids may hold slashes), and vLLM's POST /tokenize and /detokenize."""

from typing import Any

import trio
from quart import Blueprint
from quart_schema import document_request

from lmx.api.body import read_body
from lmx.api.schemas import DetokenizeRequest, TokenizeRequest
from lmx.config import Settings
from lmx.errors import InvalidRequest
from lmx.serving.models import Models, Served


def blueprint(models: Models, settings: Settings) -> Blueprint:
    """The routes that tell of ``models`` and their tokens."""
    routes = Blueprint("models", __name__)

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models that can be asked for."""
        return {"object": "list", "data": [_model_object(served) for served in models.listing()]}

    @routes.get("/v1/models/<path:model_id>")
    async def get_model(model_id: str) -> dict[str, Any]:
        """One model, by id or alias."""
        return _model_object(models.resolve(model_id))

    @routes.post("/tokenize")
    @document_request(TokenizeRequest)
    async def tokenize() -> dict[str, Any]:
        """The token ids of a text; special tokens in it are taken as such, as in POST /v1/completions."""
        body = await read_body(TokenizeRequest)
        served = models.resolve(body.model or settings.model.default)
        tokens = await trio.to_thread.run_sync(lambda: _tokenize(served, body), abandon_on_cancel=True)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": _context_length(served)}

    @routes.post("/detokenize")
    @document_request(DetokenizeRequest)
    async def detokenize() -> dict[str, Any]:
        """The text of token ids."""
        body = await read_body(DetokenizeRequest)
        chat = models.resolve(body.model or settings.model.default).chat
        for token in body.tokens:
            if token >= chat.vocab_size:
                message = f"tokens: {token} is not a token id of this model (0 to {chat.vocab_size - 1})."
                raise InvalidRequest(message, param="tokens")
        return {"prompt": await trio.to_thread.run_sync(chat.decode, body.tokens, abandon_on_cancel=True)}

    return routes


def _tokenize(served: Served, body: TokenizeRequest) -> list[int]:
    return served.chat.tokenize(body.prompt, add_special=body.add_special_tokens, parse_special=True)


def _model_object(served: Served) -> dict[str, Any]:
    return {
        "id": served.id,
        "object": "model",
        "created": served.created,
        "owned_by": "lmx",
        "max_model_len": _context_length(served),
        "backend": served.folder.backend,
        "backend_reason": served.folder.backend_reason,
    }


def _context_length(served: Served) -> int:
    ready = served.engine.ready
    return ready.context_length if ready else served.folder.context_length
