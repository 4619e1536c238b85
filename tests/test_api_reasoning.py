"""Reasoning over HTTP: told apart, counted, limited and left out as asked, whole and in a stream, cut everywhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.api_server import Server, with_server, write_model
from tests.grammars import admits
from tests.test_api_tools import CHAT, PARIS, TOOLS, both, put_together, splits, streamed, written

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls }}\n{% endfor %}{{ tools | tojson }}"
    "assistant: {% if enable_thinking is false %}<think>\n\n</think>\n{% elif open %}<think>\n{% endif %}"
)
THOUGHT = "I wonder: is it so?\n\nYes.</thin"
ANSWER = "It is so."
THINKS = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("models") / "thinker")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@with_server()
async def test_reasoning_is_told_apart_however_it_comes(server: Server) -> None:
    entry = (await server.http.get("/v1/models")).json()["data"][0]
    assert entry["reasoning_format"] == "think"
    assert "<think>" in entry["reasoning_format_reason"]
    opened = HELLO | {"chat_template_kwargs": {"open": True}}
    for body, text in ((HELLO, THINKS), (opened, THINKS.removeprefix("<think>\n"))):
        for steps in splits(text):
            server.say(*steps)
            message = await both(server, body)
            assert (message["content"], message["finish"]) == (ANSWER, "stop")
            assert message["reasoning_content"] == message["reasoning"] == THOUGHT
    server.say(*ANSWER)
    message = await both(server, HELLO)
    assert (message["content"], message.get("reasoning")) == (ANSWER, None)
    await server.free()


@with_server()
async def test_reasoning_tokens_are_counted(server: Server) -> None:
    thought, answer = "<think>abc</think>", "def"
    server.say(*[character.encode() for character in thought + answer])
    usage = (await server.http.post(CHAT, json=HELLO)).json()["usage"]
    assert usage["completion_tokens"] == len(thought) + len(answer) + 1  # and the end
    counted = usage["completion_tokens_details"]["reasoning_tokens"]
    assert len("abc</think>") <= counted <= len(thought)
    server.say((thought + answer).encode())  # all in one step
    usage = (await server.http.post(CHAT, json=HELLO)).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == counted
    events = await streamed(server, HELLO | {"stream_options": {"include_usage": True}})
    assert events[-1]["usage"] == usage
    server.say(*"abcdef")
    usage = (await server.http.post(CHAT, json=HELLO)).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


@with_server()
async def test_unfinished_thinking_at_length(server: Server) -> None:
    server.say(*"<think>\nI wonder", finish="length")
    message = await both(server, HELLO)
    assert (message["reasoning"], message["content"] or "", message["finish"]) == ("I wonder", "", "length")


@with_server()
async def test_a_call_after_reasoning_and_none_within(server: Server) -> None:
    call = written("get_weather", PARIS)
    for steps in splits(f"<think>\nI could {call} but\n</think>\n\n{call}"):
        server.say(*steps)
        message = await both(server, TOOLS)
        assert (message["content"], message["finish"]) == (None, "tool_calls")
        assert message["reasoning"] == f"I could {call} but"
        assert [json.loads(one["arguments"]) for one in message["tool_calls"]] == [PARIS]
    assert admits(server.grammars()[-1], f"<think>\nx\n</think>\n\n{call}")


@with_server()
async def test_stop_strings_do_not_cut_reasoning(server: Server) -> None:
    for steps in splits("<think>\nObservation: x\n</think>\nSo. Observation: y"):
        server.say(*steps)
        message = await both(server, HELLO | {"stop": ["Observation:"]})
        assert (message["reasoning"], message["content"]) == ("Observation: x", "So. ")
        assert message["finish"] == "stop"


@with_server()
async def test_where_reasoning_goes(server: Server) -> None:
    hidden = ({"include_reasoning": False}, {"reasoning": {"exclude": True}}, {"reasoning_format": "hidden"})
    within = ({"separate_reasoning": False}, {"reasoning_format": "none"}, {"reasoning_format": "raw"})
    apart = ({"include_reasoning": True}, {"separate_reasoning": True}, {"reasoning_format": "auto"}, {})
    for steps in splits(THINKS)[:3]:
        server.say(*steps)
        for fields in hidden:
            message = await both(server, HELLO | fields)
            assert (message["content"], message.get("reasoning")) == (ANSWER, None)
        for fields in within:
            message = await both(server, HELLO | fields)
            assert (message["content"], message.get("reasoning")) == (f"<think>\n{THOUGHT}</think>\n{ANSWER}", None)
    for fields in apart:
        message = await both(server, HELLO | fields)
        assert (message["content"], message["reasoning"]) == (ANSWER, THOUGHT)


@with_server()
async def test_every_token_has_its_logprob_once(server: Server) -> None:
    for steps in splits(THINKS):
        server.say(*steps)
        for fields in ({}, {"include_reasoning": False}):
            message = await both(server, HELLO | fields | {"logprobs": True})
            assert b"".join(bytes(entry["bytes"]) for entry in message["logprobs"]) == THINKS.encode()


BUDGETS: list[dict[str, Any]] = [
    {"max_reasoning_tokens": 4},
    {"thinking_budget": 4},
    {"thinking": {"type": "enabled", "budget_tokens": 4}},
    {"reasoning": {"max_tokens": 4}},
    {"thinking_token_budget": 4},
]


@with_server()
async def test_thinking_is_limited_and_switched_off(server: Server) -> None:
    server.say("x")
    opened = HELLO | {"chat_template_kwargs": {"open": True}}
    for fields in BUDGETS:
        await server.http.post(CHAT, json=opened | fields)
        grammar = server.grammars()[-1]
        assert admits(grammar, f"so\n</think>\n{ANSWER}"), fields
        assert not admits(grammar, f"{'so it went on and on ' * 5}</think>\n{ANSWER}"), fields
    await server.http.post(CHAT, json=opened | {"max_reasoning_tokens": -1})
    assert server.grammars()[-1] == ""
    for fields in ({"reasoning_effort": "none"}, {"enable_thinking": False}, {"thinking": {"type": "disabled"}}):
        await server.http.post(CHAT, json=HELLO | fields)
        assert server.grammars()[-1] == ""  # the template has done it


@with_server()
async def test_a_format_comes_after_the_reasoning(server: Server) -> None:
    server.say(*f'<think>\n{THOUGHT}\n</think>\n{{"a": 1}}')
    message = await both(server, HELLO | {"response_format": {"type": "json_object"}})
    assert (json.loads(message["content"]), message["reasoning"]) == ({"a": 1}, THOUGHT)
    grammar = server.grammars()[-1]
    assert admits(grammar, f'<think>\n{THOUGHT}\n</think>\n{{"a": 1}}')
    assert admits(grammar, '{"a": 1}')
    assert not admits(grammar, f"<think>\n{THOUGHT}\n</think>\nHello")


@with_server(reasoning_format="none")
async def test_the_format_can_be_switched_off(server: Server) -> None:
    server.say(*THINKS)
    message = await both(server, HELLO)
    assert (message["content"], message.get("reasoning")) == (THINKS, None)
    large = HELLO | {"metadata": {"x": "x" * 70_000}}
    assert put_together(await streamed(server, large)) == message


@with_server(LMX_NULL_STEP_MS=2)
async def test_a_client_that_goes_while_it_thinks_leaves_nothing(server: Server) -> None:
    server.say("<think>", *"y" * 3000)
    for stream in (False, True):
        client = await server.send(CHAT, HELLO | {"stream": stream, "max_reasoning_tokens": 2500})
        if stream:
            data = b""
            while b'"reasoning_content":"y' not in data:
                data += await client.receive_some()
        else:
            await server.until(lambda engine: engine["kv_sequence_bytes"] > 0)
        await client.aclose()
        await server.free()
