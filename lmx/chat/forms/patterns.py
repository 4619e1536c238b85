"""Regular expressions of JSON schemas, asked of llguidance itself: the engine's dialect, and no backtracking.

Pure. Called by the modules that read, hold and write schemas, and by ``lmx.chat.forms.structured``.
"""

import json
import re
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, Final

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

Tree = dict[str, Any]
MAX_UNROLLED: Final = 50_000
"""Characters and classes of a regular expression, repetitions written out: a mask costs up to 5 µs for each."""


class _Bytes:
    """A vocabulary of the 256 bytes."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@cache
def bytes_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=[256])


@lru_cache(maxsize=4096)
def fault(pattern: str) -> str:
    """Why llguidance cannot take the pattern; empty: it can."""
    grammar = "start: %json " + json.dumps({"type": "string", "pattern": pattern})
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if not failed:
        return ""
    message = messages[0].partition("failed to compile JSON schema: ")[2] or messages[0]
    return message.partition("\n   1 |")[0].partition("error: ")[2] or message.partition("\n   1 |")[0][:200]


@lru_cache(maxsize=4096)
def matches(pattern: str, text: str) -> bool:
    """Whether the pattern occurs in the text. One that llguidance cannot read matches nothing."""
    matcher = _matcher(pattern).deep_copy()
    spelled = list(json.dumps(text, ensure_ascii=False).encode(errors="replace"))
    return not matcher.is_error() and matcher.try_consume_tokens(spelled) == len(spelled) and matcher.is_accepting()


@lru_cache(maxsize=256)
def _matcher(pattern: str) -> LLMatcher:
    return LLMatcher(bytes_tokenizer(), "start: %json " + json.dumps({"type": "string", "pattern": pattern}))


_QUANTIFIER = re.compile(r"\{\d+(?:,\d*)?\}")
_ODD_ESCAPES = {r"\0": r"\x00", r"\/": "/"}


def translated(pattern: str) -> str:
    """An ECMA pattern in llguidance's dialect, which reads ``[``, ``&&``, ``--`` and ``~~`` in brackets otherwise."""
    parts: list[str] = []
    inside = False
    index = 0
    while index < len(pattern):
        character = pattern[index]
        taken = character
        if character == "\\":
            taken = pattern[index : index + 2]
            part = _ODD_ESCAPES.get(taken, taken)
            if taken == r"\b" and inside:
                part = r"\x08"
            elif taken == r"\u" and pattern.startswith("{", index + 2):
                taken = part = pattern[index : pattern.find("}", index) + 1] or taken
            elif taken == r"\c" and pattern[index + 2 : index + 3].isalpha():
                taken = pattern[index : index + 3]
                part = f"\\x{ord(taken[2]) % 32:02x}"
        elif inside:
            inside = character != "]"
            repeated = character in "&~-" and pattern[index + 1 : index + 2] == character
            part = f"\\{character}" if character == "[" or repeated else character
        elif character == "[":
            taken = next((empty for empty in ("[^]", "[]") if pattern.startswith(empty, index)), "[")
            inside = taken == "["
            part = {"[^]": r"[\s\S]", "[]": r"[^\s\S]"}.get(taken, "[")
            if inside and pattern.startswith("[^", index):
                taken = part = "[^"
        elif character == "{":
            quantifier = _QUANTIFIER.match(pattern, index)
            taken = quantifier[0] if quantifier else character
            part = taken if quantifier else r"\{"
        else:
            part = character
        parts.append(part)
        index += len(taken)
    return "".join(parts)


_SPELLED = re.compile(r"\\[pPux]\{[^}]{0,40}\}|\\.", re.S)
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.S)
_COUNTED = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_ENDLESS: Final = 10**9


def unrolled(pattern: str) -> int:
    """How many characters and classes it has with every counted repetition written out. llguidance's fuel does not
    see them: ``((a{100}){100}){100}`` compiles in a millisecond, and each of its masks takes seconds."""
    open_groups, last, index = [0], 0, 0
    while index < len(pattern):
        counted = _COUNTED.match(pattern, index)
        if counted and any(counted.groups()):
            times = max(min(int(digits[:10]), _ENDLESS) for digits in counted.groups() if digits)
            open_groups[-1] += last * (times - 1)
            last = min(last * times, _ENDLESS)
        elif pattern[index] == "(":
            open_groups.append(0)
        elif pattern[index] == ")" and len(open_groups) > 1:
            last = min(open_groups.pop(), _ENDLESS)
            open_groups[-1] += last
        else:
            last = int(pattern[index] not in "|*+?")
            open_groups[-1] += last
        spelled = counted or _SPELLED.match(pattern, index) or _CLASS.match(pattern, index)
        if spelled is None and pattern[index] == "[":
            break  # it is never closed: no pattern
        index = spelled.end() if spelled else index + 1
    return min(sum(open_groups), _ENDLESS)


def none_of(texts: Iterable[str]) -> str:
    """A pattern of every other text, which ECMA would say with a lookahead."""
    tree: Tree = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return f"^{_others(tree)}$"


def _others(tree: Tree) -> str:
    heads = [character for character in tree if character]
    ways = [f"{escape(character)}{_others(tree[character])}" for character in heads]
    ways.append(f"[^{''.join(map(escape, heads))}][\\s\\S]*" if heads else "[\\s\\S]+")
    return f"(?:{'|'.join(ways)})" + ("" if "" in tree else "?")


def escape(character: str) -> str:
    """One character, as itself, inside or outside of brackets."""
    return character if character.isalnum() else f"\\u{{{ord(character):x}}}"
