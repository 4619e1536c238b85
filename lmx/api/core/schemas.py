"""The OpenAI requests, as pydantic models: what is taken, and which values are possible.

Strict types (a client that sends "0.7" for a number has a bug that should be seen), unknown fields ignored, except the
ones of ``lmx.api.core.unbuilt``. What needs the model (vocabulary, context length) is checked later, in
``lmx.api.core.generation``. These models also make /openapi.json, so their descriptions are written for its readers.

Every list fails at its first wrong element and has a length that bounds what checking it can cost: a million errors in
a body of 3 MB once took 3.4 GB.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from lmx.api.core.shorten import shorten
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
Strict = bool | Literal["true", "false"]
"""Some clients write it as a string."""
Budget = Annotated[int, Field(ge=-1, le=INT64_MAX)]
"""In tokens; -1: none."""
ModelName = Annotated[
    str | None, Field(max_length=1000, description="Id, path or alias of the model; left out: the default model.")
]


class Request(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    model: ModelName = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = Field(None, description="Send a last chunk with `usage` and empty `choices`.")
    continuous_usage_stats: bool | None = Field(
        None, description="vLLM's: with include_usage, `usage` so far in every chunk, of the chunk's choice."
    )


class ResponseFormat(BaseModel):
    """``lmx.chat.forms.structured`` reads what else belongs to the type."""

    model_config = ConfigDict(strict=True)

    type: str = Field(description="text, json_object, json_schema, grammar or regex")


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
    prompt_logprobs: int | None = Field(
        None, ge=0, le=20, description="Log-probabilities of the prompt's tokens, with as many of the likeliest."
    )
    return_token_ids: bool | None = Field(
        None, description="`token_ids` in each choice or delta, and `prompt_token_ids`."
    )
    n: int | None = Field(
        None, ge=1, le=16, description="How many answers; answer i has its own seed, derived from `seed`."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(None, description="What the answer must be: enforced.")
    structured_outputs: dict[str, Any] | None = Field(None, description="vLLM's name for it.")
    guided_json: dict[str, Any] | str | bool | None = Field(None, description="vLLM's older names, and others' ones.")
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    grammar: str | None = Field(None, description="In llama.cpp's GBNF, or llguidance's Lark.")
    json_schema: dict[str, Any] | str | bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    format: dict[str, Any] | str | None = None
    user: str | None = Field(None, description="Whom fair scheduling counts the tokens for, when no API key does.")
    metadata: dict[str, Any] | None = None
    priority: int | None = Field(None, ge=-1000, le=1000)
    timeout: float | None = Field(None, gt=0, description="Seconds until the request is given up with 504.")
    ignore_eos: bool | None = Field(None, description="Go on to max_tokens whatever the model says; for measuring.")
    best_of: int | None = Field(
        None, ge=1, le=16, description="So many are made, and the n with the highest mean log-probability sent."
    )
    cache: bool | None = Field(None, description="false: neither take KV that was kept, nor keep any.")
    cache_prompt: bool | None = Field(None, description="llama-server's name for cache.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="KV is shared only between requests of the same one."
    )
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = Field(
        None, description="Which conversation it belongs to, so that its KV is kept over that of side requests."
    )
    ttl: float | None = Field(None, ge=0)
    draft_model: str | None = Field(
        None, description='Taken where the request loads its model; "": not that model\'s drafts. It changes no answer.'
    )
    speculation: Literal["off", "auto", "lookup"] | None = Field(
        None, description="Whose drafts are verified; it changes no answer, only how fast it comes."
    )

    @property
    def sources(self) -> str:
        """``speculation``, as in ``GenerateRequest``."""
        return self.speculation or ("lookup" if self.draft_model == "" else "auto")

    @property
    def most_tokens(self) -> int | None:
        """``max_tokens`` under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def salt(self) -> str | None:
        """As in ``GenerateRequest``."""
        return None if False in (self.cache, self.cache_prompt) else self.cache_salt or ""

    @property
    def least_tokens(self) -> int:
        """``min_tokens`` under either name."""
        return self.min_tokens or self.min_new_tokens or 0

    @property
    def scores(self) -> int:
        """How many of the likeliest tokens are told at each position of the prompt; -1: nothing is."""
        return -1 if self.prompt_logprobs is None else self.prompt_logprobs

    @property
    def keeps_stop(self) -> bool:
        """``include_stop_str_in_output`` under either name."""
        return bool(self.include_stop_str_in_output or self.no_stop_trim)

    @model_validator(mode="after")
    def _fit_together(self) -> "GenerationFields":
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0 and self.scores < 0 and not getattr(self, "echo", False):
                raise InvalidRequest(
                    f"{name} must be at least 1, or -1 for as many as there is room for (got 0).", param=name
                )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                f"stream_options is only allowed with stream: true (got stream: {shorten(self.stream)}).",
                param="stream_options",
            )
        if 0 < (self.most_tokens or 0) < self.least_tokens:
            raise InvalidRequest(
                f"min_tokens must not be more than max_tokens (got {self.least_tokens} and {self.most_tokens}).",
                param="min_tokens",
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest(
                "prompt_logprobs is not told in a stream (got stream: true); of a plain completion, echo with logprobs "
                "is.",
                param="prompt_logprobs",
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
    strict: Strict | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: Function


class OtherTool(BaseModel):
    """A client's own kind, or one that OpenAI runs itself: ignored."""

    model_config = ConfigDict(strict=True)

    type: str


def _tool_kind(tool: Any) -> str:
    kind = tool.get("type", "function") if isinstance(tool, dict) else getattr(tool, "type", "function")
    return "a function" if kind == "function" or not isinstance(kind, str) else "another tool"


class Reasoning(BaseModel):
    model_config = ConfigDict(strict=True)

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: Budget | None = None
    exclude: bool | None = None


class Thinking(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["enabled", "disabled", "auto", "adaptive"]
    budget_tokens: Budget | None = None


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
AnyTool = Annotated[
    Annotated[Tool, Tag("a function")] | Annotated[OtherTool, Tag("another tool")],
    Discriminator(_tool_kind),
]
Tools = Annotated[list[AnyTool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class Conversation(Request):
    """What makes a prompt of messages."""

    messages: Messages
    tools: Tools | None = Field(None, description="Functions that the model may call; other types are ignored.")
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


class PredictedPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Prediction(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["content"]
    content: str | Annotated[list[PredictedPart], Field(fail_fast=True, max_length=MAX_PARTS)]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationFields, Conversation):
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: str | dict[str, Any] | None = Field(
        None, description="none, auto, required, a function's name, or allowed_tools: enforced."
    )
    functions: Annotated[list[Function], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = Field(
        None, description="OpenAI's older name for tools."
    )
    function_call: str | dict[str, Any] | None = Field(None, description="OpenAI's older name for tool_choice.")
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most.")
    prediction: Prediction | None = Field(
        None, description="What the answer may be, or much of it: where it is, it comes faster."
    )
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = Field(None, description="`effort` and `enabled`, as OpenRouter has them.")
    thinking: Thinking | bool | None = Field(None, description='As GLM and DeepSeek have it: {"type": "disabled"}.')
    think: bool | Effort | None = Field(None, description="Ollama's name for reasoning_effort.")
    enable_thinking: bool | None = None
    max_reasoning_tokens: Budget | None = Field(None, description="Tokens after which the reasoning is ended.")
    thinking_budget: Budget | None = Field(None, description="Another name for max_reasoning_tokens, as are the next.")
    thinking_token_budget: Budget | None = None
    thinking_budget_tokens: Budget | None = None
    reasoning_budget: Budget | None = None
    reasoning_budget_tokens: Budget | None = None
    max_thinking_tokens: Budget | None = None
    include_reasoning: bool | None = Field(None, description="false: the reasoning is not sent.")
    separate_reasoning: bool | None = Field(None, description="false: the reasoning is part of the content.")
    reasoning_format: Literal["auto", "none", "deepseek", "deepseek-legacy", "parsed", "raw", "hidden"] | None = Field(
        None, description="none or raw: the reasoning is part of the content; hidden: it is not sent."
    )
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: Literal[False] | None = None

    @model_validator(mode="after")
    def _fit_a_chat(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(f"top_logprobs needs logprobs: true (got {self.top_logprobs}).", param="top_logprobs")
        return self

    @property
    def reasoning_budget_asked(self) -> int | None:
        """Tokens that the reasoning may take, under any name; None: as many as it wants."""
        asked = (
            self.max_reasoning_tokens,
            self.thinking_budget,
            self.thinking_token_budget,
            self.thinking_budget_tokens,
            self.reasoning_budget,
            self.reasoning_budget_tokens,
            self.max_thinking_tokens,
            self.reasoning.max_tokens if self.reasoning else None,
            self.thinking.budget_tokens if isinstance(self.thinking, Thinking) else None,
        )
        return next((budget for budget in asked if budget is not None and budget >= 0), None)


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

    @property
    def scores(self) -> int:
        echoed = self.logprobs if self.echo and self.logprobs is not None else -1
        return max(echoed, super().scores)

    @model_validator(mode="after")
    def _fit_a_completion(self) -> "CompletionRequest":
        if self.echo and self.suffix and self.logprobs is not None:
            raise InvalidRequest(
                f"echo with logprobs (got {self.logprobs}) and suffix: what is filled in has no place in the echo.",
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
    """A text, or a conversation: vLLM's fields, and llama-server's."""

    prompt: str | None = None
    content: str | None = Field(None, description="llama-server's name for prompt.")
    messages: Messages | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = Field(None, description="With messages; true by default.")
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = Field(None, description="BOS; true by default for a prompt, false for messages.")
    add_special: bool | None = Field(None, description="The same of content; false by default.")
    parse_special: bool | None = Field(None, description="false: special tokens in content are plain text.")
    return_token_strs: bool | None = Field(None, description="The tokens as the vocabulary spells them, too.")
    with_pieces: bool | None = Field(None, description="Each token as its id and its text, or bytes that are none.")

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        given = [name for name in ("prompt", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"One of prompt, content and messages is required (got {' and '.join(given) or 'none'}).",
                param="prompt",
            )
        return self


class DetokenizeRequest(Request):
    tokens: Annotated[TokenIds, Field(max_length=MAX_DETOKENIZED)]
