"""Keeps special tokens that are spelled out in a message from becoming control tokens.

A user who writes ``<|im_end|>`` must not end the turn. Before rendering, such spellings are broken up with a character
that occurs nowhere in the conversation; after rendering, the special tokens that are still whole are the template's
own, and the stretches between them that were broken up are to be encoded literally. Pure; ``ChatModel`` calls it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from lmx.chat.prompt.messages import collector, map_strings

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class SpecialTokens:
    """The special tokens of one tokenizer, as patterns."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        # Longest first, as the tokenizer matches. One character cannot be broken up; no model has such a token.
        tokens = sorted((t for t in added if t.special and len(t.content) > 1), key=lambda t: -len(t.content))
        spelled = [re.escape(token.content) for token in tokens]
        # With the white space that the tokenizer lets some of them swallow.
        whole = [r"\s*" * t.lstrip + text + r"\s*" * t.rstrip for t, text in zip(tokens, spelled, strict=True)]
        nothing = r"(?!)"
        self._spelled = re.compile("|".join(spelled) or nothing)
        self._whole = re.compile("|".join(whole) or nothing)

    def break_up(self, conversation: Any) -> tuple[Any, str]:
        """``conversation`` with spelled-out tokens broken up, and the character put in: "" if there are none."""
        strings: list[str] = []
        map_strings(conversation, collector(strings))
        if not any(map(self._spelled.search, strings)):
            return conversation, ""
        breaker = _unused(strings)

        def change(string: str) -> str:
            while self._spelled.search(string):  # again, because matches may overlap
                string = self._spelled.sub(lambda match: f"{match[0][0]}{breaker}{match[0][1:]}", string)
            return string

        return map_strings(conversation, change), breaker

    def segments(self, text: str, breaker: str) -> Iterator[tuple[str, bool]]:
        """``text`` without ``breaker``, cut so that each part is encoded either with its special tokens or literally.

        Parts are (text, literal). Cuts are at special tokens, where tokenizers cut anyway.
        """
        pending = start = 0
        ends = [match.span() for match in self._whole.finditer(text)]
        for begin, end in [*ends, (len(text), len(text))]:
            stretch = text[start:begin]
            if breaker in stretch:
                if start > pending:
                    yield text[pending:start], False
                yield stretch.replace(breaker, ""), True
                pending = begin
            start = end
        if pending < len(text):
            yield text[pending:], False


def unused_character(conversation: Any) -> str:
    """One that no string of the conversation has."""
    strings: list[str] = []
    map_strings(conversation, collector(strings))
    return _unused(strings)


def _unused(strings: Sequence[str]) -> str:
    used = set().union(*strings)
    return next(character for character in map(chr, _PRIVATE_USE) if character not in used)
