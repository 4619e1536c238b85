"""Brings OpenAI chat messages into the shape that chat templates are written for. Pure; ``ChatModel`` calls it.

Messages keep their number and order: a system message in mid-conversation stays there, since folding it to the top
would break the cached prefix.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic_core import from_json

from lmx.errors import InvalidRequest

_TEXT_PARTS = {"text", "input_text", "output_text", "refusal"}


def normalise(messages: Sequence[dict[str, Any]], *, only_objects: bool = False) -> list[dict[str, Any]]:
    """Copies in which ``developer`` is ``system``, contents are strings and tool arguments objects.

    Arguments that are no object stay text, for templates that take both; with ``only_objects`` they are put into one.
    Raises InvalidRequest for a content part that is not text.
    """
    return [_message(message, f"messages[{index}]", only_objects) for index, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str, only_objects: bool) -> dict[str, Any]:
    result = {key: value for key, value in message.items() if value is not None and key != "tool_calls"}
    if result.get("role") == "developer":
        result["role"] = "system"
    result["content"] = _text(message.get("content"), where)
    if message.get("tool_calls"):  # an empty list means none, but templates test for the key
        result["tool_calls"] = [_tool_call(call, only_objects) for call in message["tool_calls"]]
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


def _tool_call(call: dict[str, Any], only_objects: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = _arguments(function.get("arguments"))
    if only_objects and not isinstance(arguments, dict):
        arguments = {"arguments": arguments}
    return {**call, "function": {**function, "arguments": arguments}}


def _arguments(given: Any) -> Any:
    """OpenAI sends arguments as a JSON string; templates print an object, as the model was trained to write it.

    No arguments, in any spelling (PHP's is ``[]``), are the empty object: templates ask for its items. What is no
    object, was cut off, or is nested deeper than templates can go stays text.
    """
    if isinstance(given, dict):
        return given
    if not given or not given.strip():
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
