"""What a request decides about its answer before the first token: the words between its reading and its sending.

Pure data, small enough to come from the process that reads large bodies. Made by ``lmx.api.core.prepare``; the server
makes each answer's parser from it.
"""

from dataclasses import dataclass
from typing import Literal

from lmx.chat.tools.base import Tool

Thoughts = Literal["apart", "hidden", "within"]
"""Where an answer's reasoning goes: to a field of its own, nowhere, or into the content, with its markers."""


@dataclass(frozen=True, slots=True)
class Plan:
    grammar: str = ""
    """As in ``protocol.Submit``."""
    tools: tuple[Tool, ...] = ()
    """What the answer may call; none: nothing in it is read as a call."""
    opened: bool = False
    """The prompt ends inside the reasoning."""
    reasons: bool = False
    """Reasoning is told from the rest of the answer."""
    thoughts: Thoughts = "apart"
    thought_markers: tuple[str, str] = ("", "")
    """What stands around the reasoning where it is part of the content."""
    old_calls: bool = False
    """A call is told as ``function_call``, OpenAI's older word."""


PLAIN = Plan()
"""Nothing but text, of any kind."""
