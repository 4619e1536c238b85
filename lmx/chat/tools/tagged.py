"""Models that write one JSON list of calls between tags: Nemotron Nano 2 and Apriel."""

from collections.abc import Mapping

from lmx.chat.tools.json_calls import JsonFormat


def _detect_nemotron(template: str, special: Mapping[str, int]) -> bool:
    return "<TOOLCALL>" in template


def _detect_apriel(template: str, special: Mapping[str, int]) -> bool:
    return "<tool_calls>[" in template


NEMOTRON = JsonFormat(
    name="nemotron",
    markers=("<TOOLCALL>", "</TOOLCALL>"),
    detect=_detect_nemotron,
    trigger="<TOOLCALL>",
    opening=('[{"name": ',),
    between=(', {"name": ',),
    closing=("]</TOOLCALL>",),
    end_marker="</TOOLCALL>",
)
APRIEL = JsonFormat(
    name="apriel",
    markers=("<tool_calls>", "</tool_calls>"),
    detect=_detect_apriel,
    trigger="<tool_calls>",
    opening=('[{"name": ',),
    between=(', {"name": ',),
    closing=("]</tool_calls>",),
    end_marker="</tool_calls>",
)
