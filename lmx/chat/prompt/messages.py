"""Brings OpenAI chat messages into the shape that chat templates are written for. Pure; ``ChatModel`` calls it.

Messages keep their number and order here; what a template cannot read is the matter of ``lmx.chat.prompt.history``.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

from pydantic_core import from_json

from lmx.errors import InvalidRequest

Message = dict[str, Any]

SHOWN_CHARACTERS = 100
_TEXT_PARTS = {"text", "input_text", "output_text", "refusal"}
_ROLES = {"developer": "system", "function": "tool"}
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What clients and templates call an earlier answer's reasoning."""


def normalise(messages: Sequence[Message], names: Collection[str] = _REASONING[:1]) -> list[Message]:
    """Copies in which ``developer`` is ``system`` and ``function`` a ``tool``, contents are strings, tool calls whole,
    and tool messages say which call they answer.

    names: of message fields that the template reads; reasoning is given under one of them or left out. Arguments stay
    as they were sent: ``with_arguments`` brings them into the template's form.
    Raises InvalidRequest for what is no message of the API, such as a content part that is not text.
    """
    copies = [_message(message, f"messages[{index}]", names) for index, message in enumerate(messages)]
    _answer_calls(copies)
    return copies


def _message(message: Message, where: str, names: Collection[str]) -> Message:
    left_out = {"tool_calls", "function_call", *_REASONING}
    result = {key: value for key, value in message.items() if value is not None and key not in left_out}
    result["role"] = _ROLES.get(message["role"], message["role"])
    result["content"] = _text(message.get("content"), where)
    if result["role"] != "assistant":
        return result
    calls = message.get("tool_calls")
    if message.get("function_call") is not None and not calls:
        _expect(isinstance(message["function_call"], dict), f"{where}.function_call", message["function_call"])
        calls = [{"type": "function", "function": message["function_call"]}]
    if calls:  # an empty list means none, but templates test for the key
        _expect(isinstance(calls, list), f"{where}.tool_calls", calls)
        result["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    thoughts = next((message[name] for name in _REASONING if isinstance(message.get(name), str)), "")
    known = next((name for name in _REASONING if name in names), None)
    if thoughts and known:
        result[known] = thoughts
    return result


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.get("refusal" if part.get("type") == "refusal" else "text")
        if part.get("type") not in _TEXT_PARTS or not isinstance(text, str):
            raise InvalidRequest(
                f"{where}.content[{index}] is of type {part.get('type')!r}; this model reads text only. Send it as "
                '{"type": "text", "text": ...} or leave it out.',
                param="messages",
            )
        texts.append(text)
    return "\n".join(texts)


def _call(call: Any, where: str) -> Message:
    _expect(isinstance(call, dict), where, call)
    function = call.get("function")
    _expect(isinstance(function, dict), f"{where}.function", function)
    name, arguments = function.get("name"), function.get("arguments")
    _expect(isinstance(name, str), f"{where}.function.name", name)
    _expect(arguments is None or isinstance(arguments, (str, dict, list)), f"{where}.function.arguments", arguments)
    return {**{key: value for key, value in call.items() if value is not None}, "function": dict(function)}


def _expect(right: bool, where: str, value: Any) -> None:
    if not right:
        shown = repr(value)[:SHOWN_CHARACTERS]
        raise InvalidRequest(
            f"{where} {shown}: tool calls are a list of "
            '{"id": ..., "type": "function", "function": {"name": "...", "arguments": "{...}"}}.',
            param=where,
        )


# --- calls and their results --------------------------------------------------------------------------


def _answer_calls(messages: Sequence[Message]) -> None:
    """Every call gets an id, every result its call's id and name.

    Clients change ids (some strip underscores) and leave them out, so what has no call of its very id belongs to the
    first open call whose id has the same letters and digits, or else to the first open one of that name, or, without a
    name, to the first open one at all. Ids count within a request only.
    """
    spoken_for = {message.get("tool_call_id") for message in messages if message["role"] == "tool"}
    calls: dict[str, Message] = {}
    very, loose = _OpenCalls(), _OpenCalls()
    count = 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["id"] = call["id"] if isinstance(call.get("id"), str) and call["id"] else f"call{count:05}"
            call.setdefault("type", "function")
            count += 1
            calls[call["id"]] = call
            very.add(call, "id", call["id"])
            if call["id"] not in spoken_for:
                for key, value in (
                    ("letters", _letters(call["id"])),
                    ("name", call["function"]["name"]),
                    ("any", ""),
                ):
                    loose.add(call, key, value)
        if message["role"] != "tool":
            continue
        given, name = message.get("tool_call_id"), message.get("name")
        found = very.take("id", given) or calls.get(given or "")
        if found is None and given:
            found = loose.take("letters", _letters(given))
        if found is None:
            found = loose.take("name", name) if name else loose.take("any", "")
        if found is not None:
            message["tool_call_id"] = found["id"]
            message.setdefault("name", found["function"]["name"])


class _OpenCalls:
    """Calls that have no result yet, by what they may be asked for; each is given once."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, Any], deque[Message]] = {}
        self._taken: set[int] = set()

    def add(self, call: Message, key: str, value: Any) -> None:
        self._calls.setdefault((key, value), deque()).append(call)

    def take(self, key: str, value: Any) -> Message | None:
        calls = self._calls.get((key, value), ())
        while calls:
            call = calls.popleft()
            if id(call) not in self._taken:
                self._taken.add(id(call))
                return call
        return None


def _letters(identifier: str) -> str:
    return re.sub(r"[\W_]", "", identifier).lower()


def with_arguments(messages: Sequence[Message], form: str) -> list[Message]:
    """``form`` "object": as objects where they are any, "only objects": what is none is put into one, "text": as JSON
    text, which is the client's own where it sent text.
    """
    return [
        {**message, "tool_calls": [_with_arguments(call, form) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_arguments(call: Message, form: str) -> Message:
    function = call["function"]
    given = function.get("arguments")
    arguments = read_arguments(given)
    if form == "text":
        text = given if isinstance(given, str) and given.strip() else None
        arguments = text if text is not None else json.dumps(arguments, ensure_ascii=False)
    elif form == "only objects" and not isinstance(arguments, dict):
        arguments = {"arguments": arguments}
    return {**call, "function": {**function, "arguments": arguments}}


def read_arguments(given: Any) -> Any:
    """OpenAI sends arguments as a JSON string; templates print an object, as the model was trained to write it.

    No arguments, in any spelling (PHP's is ``[]``), are the empty object: templates ask for its items. What is no
    object, was cut off, or is nested deeper than templates can go stays text.
    """
    if isinstance(given, dict):
        return given
    if not given or not isinstance(given, str) or not given.strip():
        return {}
    try:
        read = from_json(given)
        if isinstance(read, str):  # encoded twice
            read = from_json(read) if read.strip() else {}
    except ValueError:
        return given
    return read if isinstance(read, dict) else given if read else {}


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): map_strings(item, change) for key, item in value.items()}
    return value


def collector(strings: list[str]) -> Callable[[str], str]:
    """For ``map_strings``: puts what it meets into ``strings`` and changes nothing."""

    def collect(string: str) -> str:
        strings.append(string)
        return string

    return collect
