"""Drafts from what the client says that the answer will be (OpenAI's "predicted outputs").

As long as the answer is what was predicted, the prediction goes on beside it. Where it parts from it, nothing is
offered until the answer's last tokens stand in the prediction again.
"""

from itertools import islice

from lmx.engine.backend import Sequence
from lmx.engine.drafts.index import GROUP, Index, common

_LOOKED_AT = 64
"""Places that are compared."""
_LONGEST = 32


class Prediction:
    """See ``source.Source``."""

    name = "prediction"

    def __init__(self, predicted: list[int], most: int) -> None:
        """``most``: tokens of an offer."""
        self._predicted = predicted
        self._most = most
        self._index = Index()
        self._known = -1
        """Tokens of the sequence that the prediction was held against."""
        self._place = 0
        """What comes next stands here in the prediction."""
        self._parted = False
        self._needed = GROUP
        """So many of the answer's last tokens must stand before a place where it goes on."""

    def offer(self, sequence: Sequence) -> int:
        self._follow(sequence)
        return 0 if self._parted else min(self._most, len(self._predicted) - self._place)

    def _follow(self, sequence: Sequence) -> None:
        tokens, predicted = sequence.tokens, self._predicted
        if self._known < 0:
            self._known = sequence.prompt_tokens
        for at in range(self._known, len(tokens)):
            if not self._parted and self._place < len(predicted) and predicted[self._place] == tokens[at]:
                self._place += 1
            else:
                self._parted = True
        self._known = len(tokens)
        if self._parted:
            self._find(tokens[max(sequence.prompt_tokens, len(tokens) - _LONGEST) :])

    def _find(self, tail: list[int]) -> None:
        """Go on where the answer's last tokens stand: rather behind than before where it parted, and rather near."""
        self._index.extend(self._predicted, len(self._predicted))
        parted_at, found = self._place, list[tuple[bool, int, int, int]]()
        for place in islice(self._index.places(tail), _LOOKED_AT):
            match = common(self._predicted, place, tail, _LONGEST)
            if match >= self._needed:
                found.append((place < parted_at, -match, abs(place - parted_at), place))
        if found:
            self._place, self._parted = min(found)[-1], False

    def take(self, sequence: Sequence, tokens: int) -> list[int]:
        return self._predicted[self._place : self._place + min(tokens, self._most)]

    def told(self, drafted: int, accepted: int) -> None:
        if accepted:
            self._needed = max(self._needed - accepted, GROUP)
        elif drafted:
            self._needed = min(2 * self._needed, _LONGEST)
