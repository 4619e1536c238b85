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
from llguidance.numpy import fill_next_token_bitmask
from tokenizers import Tokenizer

from lmx.chat.pieces import read_pieces
from lmx.chat.stack import on_a_large_stack, too_large
from lmx.engine.backend import Sequence as EngineSequence
from lmx.engine.requests import Refused

# What is kept compiled, since agents send the same tools in every turn: so many grammars, of so many characters in all.
# A compiled one takes up to 170 bytes for each of its characters (measured: nested anyOf).
_KEPT = 256
_KEPT_CHARACTERS = 2 << 20
# Of an answer's masks, before their average counts: the first ones build most of the lexer's states.
_FREE_S = 1.0
_SHOWN_CHARACTERS = 500
_TOO_MUCH = ("too complex", "too large", "too many", "too big", "limit", "fuel", "max is", "symbols.len()")

Masks = npt.NDArray[np.uint32]
"""(rows, ⌈vocabulary / 32⌉): the tokens that each row may draw."""


class Constraint:
    """How far one answer has come in its grammar. Those of one grammar share the lexer's states, and its limits."""

    def __init__(self, grammar: str, matcher: llguidance.LLMatcher) -> None:
        self.grammar = grammar
        self.matcher = matcher
        self.tokens = 0
        self.masks_s = 0.0
        """How long its masks took."""
        self._overdue = ""

    def fill(self, bits: npt.NDArray[np.int32], row: int, most_s: float) -> None:
        """Write the mask of its next token. One whose masks take longer than that, on average, fails."""
        started = time.perf_counter()
        self.fill_draft(bits, row)
        self.masks_s += time.perf_counter() - started
        if self.masks_s > _FREE_S + most_s * (self.tokens + 1):
            self._overdue = f"too complex: the masks of {self.tokens + 1} tokens took {self.masks_s:.1f} s"

    def fill_draft(self, bits: npt.NDArray[np.int32], row: int) -> None:
        """The same after drafts, which no answer fails for."""
        fill_next_token_bitmask(self.matcher, bits, row)

    def follow(self, draft: int) -> bool:
        """Take a draft, for ``rollback``; False: it cannot come here, and nothing has changed."""
        followed = bool(self.matcher.try_consume_tokens([draft]))
        self.tokens += followed
        return followed

    def advance(self, token: int) -> bool:
        """Take the token that was drawn. False: no further one can be found, ``refusal`` says why."""
        self.tokens += 1
        return not self._overdue and bool(self.matcher.consume_token(token)) and not self.matcher.is_error()

    def rollback(self, tokens: int) -> None:
        """Take so many tokens back (rejected drafts)."""
        if not self.matcher.rollback(tokens):
            raise ValueError(f"{tokens} tokens cannot be taken back: {self.refusal}")
        self.tokens -= tokens

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
        error = self._overdue or str(self.matcher.get_error())
        if error == "NoExtensionBias":  # in llguidance's words
            return Refused("grammar_invalid", "there is no text that it admits")
        code = "grammar_too_complex" if any(word in error.lower() for word in _TOO_MUCH) else "grammar_invalid"
        return Refused(code, error.split("\n", 1)[0][:_SHOWN_CHARACTERS])

    def copy(self) -> "Constraint":
        return Constraint(self.grammar, self.matcher.deep_copy())


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
            self._tidy()
        self._compiled.move_to_end(grammar)
        if not compiled.done():
            return None
        found = compiled.result()
        if isinstance(found, Refused):
            raise Refused(found.code, str(found))
        return found.copy()

    def _tidy(self) -> None:
        """Forget the grammars that were not asked for the longest, but never the last one."""
        while len(self._compiled) > 1 and (len(self._compiled) > _KEPT or self._characters > _KEPT_CHARACTERS):
            self.forget(next(iter(self._compiled)))

    def forget(self, grammar: str) -> None:
        """Compile it anew when it is asked for again: after a limit of the lexer was reached, that of all its answers,
        each further one would fail."""
        compiled = self._compiled.pop(grammar, None)
        if compiled is not None:
            compiled.cancel()
            self._characters -= len(grammar)


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
    # Alternatives (lmx.chat lets 5,000 be) and properties (2,000, four each) are items of one row.
    limits = llguidance.LLParserLimits(verbose_errors=False, initial_lexer_fuel=5_000_000, max_items_in_row=10_000)
    try:
        made = on_a_large_stack(partial(llguidance.LLMatcher, vocabulary, grammar, log_level=0, limits=limits))
    except BaseException as error:
        return Refused("grammar_invalid", f"{type(error).__name__}: {error}"[:_SHOWN_CHARACTERS])
    constraint = Constraint(grammar, made)
    if not made.is_error():  # the first mask builds most of the lexer's states, and here nobody waits for it
        made.compute_bitmask()
    return constraint.refusal if made.is_error() else constraint


class Masker:
    """Fills the masks of a step's rows: one after the other, which for a JSON schema is 30 µs each. With threads
    (``LLExecutor``) those of 8 rows took 0.3 to 1.5 ms instead of 0.25 on two cores, and 7 where others wanted them."""

    def __init__(self, vocab_size: int, end_ids: Sequence[int], most_ms: float) -> None:
        """``most_ms``: of a mask, on average."""
        self._words = (vocab_size + 31) // 32
        self._end_ids = tuple(token for token in end_ids if token < vocab_size)
        self._most_s = most_ms / 1e3

    def masks(self, rows: Sequence[EngineSequence | None]) -> Masks | None:
        """For the rows' next draw; None if none of them has a mask. Rows without one may draw anything."""
        masked = [(i, row) for i, row in enumerate(rows) if row is not None and row.masked and not row.ended]
        if not masked:
            return None
        bits = np.full((len(rows), self._words), -1, np.int32)
        masks = bits.view(np.uint32)
        for i, row in masked:
            if row.constraint:
                row.constraint.fill(bits, i, self._most_s)
            self._ends(masks[i], row, row.generated_tokens)
        return masks

    def along(self, row: EngineSequence, drafts: Sequence[int]) -> Masks:
        """The same for one row's draws in a step that verifies drafts: of its next token, then of those after each
        draft. After a draft that its grammar refuses, which so is never drawn, and where no mask is needed any more,
        anything may be drawn."""
        bits = np.full((1 + len(drafts), self._words), -1, np.int32)
        masks = bits.view(np.uint32)
        constraint, followed = row.constraint, 0
        for i, draft in enumerate((*drafts, None)):
            generated = row.generated_tokens + i
            if constraint is None and generated >= row.min_tokens:
                break
            if constraint and i:
                constraint.fill_draft(bits, i)
            elif constraint:
                constraint.fill(bits, i, self._most_s)
            self._ends(masks[i], row, generated)
            if constraint and draft is not None:
                if not constraint.follow(draft):
                    break
                followed += 1
        if constraint and followed:
            constraint.rollback(followed)
        return masks

    def _ends(self, mask: npt.NDArray[np.uint32], row: EngineSequence, generated: int) -> None:
        """An answer's own end tokens, and those that come too early. Where nothing else can follow, they may come."""
        if row.stop_ids and row.constraint and row.constraint.accepting:
            _set(mask, row.stop_ids, True)
        early = generated < row.min_tokens
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
