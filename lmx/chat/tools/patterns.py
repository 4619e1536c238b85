"""Patterns over a text that comes in pieces, for parsers on a ``Source``.

``regex``, unlike ``re``, says of a text's end that it may still become a match. A pattern must not be able to match
more once it matches, so it ends in something certain, and what may be missing before that is possessive. Pure.
"""

import re
from collections.abc import Callable
from typing import Any

import regex

from lmx.chat.tools.source import Source, Steps


def match(source: Source, pattern: "regex.Pattern[str]") -> Steps[Any]:
    """The match of ``pattern`` here, which is then read; None if there is none, and then nothing is."""
    while found := pattern.match(source.text, source.at, partial=True):
        if not found.partial:
            source.at = found.end()
            return found
        yield
    return None


def until(
    source: Source,
    pattern: "regex.Pattern[str]",
    give: Callable[[str], None],
    *,
    counts: Callable[[], bool] = lambda: True,
) -> Steps[Any]:
    """Gives the text before the first match of ``pattern`` as it comes, and reads that too.

    ``counts``: whether a match after what was given is one.
    """
    while True:
        found = pattern.search(source.text, source.at, partial=True)
        end = found.start() if found else len(source.text)
        if text := source.text[source.at : end]:
            source.at = end
            give(text)
        if found is None or found.partial:
            yield
        elif counts():
            source.at = found.end()
            return found
        else:
            source.at += 1
            give(source.text[end])


class JsonScan:
    """Follows a JSON value through pieces of text: where it ends, and whether a place is inside a string."""

    def __init__(self) -> None:
        self.in_string = False
        self._depth = 0
        self._escaped = False

    def scan(self, text: str, at: int = 0) -> int:
        """The place in ``text`` after the object or array that began, -1 if it goes on."""
        skip = at if self._escaped else -1
        self._escaped = False
        for match in _STRUCTURE.finditer(text, at):
            place, character = match.start(), match[0]
            if place == skip:
                continue
            if self.in_string:
                if character == "\\":
                    skip = place + 1
                elif character == '"':
                    self.in_string = False
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        self._escaped = skip == len(text)
        return -1

    def skim(self, text: str) -> None:
        """Go past ``text``, whatever ends in it."""
        at = 0
        while (at := self.scan(text, at)) >= 0:
            pass


_STRUCTURE = re.compile(r'[\\"{}\[\]]')
