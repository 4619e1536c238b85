"""openai-agents, smolagents, LiteLLM and LlamaIndex."""

import json
from typing import Any

import openai
import pytest
from conftest import MODEL
from pydantic import BaseModel

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_openai_agents(url: str) -> None:
    import agents

    agents.set_tracing_disabled(True)
    called: list[str] = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather."""
        called.append(city)
        return "sunny"

    agent = agents.Agent(
        name="Weather",
        instructions="You tell the weather.",
        tools=[get_weather],
        model=agents.OpenAIChatCompletionsModel(MODEL, openai.AsyncOpenAI(base_url=url)),
        model_settings=agents.ModelSettings(tool_choice="required", max_tokens=200, temperature=0.0),
    )
    # The library resets tool_choice to auto after a call, so the second turn is free.
    result = agents.Runner.run_sync(agent, "Paris?", max_turns=6)
    assert called
    assert isinstance(result.final_output, str)


def test_smolagents(url: str) -> None:
    import smolagents

    model = smolagents.OpenAIServerModel(MODEL, api_base=url, api_key="none", max_tokens=300)
    tool = smolagents.tool(_weather)
    message = model.generate(
        [smolagents.ChatMessage(role="user", content=[{"type": "text", "text": "Weather in Rome?"}])],
        stop_sequences=["Observation:", "Calling tools:"],
        tools_to_call_from=[tool],
    )
    assert message.tool_calls
    assert message.tool_calls[0].function.name == "weather"
    arguments = message.tool_calls[0].function.arguments
    assert set(json.loads(arguments) if isinstance(arguments, str) else arguments) == {"city"}


def _named_weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: its name
    """
    return f"sunny in {city}"


_weather = _named_weather
_weather.__name__ = "weather"


def test_litellm(url: str) -> None:
    import litellm

    ask: dict[str, Any] = {
        "model": f"openai/{MODEL}",
        "api_base": url,
        "api_key": "none",
        "messages": [{"role": "user", "content": "Weather in Oslo?"}],
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "max_tokens": 200,
        "seed": 5,
    }
    whole = litellm.completion(**ask).choices[0]
    assert whole.message.tool_calls[0].function.name == "get_weather"
    chunks = list(litellm.completion(**ask, stream=True))
    put_together = litellm.stream_chunk_builder(chunks).choices[0]
    assert put_together.message.tool_calls[0].function.arguments == whole.message.tool_calls[0].function.arguments
    assert litellm.embedding(model="openai/all-MiniLM-L6-v2", api_base=url, api_key="none", input=["x"]).data


class Song(BaseModel):
    title: str
    year: int


@pytest.mark.parametrize("stream", [False, True])
def test_llama_index(url: str, stream: bool) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        model=MODEL,
        api_base=url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=200,
        context_window=8192,
    )
    assert isinstance(llm.as_structured_llm(Song).complete("Yesterday, 1965.").raw, Song)
    message = [ChatMessage(role="user", content="Say hello.")]
    if stream:
        assert "".join(piece.delta or "" for piece in llm.stream_chat(message))
    else:
        assert llm.chat(message).message.content
    embeddings = OpenAILikeEmbedding(model_name="all-MiniLM-L6-v2", api_base=url, api_key="none")
    assert len(embeddings.get_text_embedding("hello")) == 384
