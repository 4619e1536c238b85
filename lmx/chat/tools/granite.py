"""Granite 3: ``<|tool_call|>`` and a JSON list. (Granite 4 writes as Hermes does.)"""

from collections.abc import Mapping

from lmx.chat.tools.json_calls import JsonFormat


def _detect(template: str, special: Mapping[str, int]) -> bool:
    return "<|tool_call|>" in template and "<|start_of_role|>" in template


GRANITE = JsonFormat(
    name="granite",
    markers=("<|tool_call|>",),
    detect=_detect,
    trigger="<|tool_call|>",
    opening=('[{"name": ',),
    between=(', {"name": ',),
    closing=("]",),
)
