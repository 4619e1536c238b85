"""The requests of ``lmx.api.openai.embeddings`` as pydantic models. The rules of ``lmx.api.core.schemas`` hold, too."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from lmx.api.core.schemas import INT64_MAX, Request, TokenIds
from lmx.api.core.shorten import shorten
from lmx.errors import InvalidRequest

MAX_INPUTS = 2048
"""OpenAI's."""
MAX_DOCUMENTS = 2048


class EmbeddingFields(Request):
    """What both routes have in common."""

    user: str | None = Field(None, description="Whom fair scheduling counts the tokens for, when no API key does.")
    priority: int | None = Field(None, ge=-1000, le=1000)
    timeout: float | None = Field(None, gt=0, description="Seconds until the request is given up with 504.")


def _input_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return {str: "texts", int: "ids", list: "lists"}.get(type(first))


class EmbeddingRequest(EmbeddingFields):
    input: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(fail_fast=True), Tag("texts")]
        | Annotated[TokenIds, Tag("ids")]
        | Annotated[list[TokenIds], Field(fail_fast=True), Tag("lists")],
        Discriminator(
            _input_kind,
            custom_error_type="input_kind",
            custom_error_message="Should be a text, a list of texts, of token ids, or of lists of token ids",
        ),
    ] = Field(description="Text, texts, token ids or lists of them; 2,048 at most.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Numbers, or the base64 of little-endian float32."
    )
    dimensions: int | None = Field(
        None, ge=1, le=INT64_MAX, description="Cut the vectors to so many numbers, where the model is made for that."
    )
    prompt_name: str | None = Field(
        None, max_length=1000, description="The prompt of the model's own (config_sentence_transformers.json) to use."
    )
    input_type: str | None = Field(
        None, max_length=1000, description='The same by purpose: "query" or "document", where the model has such.'
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "EmbeddingRequest":
        if self.prompt_name is not None and self.input_type is not None:
            raise InvalidRequest(
                f"prompt_name and input_type exclude each other (got {shorten(self.prompt_name)} and "
                f"{shorten(self.input_type)}).",
                param="prompt_name",
            )
        if self.input in ("", []):
            raise InvalidRequest(f"input must not be empty (got {shorten(self.input)}).", param="input")
        if isinstance(self.input, list) and not isinstance(self.input[0], int):
            if len(self.input) > MAX_INPUTS:
                raise InvalidRequest(
                    f"input has {len(self.input)} texts; this server takes {MAX_INPUTS} a request.", param="input"
                )
            for index, item in enumerate(self.input):
                if not item:
                    raise InvalidRequest(
                        f"input[{index}] must not be empty (got {shorten(item)}).", param=f"input[{index}]"
                    )
        return self


class TextDocument(BaseModel):
    model_config = ConfigDict(strict=True)

    text: str


class RerankRequest(EmbeddingFields):
    """Jina's and Cohere's."""

    query: str = Field(min_length=1)
    documents: Annotated[list[str | TextDocument], Field(fail_fast=True, min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: int | None = Field(None, ge=1, le=INT64_MAX, description="How many of the best to return.")
    return_documents: bool | None = Field(None, description="Repeat the documents in the answer.")
