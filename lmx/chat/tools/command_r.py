"""Cohere's Command models: a JSON list of actions, between tokens (R7B, A) or, before, in a code block (R, R+)."""

import re
from collections.abc import Mapping

from lmx.chat.tools.json_calls import JsonFormat

_NUMBER = re.compile("[0-9]{1,3}")


def _detect(template: str, special: Mapping[str, int]) -> bool:
    return "<|START_ACTION|>" in template


def _detect_old(template: str, special: Mapping[str, int]) -> bool:
    return "'Action:'" in template.replace("\\", "")


COMMAND_R = JsonFormat(
    name="command_r",
    markers=("<|START_ACTION|>", "<|END_ACTION|>"),
    detect=_detect,
    trigger="<|START_ACTION|>",
    opening=('[\n    {"tool_call_id": "', _NUMBER, '", "tool_name": '),
    middle=', "parameters": ',
    between=(',\n    {"tool_call_id": "', _NUMBER, '", "tool_name": '),
    closing=("\n]<|END_ACTION|>",),
    end_marker="<|END_ACTION|>",
)
COMMAND_R_OLD = JsonFormat(
    name="command_r_old",
    markers=(),
    detect=_detect_old,
    trigger="Action: ```json",
    opening=('\n[\n    {\n        "tool_name": ',),
    middle=',\n        "parameters": ',
    after=("\n    }",),
    between=(',\n    {\n        "tool_name": ',),
    closing=("\n]\n```",),
    triggers=("Action:",),
    fence="```json",
    end_marker="```",
)
