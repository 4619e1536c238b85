"""Prompts for filling in the middle: what stands before and after it, as each family of code models was trained on it.

Pure. ``ChatModel.encode_middle`` calls it; which format a model has is told by the tokens in its vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Middle:
    """One family's special tokens."""

    prefix: str
    suffix: str
    middle: str
    """"": none, the middle begins right after the prefix."""
    suffix_first: bool = False
    ends: tuple[str, ...] = ()
    """What such models write after the middle, besides their end token."""


FORMATS = (
    # Qwen2.5-Coder, Qwen3-Coder, CodeGemma, Granite 4
    Middle(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ends=("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>", "<|endoftext|>"),
    ),
    # StarCoder, StarCoder2, Granite Code, Stable Code
    Middle("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ends=("<file_sep>", "<fim_pad>", "<|endoftext|>")),
    Middle("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<|endoftext|>",)),  # SantaCoder
    Middle("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder, -V2, -V3
    Middle("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),  # CodeLlama
    Middle("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", ends=("<|endoftext|>",)),  # GLM-4
    Middle("[PREFIX]", "[SUFFIX]", "", suffix_first=True),  # Codestral
    Middle("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),  # Seed-Coder
)


def find_format(token_to_id: Callable[[str], int | None]) -> Middle | None:
    """The format whose tokens the vocabulary has."""
    for known in FORMATS:
        if all(token_to_id(token) is not None for token in (known.prefix, known.suffix, known.middle) if token):
            return known
    return None


def arrange(
    known: Middle, token_to_id: Callable[[str], int | None], prefix: list[int], suffix: list[int]
) -> tuple[list[int], tuple[int, ...]]:
    """The prompt's tokens without BOS, and the tokens that end the middle."""

    def ids(*tokens: str) -> list[int]:
        return [found for found in map(token_to_id, filter(None, tokens)) if found is not None]

    before, after = ids(known.prefix) + prefix, ids(known.suffix) + suffix
    parts = after + before if known.suffix_first else before + after
    return parts + ids(known.middle), tuple(ids(*known.ends))
