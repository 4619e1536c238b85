"""What a ``Submit`` must hold before the engine takes it: everything that the server cannot check itself (the model's
own vocabulary), and everything that would raise in a later step, where an exception ends the engine for everybody.

Pure. Called by the step loop, once for each request.
"""

import math
from collections.abc import Iterator

from lmx.engine.backend import Facts
from lmx.engine.sampling import TOP_LOGPROBS
from lmx.protocol import Sampling, Submit, unpack_tokens

SPECULATION = ("off", "lookup", "auto")


class Refused(ValueError):
    """This request cannot run; ``code`` as in ``protocol.Failed``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def read_prompt(submit: Submit, facts: Facts) -> list[int]:
    """The prompt's token ids. Raises Refused."""
    if len(submit.prompt) % 4:
        raise Refused("invalid_token", f"a prompt of {len(submit.prompt)} bytes is not made of 4-byte token ids")
    prompt = unpack_tokens(submit.prompt)
    highest = facts.vocab_size - 1
    if not prompt:
        raise Refused("invalid_token", f"the prompt must hold at least one token id from 0 to {highest}")
    if max(prompt) > highest:
        raise Refused("invalid_token", f"the prompt holds token {max(prompt)}; this model's go from 0 to {highest}")
    if len(prompt) >= facts.context_length:
        raise Refused(
            "never_fits",
            f"the prompt's {len(prompt)} tokens leave no room in a context of {facts.context_length} tokens",
        )
    return prompt


def read_answer(submit: Submit, facts: Facts) -> list[int]:
    """The token ids of the answer that it has already. Raises Refused."""
    if len(submit.answer) % 4:
        raise Refused("invalid_token", f"an answer of {len(submit.answer)} bytes is not made of 4-byte token ids")
    answer = unpack_tokens(submit.answer)
    highest = facts.vocab_size - 1
    if answer and max(answer) > highest:
        raise Refused("invalid_token", f"the answer holds token {max(answer)}; this model's go from 0 to {highest}")
    return answer


def check_sampling(sampling: Sampling, facts: Facts) -> None:
    """Raises Refused."""
    highest = facts.vocab_size - 1
    for token in sampling.logit_bias or ():
        if not 0 <= token <= highest:
            raise Refused(
                "invalid_request", f"logit_bias names token {token}; this model's tokens go from 0 to {highest}"
            )
    for name, value in _numbers(sampling):
        if not math.isfinite(value):
            raise Refused("invalid_request", f"{name} must be a finite number, got {value}")
    if sampling.temperature < 0:
        raise Refused("invalid_request", f"temperature must be at least 0, got {sampling.temperature}")


def check_answer(submit: Submit, facts: Facts) -> None:
    """Raises Refused."""
    highest = facts.vocab_size - 1
    if submit.speculation not in SPECULATION:
        raise Refused(
            "invalid_request", f"speculation must be {', '.join(SPECULATION)}, got {submit.speculation[:40]!r}"
        )
    if len(submit.prediction) % 4:
        raise Refused(
            "invalid_request", f"a prediction of {len(submit.prediction)} bytes is not made of 4-byte token ids"
        )
    if (foreign := max(unpack_tokens(submit.prediction), default=0)) > highest:
        raise Refused(
            "invalid_request", f"the prediction holds token {foreign}; this model's tokens go from 0 to {highest}"
        )
    if submit.prompt_logprobs > TOP_LOGPROBS:
        raise Refused(
            "invalid_request", f"prompt_logprobs must be at most {TOP_LOGPROBS}, got {submit.prompt_logprobs}"
        )
    for token in submit.stop_ids:
        if not 0 <= token <= highest:
            raise Refused(
                "invalid_request", f"stop_token_ids names token {token}; this model's tokens go from 0 to {highest}"
            )


def _numbers(sampling: Sampling) -> Iterator[tuple[str, float]]:
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        yield name, getattr(sampling, name)
    yield from (("logit_bias", value) for value in (sampling.logit_bias or {}).values())
