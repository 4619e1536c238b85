"""What each token of a vocabulary adds to the text, as bytes, read off the tokenizer's own decoder.

Two decoders cover the language models: byte level (each character of a token stands for a byte) and SentencePiece ("▁"
is a space, ``<0x41>`` a byte). With this table, detokenising is joining bytes. Called by ``ChatModel.load``.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Pieces:
    all: tuple[bytes, ...]
    """Indexed by token id, special tokens by their name; ids without a token are empty."""
    text: tuple[bytes, ...]
    """The same with special tokens empty: they are no part of the text."""
    strip_space: bool
    """One space at the very beginning of a text belongs to the tokenizer and not to the text."""


def read_pieces(tokenizer: Tokenizer) -> Pieces:
    """Raises ValueError for a decoder that is none of the two kinds."""
    # Not tokenizer.to_str(), which spells out the whole vocabulary: a second for 262,000 tokens.
    description = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    steps = description["decoders"] if description.get("type") == "Sequence" else [description]
    kinds = [step.get("type") for step in steps]
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if "ByteLevel" in kinds:
        table = _byte_characters()
        strip_space = False
        plain = {token.content for token in added.values()}  # these are matched, and so written, as they are

        def piece(token: str) -> bytes:
            if token in plain:
                return token.encode()
            try:
                return bytes([table[character] for character in token])
            except KeyError:  # one of the tokens that Command R's makers spelled out
                return token.encode()

    elif "Metaspace" in kinds or "ByteFallback" in kinds:
        strip_space = any(map(_strips_space, steps))

        def piece(token: str) -> bytes:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    else:
        raise ValueError(
            f"its decoder is {' + '.join(map(str, kinds))}; lmx reads ByteLevel, ByteFallback and Metaspace"
        )
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        pieces[index] = piece(token)
    text = pieces.copy()
    for index, added_token in added.items():
        if added_token.special:
            pieces[index] = added_token.content.encode()
            text[index] = b""
    return Pieces(tuple(pieces), tuple(text), strip_space)


def _strips_space(step: dict[str, Any]) -> bool:
    if step.get("type") == "Metaspace":
        return step.get("prepend_scheme") != "never"
    return step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
