"""A model's formats of calls and reasoning, as lists of models and the admin face tell them. Pure."""

from lmx.chat.model import ChatModel
from lmx.serving.models import AnyServed, Served


def formats(served: AnyServed) -> dict[str, str]:
    """How the model writes what is more than text, and why we think so."""
    if not isinstance(served, Served):
        return {}
    chat = served.chat
    return {
        "tool_format": chat.tool_format.name,
        "tool_format_reason": chat.tool_format_reason,
        "reasoning_format": _reasoning(chat),
        "reasoning_format_reason": chat.reasoning_reason,
    }


def _reasoning(chat: ChatModel) -> str:
    known = chat.reasoning or chat.whole_format
    return known.name if known is not None else "none"
