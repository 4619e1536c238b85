"""Tool calls over HTTP: what a request asks for, what its grammar enforces, and the answer whole and in a stream, cut
everywhere. The null engine says what a model would; that a model does is in ``tests/test_api_constrained.py``.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from tests.api_server import Server, with_server, write_model
from tests.grammars import admits

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def function(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


WEATHER = function("get_weather", city={"type": "string"}, days={"type": "integer"})
WRITE = function("write_file", path={"type": "string"}, text={"type": "string"})
TOOLS = {"messages": HELLO, "tools": [WEATHER, WRITE]}


def written(name: str, arguments: Any) -> str:
    """A call as the generic form has it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'


PARIS = {"city": "Paris", "days": 3}
HARD = {"path": "a</tool_call>.py", "text": 'é\n{"x": [1]}</tool_call>\n<tool_call>\n"\\🙂'}
TWO = f"I look it up: \n{written('get_weather', PARIS)}\n{written('write_file', HARD)}"


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of a stream, ids aside, which every answer has its own of."""
    message: dict[str, Any] = {"content": None, "finish": None, "logprobs": []}
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            if choice["logprobs"]:
                message["logprobs"] += choice["logprobs"]["content"]
            message["finish"] = choice["finish_reason"] or message["finish"]
            for name in ("content", "reasoning_content", "reasoning"):
                if delta.get(name) is not None:
                    message[name] = (message.get(name) or "") + delta[name]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    assert re.fullmatch("call_[0-9a-f]{24}", call["id"])
                    assert call["type"] == "function"
                    calls.append({"name": call["function"]["name"], "arguments": ""})
                else:
                    assert call["index"] == len(calls) - 1
                    assert call.keys() == {"index", "function"}
                    assert call["function"].keys() == {"arguments"}
                calls[-1]["arguments"] += call["function"]["arguments"]
            if "function_call" in delta:
                old = message.setdefault("function_call", {"name": "", "arguments": ""})
                for name, piece in delta["function_call"].items():
                    old[name] += piece
    return message


def whole(answer: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """The same of an answer in one piece."""
    choice = answer["choices"][index]
    message = {name: choice["message"][name] for name in choice["message"] if name not in ("role", "refusal")}
    for call in message.get("tool_calls", ()):
        assert re.fullmatch("call_[0-9a-f]{24}", call["id"])
        assert call["type"] == "function"
    if "tool_calls" in message:
        message["tool_calls"] = [call["function"] for call in message["tool_calls"]]
    logprobs = choice["logprobs"]["content"] if choice["logprobs"] else []
    return message | {"finish": choice["finish_reason"], "logprobs": logprobs}


async def streamed(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await server.http.post(CHAT, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    *events, done = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


async def both(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """The answer, which is the same whole and in a stream."""
    answer = (await server.http.post(CHAT, json=body)).json()
    message = put_together(await streamed(server, body))
    expected = whole(answer)
    if expected["content"] == "":
        expected["content"] = message["content"]  # a stream cannot know in time
    assert message == expected
    return expected


def splits(text: str) -> list[list[str | bytes]]:
    """``text`` as one step, a step for each character, for each byte, one token for each byte, and at random."""
    rng = random.Random(0)
    cuts = sorted(rng.sample(range(1, len(text)), min(12, len(text) - 1)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    data = text.encode()
    return [[text], list(text), [data[i : i + 1] for i in range(len(data))], [data], list(pieces)]


@with_server()
async def test_calls_are_told_and_streamed_the_same_however_they_come(server: Server) -> None:
    for steps in splits(TWO):
        server.say(*steps)
        message = await both(server, TOOLS)
        calls = message["tool_calls"]
        assert [call["name"] for call in calls] == ["get_weather", "write_file"]
        assert [json.loads(call["arguments"]) for call in calls] == [PARIS, HARD]
        assert (message["content"], message["finish"]) == ("I look it up:", "tool_calls")
    await server.free()


@with_server()
async def test_a_call_alone_has_no_content(server: Server) -> None:
    server.say(written("get_weather", PARIS))
    answer = (await server.http.post(CHAT, json=TOOLS | {"tool_choice": "required"})).json()
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert message.keys() == {"role", "content", "refusal", "tool_calls"}
    server.say("Hello")
    answer = (await server.http.post(CHAT, json=TOOLS)).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop"


@with_server(LMX_NULL_STEP_MS=2)
async def test_a_call_is_told_while_it_comes(server: Server) -> None:
    server.say(*TWO)
    events = await streamed(server, TOOLS)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": None}
    assert deltas[-1] == {}
    pieces = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert [piece["function"]["name"] for piece in pieces if "id" in piece] == ["get_weather", "write_file"]
    assert all(piece["function"]["arguments"] == "" for piece in pieces if "id" in piece)
    assert len(pieces) > 10
    assert len({piece["id"] for piece in pieces if "id" in piece}) == 2


ADMITTED: list[tuple[dict[str, Any], str, bool]] = [
    ({}, "Hello <tool> world", True),
    ({}, TWO, True),
    ({}, written("get_weather", PARIS), True),
    ({}, written("get_weather", {"city": "Paris"}), False),
    ({}, written("other", PARIS), False),
    ({"parallel_tool_calls": False}, written("get_weather", PARIS), True),
    ({"parallel_tool_calls": False}, TWO, False),
    ({"tool_choice": "required"}, "Hello", False),
    ({"tool_choice": "any"}, "Hello", False),
    ({"tool_choice": {"type": "any"}}, "Hello", False),
    ({"tool_choice": "required"}, written("get_weather", PARIS), True),
    ({"tool_choice": {"type": "function", "function": {"name": "write_file"}}}, written("get_weather", PARIS), False),
    ({"tool_choice": {"type": "function", "function": {"name": "write_file"}}}, written("write_file", HARD), True),
    ({"tool_choice": {"type": "function", "name": "write_file"}}, written("get_weather", PARIS), False),
    ({"tool_choice": {"type": "tool", "name": "write_file"}}, written("get_weather", PARIS), False),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"name": "write_file"}]}},
        written("get_weather", PARIS),
        False,
    ),
    (
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WRITE]}}},
        written("write_file", HARD),
        True,
    ),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [WRITE]}},
        written("get_weather", PARIS),
        False,
    ),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [WRITE]}}, "Hello", True),
    ({"response_format": {"type": "json_object"}}, '{"a": 1}', True),
    ({"response_format": {"type": "json_object"}}, written("get_weather", PARIS), True),
    ({"response_format": {"type": "json_object"}}, "Hello", False),
]


@with_server()
async def test_what_is_asked_for_is_enforced(server: Server) -> None:
    for fields, text, expected in ADMITTED:
        server.say("x")
        response = await server.http.post(CHAT, json=TOOLS | fields)
        assert response.status_code == 200, response.text
        assert admits(server.grammars()[-1], text) is expected, (fields, text)
    for fields in ({"tool_choice": "none"}, {"tools": []}, {"tools": [{"type": "web_search"}]}):
        await server.http.post(CHAT, json=TOOLS | fields)
        assert server.grammars()[-1] == ""


@with_server()
async def test_stop_strings_cut_content_only(server: Server) -> None:
    call = written("write_file", {"path": "x", "text": "Observation: y"})
    server.say(*f"Thought: I write.\n{call}")
    message = await both(server, TOOLS | {"stop": ["Observation:", "Calling tools:"]})
    assert json.loads(message["tool_calls"][0]["arguments"])["text"] == "Observation: y"
    assert (message["content"], message["finish"]) == ("Thought: I write.", "tool_calls")
    for steps in splits("So it is. Observation: z"):
        server.say(*steps)
        message = await both(server, TOOLS | {"stop": ["Observation:"]})
        assert (message["content"], message["finish"]) == ("So it is. ", "stop")
    server.say(*f"Observ{call}")  # what is held back for a stop string is not lost to a call
    message = await both(server, TOOLS | {"stop": ["Observation:"]})
    assert (message["content"], message["finish"]) == ("Observ", "tool_calls")
    server.say(*f"{call}\n\nObservation: z")
    message = await both(server, TOOLS | {"stop": ["Observation:"]})
    assert (len(message["tool_calls"]), message["finish"]) == (1, "tool_calls")
    assert "Obs" not in (message["content"] or "")


@with_server()
async def test_an_answer_cut_in_a_call_is_length(server: Server) -> None:
    text = written("get_weather", PARIS)
    cut = text[: text.index("Paris") + 3]
    server.say(*cut, finish="length")
    message = await both(server, TOOLS)
    assert message["finish"] == "length"
    assert message["tool_calls"] == [{"name": "get_weather", "arguments": '{"city": "Par'}]


@with_server()
async def test_what_is_no_call_is_content(server: Server) -> None:
    for text in ("<tool_call>\nno JSON\n</tool_call>", written("unknown", {}), "<tool_call>", "a <tool_cal b"):
        for steps in splits(text)[1:4]:
            server.say(*steps)
            with structlog.testing.capture_logs() as logs:
                message = await both(server, TOOLS)
            assert (message["content"], message["finish"]) == (text, "stop"), steps
            told = [log["reason"] for log in logs if "what looked like a tool call is none" in log["event"]]
            assert len(told) == 2 * ("</tool_call>" in text), told  # whole and in a stream


@with_server()
async def test_functions_are_answered_by_a_function_call(server: Server) -> None:
    body = {"messages": HELLO, "functions": [WEATHER["function"], WRITE["function"]]}
    for steps in splits(written("get_weather", PARIS)):
        server.say(*steps)
        message = await both(server, body | {"function_call": {"name": "get_weather"}})
        assert message["finish"] == "function_call"
        assert message["function_call"]["name"] == "get_weather"
        assert json.loads(message["function_call"]["arguments"]) == PARIS
        assert "tool_calls" not in message
    assert not admits(server.grammars()[-1], written("write_file", HARD))
    assert not admits(server.grammars()[-1], TWO)


@with_server()
async def test_every_token_has_its_logprob_once(server: Server) -> None:
    body = TOOLS | {"logprobs": True, "top_logprobs": 2}
    for steps in splits(TWO):
        server.say(*steps)
        message = await both(server, body)
        assert b"".join(bytes(entry["bytes"]) for entry in message["logprobs"]) == TWO.encode()
        assert all(len(entry["top_logprobs"]) == 2 for entry in message["logprobs"])


@with_server()
async def test_every_choice_has_calls_of_its_own(server: Server) -> None:
    server.say(*TWO)
    answer = (await server.http.post(CHAT, json=TOOLS | {"n": 3})).json()
    assert [whole(answer, index)["tool_calls"] for index in range(3)] == [whole(answer)["tool_calls"]] * 3
    ids = {call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == 6
    events = await streamed(server, TOOLS | {"n": 3})
    for index in range(3):
        own = [event for event in events if event["choices"][0]["index"] == index]
        assert put_together(own) == whole(answer)


@with_server()
async def test_a_large_body_is_answered_the_same(server: Server) -> None:
    large = {"metadata": {"x": "x" * 70_000}}
    server.say(*TWO)
    message = await both(server, TOOLS | large | {"tool_choice": "required"})
    assert message == await both(server, TOOLS | {"tool_choice": "required"})
    one, _, other, _ = server.grammars()
    assert one == other


@with_server(tool_format="mistral")
async def test_the_format_can_be_set_and_is_told(server: Server) -> None:
    for path in ("/v1/models", "/v1/models/tiny"):
        entry = (await server.http.get(path)).json()
        entry = entry["data"][0] if "data" in entry else entry
        assert entry["tool_format"] == "mistral"
        assert "tool_format" in entry["tool_format_reason"]
    status = (await server.http.get("/admin/status")).json()
    assert status["models"][0]["tool_format"] == "mistral"
    server.say('[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]')
    # Read by the server, and by the process for large bodies
    for request in (TOOLS, TOOLS | {"metadata": {"x": "x" * 70_000}}):
        message = await both(server, request)
        assert json.loads(message["tool_calls"][0]["arguments"]) == PARIS


NAMES = [("a b", 1), ("", 1), ("a" * 129, 1), ("ä", 1), ('a"', 1), ("a\n", 1)]
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    *[({"tools": [WRITE, function(name)]}, "tools[1].function.name", "") for name, _ in NAMES],
    ({"tools": [WEATHER, WRITE, WEATHER]}, "tools[2].function.name", "get_weather"),
    ({"functions": [WEATHER["function"]] * 2, "tools": None}, "functions[1].name", "get_weather"),
    *[
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}, param, told)
        for parameters, param, told in (
            ({"type": "string"}, "tools[0].function.parameters", '"string"'),
            ({"type": ["string", "null"]}, "tools[0].function.parameters", '["string", "null"]'),
            ({"type": 5}, "tools[0].function.parameters", "5"),
            ([], "tools[0].function.parameters", "[]"),
            ("x", "tools[0].function.parameters", '"x"'),
            (True, "tools[0].function.parameters", "true"),
        )
    ],
    ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice", "'nope'"),
    ({"tool_choice": {"type": "tool", "name": "nope"}}, "tool_choice", "'nope'"),
    ({"tool_choice": "sometimes"}, "tool_choice", '"sometimes"'),
    ({"tool_choice": "required", "tools": []}, "tool_choice", "required"),
    ({"tool_choice": "required", "tools": None}, "tool_choice", "required"),
    ({"tools": [WEATHER | {"function": WEATHER["function"] | {"strict": "perhaps"}}]}, "tools[0].function.strict", ""),
]
TAKEN: list[dict[str, Any]] = [
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}], "tool_choice": "required"}
    for parameters in (None, {}, {"type": "object"}, {"properties": {}, "type": "object"}, {"type": ["object", "null"]})
]


@with_server()
async def test_bad_tools_are_refused_by_name(server: Server) -> None:
    server.say("x")
    for fields, param, told in REFUSED:
        for stream in (False, True):
            response = await server.http.post(CHAT, json=TOOLS | fields | {"stream": stream})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, param), (fields, error)
            assert told in error["message"]
    for fields in TAKEN:
        response = await server.http.post(CHAT, json=TOOLS | fields)
        assert response.status_code == 200, response.text
        assert admits(server.grammars()[-1], written("f", {})), fields


@with_server(LMX_NULL_STEP_MS=2)
async def test_a_client_that_goes_in_a_call_leaves_nothing(server: Server) -> None:
    text = written("write_file", {"path": "x", "text": "y" * 3000})
    server.say(*text)
    for stream in (False, True):
        client = await server.send(CHAT, TOOLS | {"stream": stream, "tool_choice": "required"})
        if stream:
            data = b""
            while b'"arguments":"y' not in data:
                data += await client.receive_some()
        else:
            await server.until(lambda engine: engine["kv_sequence_bytes"] > 0)
        await client.aclose()
        await server.free()
