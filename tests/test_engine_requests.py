"""A request that cannot run fails alone, with a message that names what is wrong; the engine goes on."""

import math
from typing import Any

import pytest

from lmx.protocol import Sampling, pack_tokens
from tests.sim import VOCAB_SIZE, Simulation

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no prompt": ({"prompt": b""}, "invalid_token", "at least one token"),
    "half a token": ({"prompt": b"\x01\x00\x00"}, "invalid_token", "3 bytes"),
    "unknown token": ({"prompt": pack_tokens([5, VOCAB_SIZE])}, "invalid_token", f"token {VOCAB_SIZE}"),
    "longer than the context": ({"prompt": pack_tokens([5] * 200_000)}, "never_fits", "200000 tokens"),
    "longer than the KV": ({"prompt": pack_tokens([5] * 3000)}, "never_fits", "3000 tokens"),
    "no answer": ({"max_tokens": 0}, "invalid_request", "max_tokens"),
    "priority": ({"priority": 2**40}, "invalid_request", "priority"),
    "deadline": ({"deadline_s": math.nan}, "invalid_request", "deadline"),
    "bias beyond": ({"sampling": Sampling(0, logit_bias={VOCAB_SIZE: 1.0})}, "invalid_request", f"token {VOCAB_SIZE}"),
    "bias below": ({"sampling": Sampling(0, logit_bias={5: 1.0, -1: 1.0})}, "invalid_request", "token -1"),
    "infinite bias": ({"sampling": Sampling(0, logit_bias={5: math.inf})}, "invalid_request", "logit_bias"),
    "cold": ({"sampling": Sampling(0, temperature=-0.5)}, "invalid_request", "-0.5"),
    **{
        f"{value} {name}": ({"sampling": Sampling(0, **{name: value})}, "invalid_request", name)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for value in (math.nan, math.inf)
    },
}


@pytest.mark.parametrize("loop", ["overlapped", "plain"])
def test_all_of_them_beside_one_that_runs(loop: Any) -> None:
    simulation = Simulation(loop=loop, kv_tokens=2560)
    stream = simulation.request(prompt=20, answer=100)
    refused = {
        name: simulation.request(at_s=0.3 + 0.03 * i, prompt=10, answer=5, submit=fields)
        for i, (name, (fields, _, _)) in enumerate(REFUSED.items())
    }
    simulation.run()
    assert len(stream.token_s) == 100
    for name, request in refused.items():
        _, code, words = REFUSED[name]
        assert request.failed is not None, name
        assert (request.failed.code, request.token_s) == (code, []), name
        assert words in request.failed.message, (name, request.failed.message)
        assert request.freed_s is not None


def test_a_sequence_that_is_still_there_is_never_answered_twice() -> None:
    """The server's mistake, no client's: to fail the second would fail the first."""
    simulation = Simulation()
    first = simulation.request(prompt=20, answer=50)
    simulation.request(at_s=0.3, prompt=20, answer=50, submit={"seq": first.seq})
    with pytest.raises(ValueError, match=f"sequence {first.seq} again"):
        simulation.run()
