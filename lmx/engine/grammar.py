"""What an answer must match: llguidance's matchers, compiled beside the step loop, and the masks of their next tokens.

A grammar is a client's: whatever is wrong with one, or however long it takes, is told of its request alone. Masks are
bits, 32 tokens a word. Made once an engine; the step loop compiles and advances, the back ends ask for masks.

The algorithm (an Earley parser over a lexer of derivatives, along the tokenizer's trie) is llguidance's:
https://github.com/guidance-ai/llguidance
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from tokenizers import Tokenizer

from lmx.chat.pieces import read_pieces
from lmx.chat.stack import on_a_large_stack, too_large
from lmx.engine.backend import Sequence as EngineSequence
from lmx.engine.requests import Refused

# What is kept compiled, since agents send the same tools in every turn: so many grammars, of so many characters in all.
# A compiled one takes up to 170 bytes for each of its characters (measured: nested anyOf).
_KEPT = 256
_KEPT_CHARACTERS = 2 << 20
# Masks are computed one after the other, 30 µs each for a JSON schema, until those of a step take this long: handing
# them to threads costs more than that, and 2 to 6 ms where other processes want the cores.
_SLOW_S = 0.002
# What an answer's masks may take in all beyond the patience for each one, in the processor's time: everybody waits for
# them. A schema of 2,000 properties takes 10 ms for one.
_PATIENCE_S = 0.02
_MOST_SLOW_S = 0.5
_SHOWN_CHARACTERS = 500
_TOO_MUCH = ("too complex", "too large", "too many", "too big", "limit", "fuel", "max is", "symbols.len()")

Masks = npt.NDArray[np.uint32]
"""(rows, ⌈vocabulary / 32⌉): the tokens that each row may draw."""


class Constraint:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher
        self._slow_s = 0.0

    def fill(self, bits: npt.NDArray[np.int32], row: int) -> None:
        """The mask of the next token, as the row of ``bits``."""
        started = time.thread_time()
        fill_next_token_bitmask(self.matcher, bits, row)
        self._slow_s += max(time.thread_time() - started - _PATIENCE_S, 0.0)

    @property
    def exhausted(self) -> bool:
        """Its masks have taken too long."""
        return self._slow_s > _MOST_SLOW_S

    def advance(self, token: int) -> bool:
        """Take the token that was drawn. False: no further one can be found, ``refusal`` says why."""
        return not self.exhausted and bool(self.matcher.consume_token(token)) and not self.matcher.is_error()

    def rollback(self, tokens: int) -> None:
        """Take so many tokens back (rejected drafts)."""
        if not self.matcher.rollback(tokens):
            raise ValueError(f"{tokens} tokens cannot be taken back: {self.refusal}")

    @property
    def accepting(self) -> bool:
        """The answer may end here."""
        return bool(self.matcher.is_accepting())

    @property
    def complete(self) -> bool:
        """Nothing but an end can follow."""
        return bool(self.matcher.is_stopped()) and not self.matcher.is_error()

    @property
    def refusal(self) -> Refused:
        """What is told of a grammar that llguidance gave up on."""
        if self.exhausted:
            return Refused("grammar_too_complex", f"finding its next tokens takes too long ({self._slow_s:.1f} s)")
        error = str(self.matcher.get_error())
        if error == "NoExtensionBias":  # in llguidance's words
            return Refused("grammar_invalid", "there is no text that it admits")
        code = "grammar_too_complex" if any(word in error.lower() for word in _TOO_MUCH) else "grammar_invalid"
        return Refused(code, error.split("\n", 1)[0][:_SHOWN_CHARACTERS])

    def copy(self) -> "Constraint":
        return Constraint(self.matcher.deep_copy())


class Grammars:
    """The compiler of one engine, for the loop's thread."""

    def __init__(
        self, words: str, vocab_size: int, end_ids: Sequence[int], *, wake: Callable[[], None] = lambda: None
    ) -> None:
        """``words``: the folder with tokenizer.json, "": there is none. ``wake``: called, by another thread, when
        something is compiled."""
        self._wake = wake
        self._pool = ThreadPoolExecutor(2, "grammar")
        self._tokenizer: Future[llguidance.LLTokenizer] | None = None
        if words:
            self._tokenizer = self._pool.submit(_read_tokenizer, Path(words), vocab_size, tuple(end_ids))
        self._compiled: OrderedDict[str, Future[Constraint | Refused]] = OrderedDict()
        self._characters = 0

    def compile(self, grammar: str) -> Constraint | None:
        """A constraint at its beginning; None: not yet, ask again when woken. Never blocks. Raises Refused."""
        if self._tokenizer is None:
            raise Refused("grammar_invalid", "this model has no tokenizer.json to constrain its output by")
        if fault := too_large(grammar):
            raise Refused("grammar_too_complex", fault)
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = self._pool.submit(_compile, self._tokenizer, grammar)
            compiled.add_done_callback(lambda _: self._wake())
            self._characters += len(grammar)
            self._forget()
        self._compiled.move_to_end(grammar)
        if not compiled.done():
            return None
        found = compiled.result()
        if isinstance(found, Refused):
            raise Refused(found.code, str(found))
        return found.copy()

    def _forget(self) -> None:
        """The grammars that were not asked for the longest, but never the last one."""
        while len(self._compiled) > 1 and (len(self._compiled) > _KEPT or self._characters > _KEPT_CHARACTERS):
            grammar, compiled = self._compiled.popitem(last=False)
            compiled.cancel()
            self._characters -= len(grammar)

    def close(self) -> None:
        """Compile nothing more. What is being compiled goes on: nothing can interrupt it."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Words:
    """A vocabulary in the shape that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # The model's output may have more rows than there are tokens, and nothing ever matches an empty one; or fewer.
        tokens = read_pieces(tokenizer).all[:vocab_size]
        self.tokens = [*tokens, *[b""] * (vocab_size - len(tokens))]
        added = tokenizer.get_added_tokens_decoder()
        special = {*(index for index, token in added.items() if token.special), *end_ids}
        self.special_token_ids = sorted(index for index in special if index < vocab_size)
        self.eos_token_id = end_ids[0]
        self.bos_token_id = None

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _read_tokenizer(words: Path, vocab_size: int, end_ids: Sequence[int]) -> llguidance.LLTokenizer:
    end_ids = [token for token in end_ids if token < vocab_size]
    if not end_ids:
        raise ValueError("it has no token that ends an answer")
    tokenizer = Tokenizer.from_file(str(words / "tokenizer.json"))
    wrapper: Any = llguidance.TokenizerWrapper(_Words(tokenizer, vocab_size, end_ids))
    return llguidance.LLTokenizer(wrapper, eos_token=end_ids)


def _compile(tokenizer: "Future[llguidance.LLTokenizer]", grammar: str) -> Constraint | Refused:
    """Raises nothing: the Rust side's panics are BaseExceptions, and would end the step loop that asks for the
    result."""
    try:
        vocabulary = tokenizer.result()
    except BaseException as error:
        return Refused("grammar_invalid", f"this model's tokenizer cannot be used ({type(error).__name__}: {error})")
    # Errors do not quote the grammar, and nothing is printed for a client's mistakes.
    # Alternatives, of which lmx.chat lets 5,000 be, are items.
    limits = llguidance.LLParserLimits(verbose_errors=False, initial_lexer_fuel=5_000_000, max_items_in_row=6000)
    try:
        made = on_a_large_stack(partial(llguidance.LLMatcher, vocabulary, grammar, log_level=0, limits=limits))
    except BaseException as error:
        return Refused("grammar_invalid", f"{type(error).__name__}: {error}"[:_SHOWN_CHARACTERS])
    constraint = Constraint(made)
    if not made.is_error():  # the first mask takes the longest, and here nobody waits for it
        constraint.fill(np.empty((1, (vocabulary.vocab_size + 31) // 32), np.int32), 0)
    return constraint.refusal if made.is_error() or constraint.exhausted else constraint


class Masker:
    """Fills the masks of a step's rows."""

    def __init__(self, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._words = (vocab_size + 31) // 32
        self._end_ids = tuple(token for token in end_ids if token < vocab_size)
        self._executor: Any = None
        self._slow = False
        """The last step's masks were."""

    def masks(self, rows: Sequence[EngineSequence | None]) -> Masks | None:
        """For the rows' next draw; None if none of them has a mask. Rows without one may draw anything."""
        masked = [(i, row) for i, row in enumerate(rows) if row is not None and row.masked and not row.ended]
        if not masked:
            return None
        bits = np.full((len(rows), self._words), -1, np.int32)
        self._fill([(row.constraint, i) for i, row in masked if row.constraint], bits)
        masks = bits.view(np.uint32)
        for i, row in masked:
            self._ends(masks[i], row)
        return masks

    def _fill(self, constraints: list[tuple[Constraint, int]], bits: npt.NDArray[np.int32]) -> None:
        started, together = time.perf_counter(), self._slow and len(constraints) > 1
        if together:
            self._executor = self._executor or llguidance.LLExecutor()
            fill_next_token_bitmask_par(self._executor, [(each.matcher, i) for each, i in constraints], bits)
        else:
            for constraint, i in constraints:
                constraint.fill(bits, i)
        elapsed_s = time.perf_counter() - started
        # Where even that takes long, they go one after the other: whose masks are slow is to be seen.
        self._slow = elapsed_s > _SLOW_S and not (together and elapsed_s > _PATIENCE_S)

    def _ends(self, mask: npt.NDArray[np.uint32], row: EngineSequence) -> None:
        """An answer's own end tokens, and those that come too early. Where nothing else can follow, they may come."""
        if row.stop_ids and row.constraint and row.constraint.accepting:
            _set(mask, row.stop_ids, True)
        early = row.generated_tokens < row.min_tokens
        unwanted = self._end_ids if early or row.ignore_eos else ()
        if early:
            unwanted += row.stop_ids
        if unwanted:
            before = mask.copy()
            _set(mask, unwanted, False)
            if not mask.any():
                mask[:] = before


def _set(mask: npt.NDArray[np.uint32], tokens: Sequence[int], value: bool) -> None:
    for token in tokens:
        bit = np.uint32(1 << (token & 31))
        mask[token >> 5] = mask[token >> 5] | bit if value else mask[token >> 5] & ~bit
