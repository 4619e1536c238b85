"""Random walks through a grammar, over bytes: what a model that knows nothing could write. Used by tests."""

import random

from llguidance import LLMatcher

from lmx.chat.forms.patterns import bytes_tokenizer

END = 256
_CLOSERS = frozenset(b'"}]')


def matcher(grammar: str) -> LLMatcher:
    made = LLMatcher(bytes_tokenizer(), grammar)
    assert not made.is_error(), made.get_error()
    return made


def takes(start: LLMatcher, text: str) -> bool:
    """Whether the text is a whole answer."""
    run = start.deep_copy()
    tokens = list(text.encode())
    return run.try_consume_tokens(tokens) == len(tokens) and run.is_accepting()


def walk(start: LLMatcher, rng: random.Random, *, most: int = 3000, hurry: int = 400) -> bytes | None:
    """One answer, drawn byte by byte with some will to come to an end; None: it did not within ``most`` bytes."""
    run = start.deep_copy()
    written = bytearray()
    while len(written) < most:
        mask = run.compute_bitmask()
        assert not run.is_error(), run.get_error()
        allowed = [byte for byte in range(END + 1) if mask[byte >> 3] >> (byte & 7) & 1]
        if END in allowed and (len(allowed) == 1 or rng.random() < 0.7):
            return bytes(written)
        allowed = [byte for byte in allowed if byte != END]
        assert allowed, f"stuck after {bytes(written)!r}"
        closing = [byte for byte in allowed if byte in _CLOSERS]
        byte = rng.choice(closing if closing and rng.random() < (0.35 if len(written) < hurry else 0.9) else allowed)
        assert run.consume_token(byte)
        written.append(byte)
    return None
