"""Token ids in, text out, as tokens arrive: incremental detokenising and stop strings.

Pure and synchronous; one ``TextStream`` for each choice of each request, fed by the API faces. It must never send a
broken UTF-8 sequence, nor text that may still turn out to be part of a stop string.
"""

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns one sequence's tokens into text.

    ``pieces[id]`` are a token's bytes, empty for tokens that give no text. ``strip_space`` drops one space at the very
    beginning (SentencePiece puts one before the first word of a text). A token costs its own bytes, with stop strings
    a step for each of its characters and theirs, and never the text before.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        stop: Sequence[str] = (),
        *,
        strip_space: bool = False,
        keep_stop: bool = False,
    ) -> None:
        self._pieces = pieces
        self._strip_space = strip_space
        # UTF-8 with U+FFFD for each maximal invalid part (Unicode's "substitution of maximal subparts").
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = StopStrings(stop, keep=keep_stop) if any(stop) else None

    @property
    def stopped(self) -> bool:
        """A stop string was met; everything after it is dropped, and without ``keep_stop`` itself."""
        return self._stop is not None and self._stop.stopped

    def feed(self, tokens: Sequence[int], *, stops: bool = True) -> str:
        """The text that these tokens make safe to send; "" once ``stopped``. Unknown ids give no text. Without
        ``stops`` no stop string begins in it; for the beginning of an answer only."""
        return self._take(tokens, final=False, stops=stops)

    def finish(self) -> str:
        """What was held back, when the sequence ended for another reason than a stop string. Call it once, last.

        A stop string found only now (while one that begins earlier was still possible) still counts.
        """
        return self._take((), final=True)

    def _take(self, tokens: Sequence[int], *, final: bool, stops: bool = True) -> str:
        if self._stop is not None and self._stop.stopped:
            return ""
        pieces = self._pieces
        size = len(pieces)
        data = b"".join([pieces[token] for token in tokens if 0 <= token < size])
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        text = self._utf8.decode(data, final)
        return self._stop.feed(text, final=final) if self._stop is not None and stops else text


class StopStrings:
    """Cuts a text that comes in pieces at the stop string that begins first in it, whatever the pieces."""

    def __init__(self, strings: Sequence[str], *, keep: bool = False) -> None:
        self.stopped = False
        """One was met; everything after it is dropped, and without ``keep`` itself."""
        self._stop = [_Matcher(string) for string in filter(None, strings)]
        self._held = ""
        self._found: tuple[int, int] | None = None
        """Where in what is held back a stop string begins and ends, while one that begins earlier is still possible."""
        self._keep = keep

    def feed(self, new: str, *, final: bool = False) -> str:
        """What is safe to send; with ``final`` all of it, once, last. "" once ``stopped``."""
        if self.stopped:
            return ""
        text = self._held + new
        found, keep = self._found, len(text)
        for matcher in self._stop:
            end, pending = matcher.feed(new)
            begin = len(self._held) + end - len(matcher.string)
            if end and (found is None or begin < found[0]):
                found = begin, len(self._held) + end
            keep = min(keep, len(text) - pending)
        if final:
            keep = len(text)
        # Before ``found``, a stop string that begins at ``keep`` may still come, and would be the first.
        if found is not None and found[0] <= keep:
            self.stopped = True
            keep = found[self._keep]
        self._found = None if found is None else (found[0] - keep, found[1] - keep)
        self._held = "" if self.stopped else text[keep:]
        return text[:keep]


class _Matcher:
    """Looks for one string in a text that comes in pieces, at a cost that grows with the text alone (Knuth, Morris and
    Pratt, 1977): a stop string of thousands of characters costs no more than a short one.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self._borders = [0]
        """For each beginning of the string: the length of its longest proper beginning that is also its end."""
        self._matched = 0

    def feed(self, text: str) -> tuple[int, int]:
        """Where in ``text`` the string's first occurrence ends, 0 if it does not, and how much of the string's
        beginning, not the whole, ``text`` ends with.

        It goes on after an occurrence, which does not stop the text while another string that begins earlier may come.
        """
        string, matched, end = self.string, self._matched, 0
        if not matched and string[0] not in text:
            return 0, 0
        for position, character in enumerate(text, 1):
            while matched and string[matched] != character:
                matched = self._border(matched)
            if string[matched] == character:
                matched += 1
            if matched == len(string):
                end = end or position
                matched = self._border(matched)
        self._matched = matched
        return end, matched

    def _border(self, length: int) -> int:
        borders, string = self._borders, self.string
        while len(borders) < length:  # only as far as the text has come
            border = borders[-1]
            while border and string[border] != string[len(borders)]:
                border = borders[border - 1]
            borders.append(border + (string[border] == string[len(borders)]))
        return borders[length - 1]
