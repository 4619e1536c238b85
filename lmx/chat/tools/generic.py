"""Calls for models that were trained on none: Hermes' form, which the grammar enforces and the prompt explains."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lmx.chat.tools.hermes import HERMES


def _detect(template: str, special: Mapping[str, int]) -> bool:
    return True


GENERIC = replace(HERMES, name="generic", detect=_detect)


def ignores_tools(template: str) -> bool:
    """Whether a prompt rendered by this template says nothing of the tools."""
    return not re.search(r"\btools\b", template)


def instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the system prompt says of ``tools`` (as in a request) where the template says nothing of them."""
    listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    return (
        "You may call functions to answer the user. These are the functions, each with a JSON schema of its "
        f"arguments:\n<tools>\n{listed}\n</tools>\n"
        "To call one, write its name and arguments as a JSON object between these tags, and nothing after them:\n"
        '<tool_call>\n{"name": "function name", "arguments": {"argument name": "value"}}\n</tool_call>\n'
        "For several calls, write several such blocks. The results are given to you in the next message. "
        "Answer in plain text when no function is needed."
    )
