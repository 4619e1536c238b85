"""How much of a JSON schema is taken, and the two ways in which one is not. Pure; see ``lmx.chat.forms.writing``."""

from typing import Final

MAX_NODES: Final = 20_000
"""Subschemas written. llguidance takes 50,000, in its own count."""
MAX_WORK: Final = 300_000
"""Properties and alternatives brought together: about a second."""
MAX_SHAPES: Final = 256
"""Alternatives of one subschema, after everything is multiplied out."""
MAX_DEPTH: Final = 64
"""Subschemas inside each other. llguidance needs 2.5 kB of stack for each; the process dies where that is not there."""
MAX_PROPERTIES: Final = 2000
MAX_PATTERNS: Final = 200
MAX_MATCHED: Final = 2000
"""Constants of one ``enum`` beside a pattern: each is tried."""
MAX_NAME_PATTERNS: Final = 16
"""Of one object: llguidance holds each against each other."""
MAX_ITEMS: Final = 10_000
MAX_LENGTH: Final = 100_000
MAX_UNIQUE: Final = 4
MAX_COMBINATIONS: Final = 64


class Refused(Exception):
    """The arguments are the keyword, its path in the schema, and the reason with the way out."""

    def __init__(self, keyword: str, path: str, reason: str) -> None:
        super().__init__(keyword, path, reason)
        self.keyword = keyword
        self.path = path
        self.reason = reason


class TooComplex(Exception):
    """The schema is within what can be said but too large for that; the argument says which limit."""


def at(path: str) -> str:
    return f"#{path}" if len(path) <= 100 else f"#…{path[-100:]}"
