"""Earlier calls as text, as their models write them: for templates that tell of tools and print none of a
conversation's calls. What stands in no table here is written as the generic tool format is.

Pure. ``lmx.chat.prompt.history`` puts the text into the assistant's turn. A format's own special tokens are passed
through ``token``, so that they become tokens; what a client spells out never does.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmx.chat.prompt.messages import Message, read_arguments

Token = Callable[[str], str]
Write = Callable[[Sequence[Message], Token], str]


def generic(functions: Sequence[Message], token: Token) -> str:
    """``functions``: names and arguments, as in ``tool_calls``."""
    return "\n".join(f"<tool_call>\n{_object(function)}\n</tool_call>" for function in functions)


def _object(function: Message) -> str:
    arguments = function.get("arguments")
    if not isinstance(arguments, str) or not arguments.strip():  # text stays as it was written
        arguments = _json(read_arguments(arguments))
    return f'{{"name": {_json(function["name"])}, "arguments": {arguments}}}'


def _granite(functions: Sequence[Message], token: Token) -> str:
    return f"{token('<|tool_call|>')}[{', '.join(map(_object, functions))}]"


def _lfm2(functions: Sequence[Message], token: Token) -> str:
    calls = []
    for function in functions:
        arguments = read_arguments(function.get("arguments"))
        named = arguments if isinstance(arguments, dict) else {"arguments": arguments}
        calls.append(f"{function['name']}({', '.join(f'{name}={_python(value)}' for name, value in named.items())})")
    return f"{token('<|tool_call_start|>')}[{', '.join(calls)}]{token('<|tool_call_end|>')}"


def _python(value: Any) -> str:
    return _json(value) if isinstance(value, str) else repr(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


WRITERS: Mapping[str, Write] = {"granite": _granite, "lfm2": _lfm2}
"""By the names of tool formats."""
