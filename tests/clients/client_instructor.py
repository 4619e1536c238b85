"""instructor in the modes that it uses with OpenAI's API."""

import json
from typing import Annotated, Any, Literal

import instructor
import openai
import pytest
from conftest import MODEL
from instructor.core import InstructorRetryException
from pydantic import BaseModel, Field


class Review(BaseModel):
    sentiment: Literal["good", "bad"]
    words: list[Annotated[str, Field(max_length=12)]] = Field(max_length=3)
    score: int = Field(ge=1, le=5)


def _ask(url: str, mode: instructor.Mode) -> Any:
    client = instructor.from_openai(openai.OpenAI(base_url=url), mode=mode)
    messages = [{"role": "user", "content": "What a lovely film!"}]
    return client.chat.completions.create(
        response_model=Review, max_retries=0, model=MODEL, messages=messages, max_tokens=600, seed=2
    )


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_the_schema_is_kept(url: str, mode: instructor.Mode) -> None:
    assert isinstance(_ask(url, mode), Review)


def test_json_mode_gives_json(url: str) -> None:
    """The schema stands in the prompt only; a model of 135M parameters need not keep to it."""
    try:
        text = _ask(url, instructor.Mode.JSON).model_dump_json()
    except InstructorRetryException as error:
        text = error.failed_attempts[-1].completion.choices[0].message.content
    json.loads(text)
