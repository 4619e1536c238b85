"""MiniMax M2: ``<invoke name="…">`` and ``<parameter name="…">`` elements, all calls in one ``<minimax:tool_call>``."""

from lmx.chat.tools.markup import MarkupFormat
from lmx.chat.tools.markup_parser import Markup

MINIMAX_M2 = MarkupFormat(
    "minimax_m2",
    Markup(
        begin="<minimax:tool_call>",
        call=('<invoke name="', '">'),
        key=('<parameter name="', '">'),
        parameter_end="</parameter>",
        call_end="</invoke>",
        end="</minimax:tool_call>",
        several=True,
    ),
    signs=("<minimax:tool_call>",),
)
