"""JSON schemas as grammar: Lark expressions, in llguidance's dialect, of the values that a schema admits.

Pure. Called by the tool formats of ``lmx.chat.tools`` and by ``lmx.chat.structured``. What comes out compiles: it is
validated here, with limits, so that no client's schema costs an engine more than a server thread has already seen.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits

LAYOUT: Final = {
    # One space, or a line's end and its indentation: as models lay JSON out, and nothing that can go on for ever.
    "whitespace_pattern": r" |\n[ \t]{0,32}",
    # Without \u: "\u0061" would be another spelling of the key "a", and "\ud800" is half a character.
    "json_allowed_escapes": 'nrbtf\\"',
}
LIMITS: Final = LLParserLimits(verbose_errors=False)


def json_rule(schema: Mapping[str, Any]) -> str:
    """The Lark expression of a tool's arguments. A schema that cannot be compiled degrades to any JSON object."""
    return _json_rule(json.dumps(schema))


@lru_cache(maxsize=1024)
def _json_rule(schema: str) -> str:
    expression = _expression({**json.loads(schema), "type": "object"})
    return _expression({"type": "object"}) if complaint(f"start: {expression}") else expression


def complaint(grammar: str) -> str:
    """What llguidance says against this grammar; empty: nothing."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    return messages[0] if failed else ""


def _expression(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": LAYOUT})
