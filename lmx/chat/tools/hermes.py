"""Hermes, Qwen 2.5 and 3, Granite 4 and many more: ``<tool_call>`` around one JSON object a call."""

from collections.abc import Mapping

from lmx.chat.tools.json_calls import JsonFormat


def _detect(template: str, special: Mapping[str, int]) -> bool:
    # The XML-like formats use the same tag around other things.
    return "<tool_call>" in template and '"arguments"' in template.replace("\\", "")


HERMES = JsonFormat(
    name="hermes",
    markers=("<tool_call>", "</tool_call>"),
    detect=_detect,
    trigger="<tool_call>",
    opening=('\n{"name": ',),
    after=("}\n</tool_call>",),
    between=('\n<tool_call>\n{"name": ',),
    closing=(),
    end_marker="</tool_call>",
)
