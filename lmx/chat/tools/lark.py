"""Small parts of Lark grammars in llguidance's dialect, for the tool formats that write values themselves. Pure."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from lmx.chat.forms.limits import Refused, TooComplex
from lmx.chat.forms.patterns import matches, translated
from lmx.chat.forms.schema import LAYOUT, complaint
from lmx.chat.forms.writing import rewritten

ANY = r"(.|\n)*"


def json_value(schema: Mapping[str, Any]) -> str:
    """The Lark expression of any JSON value that matches ``schema``; of its type where llguidance cannot say more."""
    return _json_value(json.dumps(schema))


@lru_cache(maxsize=4096)
def _json_value(schema: str) -> str:
    read = json.loads(schema)
    own = "type" in read
    for allowed in (read, {"type": read["type"]} if own else {}, {}):
        try:
            said = rewritten(allowed, lenient=True)
        except (Refused, TooComplex, RecursionError):
            continue
        expression = "%json " + json.dumps({**(said if isinstance(said, dict) else {}), "x-guidance": LAYOUT})
        if isinstance(said, dict) and not complaint(f"start: {expression}"):
            break
    return expression


def quoted(text: str) -> str:
    """``text`` as a string of the grammar, whose strings know no ``\\u``."""
    return json.dumps(text, ensure_ascii=False)


def within(special: Mapping[str, int], markers: Iterable[str]) -> dict[str, int]:
    """The special tokens that stand in ``markers``: of hundreds, those that a grammar has to look for."""
    text = "\n".join(markers)
    return {token: number for token, number in special.items() if token in text}


def plain(text: str) -> str:
    """``text`` as regular expression."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~/-]", r"\\\g<0>", text).replace("\n", r"\n")


def string_body(schema: Mapping[str, Any]) -> str | None:
    """The Lark terminal expression of the strings that ``pattern``, ``minLength`` and ``maxLength`` allow.

    None: any. What llguidance cannot say is left out, as are formats.
    """
    parts = []
    pattern, least, most = schema.get("pattern"), count(schema.get("minLength")), count(schema.get("maxLength"))
    if isinstance(pattern, str):
        # As JSON schema has it, a pattern may stand anywhere in the text.
        begin = "" if pattern.startswith("^") else ANY
        end = "" if pattern.endswith("$") and not pattern.endswith(r"\$") else ANY
        inner = translated(pattern).removeprefix("^").removesuffix("" if end else "$")
        expression = f"/{begin}({_slashes(inner)}){end}/"
        if inner and _is_terminal(expression):
            parts.append(expression)
    if least or most is not None:
        expression = rf"/(.|\n){{{least or 0},{'' if most is None else most}}}/"
        parts += [expression] if _is_terminal(expression) else []
    return " & ".join(parts) or None


def count(value: object) -> int | None:
    """A length or count as schemas have it; None where it is none."""
    return int(value) if isinstance(value, int | float) and value >= 0 else None


def may_be_empty(schema: Mapping[str, Any]) -> bool:
    """Whether the empty string is one of those."""
    pattern = schema.get("pattern")
    return not count(schema.get("minLength")) and (not isinstance(pattern, str) or matches(pattern, ""))


@lru_cache(maxsize=1024)
def _is_terminal(expression: str) -> bool:
    return not complaint(f"start: T\nT: {expression}")


def _slashes(pattern: str) -> str:
    return re.sub(r"(\\.)|/|\n", lambda match: match[1] or ("\\/" if match[0] == "/" else "\\n"), pattern, flags=re.S)
