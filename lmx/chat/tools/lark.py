"""Small parts of Lark grammars in llguidance's dialect, for the tool formats that write values themselves. Pure."""

import json
import re
from collections.abc import Mapping
from typing import Any

from lmx.chat.schema import LAYOUT, complaint

ANY = r"(.|\n)*"


def json_value(schema: Mapping[str, Any]) -> str:
    """The Lark expression of any JSON value that matches ``schema``; of any JSON where llguidance cannot say it."""
    expression = "%json " + json.dumps({**schema, "x-guidance": LAYOUT})
    return "%json " + json.dumps({"x-guidance": LAYOUT}) if complaint(f"start: {expression}") else expression


def plain(text: str) -> str:
    """``text`` as regular expression."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~/-]", r"\\\g<0>", text).replace("\n", r"\n")


def string_body(schema: Mapping[str, Any]) -> str | None:
    """The Lark terminal expression of the strings that ``pattern``, ``minLength`` and ``maxLength`` allow.

    None: any. A pattern that llguidance cannot say is left out, as are formats.
    """
    parts = []
    pattern, least, most = (schema.get(key) for key in ("pattern", "minLength", "maxLength"))
    if isinstance(pattern, str):
        # As JSON schema has it, a pattern may stand anywhere in the text.
        begin = "" if pattern.startswith("^") else ANY
        end = "" if pattern.endswith("$") and not pattern.endswith(r"\$") else ANY
        inner = pattern.removeprefix("^").removesuffix("" if end else "$")
        expression = f"/{begin}({_slashes(inner)}){end}/"
        if inner and not complaint(f"start: T\nT: {expression}"):
            parts.append(expression)
    if least or most is not None:
        parts.append(rf"/(.|\n){{{int(least or 0)},{'' if most is None else int(most)}}}/")
    return " & ".join(parts) or None


def _slashes(pattern: str) -> str:
    return re.sub(r"(\\.)|/|\n", lambda match: match[1] or ("\\/" if match[0] == "/" else "\\n"), pattern, flags=re.S)
