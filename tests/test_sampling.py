"""The sampling graph: each rule by its definition, rows on their own in any batch, the same draws in MLX and NumPy."""

import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.engine.sampling import SamplingBatch, _candidates, draw_key, traces
from lmx.protocol import Sampling

VOCAB = 50


def draw(xp, logits, rows, position, counts=None):
    batch = SamplingBatch(xp, rows, logits.shape[1])
    keys = [draw_key(row.seed, position) for row in rows]
    if counts is not None:
        counts = tuple(xp.array(c) for c in counts)
    return batch.draw(xp.array(logits), keys, counts)


samplings = st.builds(
    Sampling,
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, VOCAB, 1000]),
    top_p=st.sampled_from([0.1, 0.8, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.sampled_from([None, {3: 4.0, 7: -100.0}]),
    logprobs=st.sampled_from([-1, 0, 5]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(samplings, min_size=1, max_size=5), st.integers(0, 2**20), st.integers(0, 99), st.sampled_from([3, 30]))
def test_a_row_draws_what_it_draws_alone_on_either_library(rows, seed, position, spread):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (len(rows), VOCAB)).astype(np.float32)
    answer = rng.integers(0, 2, (len(rows), VOCAB)).astype(np.int32)
    seen = answer + rng.integers(0, 2, answer.shape).astype(np.int32)
    together = draw(mx, logits, rows, position, (seen, answer))
    tokens = np.array(together.tokens)
    for i, row in enumerate(rows):
        part = slice(i, i + 1)
        for xp in (mx, np):
            alone = draw(xp, logits[part], [row], position, (seen[part], answer[part]))
            assert int(alone.tokens[0]) == tokens[i]


def frequencies(row, logits, draws=4000):
    batch = SamplingBatch(np, [row], logits.shape[0])
    found = [int(batch.draw(logits[None], [draw_key(row.seed, p)]).tokens[0]) for p in range(draws)]
    return np.bincount(found, minlength=len(logits)) / draws


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (Sampling(1), [0, 1, 2, 3, 4]),
        (Sampling(2, temperature=0.5), [0, 1, 2, 3, 4]),
        (Sampling(3, top_k=2), [3, 4]),
        (Sampling(4, top_p=0.7), [3, 4]),
        (Sampling(5, min_p=0.3), [3, 4]),
        (Sampling(6, top_k=3, top_p=0.8), [3, 4]),
    ],
)
def test_draws_follow_the_truncated_distribution(row, kept):
    logits = np.array([0.0, 0.5, 1.0, 2.0, 3.0], np.float32)
    expected = np.zeros(5)
    expected[kept] = softmax(logits[kept] / row.temperature)
    assert np.abs(frequencies(row, logits) - expected).max() < 0.03


def test_penalties_follow_their_definitions():
    logits = np.array([[2.0, 1.9, -1.0]], np.float32)
    seen, answer = np.array([[2, 0, 1]], np.int32), np.array([[2, 0, 0]], np.int32)

    def greedy(**penalty):
        return int(draw(np, logits, [Sampling(0, temperature=0.0, **penalty)], 0, (seen, answer)).tokens[0])

    assert greedy() == 0
    assert greedy(repetition_penalty=1.1) == 1
    assert greedy(presence_penalty=0.2) == 1
    assert greedy(frequency_penalty=0.06) == 1  # twice in the answer
    assert greedy(frequency_penalty=0.04) == 0
    assert greedy(logit_bias={2: 100.0}) == 2


def test_logprobs_are_of_the_unscaled_distribution_likeliest_first():
    logits = np.random.default_rng(0).normal(0, 2, (1, VOCAB)).astype(np.float32)
    drawn = draw(mx, logits, [Sampling(9, temperature=0.7, top_k=3, logprobs=5)], 4)
    expected = np.log(softmax(logits[0]))
    token = int(drawn.tokens[0])
    assert math.isclose(float(drawn.logprobs[0]), expected[token], abs_tol=1e-4)
    order = np.argsort(-expected)[:20]
    assert np.array(drawn.top_ids)[0].tolist() == order.tolist()
    np.testing.assert_allclose(np.array(drawn.top_logprobs)[0], expected[order], atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_only_the_row_with_non_finite_logits_is_bad(value):
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, 7] = value
    drawn = draw(mx, logits, [Sampling(0), Sampling(1), Sampling(2, temperature=0.0)], 0)
    assert np.array(drawn.bad).tolist() == [False, True, False]


def test_masked_entries_of_a_model_are_not_bad_and_never_drawn():
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, 11] = 0.0
    for position in range(200):
        drawn = draw(mx, logits, [Sampling(position)], position)
        assert not bool(drawn.bad[0])
        assert int(drawn.tokens[0]) == 11


def test_keys_depend_on_seed_and_position_alone():
    keys = {(seed, position): draw_key(seed, position) for seed in range(50) for position in range(50)}
    assert len(set(keys.values())) == 2500
    assert draw_key(3, 4) == keys[3, 4] != draw_key(3 + 2**63, 4)
    assert abs(np.mean(list(keys.values())) / 2**32 - 0.5) < 0.02


@pytest.mark.parametrize("size", [40, 1000, 4096, 5003])
@pytest.mark.parametrize("k", [1, 3, 20, 64, 1000])
def test_candidates_hold_the_largest(size, k):
    """Ties and entries that a model masks included."""
    rng = np.random.default_rng(size + k)
    k = min(k, size)
    logits = rng.choice([*rng.normal(0, 3, size // 4).astype(np.float32), -np.inf], (3, size)).astype(np.float32)
    for xp in (mx, np):
        values, ids = map(np.array, _candidates(xp, xp.array(logits), k))
        assert values.shape[1] <= min(size, 2 * math.sqrt(size * k) + 64)
        assert np.array_equal(np.sort(values)[:, ::-1][:, :k], np.sort(logits)[:, ::-1][:, :k])
        assert np.array_equal(np.take_along_axis(logits, ids, axis=1), values)
        assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize(
    "row", [{"top_k": 20, "top_p": 0.8}, {"top_k": 300}, {"top_p": 0.7}, {"top_k": 5000, "min_p": 0.1}]
)
def test_large_vocabularies_draw_the_same_on_either_library(row):
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (4, 5003)).astype(np.float32)
    logits[:, rng.integers(0, 5003, 40)] += 6
    rows = [Sampling(seed, temperature=0.7, **row) for seed in range(4)]
    for position in range(12):
        together = np.array(draw(mx, logits, rows, position).tokens).tolist()
        alone = [int(draw(np, logits[i : i + 1], [rows[i]], position).tokens[0]) for i in range(4)]
        assert together == alone


def graph_of(rows, vocab, logits=None, compiled=True):
    """A lazy draw, as on a GPU."""
    rng = np.random.default_rng(0)
    batch = SamplingBatch(mx, rows, vocab, compiled=compiled)
    seen = mx.array(rng.integers(0, 3, (len(rows), vocab)).astype(np.int32))
    if logits is None:
        logits = rng.normal(0, 3, (len(rows), vocab)).astype(np.float32)
    counts = [seen, seen] if batch.penalised else None
    return batch.draw(mx.array(logits), [draw_key(row.seed, 1) for row in rows], counts)


def test_mixed_traffic_does_not_trace_without_bound():
    """What differs in values alone shares a graph; what differs in kind makes a few more, and not in proportion to the
    traffic."""
    rng = np.random.default_rng(1)
    before = traces()
    for _ in range(40):
        top_k, top_p = int(rng.integers(1, 33)), float(rng.uniform(0.1, 0.99))
        graph_of([Sampling(int(seed), rng.uniform(0.1, 2), top_k, top_p) for seed in rng.integers(0, 99, 4)], 97)
    assert traces() - before == 1
    made = []
    for _ in range(400):
        rows = []
        for seed in rng.integers(0, 2**40, rng.integers(1, 4)):
            biases = {int(token): 1.0 for token in rng.integers(0, 97, rng.integers(0, 9))}
            rows.append(
                Sampling(
                    int(seed),
                    temperature=rng.choice([0.0, rng.uniform(0.1, 2)]),
                    top_k=int(rng.choice([0, rng.integers(1, 97)])),
                    top_p=rng.choice([1.0, rng.uniform(0.1, 1)]),
                    repetition_penalty=rng.choice([1.0, rng.uniform(1, 2)]),
                    logit_bias=biases if rng.random() < 0.3 else None,
                    logprobs=int(rng.choice([-1, 5])),
                )
            )
        graph_of(rows, 97)
        made.append(traces() - before)
    # Three row counts × penalties × logprobs × bias (none, 1, 2, 4, 8) × order (greedy, none, 32, 64, all).
    assert made[-1] <= 3 * 2 * 2 * 5 * 5
    assert made[-1] - made[200] < made[200]


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles CPU kernels with g++")
def test_compiled_draws_are_the_same():
    rows = [
        Sampling(1, 0.7, 20, 0.8, repetition_penalty=1.2, logit_bias={3: 2.0, 9: -100.0}),
        Sampling(2, temperature=0.0),
        Sampling(3, 1.3, presence_penalty=0.4),
    ]
    for vocab in (90, 3001):
        assert graph_of(rows, vocab).tokens.tolist() == graph_of(rows, vocab, compiled=False).tokens.tolist()
