"""POST /v1/completions: OpenAI's plain completions over ``lmx.api.generation``, for text, texts and token ids."""

from functools import partial
from typing import Any

import trio
from quart import Blueprint, Response
from quart_schema import document_request

from lmx.api.answer import Collected, heading, json_response
from lmx.api.body import read_body, shorten
from lmx.api.call import current_call
from lmx.api.chunks import ChunkStream
from lmx.api.events import EventStream, EventWriter
from lmx.api.generation import Job, make_job, run, usage
from lmx.api.logprobs import CompletionLogprobs
from lmx.api.schemas import CompletionRequest
from lmx.chat.model import ChatModel
from lmx.config import Settings
from lmx.errors import InvalidRequest
from lmx.serving.models import Models

DEFAULT_MAX_TOKENS = 16
"""OpenAI's and vLLM's."""


def blueprint(models: Models, settings: Settings) -> Blueprint:
    """The completion routes over ``models``."""
    routes = Blueprint("completions", __name__)

    @routes.post("/v1/completions")
    @document_request(CompletionRequest)
    async def completions() -> Response:
        """Continue a text, in one piece or as server-sent events (`stream`)."""
        body = await read_body(CompletionRequest)
        _refuse_unsupported(body)
        served = models.resolve(body.model or settings.model.default)
        texts, prompts = await trio.to_thread.run_sync(_prompts, body, served.chat, abandon_on_cancel=True)
        job = make_job(
            served,
            body,
            prompts,
            max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            logprobs=-1 if body.logprobs is None else body.logprobs,
            prompt_param="prompt",
            call=current_call(),
            settings=settings.server,
        )
        echoes = [text if body.echo else "" for text in texts for _ in range(job.n)]
        model = body.model or served.id
        if body.stream:
            produce = partial(_stream, job, body, model, echoes)
            return EventStream(produce, job.call.id, settings.server.sse_comment_s)
        return json_response(await _answer(job, body, model, echoes))

    return routes


def _refuse_unsupported(body: CompletionRequest) -> None:
    if body.suffix:
        raise InvalidRequest(
            "suffix: no model here can fill in the middle; put everything into prompt.", param="suffix"
        )
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest(f"best_of must equal n (got {body.best_of} and {body.n or 1}).", param="best_of")
    if body.echo and body.logprobs is not None:
        raise InvalidRequest(
            "echo with logprobs: this server gives log-probabilities of new tokens only.", param="echo"
        )


def _prompts(body: CompletionRequest, chat: ChatModel) -> tuple[list[str], list[list[int]]]:
    """Each prompt as text (for ``echo``) and as token ids. Blocking. Raises InvalidRequest."""
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    if not given:
        raise InvalidRequest("prompt must not be an empty list.", param="prompt")
    texts, prompts = [], []
    for prompt in given:
        tokens = chat.encode_text(prompt) if isinstance(prompt, str) else prompt
        if not tokens:
            raise InvalidRequest(f"prompt {shorten(prompt)} has no tokens; give at least one.", param="prompt")
        for token in tokens:
            if not 0 <= token < chat.vocab_size:
                message = f"prompt: {token} is not a token id of this model (0 to {chat.vocab_size - 1})."
                raise InvalidRequest(message, param="prompt")
        prompts.append(tokens)
        texts.append(prompt if isinstance(prompt, str) else chat.decode(prompt) if body.echo else "")
    return texts, prompts


async def _answer(job: Job, body: CompletionRequest, model: str, echoes: list[str]) -> dict[str, Any]:
    collected = Collected(job)
    choices = await run(job, collected)
    objects = []
    for choice in choices:
        given = collected.logprobs(choice)
        logprobs = None if body.logprobs is None else CompletionLogprobs(job.served.chat).format(given)
        objects.append(
            _choice_object(choice.index, echoes[choice.index] + collected.text(choice), logprobs, choice.finish)
        )
    return heading("cmpl", "text_completion", model, job) | {"choices": objects, "usage": usage(job, choices)}


async def _stream(job: Job, body: CompletionRequest, model: str, echoes: list[str], writer: EventWriter) -> None:
    logprobs = [CompletionLogprobs(job.served.chat) for _ in job.requests]
    chunks = ChunkStream(
        job,
        writer,
        heading("cmpl", "text_completion", model, job),
        _choice_object,
        first={index: _choice_object(index, text, None, None) for index, text in enumerate(echoes) if text},
        with_usage=body.stream_options is not None and body.stream_options.include_usage,
        format_logprobs=lambda index, new: logprobs[index].format(new),
    )
    await chunks.end(await run(job, chunks))


def _choice_object(index: int, text: str | None, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text or "", "logprobs": logprobs, "finish_reason": finish}
