"""Phi-4-mini: ``<|tool_call|>[…]<|/tool_call|>``, and the ``functools[…]`` that it and Firefunction fall back to."""

from collections.abc import Mapping

from lmx.chat.tools.json_calls import JsonFormat


def _detect(template: str, special: Mapping[str, int]) -> bool:
    return "<|/tool_call|>" in special or "<|/tool|>" in template


def _detect_functools(template: str, special: Mapping[str, int]) -> bool:
    return "functools[" in template


PHI4 = JsonFormat(
    name="phi4",
    markers=("<|tool_call|>", "<|/tool_call|>"),
    detect=_detect,
    trigger="<|tool_call|>",
    opening=('[{"name": ',),
    between=(', {"name": ',),
    closing=("]<|/tool_call|>",),
    triggers=("<|tool_call|>", "functools["),
    end_marker="<|/tool_call|>",
)
FUNCTOOLS = JsonFormat(
    name="functools",
    markers=(),
    detect=_detect_functools,
    trigger="functools[",
    opening=('{"name": ',),
    between=(', {"name": ',),
    closing=("]",),
)
