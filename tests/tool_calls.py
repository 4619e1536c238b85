"""What the tests of tool formats share: reading a text in pieces, and walking a grammar at random."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from lmx.chat.events import CallArguments, CallEnd, CallStart, Content, Event, Malformed, Reasoning
from lmx.chat.tools.base import Format, Parser, Tool

Made = tuple[str, Mapping[str, Any]]
"""A call that is to be written: the tool's name, and the arguments."""
Write = Callable[..., str]
"""(form, *made) to the text, as the model's own template writes it."""


def together(events: Sequence[Event]) -> list[Event]:
    """With pieces of one text or of one call's arguments put together."""
    found: list[Event] = []
    for _, group in groupby(events, lambda event: (type(event), getattr(event, "index", -1))):
        pieces = list(group)
        match pieces[0]:
            case Content() | Reasoning():
                found.append(type(pieces[0])("".join(piece.text for piece in pieces)))
            case CallArguments(index):
                found.append(CallArguments(index, "".join(piece.json for piece in pieces)))
            case _:
                found += pieces
    return found


def read(parser: Parser, pieces: Sequence[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return together([*events, *parser.finish()])


def every_way(form: Format, text: str, tools: Sequence[Tool]) -> list[Event]:
    """The whole text's events, which are the same for every cut and for single characters."""
    whole = read(form.parser(tools), [text])
    assert read(form.parser(tools), list(text)) == whole
    for cut in range(1, len(text)):
        assert read(form.parser(tools), [text[:cut], text[cut:]]) == whole, text[:cut]
    return whole


def in_pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def by_name(forms: Sequence[Format]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", forms, ids=lambda form: form.name)


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str
    whole: bool


def calls(events: Sequence[Event]) -> list[Call]:
    ended = {event.index for event in events if isinstance(event, CallEnd)}
    return [
        Call(
            start.name,
            "".join(e.json for e in events if isinstance(e, CallArguments) and e.index == start.index),
            start.index in ended,
        )
        for start in events
        if isinstance(start, CallStart)
    ]


def whole_calls(events: Sequence[Event]) -> list[tuple[str, object]]:
    found = calls(events)
    assert all(call.whole for call in found)
    return [(call.name, json.loads(call.arguments)) for call in found]


def content(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def reasoning(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Reasoning))


class Walker:
    """Writes what a grammar allows, at random: bytes, and ``special`` tokens."""

    def __init__(self, special: Sequence[str]) -> None:
        self.special = {token: 256 + number for number, token in enumerate(special)}
        self.tokens = [bytes([byte]) for byte in range(256)] + [token.encode() for token in special] + [b"<eos>"]
        self.eos_token_id = len(self.tokens) - 1
        self.bos_token_id = None
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self))

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    def walk(self, grammar: str, seed: int, liked: str, most: int = 1500) -> str | None:
        """Characters of ``liked`` are likelier. None: it did not end in ``most`` tokens."""
        draw = random.Random(seed)
        matcher = llguidance.LLMatcher(self.tokenizer, grammar)
        assert not matcher.get_error(), matcher.get_error()
        mask = allocate_token_bitmask(1, self.tokenizer.vocab_size)
        wanted = {*liked.encode(), *self.special.values()}
        written: list[int] = []
        while not matcher.is_stopped():
            if len(written) == most:
                return None
            fill_next_token_bitmask(matcher, mask)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(self.tokens)]
            allowed = np.nonzero(bits)[0].tolist()
            assert allowed, self._text(written)
            if allowed == [self.eos_token_id] or (matcher.is_accepting() and draw.random() < 0.3):
                break
            # Bytes over 127 are left out: at random they seldom end as characters.
            usual = [token for token in allowed if token < 128 or 256 <= token < self.eos_token_id]
            better = [token for token in usual if token in wanted] if draw.random() < 0.95 else []
            token = draw.choice(better or usual or allowed)
            assert matcher.consume_token(token)
            written.append(token)
        return self._text(written)

    def takes(self, grammar: str, text: str) -> bool:
        """Whether the grammar takes this text, with its special tokens as tokens, and may end there."""
        written: list[int] = []
        while text:
            token = next((token for token in self.special if text.startswith(token)), text[0])
            written += [self.special[token]] if token in self.special else token.encode()
            text = text[len(token) :]
        matcher = llguidance.LLMatcher(self.tokenizer, grammar)
        assert not matcher.get_error(), matcher.get_error()
        if matcher.validate_tokens(written) < len(written):
            return False
        matcher.consume_tokens(written)
        return bool(matcher.is_accepting())

    def _text(self, written: Sequence[int]) -> str:
        return b"".join(self.tokens[token] for token in written).decode()


def check_calls(form: Format, tools: Sequence[Tool], write: Write, before: str, *made: Made) -> None:
    """Calls behind text are read, and the text is theirs no more than the white space between them."""
    events = every_way(form, f"{before}{write(form, *made)}\n", tools)
    assert whole_calls(events) == list(made)
    assert content(events) == before.rstrip()
    assert not [event for event in events if isinstance(event, Malformed)]


def check_no_call(form: Format, tools: Sequence[Tool], write: Write, begin: str) -> None:
    """A call of no tool, and ``begin`` without one, are content. ``tools`` hold ``now``, without arguments."""
    call = write(form, ("now", {}))
    text = f"x {write(form, ('delete', {'path': 'a'}))} y {call}"
    events = every_way(form, text, tools)
    assert whole_calls(events) == [("now", {})]
    assert "".join(content(events).split()) == "".join(text.removesuffix(call).split())
    (malformed,) = (event for event in events if isinstance(event, Malformed))
    assert "'delete'" in malformed.reason
    for text in (f"{begin} is the marker", f"a {begin}", begin[:-1], "< <tool"):
        events = every_way(form, text, tools)
        assert content(events) == text
        assert not calls(events)


def check_walks(
    form: Format, tools: Sequence[Tool], walker: Walker, *, parallel: bool, seeds: range, likes: Sequence[str]
) -> None:
    """What the grammar lets through is read as whole calls, whose arguments are valid."""
    grammar = form.grammar(tools, walker.special, parallel=parallel)
    assert not llguidance.LLMatcher.validate_grammar(f"start: calls\n{grammar.rules}")
    schemas = {tool.name: tool.parameters for tool in tools}
    ended = 0
    for seed in seeds:
        text = walker.walk(f"start: calls\n{grammar.rules}", seed, likes[seed % len(likes)])
        if text is None:
            continue
        ended += 1
        text = grammar.trigger + text
        events = read(form.parser(tools), [text])
        assert read(form.parser(tools), list(text)) == events
        assert not [e for e in events if isinstance(e, Content | Malformed)], (text, events)
        found = whole_calls(events)
        assert found, text
        assert parallel or len(found) == 1, text
        for name, arguments in found:
            assert isinstance(schemas[name], dict)
            jsonschema.validate(arguments, schemas[name])
    assert ended
