"""Prompts of real text that no cache can know: each begins with a word of its own and goes on with shuffled sentences.

Pure; the same seed gives the same prompts. Called by the command and by the repository's ``bench/``.
"""

import re
from functools import cache
from importlib.resources import files
from random import Random

_CALIBRATION_WORDS = 200


@cache
def _sentences() -> tuple[str, ...]:
    text = files("lmx.bench").joinpath("text.txt").read_text(encoding="utf-8")
    return tuple(re.split(r"(?<=[.?!])\s+", text.strip()))


class Prompts:
    """A seeded source of prompts. No two of one source are equal, and those of two seeds differ from the first word."""

    def __init__(self, seed: int, words_per_token: float = 0.75) -> None:
        self._random = Random(seed)
        self._words_per_token = words_per_token

    def words(self, count: int) -> str:
        """A prompt of ``count`` words (at least one)."""
        words = [f"{self._random.getrandbits(32):08x}:"]
        sentences = _sentences()
        while len(words) < count:
            for sentence in self._random.sample(sentences, len(sentences)):
                words += sentence.split()
        return " ".join(words[:count])

    def tokens(self, count: int) -> str:
        """A prompt of about ``count`` tokens; the server's usage tells how many it has."""
        return self.words(max(1, round(count * self._words_per_token)))

    def calibration(self) -> str:
        """A prompt to learn from how many tokens this model makes of a word."""
        return self.words(_CALIBRATION_WORDS)

    def calibrate(self, prompt_tokens: int) -> None:
        """``calibration()`` had this many tokens."""
        self._words_per_token = _CALIBRATION_WORDS / prompt_tokens
