"""Qwen3-Coder and Qwen3.5: ``<function=name>`` and ``<parameter=key>`` elements, each call in ``<tool_call>``."""

from lmx.chat.tools.markup import MarkupFormat
from lmx.chat.tools.markup_parser import Markup

QWEN3_CODER = MarkupFormat(
    "qwen3_coder",
    Markup(
        begin="<tool_call>",
        call=("<function=", ">"),
        key=("<parameter=", ">"),
        parameter_end="</parameter>",
        call_end="</function>",
        end="</tool_call>",
        newlines=True,
        forgotten=True,
    ),
    signs=("<function=", "<parameter="),
)
