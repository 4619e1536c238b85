"""The OpenAI SDK of the generation before the one that ``make test`` uses."""

from typing import Literal

import openai
from conftest import MODEL
from pydantic import BaseModel

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }
]


class City(BaseModel):
    name: str
    country: Literal["France", "Italy"]


def test_parse(url: str) -> None:
    client = openai.OpenAI(base_url=url)
    done = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Paris is where?"}], response_format=City, max_tokens=200
    )
    assert isinstance(done.choices[0].message.parsed, City)


def test_stream_of_a_forced_call(url: str) -> None:
    client = openai.OpenAI(base_url=url)
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "Weather in Paris?"}],
        tools=[{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}],
        tool_choice="required",
        max_tokens=200,
        seed=3,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls
    assert final.message.tool_calls[0].function.name == "get_weather"


def test_embeddings(url: str) -> None:
    answer = openai.OpenAI(base_url=url).embeddings.create(model="all-MiniLM-L6-v2", input=["one", "two"])
    assert [len(item.embedding) for item in answer.data] == [384, 384]
