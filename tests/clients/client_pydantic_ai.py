"""pydantic-ai: its three kinds of output."""

from typing import Any

import pytest
from conftest import MODEL
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Box(BaseModel):
    width: int
    height: int


class Anything(BaseModel, extra="allow"):
    """Any JSON object."""


def _agent(url: str, **options: Any) -> Agent[Any, Any]:
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key="none"))
    return Agent(model, model_settings={"max_tokens": 300, "temperature": 0.0}, **options)


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput])
def test_outputs(url: str, kind: type) -> None:
    assert isinstance(_agent(url, output_type=kind(Box)).run_sync("A box of 3 by 4.").output, Box)


def test_prompted_output(url: str) -> None:
    """json_object, with the schema in the prompt only: what comes is JSON, if not always a box."""
    agent = _agent(url, output_type=PromptedOutput(Anything))
    assert isinstance(agent.run_sync("What is the capital of Japan?").output, Anything)


def test_tools(url: str) -> None:
    calls = []
    agent = _agent(url, retries=2)

    @agent.tool_plain
    def dice(sides: int) -> int:
        """Roll a dice."""
        calls.append(sides)
        return 4

    assert isinstance(agent.run_sync("Say hello.").output, str)
    assert all(isinstance(sides, int) for sides in calls)
