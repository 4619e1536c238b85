"""Structured output, tool calls and their ends as a user meets them: the embedded model on both engines, whose grammar
makes up for what so small a model does not know. What cannot be asked for is refused over the null engine.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field

from tests.api_server import Server as NullServer
from tests.api_server import with_server, write_model
from tests.grammars import admits
from tests.server import serve
from tests.test_api_tools import CHAT, WRITE, function

MODEL = "smollm2-135m-instruct"
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris in the next 3 days?"}]


SHORT = function("get_weather", city={"type": "string", "maxLength": 8}, days={"type": "integer", "maximum": 14})


class Person(BaseModel):
    name: str = Field(max_length=8)
    age: Literal[3, 4]
    likes: bool | None


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """On llama.cpp where it is, which is five times as fast on a CPU; test_constrained.py has both engines."""
    with serve(tmp_path_factory.mktemp("structured")) as server:
        server.line(r"lmx: model \S+ ready")
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
            yield client
        server.idle()


def same_in_a_stream(client: openai.OpenAI, options: dict[str, Any]) -> Any:
    """The answer, put together from a stream by the SDK; whole, it is the same."""
    whole = client.chat.completions.create(**options).choices[0]
    with client.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert (streamed.message.content or "") == (whole.message.content or "")
    assert streamed.finish_reason == whole.finish_reason
    pairs = zip(streamed.message.tool_calls or [], whole.message.tool_calls or [], strict=True)
    for one, other in pairs:
        assert (one.function.name, one.function.arguments) == (other.function.name, other.function.arguments)
    return whole


def test_a_forced_call_and_its_stream(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    options = {"model": MODEL, "messages": ASK, "tools": [WRITE, SHORT], "tool_choice": choice, "seed": 3}
    answer = same_in_a_stream(client, options | {"max_tokens": 80})
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    (call,) = answer.message.tool_calls
    assert call.function.name == "get_weather"
    Draft202012Validator(SHORT["function"]["parameters"]).validate(json.loads(call.function.arguments))


def test_json_schema_and_parse(client: openai.OpenAI) -> None:
    described: Any = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, response_format=described, seed=1, max_tokens=60
    ).choices[0]
    assert answer.finish_reason == "stop"
    Draft202012Validator(PERSON).validate(json.loads(answer.message.content or ""))
    parsed = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Person, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, Person)


def test_what_is_cut_is_length(client: openai.OpenAI) -> None:
    described: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    cut = client.chat.completions.create(model=MODEL, messages=ASK, response_format=described, max_tokens=2).choices[0]
    assert cut.finish_reason == "length"


def test_auto_leaves_text_alone(client: openai.OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "What is the capital of Japan?"}]
    answer = client.chat.completions.create(
        model=MODEL, messages=question, tools=[SHORT], temperature=0, max_tokens=16
    ).choices[0]
    assert answer.message.content or answer.message.tool_calls
    assert "<tool_call>" not in (answer.message.content or "")


def test_choices_and_grammars_in_both_faces(client: openai.OpenAI) -> None:
    yes_or_no = {"structured_outputs": {"choice": ["yes", "no"]}}
    answer = client.chat.completions.create(model=MODEL, messages=ASK, extra_body=yes_or_no, max_tokens=20)
    assert answer.choices[0].message.content in ("yes", "no")
    text = client.completions.create(
        model=MODEL, prompt="It is", extra_body={"guided_regex": "[0-9]{3}"}, max_tokens=20
    )
    assert text.choices[0].text.isdigit()
    assert len(text.choices[0].text) == 3


# --- over the null engine -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


DEEP: Any = {"type": "string"}
for _ in range(150):
    DEEP = {"type": "array", "items": DEEP}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (schema(5), "response_format.json_schema.schema"),
    (schema(False), "response_format.json_schema.schema"),
    (schema({"type": "banana"}), "response_format.json_schema.schema"),
    (schema({"$ref": "#/$defs/nothing"}), "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"grammar": "root ::= ("}, "grammar"),
    ({"structured_outputs": {"choice": 5}}, "structured_outputs.choice"),
    (schema(PERSON) | {"guided_regex": "a"}, "guided_regex"),
    (schema({"type": "object", "properties": {"x": {"type": "string", "pattern": "("}}}), "response_format"),
    (schema({"type": "object", "properties": {f"p{i}": PERSON for i in range(3000)}}), "response_format"),
    (schema({"$ref": "#"}), "response_format"),
    (schema(DEEP), "response_format.json_schema.schema"),
]
TAKEN: list[dict[str, Any]] = [
    schema({"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}),
    schema({}),
    schema(True),
]


@with_server()
async def test_what_cannot_be_enforced_is_refused(server: NullServer) -> None:
    for path, body in ((CHAT, {"messages": ASK}), ("/v1/completions", {"prompt": "x"})):
        for fields, param in REFUSED:
            for stream in (False, True):
                response = await server.http.post(path, json=body | fields | {"stream": stream})
                assert response.status_code == 400, (fields, response.text)
                error = response.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert error["param"].startswith(param), (fields, error)
        for fields in TAKEN:
            response = await server.http.post(path, json=body | fields | {"max_tokens": 1})
            assert response.status_code == 200, (fields, response.text)
    await server.free()


@with_server()
async def test_both_faces_enforce(server: NullServer) -> None:
    server.say("x")
    large = {"metadata": {"x": "x" * 70_000}}
    for path, body in ((CHAT, {"messages": ASK}), ("/v1/completions", {"prompt": "x"})):
        for extra in ({}, large):
            await server.http.post(path, json=body | schema(PERSON) | extra)
            grammar = server.grammars()[-1]
            assert admits(grammar, '{"name": "Bo", "age": 3, "kind": "cat"}')
            assert not admits(grammar, '{"name": "Bo", "age": 3, "kind": "cow"}')
            await server.http.post(path, json=body | {"response_format": {"type": "text"}} | extra)
            assert server.grammars()[-1] == ""
