"""Where prefills of models with recurrent states should pause, so that a checkpoint is kept there.

A recurrent state stands for all tokens before it, so a prefix can be had again only where one was copied: at the places
where prompts are likely to part. These are where messages begin (and so before the last user message, which some agents
replace with each turn), a few tokens before the prompt's end (the opening of an answer is written in another way once
it is history), and every so many tokens between. Pure; called by the prefix store.
"""

import json
from collections.abc import Sequence
from pathlib import Path

MOST = 16
"""Stops of one prompt that the scheduler keeps."""
BEFORE_END = 4
EVERY_TOKENS = 4096
# Two stops are at least so far from each other: each makes a pass of its own.
_APART = 32
_MESSAGES = 6
# To pause in a shorter prompt costs more than to compute it again.
_LEAST_TOKENS = 512


def message_marks(words: str) -> frozenset[int]:
    """The special tokens of a tokenizer's folder: templates put them around messages."""
    file = Path(words, "tokenizer.json")
    if not words or not file.is_file():
        return frozenset()
    added = json.loads(file.read_bytes()).get("added_tokens") or ()
    return frozenset(int(token["id"]) for token in added if token.get("special"))


def stops(prompt: Sequence[int], marks: frozenset[int]) -> tuple[int, ...]:
    """Ascending, inside the prompt."""
    if len(prompt) < _LEAST_TOKENS:
        return ()
    last = len(prompt) - BEFORE_END
    found = [last]
    # From the end, because later turns part near it; the message itself is on the far side of the stop.
    at = last
    for index in range(last - 1, 0, -1):
        if len(found) > _MESSAGES:
            break
        if prompt[index] in marks and at - index >= _APART:
            found.append(index)
            at = index
    first = min(found, default=last)
    every = max(EVERY_TOKENS, first // (MOST - len(found)) + 1 if len(found) < MOST else len(prompt))
    found += range(every, first - _APART, every)
    return tuple(sorted(set(found)))[-MOST:]
