"""JSON schemas as grammar: Lark expressions, in llguidance's dialect, of the values that a schema admits.

Pure. Called by the tool formats of ``lmx.chat.tools`` and by ``lmx.chat.forms.structured``. What comes out compiles: it
is validated here, with limits, so that no client's schema costs an engine more than a server thread has already seen.
"""

import json
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits

from lmx.chat.forms.limits import Refused, TooComplex
from lmx.chat.forms.writing import rewritten
from lmx.chat.stack import FLAT_CHARACTERS, on_a_large_stack
from lmx.errors import GrammarTooComplex, InvalidRequest

LAYOUT: Final = {
    # On one line, as OpenAI writes it: nothing of it can go on for ever, and small models that may break lines anywhere
    # wander off ('{\n  "a"\n    :').
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # Without \u: "\u0061" would be another spelling of the key "a", and "\ud800" is half a character.
    "json_allowed_escapes": 'nrbtf\\"',
}
TIGHT: Final = {
    **LAYOUT,
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": r",(?: |\n[ \t]{0,32})?",
    "key_separator": ": ?",
}
LIMITS: Final = LLParserLimits(verbose_errors=False, initial_lexer_fuel=5_000_000)
"""Five times the usual: two hundred tools in one grammar take it, and 0.7 s. ``lmx.engine.grammar`` has the same."""
OWN_LIMITS: Final = LLParserLimits(verbose_errors=False)
"""Of a grammar that a client has written: the usual, which takes 0.7 s."""
MAX_TEXT: Final = 2**16
"""Characters of one constant: what they cost in masks grows with them, and 1,000,000 take more than a minute."""
MAX_COMPOUNDS: Final = 5000
"""Arrays and objects in one ``enum``: 20,000 take more than a minute."""
MAX_CHARACTERS: Final = 2**20
"""Of one schema or grammar."""
_SIZE: Final = ("too large", "too big", "limit", "fuel", "Unable to determine")
"""Words of llguidance's complaints about size."""
ANY_OBJECT: Final = {"type": "object"}


def json_rule(schema: Mapping[str, Any]) -> str:
    """The Lark expression of a tool's arguments. A schema that cannot be compiled degrades to any JSON object.

    Keywords that no grammar can say (``uniqueItems``, overlapping ``oneOf``) are left out here.
    """
    try:
        return _tool_rule(json.dumps(schema))
    except (ValueError, TypeError, RecursionError):
        return _tool_rule(json.dumps(ANY_OBJECT))


@lru_cache(maxsize=1024)
def _tool_rule(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        try:
            return _compiled(rewritten(json.loads(text), within=ANY_OBJECT, lenient=True))
        except (Refused, TooComplex, RecursionError):
            pass
    return _compiled(rewritten(ANY_OBJECT))


def strict_rule(schema: Any, param: str, layout: Mapping[str, Any] | None = None) -> str:
    """The Lark expression of the values that the schema admits, less what ``lmx.chat.forms.writing`` says: never more.

    Raises InvalidRequest that names the keyword and where it stands; ``param`` is the request's field. layout: other
    white space than ``LAYOUT``'s.
    """
    try:
        return _strict_rule(json.dumps(schema, allow_nan=False), json.dumps({**LAYOUT, **(layout or {})}))
    except Refused as refused:
        raise InvalidRequest(
            f"{param}: {refused.keyword} at #{refused.path} cannot be enforced: {refused.reason}.", param=param
        ) from None
    except TooComplex as problem:
        raise GrammarTooComplex(f"{param} is too complex: {problem}.", param=param) from None
    except RecursionError:
        raise GrammarTooComplex(f"{param} is too complex: it is too deep.", param=param) from None
    except (ValueError, TypeError) as problem:
        raise InvalidRequest(f"{param} is no JSON schema: {problem}.", param=param) from None


@lru_cache(maxsize=256)
def _strict_rule(text: str, layout: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise TooComplex(f"it has {len(text):,} characters and {MAX_CHARACTERS:,} are taken")
    return _compiled(rewritten(json.loads(text)), json.loads(layout))


def _compiled(schema: dict[str, Any] | bool, layout: Mapping[str, Any] = LAYOUT) -> str:
    if isinstance(schema, bool):
        raise Refused("schema", "", "nothing satisfies it")
    _check_constants(schema)
    expression = "%json " + json.dumps({**schema, "x-guidance": layout})
    problem = complaint(f"start: {expression}")
    if problem:
        raise Refused("schema", "", said(problem))
    return expression


def _check_constants(schema: Any) -> None:
    """Raises TooComplex."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
            if sum(isinstance(item, dict | list) for item in value) > MAX_COMPOUNDS:
                raise TooComplex(f"one of its lists has more than {MAX_COMPOUNDS:,} arrays and objects")
        elif isinstance(value, str) and len(value) > MAX_TEXT:
            raise TooComplex(f"a text in it has {len(value):,} characters, and {MAX_TEXT:,} are taken")


def tightened(rules: str) -> str:
    """The rules with white space only behind commas and colons.

    With white space of its own a schema has a lexer of its own, and llguidance must choose between that and what else
    may begin with a bracket, at the bracket.
    """
    return rules.replace(f'"x-guidance": {json.dumps(LAYOUT)}', f'"x-guidance": {json.dumps(TIGHT)}')


def complaint(grammar: str, limits: LLParserLimits = LIMITS) -> str:
    """What llguidance says against this grammar; empty: nothing."""
    validate = partial(LLMatcher.validate_grammar_with_warnings, grammar, limits=limits)
    failed, messages = validate() if len(grammar) <= FLAT_CHARACTERS else on_a_large_stack(validate)
    return messages[0] if failed else ""


def said(problem: str) -> str:
    """llguidance's complaint without the place in our grammar. Raises TooComplex where it is about size."""
    shown = problem.partition("failed to compile JSON schema: ")[2] or problem
    shown = shown.partition("\n   1 |")[0].strip()
    shown = (shown.rpartition("\nerror: ")[2] or shown)[:200]  # of a regular expression
    if any(word in shown for word in _SIZE):
        raise TooComplex(shown)
    return shown
