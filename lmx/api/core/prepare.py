"""From a validated request to token ids: messages through the template, texts through the tokenizer.

Pure and blocking: in the server it runs in a worker thread (small bodies), or in ``lmx.api.reader`` (all others), so it
must not import the web framework. Whatever a library raises on a client's data ends that request alone.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pydantic_core import to_json

from lmx.api.core.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, Request, TokenizeRequest
from lmx.api.core.shorten import shorten
from lmx.api.core.tools import ToolUse, tool_use
from lmx.chat.forms.grammar import answer_grammar, check
from lmx.chat.forms.schema import ANY_OBJECT
from lmx.chat.forms.structured import FIELDS, Body, body_of, with_sub_grammar
from lmx.chat.model import ChatModel
from lmx.chat.plan import PLAIN, Plan, Thoughts
from lmx.chat.prompt.switches import Switches
from lmx.chat.reasoning import rules as reasoning_rules
from lmx.chat.tools.base import WholeFormat
from lmx.errors import GrammarTooComplex, InvalidRequest

KINDS: dict[str, type[Request]] = {
    kind.__name__: kind for kind in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
}
TOKENIZED_CHARACTERS = 4_000_000
"""Of /tokenize, which counts the tokens of texts that are too long for the model, too."""
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_ONLY_PREPARED = FIELDS | {
    *("messages", "prediction", "tools", "tool_choice", "functions", "function_call"),
    *("prompt", "content", "tokens", "chat_template_kwargs", "metadata"),
}


@dataclass(frozen=True, slots=True)
class Prepared:
    prompts: list["array[int]"] = field(default_factory=list)
    """Token ids, four bytes each."""
    texts: list[str] = field(default_factory=list)
    """Each prompt as text, for ``echo``."""
    plan: Plan = PLAIN
    continues: bool = False
    """The answers go on with a text, and begin no turn."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answers, besides the model's own and the request's."""
    seconds: list[int] = field(default_factory=list)
    """Of pairs of texts: where the second one of each begins."""
    offsets: list["array[int]"] = field(default_factory=list)
    """Where in its text each token of a prompt begins, for ``echo`` with ``logprobs``."""
    prediction: "array[int]" = field(default_factory=lambda: array("I"))
    """What the answer may be, by the client."""
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
                return _completion(body, given, chat, context)
            case TokenizeRequest():
                return Prepared(answer=_tokenize(body, given, chat, context))
            case DetokenizeRequest():
                _check_ids(body.tokens, chat, "tokens")
                text = chat.decode(body.tokens)
                return Prepared(answer=to_json({"prompt": text, "content": text}))  # vLLM's name, llama-server's
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
    return body.model_copy(update=dict.fromkeys(_ONLY_PREPARED & type(body).model_fields.keys()))


def _chat(body: ChatRequest, given: dict[str, Any], chat: ChatModel, context: int) -> Prepared:
    _check_messages(given["messages"], chat, context)
    use, switches = tool_use(given), _switches(body)
    ids = chat.encode_chat(
        given["messages"],
        tools=use.shown or None,
        template_kwargs=chat.template_variables(switches) | (body.chat_template_kwargs or {}),
        add_generation_prompt=body.add_generation_prompt is not False,
        continues=body.continues,
        context=context,
    )
    return Prepared(
        [array("I", ids)],
        [""],
        _plan(body, given, use, switches, chat, ids),
        body.continues,
        prediction=_prediction(body, chat, context),
    )


def _prediction(body: ChatRequest, chat: ChatModel, context: int) -> "array[int]":
    text = body.prediction.text if body.prediction is not None else ""
    if not text:
        return array("I")
    chat.check_length(len(text), context, "prediction")
    return array("I", chat.tokenize(text, add_special=False, parse_special=False))


def _plan(
    body: ChatRequest,
    given: dict[str, Any],
    use: ToolUse,
    switches: Switches,
    chat: ChatModel,
    prompt: list[int],
) -> Plan:
    reasoning, opened, rules, limited = chat.reasoning, False, "", False
    if reasoning is not None:
        content = given["messages"][-1].get("content")
        prefill = content if body.continues and isinstance(content, str) else ""
        opened = chat.thinking_opened(prompt, prefill)
        # Where the template has switched it off, nothing is to forbid.
        forbidden = switches.on is False and not chat.thinking_closed(prompt)
        limited = forbidden or switches.budget is not None
        rules = reasoning_rules(reasoning, chat.special, opened, switches.budget, forbid=forbidden)
    body_asked = body_of(given)
    if chat.whole_format is not None:
        grammar = _whole_grammar(chat.whole_format, chat, use, switches, body_asked)
    else:
        make = partial(
            answer_grammar,
            special=chat.special,
            reasoning_rules=rules,
            limits_reasoning=limited,
            format=chat.tool_format,
            choice=use.mode,
            parallel=use.parallel,
            body=body_asked,
        )
        grammar = make(tools=use.callable)
        try:
            check(grammar)
        except GrammarTooComplex:
            if not use.callable:
                raise
            # Each schema alone is not: so many tools are still tools, of which only the names are enforced.
            grammar = make(tools=[replace(tool, parameters=ANY_OBJECT) for tool in use.callable])
    check(grammar)
    return Plan(
        grammar,
        use.callable,
        opened,
        reasons=reasoning is not None or chat.whole_format is not None,
        thoughts=_thoughts(body),
        thought_markers=(reasoning.begin, reasoning.end) if reasoning is not None else ("", ""),
        old_calls=use.old,
    )


def _whole_grammar(form: WholeFormat, chat: ChatModel, use: ToolUse, switches: Switches, body: Body | None) -> str:
    if switches.budget:
        raise InvalidRequest(
            f"Reasoning cannot be limited to {switches.budget} tokens: answers of this model ({form.name}) have no one "
            "place for it. Use reasoning_effort.",
            param="max_reasoning_tokens",
        )
    if not use.callable and body is None and switches.on is not False:
        return ""
    rules = form.answer(
        use.callable,
        chat.special,
        choice=use.mode,
        parallel=use.parallel,
        body=body.rules if body is not None else "",
        thinking=switches.on is not False,
    )
    return with_sub_grammar(rules, body.grammar if body is not None else "")


def _check_messages(messages: list[dict[str, Any]], chat: ChatModel, context: int) -> None:
    """The model can read every part of them, and as much as they are. Raises InvalidRequest."""
    characters = 0
    for index, message in enumerate(messages):
        characters += _check_message(message, f"messages[{index}]")
    chat.check_length(characters, context, "messages")


def _check_message(message: dict[str, Any], where: str) -> int:
    """How many characters its content has."""
    content = message.get("content")
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


def _switches(body: ChatRequest) -> Switches:
    """What the client says about thinking, in whatever spelling."""
    effort = body.reasoning_effort or (body.reasoning.effort if body.reasoning else None)
    if isinstance(body.think, str):
        effort = effort or body.think
    switches = (body.enable_thinking, body.think, body.reasoning.enabled if body.reasoning else None, _thinking(body))
    enabled = next((switch for switch in switches if isinstance(switch, bool)), None)
    return Switches(enabled, effort, body.reasoning_budget_asked)


def _thoughts(body: ChatRequest) -> Thoughts:
    excluded = body.reasoning is not None and body.reasoning.exclude
    if excluded or body.include_reasoning is False or body.reasoning_format == "hidden":
        return "hidden"
    return "within" if body.separate_reasoning is False or body.reasoning_format in ("none", "raw") else "apart"


def _thinking(body: ChatRequest) -> bool | None:
    if body.thinking is None or isinstance(body.thinking, bool):
        return body.thinking
    return {"enabled": True, "disabled": False}.get(body.thinking.type)


def _completion(body: CompletionRequest, given: dict[str, Any], chat: ChatModel, context: int) -> Prepared:
    listed: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if listed and isinstance(listed[0], int):
        listed = [listed]
    # All of them first: no work for a request that is refused in the end.
    for prompt in listed:
        if isinstance(prompt, str):
            chat.check_length(len(prompt), context, "prompt")
        else:
            chat.check_tokens(len(prompt), context, "prompt")
            _check_ids(prompt, chat, "prompt")
    texts, prompts, offsets = [], [], []
    stop_ids: tuple[int, ...] = ()
    add_special = body.add_special_tokens is not False
    for prompt in listed:
        tokens = prompt
        if body.suffix:
            chat.check_length(len(body.suffix), context, "suffix")
            tokens, stop_ids = chat.encode_middle(prompt, body.suffix, add_special=add_special)
        elif isinstance(prompt, str):
            tokens = chat.tokenize(prompt, add_special=add_special, parse_special=True)
        if not tokens:
            raise InvalidRequest(f"prompt {shorten(prompt)} has no tokens; give at least one.", param="prompt")
        prompts.append(array("I", tokens))
        texts.append("" if not body.echo else prompt if isinstance(prompt, str) else chat.decode(prompt))
        if body.echo and body.logprobs is not None:
            offsets.append(array("I", chat.offsets(tokens, prompt if isinstance(prompt, str) else None)))
    grammar = answer_grammar(special=chat.special, body=body_of(given))
    check(grammar)
    return Prepared(prompts, texts, Plan(grammar), True, stop_ids, offsets=offsets)


def _check_ids(tokens: Sequence[int], chat: ChatModel, param: str) -> None:
    largest = max(tokens, default=0)  # the schema has refused negative ones
    if largest >= chat.vocab_size:
        raise InvalidRequest(
            f"{param}: {largest} is not a token id of this model (0 to {chat.vocab_size - 1}).", param=param
        )


def _tokenize(body: TokenizeRequest, given: dict[str, Any], chat: ChatModel, context: int) -> bytes:
    param, text = ("prompt", body.prompt) if body.content is None else ("content", body.content)
    if text is not None:
        if len(text) > TOKENIZED_CHARACTERS:
            chat.check_length(len(text), context or 1, param)
        add_special = body.add_special_tokens is not False if body.content is None else bool(body.add_special)
        ids = chat.tokenize(text, add_special=add_special, parse_special=body.parse_special is not False)
    else:
        _check_messages(given["messages"], chat, context)
        ids = chat.encode_chat(
            given["messages"],
            tools=[tool for tool in given.get("tools") or () if tool["type"] == "function"] or None,
            template_kwargs=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special=bool(body.add_special_tokens),
            context=context,
        )
    tokens = [{"id": token, "piece": _piece(chat.token_bytes(token))} for token in ids] if body.with_pieces else ids
    answer: dict[str, Any] = {"tokens": tokens, "count": len(ids), "max_model_len": context}
    if body.return_token_strs:
        answer["token_strs"] = [chat.token_name(token) for token in ids]
    return to_json(answer)


def _piece(raw: bytes) -> str | list[int]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
