"""Drafts from the sequence's own text: what followed where its last tokens stood before.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023; vLLM's and llama.cpp's n-gram speculation), over prompt and
answer. As long as a place goes on being right it is followed, a comparison a token; otherwise the longest match among
the latest ones is taken. How long a match must be follows from how good the last ones were.
"""

from itertools import islice

from lmx.engine.backend import Sequence
from lmx.engine.drafts.index import GROUP, Index, common

_INDEXED_AT_ONCE = 4096
"""Tokens; 2 ms. A longer prompt is taken in over some steps."""
_LOOKED_AT = 8
"""Places that are compared."""
_LONGEST = 32
"""A match that is longer is as good."""


class Lookup:
    """See ``source.Source``."""

    name = "lookup"

    def __init__(self, most: int) -> None:
        """``most``: tokens of an offer."""
        self._most = most
        self._index = Index()
        self._known = 0
        """Tokens of the sequence that ``_place`` was followed along."""
        self._place = 0
        """What comes next stood here before; 0: nowhere."""
        self._match = 0
        """So many tokens before it are the same."""
        self._needed = GROUP
        """So many must be."""

    def offer(self, sequence: Sequence) -> int:
        tokens = sequence.tokens
        if self._index.size < len(tokens) - 1:
            self._index.extend(tokens, min(self._index.size + _INDEXED_AT_ONCE, len(tokens) - 1))
            if self._index.size < len(tokens) - 1:
                return 0
        self._follow(tokens)
        return self._most if self._place and self._match >= self._needed else 0

    def _follow(self, tokens: list[int]) -> None:
        for token in tokens[self._known :] if self._place else ():
            if tokens[self._place] != token:
                self._place = 0
                break
            self._place += 1
            self._match += 1
        self._known = len(tokens)
        if self._place:
            return
        # The text's own end is not in the index yet, so no place is that.
        for place in islice(self._index.places(tokens[-GROUP:]), _LOOKED_AT):
            match = common(tokens, place, tokens, _LONGEST)
            if not self._place or match > self._match:
                self._place, self._match = place, match

    def take(self, sequence: Sequence, tokens: int) -> list[int]:
        text = sequence.tokens
        period = len(text) - self._place  # what repeats itself goes on doing so
        return [text[self._place + step % period] for step in range(min(tokens, self._most))]

    def told(self, drafted: int, accepted: int) -> None:
        if accepted:
            self._needed = max(self._needed - accepted, GROUP)
        elif drafted:
            self._needed = min(2 * self._needed, _LONGEST)
