"""POST /v1/completions: OpenAI's plain completions over ``lmx.api.core.generation``, for text, texts and token ids."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from quart import Blueprint, Response
from quart_schema import document_request

from lmx.api.body import receive
from lmx.api.core.call import current_call
from lmx.api.core.generation import Job, best, make_job, run, usage
from lmx.api.core.schemas import CompletionRequest
from lmx.api.events import EventStream, EventWriter
from lmx.api.openai.answer import Collected, heading
from lmx.api.openai.chunks import ChunkStream
from lmx.api.openai.logprobs import CompletionLogprobs
from lmx.chat.events import Event
from lmx.config.live import Live
from lmx.serving.models import Models

DEFAULT_MAX_TOKENS = 16
"""OpenAI's and vLLM's."""


def blueprint(models: Models, live: Live) -> Blueprint:
    """The completion routes over ``models``."""
    routes = Blueprint("completions", __name__)

    @routes.post("/v1/completions")
    @document_request(CompletionRequest)
    async def completions() -> Response:
        """Continue a text, in one piece or as server-sent events (`stream`)."""
        body, served, prepared = await receive(CompletionRequest, models, live)
        job = make_job(
            served,
            body,
            prepared.prompts,
            max_tokens=DEFAULT_MAX_TOKENS if body.most_tokens is None else body.most_tokens,
            logprobs=-1 if body.logprobs is None else body.logprobs,
            prompt_param="prompt",
            call=current_call(),
            settings=live.now,
            plan=prepared.plan,
            stop_ids=prepared.stop_ids,
            continues=prepared.continues,
            echoes_logprobs=bool(prepared.offsets),
            shows_end=True,
        )
        echoes = [text if body.echo else "" for text in prepared.texts for _ in range(job.n)]
        model = body.model or served.id
        if body.stream:
            produce = partial(_stream, job, body, model, echoes, prepared.offsets)
            return EventStream(produce, job.call.id, live.now.server.sse_comment_s)
        return await _answer(job, body, model, echoes, prepared.offsets)

    return routes


async def _answer(
    job: Job, body: CompletionRequest, model: str, echoes: list[str], offsets: Sequence[Sequence[int]]
) -> Response:
    logprobs = _logprobs(job, echoes, offsets)
    collected = Collected(job, lambda index, new: logprobs[index].format(new))
    choices = await run(job, collected)
    made = best(job, choices)
    objects = [
        _choice_object(index, echoes[choice.index] + collected.text(choice), None, choice.finish)
        | collected.ids(choice)
        | _prompt_ids(job, choice.index)
        | (await collected.prompt_logprobs(choice) if body.prompt_logprobs is not None else {})
        for index, choice in enumerate(made)
    ]
    answer = heading("cmpl", "text_completion", model, job) | {"choices": [], "usage": usage(job, choices)}
    return collected.response(answer, made, objects, with_logprobs=body.logprobs is not None)


async def _stream(
    job: Job,
    body: CompletionRequest,
    model: str,
    echoes: list[str],
    offsets: Sequence[Sequence[int]],
    writer: EventWriter,
) -> None:
    logprobs = _logprobs(job, echoes, offsets)
    chunks = ChunkStream(
        job,
        writer,
        heading("cmpl", "text_completion", model, job),
        _choice_object,
        first={
            index: _choice_object(index, text, None, None) | _prompt_ids(job, index)
            for index, text in enumerate(echoes)
            if text or job.returns_ids
        },
        options=body.stream_options,
        format_logprobs=lambda index, new: logprobs[index].format(new),
    )
    await chunks.end(await run(job, chunks))


def _logprobs(job: Job, echoes: list[str], offsets: Sequence[Sequence[int]]) -> list[CompletionLogprobs]:
    """Of each choice."""
    return [
        CompletionLogprobs(job.served.chat, offsets[index // job.n] if offsets else (), len(echoes[index]))
        for index in range(len(job.requests))
    ]


def _prompt_ids(job: Job, index: int) -> dict[str, list[int]]:
    """vLLM's field of a choice for them, where they are wanted."""
    return {"prompt_token_ids": list(job.requests[index].prompt)} if job.returns_ids else {}


def _choice_object(
    index: int, text: str | Event | None, logprobs: dict[str, Any] | None, finish: str | None
) -> dict[str, Any]:
    assert text is None or isinstance(text, str)  # a completion is nothing but text
    return {"index": index, "text": text or "", "logprobs": logprobs, "finish_reason": finish}
