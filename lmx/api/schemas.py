"""The OpenAI requests, as pydantic models: what is taken, and which values are possible.

Strict types (a client that sends "0.7" for a number has a bug that should be seen), unknown fields ignored, except the
ones of ``lmx.api.unbuilt``. What needs the model (vocabulary, context length) is checked later, in
``lmx.api.generation``. These models also make /openapi.json, so their descriptions are written for its readers.

Every list fails at its first wrong element and has a length that bounds what checking it can cost: a million errors in
a body of 3 MB once took 3.4 GB.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from lmx.api.shorten import shorten
from lmx.errors import InvalidRequest

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_MESSAGES = 10_000
MAX_PARTS = 10_000
MAX_TOOLS = 1024
MAX_BIASES = 1024
"""OpenAI takes 300."""
MAX_SEQUENCES = 1024
"""Prompts times n, as many as may wait (``[engine] max_queue``)."""
MAX_DETOKENIZED = 2**18
MAX_STOP_TOKENS = 1024
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

TokenCount = Annotated[int, Field(ge=-1, le=INT64_MAX)]
StopString = Annotated[str, Field(min_length=1, max_length=4096)]
TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ModelName = Annotated[
    str | None, Field(max_length=1000, description="Id, path or alias of the model; left out: the default model.")
]


class Request(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    model: ModelName = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = Field(None, description="Send a last chunk with `usage` and empty `choices`.")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]


def _few_biases(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise InvalidRequest(
            f"logit_bias has {len(value)} entries; this server takes {MAX_BIASES}.", param="logit_bias"
        )
    return value


class GenerationFields(Request):
    """What chat and plain completions have in common."""

    max_tokens: TokenCount | None = Field(
        None,
        description="Tokens of the answer at most; -1: until the context ends. More than there is room for is cut.",
    )
    max_completion_tokens: TokenCount | None = Field(
        None, description="OpenAI's newer name for max_tokens; wins over it."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 by default.")
    top_p: float | None = Field(None, ge=0, le=1, description="0: the likeliest token.")
    top_k: int | None = Field(None, ge=-1, le=INT64_MAX, description="0 or -1: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="Over prompt and answer; 1: off.")
    repeat_penalty: float | None = Field(None, ge=0.01, le=10, description="LM Studio's name for repetition_penalty.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_biases)] | None = (
        Field(None, description="Token id (as a string) to what is added to its logit.")
    )
    seed: int | None = Field(
        None, ge=INT64_MIN, le=INT64_MAX, description="Left out or -1: a fresh one, told in the answer."
    )
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=16)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="Tokens that end the answer, besides the model's own."
    )
    min_tokens: int | None = Field(
        None, ge=0, le=INT64_MAX, description="Nothing ends the answer before so many tokens but max_tokens."
    )
    min_new_tokens: int | None = Field(None, ge=0, le=INT64_MAX, description="Another name for min_tokens.")
    include_stop_str_in_output: bool | None = Field(
        None, description="Leave the stop string, or the text of the stop token, at the answer's end."
    )
    no_stop_trim: bool | None = Field(None, description="SGLang's name for include_stop_str_in_output.")
    return_token_ids: bool | None = Field(
        None, description="`token_ids` in each choice or delta, and `prompt_token_ids`."
    )
    n: int | None = Field(
        None, ge=1, le=16, description="How many answers; answer i has its own seed, derived from `seed`."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(None, description='Only {"type": "text"} yet.')
    user: str | None = Field(None, description="Whom fair scheduling counts the tokens for, when no API key does.")
    metadata: dict[str, Any] | None = None
    priority: int | None = Field(None, ge=-1000, le=1000)
    timeout: float | None = Field(None, gt=0, description="Seconds until the request is given up with 504.")
    ignore_eos: bool | None = Field(None, description="Go on to max_tokens whatever the model says; for measuring.")
    best_of: int | None = Field(
        None, ge=1, le=16, description="So many are made, and the n with the highest mean log-probability sent."
    )
    ttl: float | None = Field(None, ge=0)
    draft_model: str | None = None

    @property
    def most_tokens(self) -> int | None:
        """``max_tokens`` under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def least_tokens(self) -> int:
        """``min_tokens`` under either name."""
        return self.min_tokens or self.min_new_tokens or 0

    @property
    def keeps_stop(self) -> bool:
        """``include_stop_str_in_output`` under either name."""
        return bool(self.include_stop_str_in_output or self.no_stop_trim)

    @model_validator(mode="after")
    def _fit_together(self) -> "GenerationFields":
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0:
                raise InvalidRequest(
                    f"{name} must be at least 1, or -1 for as many as there is room for (got 0).", param=name
                )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                f"stream_options is only allowed with stream: true (got stream: {shorten(self.stream)}).",
                param="stream_options",
            )
        wanted = self.response_format.type if self.response_format else "text"
        if wanted != "text":
            raise InvalidRequest(
                f"response_format {shorten(wanted)}: this server does not constrain output yet; ask for the format in "
                'a message and use {"type": "text"}.',
                param="response_format",
            )
        if 0 < (self.most_tokens or 0) < self.least_tokens:
            raise InvalidRequest(
                f"min_tokens must not be more than max_tokens (got {self.least_tokens} and {self.most_tokens}).",
                param="min_tokens",
            )
        n, best_of = self.n or 1, self.best_of
        if best_of is not None and best_of < n:
            raise InvalidRequest(f"best_of must be at least n (got {best_of} and {n}).", param="best_of")
        if best_of is not None and best_of > n and self.stream:
            raise InvalidRequest(
                f"best_of must equal n with stream: true (got {best_of} and {n}): which answers are best is known when "
                "all have ended.",
                param="best_of",
            )
        return self


class CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    arguments: str | dict[str, Any] | Annotated[list[Any], Field(max_length=0)] | None = None


class ToolCall(BaseModel):
    model_config = ConfigDict(strict=True)

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(BaseModel):
    """One turn; further fields reach the model's chat template as they are."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    prefix: bool | None = None
    partial: bool | None = None


class Function(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: Function


class Reasoning(BaseModel):
    model_config = ConfigDict(strict=True)

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: None = None
    exclude: Literal[False] | None = None


class Thinking(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["enabled", "disabled", "auto", "adaptive"]
    budget_tokens: None = None


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class Conversation(Request):
    """What makes a prompt of messages."""

    messages: Messages
    tools: Tools | None = Field(None, description="Given to the chat template.")
    add_generation_prompt: bool | None = Field(None, description="false: without the beginning of the answer.")
    continue_final_message: bool | None = Field(
        None, description="The answer goes on with the last message, which must be the assistant's."
    )
    continue_: bool | None = Field(None, description="text-generation-webui's name for continue_final_message.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")

    @property
    def continues(self) -> bool:
        """The answer goes on with the last message: vLLM's field, or the message's own mark (DeepSeek's and Mistral's
        ``prefix``, Moonshot's and Qwen's ``partial``)."""
        last = self.messages[-1]
        return bool(self.continue_final_message or self.continue_ or last.prefix or last.partial)

    @model_validator(mode="after")
    def _fit_a_continuation(self) -> "Conversation":
        for index, message in enumerate(self.messages):
            for name in ("prefix", "partial"):
                last = index == len(self.messages) - 1
                if getattr(message, name) and not (last and message.role == "assistant"):
                    param = f"messages[{index}].{name}"
                    raise InvalidRequest(
                        f"{param}: only the last message can be gone on with, and only the assistant's (this is a "
                        f"message of the {message.role}, {index + 1} of {len(self.messages)}).",
                        param=param,
                    )
        if not self.continues:
            return self
        if self.messages[-1].role != "assistant":
            raise InvalidRequest(
                "continue_final_message: the last message must be the assistant's (its role is "
                f"{self.messages[-1].role!r}).",
                param="continue_final_message",
            )
        if self.messages[-1].tool_calls:
            raise InvalidRequest(
                "continue_final_message: a message with tool_calls is whole and cannot be gone on with.",
                param="continue_final_message",
            )
        if self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt cannot both be true: one goes on with a turn, the "
                "other begins one.",
                param="add_generation_prompt",
            )
        return self


_AUTO = ("auto", {"type": "auto"})
_NONE = ("none", {"type": "none"})
"""As strings, and as Anthropic spells them."""


class ChatRequest(GenerationFields, Conversation):
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: str | dict[str, Any] | None = Field(None, description="none or auto; allowed_tools with mode auto.")
    functions: Annotated[list[Function], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = Field(
        None, description="OpenAI's older name for tools."
    )
    function_call: str | dict[str, Any] | None = Field(None, description="none or auto.")
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = Field(None, description="`effort` and `enabled`, as OpenRouter has them.")
    thinking: Thinking | bool | None = Field(None, description='As GLM and DeepSeek have it: {"type": "disabled"}.')
    think: bool | Effort | None = Field(None, description="Ollama's name for reasoning_effort.")
    enable_thinking: bool | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: Literal[False] | None = None

    @model_validator(mode="after")
    def _fit_a_chat(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest(f"top_logprobs needs logprobs: true (got {self.top_logprobs}).", param="top_logprobs")
        _check_choice("function_call", self.function_call, "functions", self.functions)
        if isinstance(self.tool_choice, dict) and self.tool_choice.get("type") == "allowed_tools":
            self.allowed_tools()
        else:
            _check_choice("tool_choice", self.tool_choice, "tools", self.tools)
        return self

    def allowed_tools(self) -> frozenset[str] | None:
        """The tools that tool_choice leaves, None for all. Raises InvalidRequest."""
        choice = self.tool_choice
        if choice in _NONE or self.function_call == "none":
            return frozenset()
        if not isinstance(choice, dict) or choice in _AUTO:
            return None
        rule = choice.get("allowed_tools", choice)  # OpenAI's chat face nests it, its Responses face does not
        mode, allowed = (rule.get("mode"), rule.get("tools")) if isinstance(rule, dict) else (None, None)
        if mode != "auto":
            raise InvalidRequest(
                f'tool_choice.mode {shorten(mode)}: only "auto", this server cannot force a tool call yet.',
                param="tool_choice",
            )
        names = [_tool_name(tool) for tool in allowed] if isinstance(allowed, list) else [None]
        known = {tool.function.name for tool in self.tools or ()}
        if not known.issuperset(names):
            raise InvalidRequest(
                f"tool_choice.tools {shorten(allowed)} must be a list of tools that are in tools.", param="tool_choice"
            )
        return frozenset(name for name in names if name)


def _tool_name(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _check_choice(param: str, choice: Any, needed: str, given: Any) -> None:
    if choice not in (None, *_AUTO, *_NONE):
        raise InvalidRequest(
            f"{param} {shorten(choice)}: this server does not constrain output yet and cannot force a call; use "
            '"auto" or "none".',
            param=param,
        )
    if choice in _AUTO and given is None:
        raise InvalidRequest(f"{param} {shorten(choice)} needs {needed}.", param=param)


def _prompt_kind(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else 0
    return {str: "texts", int: "ids", list: "lists"}.get(type(first))


class CompletionRequest(GenerationFields):
    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(fail_fast=True, max_length=MAX_SEQUENCES), Tag("texts")]
        | Annotated[TokenIds, Tag("ids")]
        | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_SEQUENCES), Tag("lists")],
        Discriminator(
            _prompt_kind,
            custom_error_type="prompt_kind",
            custom_error_message="Should be a text, a list of texts, of token ids, or of lists of token ids",
        ),
    ] = Field(description="Text, texts, token ids or lists of them.")
    suffix: str | None = Field(
        None, description="What follows the answer; for models that were trained to fill in the middle."
    )
    echo: bool | None = Field(None, description="Repeat the prompt before the answer.")
    logprobs: int | None = Field(None, ge=0, le=20)
    add_special_tokens: bool | None = Field(None, description="false: without the model's BOS.")
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _fit_a_completion(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                f"echo with logprobs (got {self.logprobs}): this server gives log-probabilities of new tokens only.",
                param="echo",
            )
        if self.prompt == []:
            raise InvalidRequest("prompt must not be an empty list (got []).", param="prompt")
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        each = max(self.n or 1, self.best_of or 1)
        sequences = (1 if single else len(self.prompt)) * each
        if sequences > MAX_SEQUENCES:
            raise InvalidRequest(
                f"prompt: {len(self.prompt)} prompts times n or best_of {each} are {sequences} answers; this server "
                f"makes {MAX_SEQUENCES} a request.",
                param="prompt",
            )
        return self


class TokenizeRequest(Request):
    """vLLM's: a text, or a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = Field(None, description="With messages; true by default.")
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = Field(None, description="BOS; true by default for a prompt, false for messages.")
    return_token_strs: bool | None = Field(None, description="The tokens as the vocabulary spells them, too.")

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            given = "neither" if self.prompt is None else "both"
            raise InvalidRequest(f"prompt or messages is required, and not both (got {given}).", param="prompt")
        return self


class DetokenizeRequest(Request):
    tokens: Annotated[TokenIds, Field(max_length=MAX_DETOKENIZED)]
