"""A client's value in an error message: as JSON, short, and at a cost that its size does not change. Pure."""

import json
from typing import Any

SHOWN_CHARACTERS = 80
SHOWN_ITEMS = 8
SHOWN_DEPTH = 4


def shorten(value: Any) -> str:
    """``value`` as JSON, cut so that an error message stays a message; cheap whatever the value's size."""
    if isinstance(value, str) and len(value) > SHOWN_CHARACTERS:
        return f"{_json(value[:SHOWN_CHARACTERS])[:-1]}… ({len(value)} characters)"
    text = _json(_clip(value, SHOWN_DEPTH))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _clip(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return value[: SHOWN_CHARACTERS + 1]
    if isinstance(value, list):
        return [_clip(item, depth - 1) for item in value[:SHOWN_ITEMS]] if depth else ["…"] * bool(value)
    if isinstance(value, dict):
        items = list(zip(value.items(), range(SHOWN_ITEMS), strict=False)) if depth else []
        return {key[: SHOWN_CHARACTERS + 1]: _clip(item, depth - 1) for (key, item), _ in items}
    return value
