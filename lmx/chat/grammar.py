"""The grammar of a whole answer, in llguidance's Lark dialect: reasoning, then text, calls or a format.

Pure: strings in, a string out, which the engine compiles (``lmx.engine.grammar``). Called by ``lmx.api.prepare``.
"""

import json
from collections.abc import Mapping


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
        parts += [json.dumps(pending)] if pending else []
        parts.append(f"<[{special[found]}]>")
        pending, text = "", text[len(found) :]
    parts += [json.dumps(pending)] if pending else []
    return " ".join(parts) or '""'
