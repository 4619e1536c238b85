"""The grammar of a whole answer, in llguidance's Lark dialect: reasoning, then text, calls or a format.

Pure: strings in, a string out, which the engine compiles (``lmx.engine.grammar``). Called by ``lmx.api.core.prepare``.

Names in it: the parts of others begin with ``reasoning``, ``call`` and ``body``, what is written here with ``answer``.
Whatever comes without end is text or the client's own wish: white space between the parts is bounded.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

from lmx.chat.forms.limits import TooComplex
from lmx.chat.forms.schema import complaint, said, tightened
from lmx.chat.forms.structured import Body, with_sub_grammar
from lmx.chat.stack import too_large
from lmx.errors import GrammarTooComplex, InvalidRequest

if TYPE_CHECKING:  # the formats import `literal` from here
    from lmx.chat.tools.base import Calls, Format, Tool

Choice = Literal["none", "auto", "required"]
"""A named choice is "required" with that one tool, allowed_tools the choice with those."""
_GAP: Final = r"ANSWER_GAP: /[ \t\r\n]{1,8}/"
_TEXT: Final = r"ANSWER_TEXT: /(?s:.*)/"
_NOT_BEGUN: Final = " & ~REASONING_BEGUN"


def answer_grammar(
    *,
    special: Mapping[str, int],
    reasoning_rules: str = "",
    limits_reasoning: bool = False,
    format: "Format | None" = None,
    tools: "Sequence[Tool]" = (),
    choice: Choice = "auto",
    parallel: bool = True,
    body: Body | None = None,
) -> str:
    """The grammar of the whole answer; empty when nothing constrains it.

    reasoning_rules define the rule ``reasoning``, which comes first (it may match nothing). limits_reasoning: they
    matter even where nothing is constrained behind them. special: the vocabulary's special tokens, text → id.
    """
    calls = None
    if format is not None and tools and choice != "none":
        calls = format.grammar(tools, special, parallel=parallel)
    if calls is None and body is None and not (reasoning_rules and limits_reasoning):
        return ""
    if calls is not None and choice == "required":
        body = None
    first = "reasoning " if reasoning_rules else ""
    # Else the lexer, which takes the longest, would read reasoning in text as more of the text.
    guard = _NOT_BEGUN if "REASONING_BEGUN:" in reasoning_rules else ""
    # Behind reasoning come line breaks, whatever follows; before calls they may come anyway.
    gap = "ANSWER_GAP? "
    rules: list[str] = []
    if calls is None:
        ways = [f"{gap if first else ''}body" if body else "ANSWER_TEXT"]
    elif choice == "required":
        ways = [f"{gap}answer_calls"]
    elif body is not None:
        ways = [f"{gap}answer_calls", f"{gap if first else ''}body"]
    else:
        ways = _text_or_calls(calls, literal(calls.trigger, special), rules, guard)
    alike = calls is not None and body is not None and calls.trigger[:1] in ("{", "[")
    if calls is not None:
        trigger = literal(calls.trigger, special)
        if alike:
            # The lexer takes the longest it may: one lexeme of {"name" would leave no { for a format.
            trigger = f"{literal(calls.trigger[:1], special)} {literal(calls.trigger[1:], special)}"
        rules.append(f"answer_calls: {trigger} calls ANSWER_GAP?")
    body_rules = body.rules if body else ""
    if alike:
        body_rules = tightened(body_rules)
    lark = "\n".join(
        (
            f"start: {first}answer",
            f"answer: {' | '.join(ways)}",
            *rules,
            *([_GAP] if any("ANSWER_GAP" in line for line in (*ways, *rules)) else []),
            *([_TEXT + guard] if any("ANSWER_TEXT" in line for line in (*ways, *rules)) else []),
            *(part.strip() for part in (reasoning_rules, calls.rules if calls else "", body_rules)),
            "",
        )
    )
    return with_sub_grammar(lark, body.grammar if body else "")


def _text_or_calls(calls: "Calls", trigger: str, rules: list[str], guard: str) -> list[str]:
    """Free text, which the trigger ends wherever it comes up; behind it there are calls."""
    if trigger.startswith("<["):  # a special token is no text
        return ["ANSWER_GAP? answer_calls" if calls.at_start else "ANSWER_TEXT answer_calls", "ANSWER_TEXT"]
    if calls.at_start:
        rules.append(f"ANSWER_PLAIN: /(?s:.*)/ & ~(/[ \\t\\r\\n]*/ {trigger} /(?s:.*)/){guard}")
        return ["ANSWER_GAP? answer_calls", "ANSWER_PLAIN"]
    plain, _, rest = trigger.partition(" <[")
    if rest:  # the special token ends the text; what stands before it ("<") may be text as well
        rules.append(f"ANSWER_HEAD: ANSWER_TEXT {plain}")
        rules.append(f"answer_begun: ANSWER_HEAD <[{rest} calls ANSWER_GAP?")
    else:
        rules.append(f"answer_head[lazy]: ANSWER_TEXT {plain}")
        rules.append("answer_begun: answer_head calls ANSWER_GAP?")
    return ["ANSWER_TEXT", "answer_begun"]


@lru_cache(maxsize=32)  # agents send the same tools in every turn, and fifty of them take a quarter of a second
def check(grammar: str, param: str | None = None) -> None:
    """Raises InvalidRequest for a grammar that llguidance does not take: the engine would refuse it later."""
    try:
        if size := too_large(grammar):
            raise TooComplex(size)
        problem = complaint(grammar) if grammar else ""
        if not problem:
            return
        reason = said(problem)
    except TooComplex as size:
        raise GrammarTooComplex(
            f"The tools and formats of this request are too complex: {size}.", param=param
        ) from None
    raise InvalidRequest(f"The grammar of this answer cannot be used: {reason}.", param=param)


def literal(text: str, special: Mapping[str, int]) -> str:
    """``text`` as a Lark expression: special tokens in it as tokens, which is how models write them.

    ``special``: text → id.
    """
    parts: list[str] = []
    pending = ""
    while text:
        found = max((token for token in special if text.startswith(token)), key=len, default="")
        if not found:
            pending, text = pending + text[0], text[1:]
            continue
        parts += [_quoted(pending)] if pending else []
        parts.append(f"<[{special[found]}]>")
        pending, text = "", text[len(found) :]
    parts += [_quoted(pending)] if pending else []
    return " ".join(parts) or '""'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Lark's strings know no \\u
