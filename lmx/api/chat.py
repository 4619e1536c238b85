"""POST /v1/chat/completions: OpenAI's chat face over ``lmx.api.generation``.

What can be refused is refused before the first byte.
"""

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
from lmx.api.logprobs import chat_logprobs
from lmx.api.schemas import ChatRequest, Message
from lmx.config import Settings
from lmx.errors import InvalidRequest
from lmx.serving.models import Models, Served


def blueprint(models: Models, settings: Settings) -> Blueprint:
    """The chat routes over ``models``."""
    routes = Blueprint("chat", __name__)

    @routes.post("/v1/chat/completions")
    @document_request(ChatRequest)
    async def chat_completions() -> Response:
        """Answer a conversation, in one piece or as server-sent events (`stream`)."""
        body = await read_body(ChatRequest)
        _refuse_unsupported(body)
        served = models.resolve(body.model or settings.model.default)
        job = await _job(body, served, settings)
        model = body.model or served.id
        if body.stream:
            return EventStream(partial(_stream, job, body, model), job.call.id, settings.server.sse_comment_s)
        return json_response(await _answer(job, body, model))

    return routes


def _refuse_unsupported(body: ChatRequest) -> None:
    choice, wanted = body.tool_choice, (body.response_format or {}).get("type", "text")
    if choice not in (None, "none", "auto"):
        raise InvalidRequest(
            f"tool_choice {shorten(choice)}: this server does not constrain output yet and cannot force a tool call; "
            'use "auto" or "none".',
            param="tool_choice",
        )
    if wanted != "text":
        raise InvalidRequest(
            f"response_format {shorten(wanted)}: this server does not constrain output yet; ask for the format in a "
            'message and use {"type": "text"}.',
            param="response_format",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")


async def _job(body: ChatRequest, served: Served, settings: Settings) -> Job:
    encode = partial(
        served.chat.encode_chat,
        [_template_message(message, f"messages[{index}]") for index, message in enumerate(body.messages)],
        tools=None if body.tool_choice == "none" else body.tools or None,
        template_kwargs=_template_kwargs(body),
    )
    prompt = await trio.to_thread.run_sync(encode, abandon_on_cancel=True)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return make_job(
        served,
        body,
        [prompt],
        max_tokens=-1 if asked is None else asked,
        logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
        prompt_param="messages",
        call=current_call(),
        settings=settings.server,
    )


def _template_message(message: Message, where: str) -> dict[str, Any]:
    """The message as the client wrote it. Raises InvalidRequest for what the model cannot read."""
    if message.content is None and message.role != "assistant":
        raise InvalidRequest(f"{where}.content is required for the role {message.role!r}.", param=f"{where}.content")
    for index, part in enumerate(message.content if isinstance(message.content, list) else ()):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f'{where}.content[{index}]: this model reads text only, as {{"type": "text", "text": ...}} (got '
                f"{shorten(part)}).",
                param=f"{where}.content[{index}]",
            )
    return message.model_dump(exclude_unset=True)


def _template_kwargs(body: ChatRequest) -> dict[str, Any]:
    kwargs: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        kwargs = {"reasoning_effort": body.reasoning_effort, "enable_thinking": body.reasoning_effort != "none"}
    if body.enable_thinking is not None:
        kwargs["enable_thinking"] = body.enable_thinking
    return kwargs | (body.chat_template_kwargs or {})


async def _answer(job: Job, body: ChatRequest, model: str) -> dict[str, Any]:
    collected = Collected(job)
    choices = await run(job, collected)
    return heading("chatcmpl", "chat.completion", model, job) | {
        "choices": [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": collected.text(choice), "refusal": None},
                "logprobs": chat_logprobs(job.served.chat, collected.logprobs(choice)) if body.logprobs else None,
                "finish_reason": choice.finish,
            }
            for choice in choices
        ],
        "usage": usage(job, choices),
    }


async def _stream(job: Job, body: ChatRequest, model: str, writer: EventWriter) -> None:
    chunks = ChunkStream(
        job,
        writer,
        heading("chatcmpl", "chat.completion.chunk", model, job),
        _delta_object,
        first={index: _delta_object(index, "", None, None, role="assistant") for index in range(job.n)},
        with_usage=body.stream_options is not None and body.stream_options.include_usage,
        format_logprobs=lambda _, logprobs: chat_logprobs(job.served.chat, logprobs),
    )
    await chunks.end(await run(job, chunks))


def _delta_object(
    index: int, text: str | None, logprobs: dict[str, Any] | None, finish: str | None, **first: str
) -> dict[str, Any]:
    delta = first if text is None else first | {"content": text}
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
