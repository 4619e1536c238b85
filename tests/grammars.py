"""Whether a grammar, as the engine gets it, admits a text: asked of llguidance with the tests' own tokenizer."""

from functools import cache

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from lmx.chat.pieces import read_pieces
from tests.models import train_tokenizer


class _Words:
    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = read_pieces(tokenizer)
        self._tokenizer = tokenizer
        self.tokens = list(pieces.all)
        self.special_token_ids = [index for index, piece in enumerate(pieces.text) if not piece]
        self.eos_token_id = 2
        self.bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids


@cache
def _tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Words(train_tokenizer())), eos_token=2)


def admits(grammar: str, text: str) -> bool:
    """``text`` may be the whole answer."""
    if not grammar:
        return True
    matcher = LLMatcher(_tokenizer(), grammar)
    assert not matcher.is_error(), matcher.get_error()
    for token in train_tokenizer().encode(text).ids:
        if not matcher.consume_token(token):
            return False
    return bool(matcher.is_accepting())
