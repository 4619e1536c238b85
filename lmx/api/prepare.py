"""From a validated request to token ids: messages through the template, texts through the tokenizer.

Pure and blocking: in the server it runs in a worker thread (small bodies), or in ``lmx.api.reader`` (all others), so it
must not import the web framework. Whatever a library raises on a client's data ends that request alone.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from lmx.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, Request, TokenizeRequest
from lmx.api.shorten import shorten
from lmx.chat.model import ChatModel
from lmx.chat.switches import Switches
from lmx.errors import InvalidRequest

KINDS: dict[str, type[Request]] = {
    kind.__name__: kind for kind in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
}
TOKENIZED_CHARACTERS = 4_000_000
"""Of /tokenize, which counts the tokens of texts that are too long for the model, too."""
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_PREFILL = ("prefix", "partial")


@dataclass(frozen=True, slots=True)
class Prepared:
    prompts: list["array[int]"] = field(default_factory=list)
    """Token ids, four bytes each."""
    texts: list[str] = field(default_factory=list)
    """Each prompt as text, for ``echo``."""
    answer: bytes = b""
    """The whole answer, as JSON, where no engine is needed for it."""


def prepare(body: Request, given: dict[str, Any], chat: ChatModel, context: int) -> Prepared:
    """``given`` is the body as the client wrote it: templates print its dicts, whose order counts. ``context``: of the
    model, in tokens, 0 while it is not known.

    Raises InvalidRequest (ContextLengthExceeded for what is certainly too long, before any work is done on it).
    """
    try:
        match body:
            case ChatRequest():
                return _chat(body, given, chat, context)
            case CompletionRequest():
                return _completion(body, chat, context)
            case TokenizeRequest():
                return Prepared(answer=_tokenize(body, given, chat, context))
            case DetokenizeRequest():
                _check_ids(body.tokens, chat, "tokens")
                return Prepared(answer=to_json({"prompt": chat.decode(body.tokens)}))
    except (RecursionError, MemoryError) as error:
        raise InvalidRequest(f"The request is too deep or too large to be read ({type(error).__name__}).") from None
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, Exception):
            raise
        # pyo3's PanicException: it is no Exception, and would end the server.
        raise InvalidRequest(f"The request cannot be read ({type(error).__name__}: {str(error)[:200]}).") from None
    raise TypeError(type(body))


def check_length(body: Request, given: dict[str, Any], chat: ChatModel, context: int) -> None:
    """Refuse what is certainly too long for the model, by its characters: this costs nothing.

    Raises ContextLengthExceeded, or InvalidRequest for messages that the model cannot read.
    """
    match body:
        case ChatRequest():
            _check_messages(given["messages"], chat, context)
        case CompletionRequest(prompt=str(text)):
            chat.check_length(len(text), context, "prompt")


def slimmed(body: Request) -> Request:
    """``body`` without what only ``prepare`` reads: what is left is small."""
    gone = {"messages", "tools", "functions", "prompt", "chat_template_kwargs", "metadata", "tokens", "tool_choice"}
    return body.model_copy(update=dict.fromkeys(gone & type(body).model_fields.keys()))


def _chat(body: ChatRequest, given: dict[str, Any], chat: ChatModel, context: int) -> Prepared:
    _check_messages(given["messages"], chat, context)
    ids = chat.encode_chat(
        given["messages"],
        tools=_tools(body, given),
        template_kwargs=_template_kwargs(body, chat),
        add_generation_prompt=body.add_generation_prompt is not False,
        context=context,
    )
    return Prepared([array("I", ids)], [""])


def _tools(body: ChatRequest, given: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = given.get("tools") or [{"type": "function", "function": old} for old in given.get("functions") or ()]
    allowed = body.allowed_tools()
    if allowed is not None:
        tools = [tool for tool in tools if tool["function"]["name"] in allowed]
    return tools or None


def _check_messages(messages: list[dict[str, Any]], chat: ChatModel, context: int) -> None:
    """The model can read every part of them, and as much as they are. Raises InvalidRequest."""
    characters = 0
    for index, message in enumerate(messages):
        characters += _check_message(message, f"messages[{index}]")
    chat.check_length(characters, context, "messages")


def _check_message(message: dict[str, Any], where: str) -> int:
    """How many characters its content has."""
    content = message.get("content")
    for name in _PREFILL:
        if message.get(name):
            raise InvalidRequest(
                f"{where}.{name} {shorten(message[name])}: this server always starts a new turn; use /v1/completions "
                "to go on with a text.",
                param=f"{where}.{name}",
            )
    if message.get("audio") is not None:
        raise InvalidRequest(
            f"{where}.audio: this model reads text only (got {shorten(message['audio'])}).", param=f"{where}.audio"
        )
    if isinstance(content, str):
        return len(content)
    if content is None:
        if message["role"] != "assistant":
            raise InvalidRequest(
                f"{where}.content is required for the role {message['role']!r} (got null).", param=f"{where}.content"
            )
        return 0
    characters = 0
    for index, part in enumerate(content):
        kind = part.get("type")
        text = part.get(_TEXT_PARTS.get(kind, "")) if isinstance(kind, str) else None
        if not isinstance(text, str):
            raise InvalidRequest(
                f'{where}.content[{index}]: this model reads text only, as {{"type": "text", "text": ...}} (got '
                f"{shorten(part)}).",
                param=f"{where}.content[{index}]",
            )
        characters += len(text)
    return characters


def _template_kwargs(body: ChatRequest, chat: ChatModel) -> dict[str, Any]:
    """What the client says about thinking, under the names that the template reads; and its own words for it."""
    effort = body.reasoning_effort or (body.reasoning.effort if body.reasoning else None)
    if isinstance(body.think, str):
        effort = effort or body.think
    switches = (body.enable_thinking, body.think, body.reasoning.enabled if body.reasoning else None, _thinking(body))
    enabled = next((switch for switch in switches if isinstance(switch, bool)), None)
    return chat.template_variables(Switches(enabled, effort)) | (body.chat_template_kwargs or {})


def _thinking(body: ChatRequest) -> bool | None:
    if body.thinking is None or isinstance(body.thinking, bool):
        return body.thinking
    return {"enabled": True, "disabled": False}.get(body.thinking.type)


def _completion(body: CompletionRequest, chat: ChatModel, context: int) -> Prepared:
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    # All of them first: no work for a request that is refused in the end.
    for prompt in given:
        if isinstance(prompt, str):
            chat.check_length(len(prompt), context, "prompt")
        else:
            chat.check_tokens(len(prompt), context, "prompt")
            _check_ids(prompt, chat, "prompt")
    texts, prompts = [], []
    for prompt in given:
        tokens = prompt
        if isinstance(prompt, str):
            add_special = body.add_special_tokens is not False
            tokens = chat.tokenize(prompt, add_special=add_special, parse_special=True)
        if not tokens:
            raise InvalidRequest(f"prompt {shorten(prompt)} has no tokens; give at least one.", param="prompt")
        prompts.append(array("I", tokens))
        texts.append("" if not body.echo else prompt if isinstance(prompt, str) else chat.decode(prompt))
    return Prepared(prompts, texts)


def _check_ids(tokens: Sequence[int], chat: ChatModel, param: str) -> None:
    largest = max(tokens, default=0)  # the schema has refused negative ones
    if largest >= chat.vocab_size:
        raise InvalidRequest(
            f"{param}: {largest} is not a token id of this model (0 to {chat.vocab_size - 1}).", param=param
        )


def _tokenize(body: TokenizeRequest, given: dict[str, Any], chat: ChatModel, context: int) -> bytes:
    if body.prompt is not None:
        if len(body.prompt) > TOKENIZED_CHARACTERS:
            chat.check_length(len(body.prompt), context or 1, "prompt")
        add_special = body.add_special_tokens is not False
        ids = chat.tokenize(body.prompt, add_special=add_special, parse_special=True)
    else:
        _check_messages(given["messages"], chat, context)
        ids = chat.encode_chat(
            given["messages"],
            tools=given.get("tools") or None,
            template_kwargs=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special=bool(body.add_special_tokens),
            context=context,
        )
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": context}
    if body.return_token_strs:
        answer["token_strs"] = [chat.token_name(token) for token in ids]
    return to_json(answer)
