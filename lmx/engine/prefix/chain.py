"""What a prefix is called: a chain of hashes over its tokens, a block at a time (vLLM's and SGLang's way).

The key of a block stands for every token from the sequence's first on, the model, how its KV is held, and who may share
it; so equal keys mean equal KV, and a foreign token is never found. Pure; used by every tier of the prefix store.

``Chain`` is one sequence's: ``Chain(root, tokens, session)``, ``key(blocks)``, ``shared(other, most)``; the rest of its
fields are the memory tier's (``ram``).
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmx.engine.prefix.nodes import Conversation

BLOCK_TOKENS = 256
KEY_BYTES = 16


def root_key(fingerprint: str, salt: str) -> bytes:
    """Where a chain begins. ``fingerprint``: of all that KV depends on beside the tokens (``fingerprint.py``);
    adapters and images will have their place here and in ``next_key``."""
    # A salt is any text that JSON can hold, unpaired surrogates too.
    named = f"{fingerprint}\n{salt}".encode(errors="surrogatepass")
    return hashlib.blake2b(named, digest_size=KEY_BYTES, person=b"lmx root").digest()


def next_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Of a block, or of a part of one at a sequence's end."""
    packed = tokens if isinstance(tokens, array) else array("I", tokens)
    return hashlib.blake2b(parent + packed.tobytes(), digest_size=KEY_BYTES).digest()


class Chain:
    """The keys of one sequence, made as they are asked for. Hashing 62,000 tokens takes about 2 ms."""

    __slots__ = ("_keys", "conversation", "prompt_tokens", "put_tokens", "session", "tokens", "turn")

    def __init__(self, root: bytes, tokens: list[int], session: str = "") -> None:
        """``tokens``: the prompt; the list stays the caller's, who only appends to it. ``session``: what the client
        calls the conversation, or a group of them; "": nothing."""
        self.tokens = tokens
        self.prompt_tokens = len(tokens)
        self.session = session
        self.conversation: Conversation | None = None
        """Which one it goes on with; None: not looked for yet."""
        self.turn = 0
        """How many sequences the memory tier had met."""
        self.put_tokens = 0
        """As far as it was kept once."""
        self._keys = [root]

    def key(self, blocks: int) -> bytes:
        """Of its first so many blocks, which must be whole; 0: the root."""
        while len(self._keys) <= blocks:
            start = (len(self._keys) - 1) * BLOCK_TOKENS
            self._keys.append(next_key(self._keys[-1], self.tokens[start : start + BLOCK_TOKENS]))
        return self._keys[blocks]

    def shared(self, other: "Chain", most: int) -> int:
        """How many first tokens, of at most ``most``, both have, and may share."""
        most = min(most, len(self.tokens), len(other.tokens))
        if most <= 0 or self._keys[0] != other._keys[0]:
            return 0
        low, high = 0, most // BLOCK_TOKENS  # equal keys mean that all before is equal
        while low < high:
            middle = (low + high + 1) // 2
            if self.key(middle) == other.key(middle):
                low = middle
            else:
                high = middle - 1
        start = low * BLOCK_TOKENS
        end = min(start + BLOCK_TOKENS, most)
        return start + common(self.tokens[start:end], other.tokens[start:end])


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # comparing slices is many times faster than a loop over tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
