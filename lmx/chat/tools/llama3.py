"""Llama 3.1 to 4: ``{"name": …, "parameters": {…}}``, bare or behind a token."""

from collections.abc import Mapping

from lmx.chat.tools.json_calls import JsonFormat


def _detect(template: str, special: Mapping[str, int]) -> bool:
    return '{"name": function name, "parameters":' in template


# Other objects in an answer's text may not begin with "name": the models' training leaves no other way to tell.
LLAMA3 = JsonFormat(
    name="llama3",
    markers=("<|python_tag|>", "<|python_start|>", "<|python_end|>"),
    detect=_detect,
    trigger='{"name"',
    opening=(": ",),
    middle=', "parameters": ',
    between=('; {"name": ',),
    closing=(),
    triggers=("<|python_tag|>", "<|python_start|>", "{"),
    end_marker="<|python_end|>",
)
