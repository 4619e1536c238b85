"""What an answer must match: llguidance's matchers, compiled beside the step loop, and the masks of their next tokens.

A grammar is a client's: whatever is wrong with one, or however long it takes, is told of its request alone. Masks are
bits, 32 tokens a word. Made once an engine; the step loop compiles and advances, the back ends ask for masks.

The algorithm (an Earley parser over a lexer of derivatives, along the tokenizer's trie) is llguidance's:
https://github.com/guidance-ai/llguidance
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from tokenizers import Tokenizer

from lmx.chat.pieces import read_pieces
from lmx.engine.backend import Sequence as EngineSequence
from lmx.engine.requests import Refused

_KEPT = 256
"""Compiled grammars. Agents send the same tools in every turn."""
_SHOWN_CHARACTERS = 500
_TOO_MUCH = ("too complex", "too large", "too many", "too big", "limit", "fuel")

Masks = npt.NDArray[np.uint32]
"""(rows, ⌈vocabulary / 32⌉): the tokens that each row may draw."""


class Constraint:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher

    def advance(self, token: int) -> bool:
        """Take the token that was drawn. False: no further one can be found, ``refusal`` says why."""
        return bool(self.matcher.consume_token(token)) and not self.matcher.is_error()

    @property
    def complete(self) -> bool:
        """Nothing but an end can follow."""
        return bool(self.matcher.is_stopped()) and not self.matcher.is_error()

    @property
    def refusal(self) -> Refused:
        """What is told of a grammar that llguidance gave up on."""
        error = str(self.matcher.get_error())
        code = "grammar_too_complex" if any(word in error.lower() for word in _TOO_MUCH) else "grammar_invalid"
        return Refused(code, error.split("\n", 1)[0][:_SHOWN_CHARACTERS])

    def copy(self) -> "Constraint":
        return Constraint(self.matcher.deep_copy())


class Grammars:
    """The compiler of one engine. ``compile`` never blocks; the rest of its methods are of the loop's thread, too."""

    def __init__(
        self, words: str, vocab_size: int, end_ids: Sequence[int], *, wake: Callable[[], None] = lambda: None
    ) -> None:
        """``words``: the folder with tokenizer.json. ``wake``: called, by another thread, when something is
        compiled."""
        self._wake = wake
        self._pool = ThreadPoolExecutor(2, "grammar")
        self._tokenizer = self._pool.submit(_read_tokenizer, Path(words), vocab_size, tuple(end_ids))
        self._compiled: OrderedDict[str, Constraint] = OrderedDict()
        self._running: dict[str, Future[Constraint]] = {}

    def compile(self, grammar: str) -> Constraint | None:
        """A constraint at its beginning; None: not yet, ask again when woken. Raises Refused."""
        if grammar not in self._compiled:
            running = self._running.get(grammar)
            if running is None:
                running = self._running[grammar] = self._pool.submit(_compile, self._tokenizer, grammar)
                running.add_done_callback(lambda _: self._wake())
            if not running.done():
                return None
            del self._running[grammar]
            self._compiled[grammar] = running.result()
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar].copy()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Words:
    """A vocabulary in the shape that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        tokens = read_pieces(tokenizer).all
        # The model's output may have more rows than there are tokens: nothing ever matches an empty one.
        self.tokens = [*tokens, *[b""] * (vocab_size - len(tokens))]
        added = tokenizer.get_added_tokens_decoder()
        self.special_token_ids = sorted({*(index for index, token in added.items() if token.special), *end_ids})
        self.eos_token_id = end_ids[0]
        self.bos_token_id = None

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _read_tokenizer(words: Path, vocab_size: int, end_ids: Sequence[int]) -> llguidance.LLTokenizer:
    tokenizer = Tokenizer.from_file(str(words / "tokenizer.json"))
    wrapper: Any = llguidance.TokenizerWrapper(_Words(tokenizer, vocab_size, end_ids))
    return llguidance.LLTokenizer(wrapper, eos_token=list(end_ids))


def _compile(tokenizer: "Future[llguidance.LLTokenizer]", grammar: str) -> Constraint:
    try:
        vocabulary = tokenizer.result()
    except Exception as error:
        raise Refused(
            "grammar_invalid", f"this model's tokenizer cannot be constrained ({type(error).__name__}: {error})"
        ) from None
    # Errors do not quote the grammar, and nothing is printed for a client's mistakes.
    limits = llguidance.LLParserLimits(verbose_errors=False)
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    constraint = Constraint(matcher)
    if matcher.is_error():
        raise constraint.refusal
    return constraint


class Masker:
    """Fills the masks of a step's rows."""

    def __init__(self, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._words = (vocab_size + 31) // 32
        self._end_ids = tuple(end_ids)
        self._executor: Any = None

    def masks(self, rows: Sequence[EngineSequence | None]) -> Masks | None:
        """For the rows' next draw; None if none of them has a mask. Rows without one may draw anything."""
        if not any(row is not None and row.masked for row in rows):
            return None
        bits = np.full((len(rows), self._words), -1, np.int32)
        matchers = [(row.constraint.matcher, i) for i, row in enumerate(rows) if row is not None and row.constraint]
        if len(matchers) == 1:
            fill_next_token_bitmask(*matchers[0][:1], bits, matchers[0][1])
        elif matchers:
            self._executor = self._executor or llguidance.LLExecutor()
            fill_next_token_bitmask_par(self._executor, matchers, bits)
        masks = bits.view(np.uint32)
        for mask, row in zip(masks, rows, strict=True):
            if row is not None and row.masked:
                self._ends(mask, row)
        return masks

    def _ends(self, mask: npt.NDArray[np.uint32], row: EngineSequence) -> None:
        """An answer's own end tokens, and those that come too early."""
        if row.stop_ids and row.constraint and row.constraint.matcher.is_accepting():
            _set(mask, row.stop_ids, True)
        if row.generated_tokens < row.min_tokens:
            before = mask.copy()
            _set(mask, (*self._end_ids, *row.stop_ids), False)
            if not mask.any():  # the answer is complete: nothing else can follow
                mask[:] = before


def _set(mask: npt.NDArray[np.uint32], tokens: Sequence[int], value: bool) -> None:
    for token in tokens:
        bit = np.uint32(1 << (token & 31))
        mask[token >> 5] = mask[token >> 5] | bit if value else mask[token >> 5] & ~bit
