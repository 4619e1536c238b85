"""DeepSeek V3.2 and V4: elements named ``｜DSML｜…``, all calls in one; they say which values are strings.

V4 calls the one element ``tool_calls``.
"""

from dataclasses import replace

from lmx.chat.tools.markup import MarkupFormat
from lmx.chat.tools.markup_parser import Markup

DEEPSEEK_V32 = MarkupFormat(
    "deepseek_v32",
    Markup(
        begin="<｜DSML｜function_calls>",
        call=('<｜DSML｜invoke name="', '">'),
        key=('<｜DSML｜parameter name="', '" string="true">'),
        typed='" string="false">',
        parameter_end="</｜DSML｜parameter>",
        call_end="</｜DSML｜invoke>",
        end="</｜DSML｜function_calls>",
        several=True,
    ),
    signs=("｜DSML｜", "function_calls"),
    tokens=("｜DSML｜",),
)
DEEPSEEK_V4 = MarkupFormat(
    "deepseek_v4",
    replace(DEEPSEEK_V32.markup, begin="<｜DSML｜tool_calls>", end="</｜DSML｜tool_calls>"),
    signs=("｜DSML｜",),
    tokens=("｜DSML｜",),
)
