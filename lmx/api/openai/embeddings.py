"""POST /v1/embeddings (OpenAI's) and POST /v1/rerank (Jina's and Cohere's) over one lease of the embedding engine.

Answers of megabytes are made in a thread, row by row: the event loop is never held.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import trio
from pydantic_core import to_json
from quart import Blueprint, Response
from quart_schema import document_request

from lmx.api.body import receive_embedding
from lmx.api.core.call import current_call
from lmx.api.core.embedding_requests import EmbeddingFields, EmbeddingRequest, RerankRequest
from lmx.api.core.prepare import Prepared
from lmx.config.live import Live
from lmx.errors import DeadlineExceeded, InvalidRequest
from lmx.protocol import Embedded
from lmx.serving.engine import EmbedRequest
from lmx.serving.models import Models, ServedEmbedding

CLIENT_CHARACTERS = 256
"""Of ``user`` that tell clients apart."""

Vectors = npt.NDArray[np.float32]


def blueprint(models: Models, live: Live) -> Blueprint:
    """The routes over ``models``."""
    routes = Blueprint("embeddings", __name__)

    @routes.post("/v1/embeddings")
    @document_request(EmbeddingRequest)
    async def embeddings() -> Response:
        """A vector of each text."""
        body, served, prepared = await receive_embedding(EmbeddingRequest, models, live)
        if served.ranks:
            raise InvalidRequest(
                f"The model {served.id!r} is a cross-encoder: it makes no vectors; ask it at /v1/rerank.", param="model"
            )
        _check_dimensions(body.dimensions, served)
        pieces = await _run(body, served, prepared)
        answer = {"object": "list", "model": body.model or served.id, "usage": _usage(prepared)}
        data = await trio.to_thread.run_sync(_render, body, prepared, pieces, answer, abandon_on_cancel=True)
        return Response(data, content_type="application/json")

    @routes.post("/v1/rerank")
    @document_request(RerankRequest)
    async def rerank() -> Response:
        """How well each document answers the query, best first; for cross-encoders."""
        body, served, prepared = await receive_embedding(RerankRequest, models, live)
        if not served.ranks:
            raise InvalidRequest(
                f"The model {served.id!r} is no cross-encoder, so it cannot rank documents; compare its embeddings "
                "(/v1/embeddings) instead.",
                param="model",
            )
        scores = _assemble(await _run(body, served, prepared), len(prepared.prompts))[:, 0]
        order = np.argsort(-scores, kind="stable")[: body.top_n or len(scores)]
        results: list[dict[str, Any]] = [
            {"index": int(index), "relevance_score": float(scores[index])} for index in order
        ]
        if body.return_documents:
            for result in results:
                result["document"] = {"text": prepared.texts[result["index"]]}
        answer = {"object": "list", "model": body.model or served.id, "results": results, "usage": _usage(prepared)}
        return Response(to_json(answer), content_type="application/json")

    async def _run(body: EmbeddingFields, served: ServedEmbedding, prepared: Prepared) -> list[Embedded]:
        call = current_call()
        call.model, call.route = served.id, body.model or "embedding"
        call.choices, call.prompt_tokens = len(prepared.prompts), sum(map(len, prepared.prompts))
        deadline = call.deadline(body.timeout, live.now.server)
        remaining_s = deadline - trio.current_time()
        request = EmbedRequest(
            prepared.prompts,
            prepared.seconds,
            client=call.client((body.user or "")[:CLIENT_CHARACTERS]),
            priority=body.priority or 0,
            deadline_s=None if remaining_s == float("inf") else max(remaining_s, 0.0),
            request_id=call.id,
        )
        with trio.CancelScope(deadline=deadline) as limit:
            async with served.engine.embed(request) as vectors:
                call.streams.append(vectors)
                pieces = await vectors.receive()
        if limit.cancelled_caught:
            raise DeadlineExceeded(
                "The request's time (field `timeout`, header x-request-timeout or the server's limit) is up."
            )
        call.finish = "stop"
        return pieces

    return routes


def _check_dimensions(asked: int | None, served: ServedEmbedding) -> None:
    sentence, whole = served.encoder.sentence, served.dimension
    if asked is None or asked == whole:
        return
    if sentence.any_dimension and asked <= whole:
        return
    if asked in sentence.dimensions:
        return
    can = sorted({*sentence.dimensions, whole} - {0})
    allowed = f"from 1 to {whole}" if sentence.any_dimension else f"of {', '.join(map(str, can)) or 'their own size'}"
    raise InvalidRequest(
        f"dimensions {asked}: the vectors of {served.id!r} can be {allowed}; others would lose their meaning.",
        param="dimensions",
    )


def _usage(prepared: Prepared) -> dict[str, int]:
    tokens = sum(map(len, prepared.prompts))
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _assemble(pieces: Sequence[Embedded], count: int) -> Vectors:
    """The vectors of all inputs, in their order."""
    order = np.concatenate([np.frombuffer(piece.inputs, "<u4") for piece in pieces])
    found = np.frombuffer(b"".join(piece.vectors for piece in pieces), "<f4").reshape(count, -1)
    vectors = np.empty(found.shape, np.float32)
    vectors[order] = found
    return vectors


def _render(body: EmbeddingRequest, prepared: Prepared, pieces: Sequence[Embedded], answer: dict[str, Any]) -> bytes:
    """The whole answer as JSON. Blocking."""
    vectors = _assemble(pieces, len(prepared.prompts))
    if body.dimensions is not None and body.dimensions < vectors.shape[1]:
        vectors = vectors[:, : body.dimensions]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    rows = []
    for index, vector in enumerate(vectors):
        if body.encoding_format == "base64":
            shown = b'"' + base64.b64encode(vector.astype("<f4").tobytes()) + b'"'
        else:
            shown = to_json(vector.tolist())
        rows.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (index, shown))
    return to_json(answer)[:-1] + b',"data":[' + b",".join(rows) + b"]}"
