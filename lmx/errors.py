"""Every error that lmx raises on purpose, with the facts an API face needs to answer it.

Raised where the fact is known; turned into HTTP in one place (``lmx.api.errors``). ``message`` names the offending
value and the way out. Nothing here knows HTTP beyond the status number.
"""

from typing import ClassVar


class LmxError(Exception):
    """Base of all expected errors. ``param`` names the request field or setting at fault."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(LmxError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class GrammarTooComplex(InvalidRequest):
    """A schema or grammar that would take longer than a request may."""

    code = "grammar_too_complex"


def input_too_long(index: int, tokens: int, context: int) -> ContextLengthExceeded:
    """For one of the texts that vectors are asked of."""
    return ContextLengthExceeded(
        f"This model takes inputs of at most {context} tokens; input[{index}] has {tokens}. Nothing is cut: send less "
        "of it, or in several inputs.",
        param=f"input[{index}]",
    )


class Unauthorized(LmxError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(LmxError):
    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class ModelNotFound(LmxError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class Conflict(LmxError):
    """Not while things are as they are; ``message`` says what must end first."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTooLarge(LmxError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class QueueFull(LmxError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class ModelLoadingFailed(LmxError):
    status = 503
    code = "model_loading_failed"


class ModelOverloaded(LmxError):
    """The model cannot take the request now (it is restarting, or the server shuts down)."""

    status = 503
    code = "model_overloaded"


class InsufficientMemory(LmxError):
    """A model does not fit beside what must stay; ``message`` has the numbers."""

    status = 503
    code = "insufficient_memory"


class EngineDied(LmxError):
    """The model's engine process ended under this request; ``message`` says why as far as it is known."""

    status = 503
    code = "engine_died"


class RequestCrashesEngine(LmxError):
    """The engine ended twice over this one request, the second time with nothing beside it: trying again is no use."""

    status = 422
    type = "invalid_request_error"
    code = "request_crashes_engine"


class SequenceFailed(LmxError):
    """The engine gave this one sequence up (for example non-finite logits); others are not touched."""

    code = "generation_failed"


class DeadlineExceeded(LmxError):
    status = 504
    type = "timeout_error"
    code = "timeout"


class ConfigError(LmxError):
    """lmx.toml, an ``LMX_`` variable or a command-line option cannot be used."""

    code = "invalid_config"


class ModelInvalid(LmxError):
    """A model folder or file is missing, truncated or of a kind that lmx cannot read: asking again does not help."""

    status = 422
    type = "invalid_request_error"
    code = "model_invalid"
