"""From a validated request for embeddings to token ids: ``lmx.api.core.prepare`` for models that make vectors, and as
that one pure, blocking, and called in a worker thread or in ``lmx.api.reader``.

Everything that can be refused is refused here, before the engine hears of it; nothing is cut.
"""

from array import array
from collections.abc import Sequence
from typing import Any

from lmx.api.core.embedding_requests import EmbeddingRequest, RerankRequest
from lmx.api.core.prepare import Prepared
from lmx.api.core.schemas import Request
from lmx.api.core.shorten import shorten
from lmx.chat.encoder import TextEncoder
from lmx.errors import InvalidRequest, input_too_long

_PURPOSES = {
    "query": ("query", "search_query"),
    "search_query": ("query", "search_query"),
    "document": ("document", "passage", "search_document"),
    "passage": ("passage", "document", "search_document"),
    "search_document": ("document", "passage", "search_document"),
    "classification": ("classification", "Classification"),
    "clustering": ("clustering", "Clustering"),
}
"""Clients' words for what a text is for (Cohere, Voyage, NVIDIA) → the models' names for the prompt."""


KINDS: dict[str, type[Request]] = {kind.__name__: kind for kind in (EmbeddingRequest, RerankRequest)}


def prepare_embeddings(body: Request, encoder: TextEncoder, context: int) -> Prepared:
    """``context``: tokens of the longest input, 0 while it is not known. Raises InvalidRequest."""
    match body:
        case EmbeddingRequest():
            return Prepared(_embedding_inputs(body, encoder, context))
        case RerankRequest():
            return _rerank_inputs(body, encoder, context)
    raise TypeError(type(body))


def slimmed(body: Request) -> Request:
    """``body`` without what only ``prepare_embeddings`` reads."""
    gone = {"input", "documents", "query"} & type(body).model_fields.keys()
    return body.model_copy(update=dict.fromkeys(gone))


def _embedding_inputs(body: EmbeddingRequest, encoder: TextEncoder, context: int) -> "list[array[int]]":
    prompt = _prompt(body, encoder)
    given: list[Any] = body.input if isinstance(body.input, list) else [body.input]
    if isinstance(given[0], int):
        given = [given]
    if isinstance(given[0], list):
        for index, ids in enumerate(given):
            _check_ids(ids, encoder, "input" if given is not body.input else f"input[{index}]")
        if prompt and (body.prompt_name or body.input_type):
            name = "prompt_name" if body.prompt_name else "input_type"
            raise InvalidRequest(f"{name} goes before texts, and input is token ids; put its ids there.", param=name)
        tokens = given
    else:
        tokens = encoder.encode(given, prompt)
        for index, ids in enumerate(tokens):
            if not ids:
                raise InvalidRequest(f"input[{index}] {shorten(given[index])} has no tokens.", param=f"input[{index}]")
    _check_lengths(tokens, context)
    return [array("I", ids) for ids in tokens]


def _rerank_inputs(body: RerankRequest, encoder: TextEncoder, context: int) -> Prepared:
    documents = [document if isinstance(document, str) else document.text for document in body.documents]
    for index, text in enumerate(documents):
        if not text:
            raise InvalidRequest(f"documents[{index}] must not be empty (got '').", param=f"documents[{index}]")
    pairs = encoder.encode_pairs(body.query, documents)
    _check_lengths([ids for ids, _ in pairs], context)
    return Prepared([array("I", ids) for ids, _ in pairs], documents, seconds=[second for _, second in pairs])


def _prompt(body: EmbeddingRequest, encoder: TextEncoder) -> str:
    sentence = encoder.sentence
    known = ", ".join(sorted(sentence.prompts)) or "none"
    name = body.prompt_name
    if name is not None and name not in sentence.prompts:
        raise InvalidRequest(
            f"prompt_name {shorten(name)}: this model has no such prompt (it has: {known}).", param="prompt_name"
        )
    if body.input_type is not None:
        if body.input_type not in _PURPOSES and body.input_type not in sentence.prompts:
            raise InvalidRequest(
                f"input_type {shorten(body.input_type)} is none of {', '.join(_PURPOSES)}, nor a prompt of this model "
                f"(it has: {known}).",
                param="input_type",
            )
        names = (body.input_type, *_PURPOSES.get(body.input_type, ()))
        name = next((purpose for purpose in names if purpose in sentence.prompts), None)
    elif name is None:
        name = sentence.default_prompt
    prompt = sentence.prompts.get(name, "") if name is not None else ""
    if prompt and not sentence.prompts_count:
        raise InvalidRequest(
            f"The prompt {name!r} of this model must be left out of the pooling, which this server does not do yet; "
            "put it before your texts yourself if that will do.",
            param="prompt_name",
        )
    return prompt


def _check_ids(ids: Sequence[int], encoder: TextEncoder, param: str) -> None:
    largest = max(ids)  # the schema has refused empty lists and negative ones
    if largest >= encoder.vocab_size:
        raise InvalidRequest(
            f"{param}: {largest} is not a token id of this model (0 to {encoder.vocab_size - 1}); ids of another "
            "tokenizer, such as OpenAI's, mean nothing here: send text.",
            param=param,
        )


def _check_lengths(tokens: Sequence[Sequence[int]], context: int) -> None:
    for index, ids in enumerate(tokens):
        if 0 < context < len(ids):
            raise input_too_long(index, len(ids), context)
