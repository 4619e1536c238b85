"""An answer's events in OpenAI's words: the fields of a ``message``, and of a ``delta`` in a stream. Pure.

Put together, a stream's deltas are the message. Called by ``lmx.api.openai.chat``, and by ``lmx.api.openai.chunks``
through it.
"""

import secrets
from collections.abc import Iterable
from typing import Any

from lmx.chat.events import CallArguments, CallEnd, CallStart, Content, Event, Malformed, Reasoning


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def delta_fields(event: Event, *, old_calls: bool) -> dict[str, Any]:
    """What ``event`` adds to a stream's ``delta``; {}: nothing. ``old_calls``: as ``Plan.old_calls``."""
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text, "reasoning": text}
        case CallStart(_, name) if old_calls:
            return {"function_call": {"name": name, "arguments": ""}}
        case CallStart(index, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id(), "type": "function", "function": function}]}
        case CallArguments(_, json) if old_calls:
            return {"function_call": {"arguments": json}}
        case CallArguments(index, json):
            return {"tool_calls": [{"index": index, "function": {"arguments": json}}]}
        case CallEnd() | Malformed():
            return {}


def message(events: Iterable[Event], *, old_calls: bool) -> dict[str, Any]:
    """The whole answer. ``content`` is null where there are calls and no text; no key is there for what is not."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallStart(_, name):
                calls.append((name, []))
            case CallArguments(_, json):
                calls[-1][1].append(json)
    fields: dict[str, Any] = {"role": "assistant", "content": "".join(content) if content or not calls else None}
    if reasoning:
        fields["reasoning_content"] = fields["reasoning"] = "".join(reasoning)
    fields["refusal"] = None
    functions = [{"name": name, "arguments": "".join(arguments)} for name, arguments in calls]
    if functions and old_calls:
        fields["function_call"] = functions[0]
    elif functions:
        fields["tool_calls"] = [{"id": call_id(), "type": "function", "function": function} for function in functions]
    return fields
