"""Token ids in, text out, as tokens arrive: incremental detokenising and stop strings.

Pure and synchronous; one ``TextStream`` for each choice of each request, fed by the API faces. It must never send a
broken UTF-8 sequence, nor text that may still turn out to be part of a stop string.
"""

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns one sequence's tokens into text.

    ``pieces[id]`` are a token's bytes, empty for tokens that give no text. ``strip_space`` drops one space at the very
    beginning (SentencePiece puts one before the first word of a text). A token costs its own bytes and, with stop
    strings, a look at what is held back (less than the longest stop string), never the text before.
    """

    def __init__(self, pieces: Sequence[bytes], stop: Sequence[str] = (), *, strip_space: bool = False) -> None:
        self.stopped = False
        """A stop string was met; it and everything after it is dropped."""
        self._pieces = pieces
        self._strip_space = strip_space
        # UTF-8 with U+FFFD for each maximal invalid part (Unicode's "substitution of maximal subparts").
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(filter(None, stop))
        self._first_characters = frozenset(string[0] for string in self._stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make safe to send; "" once ``stopped``. Unknown ids give no text."""
        return self._take(tokens, final=False)

    def finish(self) -> str:
        """What was held back, when the sequence ended for another reason than a stop string. Call it once, last.

        A stop string found only now (while one that begins earlier was still possible) still counts.
        """
        return self._take((), final=True)

    def _take(self, tokens: Sequence[int], *, final: bool) -> str:
        if self.stopped:
            return ""
        pieces = self._pieces
        size = len(pieces)
        data = b"".join([pieces[token] for token in tokens if 0 <= token < size])
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        text = self._utf8.decode(data, final)
        return self._cut(text, final=final) if self._stop else text

    def _cut(self, text: str, *, final: bool) -> str:
        """The stop string that begins first in the whole text wins, so the result is the same for every chunking."""
        text = self._held + text
        found = min((at for string in self._stop if (at := text.find(string)) >= 0), default=-1)
        keep = len(text) if final else self._unsettled(text)
        # Before ``found``, a stop string that begins at ``keep`` may still come, and would be the first.
        if 0 <= found <= keep:
            self.stopped = True
            keep = found
        self._held = "" if self.stopped else text[keep:]
        return text[:keep]

    def _unsettled(self, text: str) -> int:
        """Where the longest end of ``text`` starts that is the beginning, and not the whole, of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_characters:
                tail = text[start:]
                if any(string.startswith(tail) and string != tail for string in self._stop):
                    return start
        return len(text)
