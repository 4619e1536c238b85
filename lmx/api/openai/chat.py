"""POST /v1/chat/completions: OpenAI's chat face over ``lmx.api.core.generation``.

What can be refused is refused before the first byte.
"""

from functools import partial
from typing import Any

from quart import Blueprint, Response
from quart_schema import document_request

from lmx.api.body import receive
from lmx.api.core.call import current_call
from lmx.api.core.generation import Job, best, make_job, run, usage
from lmx.api.core.schemas import ChatRequest
from lmx.api.events import EventStream, EventWriter
from lmx.api.openai.answer import Collected, heading
from lmx.api.openai.chunks import ChunkStream
from lmx.api.openai.logprobs import chat_logprobs
from lmx.api.openai.message import delta_fields, message
from lmx.chat.events import Content, Event
from lmx.config.live import Live
from lmx.serving.models import Models


def blueprint(models: Models, live: Live) -> Blueprint:
    """The chat routes over ``models``."""
    routes = Blueprint("chat", __name__)

    @routes.post("/v1/chat/completions")
    @document_request(ChatRequest)
    async def chat_completions() -> Response:
        """Answer a conversation, in one piece or as server-sent events (`stream`)."""
        body, served, prepared = await receive(ChatRequest, models, live)
        job = make_job(
            served,
            body,
            prepared.prompts,
            max_tokens=-1 if body.most_tokens is None else body.most_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
            prompt_param="messages",
            call=current_call(),
            settings=live.now,
            plan=prepared.plan,
            prediction=prepared.prediction,
            continues=prepared.continues,
        )
        model = body.model or served.id
        if body.stream:
            return EventStream(partial(_stream, job, body, model), job.call.id, live.now.server.sse_comment_s)
        return await _answer(job, body, model)

    return routes


async def _answer(job: Job, body: ChatRequest, model: str) -> Response:
    collected = Collected(job, lambda _, logprobs: chat_logprobs(job.served.chat, logprobs))
    choices = await run(job, collected)
    made = best(job, choices)
    objects = [
        {
            "index": index,
            "message": message(collected.events(choice), old_calls=job.plan.old_calls),
            "logprobs": None,
            "finish_reason": _finish(choice.finish, job),
            **collected.ids(choice),
        }
        for index, choice in enumerate(made)
    ]
    answer = heading("chatcmpl", "chat.completion", model, job) | {"choices": [], "usage": usage(job, choices)}
    if job.scores:
        answer |= await collected.prompt_logprobs(choices[0])
    if job.returns_ids:
        answer["prompt_token_ids"] = list(job.requests[0].prompt)
    return collected.response(answer, made, objects, with_logprobs=bool(body.logprobs))


async def _stream(job: Job, body: ChatRequest, model: str, writer: EventWriter) -> None:
    # Whether there will be content is not known where more than text is told apart: null, as OpenAI sends it.
    role = {"role": "assistant", "content": "" if job.served.chat.parser(job.plan) is None else None}
    chunks = ChunkStream(
        job,
        writer,
        heading("chatcmpl", "chat.completion.chunk", model, job),
        partial(_delta_object, job),
        first={index: _choice_object(index, role) for index in range(job.n)},
        first_fields={"prompt_token_ids": list(job.requests[0].prompt)} if job.returns_ids else {},
        options=body.stream_options,
        format_logprobs=lambda _, logprobs: chat_logprobs(job.served.chat, logprobs),
    )
    await chunks.end(await run(job, chunks))


def _delta_object(
    job: Job, index: int, piece: str | Event | None, logprobs: dict[str, Any] | None, finish: str | None
) -> dict[str, Any]:
    event = Content(piece) if isinstance(piece, str) else piece
    delta = delta_fields(event, old_calls=job.plan.old_calls) if event is not None else {}
    return _choice_object(index, delta, logprobs, _finish(finish, job))


def _choice_object(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _finish(finish: str | None, job: Job) -> str | None:
    return "function_call" if finish == "tool_calls" and job.plan.old_calls else finish
