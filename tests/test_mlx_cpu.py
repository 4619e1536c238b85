"""Attention and the logistic function for MLX's CPU: the same results as MLX's own, for everything models ask for."""

import math
import platform
import sys

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.mlx import adapter, cpu

FEW, CHUNK = 3, 40
"""Queries that are computed lazily, and in place."""


@pytest.fixture
def arrays(request: pytest.FixtureRequest) -> list[mx.array]:
    """Queries of 6 heads, keys and values of 2."""
    batch, tokens, context = request.param
    rng = np.random.default_rng(tokens)
    shapes = ((batch, 6, tokens, 16), (batch, 2, context, 16), (batch, 2, context, 24))
    return [mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


@pytest.mark.parametrize("arrays", [(1, FEW, 900), (3, FEW, 300), (1, CHUNK, 900), (2, CHUNK, CHUNK)], indirect=True)
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "of each head", "added"])
def test_attention_equals_mlx_own(arrays, kind):
    q, k, v = arrays
    tokens, context = q.shape[2], k.shape[2]
    causal = mx.arange(context) <= mx.arange(context - tokens, context)[:, None]
    mask = {
        "none": None,
        "causal": "causal",
        "bool": causal & (mx.arange(context) > 3),
        "of each head": mx.broadcast_to(causal, (q.shape[0], q.shape[1], tokens, context)),
        "added": mx.where(causal, 0.0, -1e9),
    }[kind]
    wanted = np.array(cpu.mlx_attention(q, k, v, scale=0.3, mask=mask))
    np.testing.assert_allclose(np.array(cpu.attention(q, k, v, scale=0.3, mask=mask)), wanted, atol=3e-6)


@pytest.mark.parametrize("arrays", [(1, FEW, 900), (1, CHUNK, 900)], indirect=True)
def test_scores_that_are_far_apart_are_weighed_as_by_mlx(arrays):
    q, k, v = arrays
    wanted = np.array(cpu.mlx_attention(100 * q, k, v, scale=1.0))
    np.testing.assert_allclose(np.array(cpu.attention(100 * q, k, v, scale=1.0)), wanted, atol=1e-3)


@pytest.mark.parametrize("arrays", [(2, FEW, 900), (2, CHUNK, 900)], indirect=True)
@pytest.mark.parametrize("place", ["queries", "keys", "values"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_own_row_and_no_other(arrays, place, bad):
    spoilt = arrays[("queries", "keys", "values").index(place)]
    spoilt[0, :, 1, 2] = bad
    found = cpu.attention(*arrays, scale=0.3)
    assert not mx.all(mx.isfinite(found[0])).item()
    assert mx.all(mx.isfinite(found[1])).item()


def test_other_types_and_sinks_are_left_to_mlx():
    q, k, v = (mx.random.normal((1, 2, 32, 16)).astype(mx.float16) for _ in range(3))
    assert mx.array_equal(cpu.attention(q, k, v, scale=1.0), cpu.mlx_attention(q, k, v, scale=1.0)).item()
    q, k, v = (part.astype(mx.float32) for part in (q, k, v))
    sinks = mx.ones(2)
    found, wanted = (attend(q, k, v, scale=1.0, sinks=sinks) for attend in (cpu.attention, cpu.mlx_attention))
    assert mx.array_equal(found, wanted).item()


def test_the_logistic_function_equals_mlx_own():
    x = mx.concatenate([mx.arange(-300, 300, 0.37), mx.array([math.inf, -math.inf])])
    np.testing.assert_allclose(np.array(cpu.sigmoid(x)), 1 / (1 + np.exp(-np.array(x, dtype=np.float64))), atol=1e-6)
    assert math.isnan(cpu.sigmoid(mx.array(math.nan)).item())


def test_models_call_them_where_they_gain():
    gains = mx.default_device() == mx.cpu and sys.platform == "linux" and platform.machine() == "x86_64"
    assert adapter.mx.fast.scaled_dot_product_attention is (cpu.attention if gains else cpu.mlx_attention)
