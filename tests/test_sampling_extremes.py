"""No logits and no parameters make a draw raise: a row draws one of the vocabulary's ids, or is bad, and says so."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.sampling import SamplingBatch, draw_key
from lmx.protocol import Sampling

VOCAB = 40
HUGE, TINY = 1e308, 5e-324
NUCLEUS = [
    {},
    {"top_p": 0.9},
    {"top_k": 3},
    {"min_p": 0.2},
    {"top_p": TINY, "top_k": 2**31 - 1, "min_p": TINY},
    {"top_p": 0.0, "min_p": 7.0},
]
PENALTIES = [
    {},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {0: -100, 5: 3.5}},
    {"repetition_penalty": TINY, "logit_bias": {1: HUGE, 2: -HUGE}},
    {"repetition_penalty": HUGE, "presence_penalty": -HUGE, "frequency_penalty": HUGE},
    {"logit_bias": dict.fromkeys(range(VOCAB), -HUGE)},
]
# An API may let them through, and JSON has a way to write them.
NONSENSE = {
    "repetition_penalty": math.nan,
    "presence_penalty": math.inf,
    "frequency_penalty": math.nan,
    "top_p": math.nan,
    "top_k": -1,
    "min_p": math.nan,
    "logit_bias": {3: math.nan, 4: math.inf, VOCAB: 3.0, 2**40: 3.0, -1: 3.0},
}


def logits_rows() -> dict[str, np.ndarray]:
    plain = np.random.default_rng(0).normal(0, 4, VOCAB).astype(np.float32)
    rows = {"plain": plain, "flat": np.zeros(VOCAB), "wide": plain * 1e37, "masked": np.full(VOCAB, -np.inf)}
    rows["masked"][7] = 1.5
    for name, value in (("nan", np.nan), ("inf", np.inf), ("-inf", -np.inf)):
        rows[f"one {name}"] = plain.copy()
        rows[f"one {name}"][11] = value
        rows[f"all {name}"] = np.full(VOCAB, value)
    return {name: row.astype(np.float32) for name, row in rows.items()}


ROWS = logits_rows()
BAD = {"one nan", "all nan", "one inf", "all inf", "all -inf"}


def draws(xp, rows, logits, seen, answer):
    """Of all rows together in MLX, and one row after the other in NumPy, as the back ends draw; (token, bad) each."""
    parts = [slice(0, len(rows))] if xp is mx else [slice(i, i + 1) for i in range(len(rows))]
    for part in parts:
        batch = SamplingBatch(xp, rows[part], VOCAB)
        keys = [draw_key(row.seed, 3) for row in rows[part]]
        counts = [xp.array(seen[part]), xp.array(answer[part])] if batch.penalised else None
        drawn = batch.draw(xp.array(logits[part]), keys, counts)
        yield from zip(np.array(drawn.tokens).tolist(), np.array(drawn.bad).tolist(), strict=True)


@pytest.mark.parametrize("temperature", [0.0, TINY, 1e-310, 1e-30, 1.0, HUGE])
@pytest.mark.parametrize("xp", [mx, np], ids=["mlx", "numpy"])
def test_a_draw_is_a_token_or_bad(xp, temperature):
    rng = np.random.default_rng(1)
    logits = np.stack(list(ROWS.values()))
    answer = rng.integers(0, 3, logits.shape).astype(np.int32)
    seen = answer + rng.integers(0, 2, logits.shape).astype(np.int32)
    for fields in [*({**n, **p} for n, p in itertools.product(NUCLEUS, PENALTIES)), NONSENSE]:
        for logprobs in (-1, 5):
            rows = [Sampling(seed, temperature, logprobs=logprobs, **fields) for seed in range(len(ROWS))]
            for name, (token, bad) in zip(ROWS, draws(xp, rows, logits, seen, answer), strict=True):
                assert bad == (name in BAD), (name, fields)
                assert 0 <= token < VOCAB, (name, fields)


@pytest.mark.parametrize("temperature", [TINY, 1e-310, 1e-30])
@pytest.mark.parametrize("xp", [mx, np], ids=["mlx", "numpy"])
def test_a_tiny_temperature_takes_the_likeliest(xp, temperature):
    logits = np.stack([ROWS["plain"], ROWS["masked"]])
    rows = [Sampling(seed, temperature, top_p=0.9) for seed in range(2)]
    none = np.zeros(logits.shape, np.int32)
    assert [token for token, _ in draws(xp, rows, logits, none, none)] == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("xp", [mx, np], ids=["mlx", "numpy"])
def test_a_bias_beyond_float32_forbids_and_forces(xp):
    logits = np.zeros((1, VOCAB), np.float32)
    none = np.zeros(logits.shape, np.int32)
    for seed in range(20):
        [(forced, _)] = draws(xp, [Sampling(seed, logit_bias={9: HUGE})], logits, none, none)
        assert forced == 9
        forbidden = dict.fromkeys(range(1, VOCAB), -HUGE)
        [(left, _)] = draws(xp, [Sampling(seed, logit_bias=forbidden)], logits, none, none)
        assert left == 0
