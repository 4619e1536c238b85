"""The tool formats: a table, and which of them a model writes.

The order matters: a format that others resemble comes after them, the generic one last. ``lmx.chat.model`` calls
``find`` once for a model.
"""

from collections.abc import Mapping

from lmx.chat.tools.base import Format
from lmx.chat.tools.command_r import COMMAND_R, COMMAND_R_OLD
from lmx.chat.tools.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from lmx.chat.tools.deepseek_v32 import DEEPSEEK_V4, DEEPSEEK_V32
from lmx.chat.tools.gemma import FUNCTION_GEMMA, GEMMA4
from lmx.chat.tools.generic import GENERIC
from lmx.chat.tools.glm import GLM45, GLM47
from lmx.chat.tools.granite import GRANITE
from lmx.chat.tools.harmony import HARMONY
from lmx.chat.tools.hermes import HERMES
from lmx.chat.tools.kimi_k2 import KIMI_K2
from lmx.chat.tools.llama3 import LLAMA3
from lmx.chat.tools.minimax_m2 import MINIMAX_M2
from lmx.chat.tools.mistral import MISTRAL, MISTRAL_OLD
from lmx.chat.tools.phi4 import FUNCTOOLS, PHI4
from lmx.chat.tools.pythonic import LFM2, PYTHONIC
from lmx.chat.tools.qwen3_coder import QWEN3_CODER
from lmx.chat.tools.tagged import APRIEL, NEMOTRON

FORMATS: tuple[Format, ...] = (
    HARMONY,
    QWEN3_CODER,
    GLM47,
    GLM45,
    MINIMAX_M2,
    DEEPSEEK_V32,
    DEEPSEEK_V4,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    KIMI_K2,
    GEMMA4,
    FUNCTION_GEMMA,
    COMMAND_R,
    COMMAND_R_OLD,
    MISTRAL,
    MISTRAL_OLD,
    GRANITE,
    PHI4,
    FUNCTOOLS,
    NEMOTRON,
    APRIEL,
    LFM2,
    HERMES,
    PYTHONIC,
    LLAMA3,
    GENERIC,
)


def find(template: str, special: Mapping[str, int], override: str = "") -> tuple[Format, str]:
    """How a model with this chat template and these special tokens (text → id) writes calls, and why we think so.

    ``override``: the name of one of ``FORMATS``, which is then the answer. Raises ValueError for an unknown one.
    """
    if override:
        for form in FORMATS:
            if form.name == override:
                return form, "it is set by tool_format"
        names = ", ".join(form.name for form in FORMATS)
        raise ValueError(f"tool_format {override!r} is unknown; known are {names}.")
    form = next(form for form in FORMATS if form.matches(template, special))
    if form.name == GENERIC.name:
        return form, "neither its chat template nor its special tokens are those of a known format"
    shown = [marker for marker in form.markers if marker in template]
    if shown:
        return form, f"its chat template has {shown[0]}"
    tokens = [marker for marker in form.markers if marker in special]
    if tokens:
        return form, f"its vocabulary has {tokens[0]}"
    return form, f"its chat template is that of {form.name}"
