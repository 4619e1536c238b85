"""LangChain: tools bound, structured output by its three methods, embeddings."""

import pytest
from conftest import MODEL
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class Person(BaseModel):
    """Somebody."""

    name: str = Field(description="The full name.", max_length=40)
    age: int = Field(ge=0, le=150)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture
def model(url: str) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=url, api_key="none", max_tokens=200, seed=1, max_retries=0)


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_structured_output(model: ChatOpenAI, method: str) -> None:
    if method == "json_mode":
        answer = model.with_structured_output(method=method).invoke('Answer as JSON: {"name": "Ann"}')
        assert isinstance(answer, dict)
    else:
        assert isinstance(model.with_structured_output(Person, method=method).invoke("Ann is 30."), Person)


@pytest.mark.parametrize("choice", ["any", "add"])
def test_bound_tools(model: ChatOpenAI, choice: str) -> None:
    bound = model.bind_tools([add], tool_choice=choice)
    message = bound.invoke("What is 2 + 3?")
    assert [call["name"] for call in message.tool_calls][:1] == ["add"]
    assert set(message.tool_calls[0]["args"]) == {"a", "b"}
    whole = None
    for chunk in bound.stream("What is 2 + 3?"):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [
        (call["name"], call["args"]) for call in message.tool_calls
    ]


async def _answers(model: ChatOpenAI) -> str:
    return str((await model.ainvoke("Say hello.")).content)


def test_async(model: ChatOpenAI) -> None:
    import asyncio

    assert asyncio.run(_answers(model))


def test_embeddings(url: str) -> None:
    embeddings = OpenAIEmbeddings(
        model="all-MiniLM-L6-v2", base_url=url, api_key="none", check_embedding_ctx_length=False
    )
    vectors = embeddings.embed_documents(["a cat", "a kitten", "the stock market"])
    dot = [sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors]
    assert dot[1] > dot[2]
