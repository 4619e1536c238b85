"""The OpenAI requests, as pydantic models: what is taken, and which values are possible.

Strict types (a client that sends "0.7" for a number has a bug that should be seen), unknown fields ignored. What needs
the model (vocabulary, context length) is checked later, in ``lmx.api.generation``. These models also make
/openapi.json, so their descriptions are written for its readers.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

TokenCount = Annotated[int, Field(ge=-1, le=INT64_MAX)]
StopString = Annotated[str, Field(min_length=1)]


class Unconstrained(ValueError):
    """A request for constrained output, which this server does not produce yet; the argument names the field."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = Field(False, description="Send a last chunk with `usage` and empty `choices`.")


class GenerationFields(BaseModel):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(None, description="Id, path or alias of the model; left out: the default model.")
    max_tokens: TokenCount | None = Field(
        None,
        description="Tokens of the answer at most; -1: until the context ends. More than there is room for is cut.",
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 by default.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT64_MAX, description="0 or -1: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="Over prompt and answer; 1: off.")
    repeat_penalty: float | None = Field(None, gt=0, le=10, description="LM Studio's name for repetition_penalty.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id (as a string) to what is added to its logit."
    )
    seed: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX, description="Left out: a fresh one, told in the answer.")
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    n: int | None = Field(
        None, ge=1, le=16, description="How many answers; answer i has its own seed, derived from `seed`."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Whom fair scheduling counts the tokens for, when no API key does.")
    metadata: dict[str, Any] | None = None
    priority: int | None = Field(None, ge=-1000, le=1000)
    timeout: float | None = Field(None, gt=0, description="Seconds until the request is given up with 504.")
    ignore_eos: bool | None = Field(None, description="Go on to max_tokens whatever the model says; for measuring.")
    ttl: float | None = Field(None, ge=0)
    draft_model: str | None = None

    @model_validator(mode="after")
    def _nonzero_max_tokens(self) -> "GenerationFields":
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name, None) == 0:
                raise ValueError(f"{name} must be at least 1, or -1 for as many as there is room for")
        return self


class Message(BaseModel):
    """One turn; further fields (name, tool_calls, tool_call_id …) reach the model's chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(GenerationFields):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: TokenCount | None = Field(
        None, description="OpenAI's newer name for max_tokens; wins over it."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = Field(None, description="Given to the chat template.")
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")


class CompletionRequest(GenerationFields):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text, texts, token ids or lists of them."
    )
    suffix: str | None = None
    echo: bool | None = Field(None, description="Repeat the prompt before the answer.")
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=16, description="Must equal n.")


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True)

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True)

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
