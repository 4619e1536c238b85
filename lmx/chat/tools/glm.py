"""GLM 4.5 and later: ``<arg_key>`` and ``<arg_value>`` elements after the name, each call in ``<tool_call>``.

From 4.7 on nothing stands between them.
"""

from dataclasses import replace

from lmx.chat.tools.markup import MarkupFormat
from lmx.chat.tools.markup_parser import Markup

_MARKUP = Markup(
    begin="<tool_call>",
    call=("", ""),
    key=("<arg_key>", "</arg_key>"),
    value="<arg_value>",
    parameter_end="</arg_value>",
    call_end="</tool_call>",
)
_SIGNS = ("<arg_key>", "<arg_value>")
_CLOSE = "}<arg_key>"
"""How the template of 4.7 shows a call: ``<tool_call>{function-name}<arg_key>``."""
GLM45 = MarkupFormat("glm45", _MARKUP, signs=_SIGNS, without=(_CLOSE,))
GLM47 = MarkupFormat("glm47", replace(_MARKUP, gap=""), signs=(*_SIGNS, _CLOSE))
