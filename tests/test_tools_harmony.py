"""Harmony: what gpt-oss writes is read in pieces, and its whole answer is enforced by grammar."""

import json
import re
from typing import Any

import jsonschema
import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.chat.events import CallStart, Content, Event, Malformed, Reasoning
from lmx.chat.tools.base import Tool, WholeFormat
from lmx.chat.tools.harmony import HARMONY
from tests.tool_calls import Walker, calls, content, every_way, read, reasoning, whole_calls

WRITE = Tool(
    "write_file",
    {
        "type": "object",
        "properties": {"path": {"type": "string"}, "content": {"type": "string"}},
        "required": ["path", "content"],
        "additionalProperties": False,
    },
)
NOW = Tool("now", {"type": "object", "properties": {}, "additionalProperties": False})
TOOLS = [WRITE, NOW]
THOUGHT = "<|channel|>analysis<|message|>The user wants\na < b.<|end|>"
NEXT = "<|start|>assistant"
FINAL = "<|channel|>final<|message|>"


def events_of(text: str) -> list[Event]:
    return every_way(HARMONY, text, TOOLS)


def call(name: str, arguments: object) -> str:
    text = json.dumps(arguments, ensure_ascii=False)
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{text}<|call|>"


def test_an_answer_after_reasoning() -> None:
    events = events_of(f"{THOUGHT}{NEXT}{FINAL}It is 3 < 4 é 😀.\n<|return|>")
    assert events == [Reasoning("The user wants\na < b."), Content("It is 3 < 4 é 😀.\n")]


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.write_file <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.write_file<|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.write_file json<|message|>",
        "<|channel|>commentary to=functions.write_file<|message|>",
        " to=functions.write_file<|channel|>commentary json<|message|>",
        " to=functions.write_file<|channel|>commentary <|constrain|>json<|message|>",
        "<|channel|>analysis to=functions.write_file code<|message|>",
        "<|start|>assistant<|channel|>commentary to=write_file <|constrain|>json<|message|>",
    ],
)
@pytest.mark.parametrize("end", ["<|call|>", "<|end|>", ""])
def test_every_header_of_a_call(header: str, end: str) -> None:
    arguments = {"path": "a", "content": 'é "😀"\n<|call|><|start|>assistant<|channel|>final<|message|>}'}
    events = events_of(header + json.dumps(arguments, ensure_ascii=False) + end)
    assert whole_calls(events) == [("write_file", arguments)]
    assert content(events) == reasoning(events) == ""


def test_text_then_reasoning_then_several_calls() -> None:
    preamble = "<|channel|>commentary<|message|>Let me look.<|end|>"
    arguments = {"path": "<|end|>", "content": "<|channel|>"}
    text = f"{preamble}{NEXT}{THOUGHT}{NEXT}{call('write_file', arguments)}{NEXT}{call('now', {})}"
    events = events_of(text)
    assert whole_calls(events) == [("write_file", arguments), ("now", {})]
    assert content(events) == "Let me look."
    assert reasoning(events) == "The user wants\na < b."
    assert not [event for event in events if isinstance(event, Malformed)]


def test_messages_of_one_kind_are_apart() -> None:
    events = events_of(f"<|channel|>commentary<|message|>One.<|end|>{NEXT}{THOUGHT}{NEXT}{THOUGHT}{NEXT}{FINAL}Two.")
    assert content(events) == "One.\nTwo."
    assert reasoning(events) == "The user wants\na < b.\nThe user wants\na < b."


def test_markers_in_a_text_are_text() -> None:
    said = "A message ends at <|end|> or <|return|>; <|channel|>final<|message|> begins one, <|start|>user too. <|en"
    assert content(events_of(f"{FINAL}{said}<|return|>")) == said
    assert content(events_of(FINAL + said)) == said


def test_an_unknown_recipient_is_content() -> None:
    text = "<|channel|>commentary to=functions.delete <|constrain|>json<|message|>{}"
    events = events_of(f"{THOUGHT}{NEXT}{text}<|call|>")
    assert not calls(events)
    assert content(events) == NEXT + text
    (malformed,) = (event for event in events if isinstance(event, Malformed))
    assert "'delete'" in malformed.reason


@pytest.mark.parametrize("body", ["no JSON", '{"path": }', '["a"]'])
def test_arguments_that_are_no_object_are_content(body: str) -> None:
    text = f"<|channel|>commentary to=functions.now <|constrain|>json<|message|>{body}<|call|>{NEXT}{FINAL}Done."
    events = events_of(text)
    assert [event for event in events if isinstance(event, Malformed)]
    assert not [found for found in calls(events) if found.whole]
    together = "".join(found.arguments for found in calls(events)) + content(events)
    assert together == f"{body}\nDone."


@pytest.mark.parametrize("text", ["Hello there.", "", "to be", "<|", " ", "Hello <|end|>", "<html>"])
def test_an_answer_without_header_is_content(text: str) -> None:
    assert content(events_of(text)) == text.removesuffix("<|end|>")


def test_no_arguments() -> None:
    text = f"<|channel|>commentary to=functions.now <|constrain|>json<|message|><|call|>{NEXT}{FINAL}x"
    assert whole_calls(events_of(text)) == [("now", {})]


def test_a_call_that_is_cut_has_no_end() -> None:
    text = call("write_file", {"path": "a", "content": "b"})
    named = text.index(" <|constrain|>")
    whole = text.index("<|call|>")
    for cut in range(len("<|channel|>"), len(text)):
        events = read(HARMONY.parser(TOOLS), [text[:cut]])
        assert content(events) == ""
        assert [found.whole for found in calls(events)] == ([] if cut <= named else [cut >= whole])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_what_the_format_writes_is_read_again(data: st.DataObject) -> None:
    fragments = st.sampled_from(
        ["<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<", '"', "\\", "\n"]
    )
    strings = st.lists(fragments | st.text(max_size=4), max_size=6).map("".join)
    ends = re.compile(r"<\|(end|call|return)\|>(<\|start\|>|$)")
    texts = strings.filter(lambda text: text and not ends.search(text))
    thought, said = data.draw(texts), data.draw(texts)
    made = data.draw(st.lists(st.fixed_dictionaries({"path": strings, "content": strings}), max_size=2))
    parts = [f"<|channel|>analysis<|message|>{thought}<|end|>", f"<|channel|>commentary<|message|>{said}<|end|>"]
    parts += [call("write_file", arguments) for arguments in made]
    text = NEXT.join(parts)
    size = data.draw(st.integers(1, 30))
    events = read(HARMONY.parser(TOOLS), [text[at : at + size] for at in range(0, len(text), size)])
    assert whole_calls(events) == [("write_file", arguments) for arguments in made]
    assert (reasoning(events), content(events)) == (thought, said)


WALKER = Walker(HARMONY.markers)
BODY = 'body: %json {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": false}'


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "one"])
@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "not"])
@pytest.mark.parametrize("body", ["", BODY], ids=["text", "body"])
@pytest.mark.parametrize("choice", ["none", "auto", "required"])
def test_what_the_grammar_lets_through(choice: Any, body: str, thinking: bool, parallel: bool) -> None:
    form: WholeFormat = HARMONY
    grammar = form.answer(TOOLS, WALKER.special, choice=choice, parallel=parallel, body=body, thinking=thinking)
    assert not llguidance.LLMatcher.validate_grammar(grammar)
    schemas: dict[str, Any] = {tool.name: tool.parameters for tool in TOOLS}
    ended = 0
    for seed in range(8):
        text = WALKER.walk(grammar, seed, '{}"path:content', most=600)
        if text is None:
            continue
        ended += 1
        events = read(HARMONY.parser(TOOLS), [text])
        assert events == read(HARMONY.parser(TOOLS), list(text))
        assert not [event for event in events if isinstance(event, Malformed)], text
        found = whole_calls(events)
        assert not (found and choice == "none")
        assert found or choice != "required"
        assert parallel or len(found) <= 1
        assert thinking or not reasoning(events)
        for name, arguments in found:
            jsonschema.validate(arguments, schemas[name])
        if body and not found:
            jsonschema.validate(json.loads(content(events)), {"type": "object"})
    assert ended


def test_the_grammar_of_calls_alone() -> None:
    grammar = HARMONY.grammar(TOOLS, WALKER.special, parallel=True)
    text = WALKER.walk(f"start: calls\n{grammar.rules}", 3, '{}"path:content')
    assert text is not None
    assert whole_calls(read(HARMONY.parser(TOOLS), [grammar.trigger + text]))


def test_the_name_is_told_before_the_arguments_and_those_as_they_come() -> None:
    parser = HARMONY.parser(TOOLS)
    header, _, arguments = call("write_file", {"path": "a", "content": "b" * 100}).partition("{")
    assert parser.feed(header) == [CallStart(0, "write_file")]
    assert all(parser.feed(("{" + arguments)[at : at + 4]) for at in range(0, 120, 4))
