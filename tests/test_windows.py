"""Sliding layers fetch their window and nothing else: rows far past it draw what mlx-lm draws alone, however their
prompts are cut and whoever runs beside them."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.mlx import adapter
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.layers import scatter_write, slice_write
from tests.models import build_model

WINDOW = 8
LENGTHS = (5, 41, 19, 30)
STEPS = 13
_TYPES = ["sliding_attention", "full_attention"] * 2
_SMALL = {"num_hidden_layers": 4, "sliding_window": WINDOW, "layer_types": _TYPES}
# How each makes its masks: from one cache for all sliding layers, given the window or not, with sinks, with patterns.
MODELS: dict[str, dict[str, Any]] = {
    "gemma3_text": {**_SMALL, "sliding_window_pattern": 2},
    "llama": _SMALL,
    "cohere2": {**_SMALL, "sliding_window_pattern": 2, "layer_norm_eps": 1e-5, "logit_scale": 1.0},
    "olmo3": _SMALL,
    "exaone4": {**_SMALL, "sliding_window_pattern": "LG", "rope_scaling": None},
    "gpt_oss": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral3": {
        **_SMALL,
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    },
}


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> adapter.LoadedModel:
    return adapter.load(build_model(request.param, tmp_path_factory.mktemp("model") / "model", **MODELS[request.param]))


def lane_of(loaded: adapter.LoadedModel, rows: int, write: Any = scatter_write) -> Lane:
    kinds = adapter.layer_kinds(loaded.model)
    assert not isinstance(kinds, str)
    assert {kind.window for kind in kinds} == {WINDOW, None}
    return Lane(loaded, kinds, rows, 256, write)


def alone(loaded: adapter.LoadedModel, prompt: list[int], forced: list[int]) -> np.ndarray:
    """The logits after the prompt and after each forced token, on mlx-lm's own caches."""
    caches = adapter.make_prompt_cache(loaded.model)
    rows = [loaded.model(mx.array([prompt]), cache=caches)[:, -1]]
    rows += [loaded.model(mx.array([[token]]), cache=caches)[:, -1] for token in forced]
    return np.array(mx.concatenate(rows))


def prefill(lane: Lane, row: int, prompt: list[int], cuts: list[int]) -> mx.array:
    ends = sorted({min(cut, len(prompt)) for cut in cuts} | {len(prompt)})
    logits = None
    for start, end in zip([0, *ends], ends, strict=False):
        logits = lane.prefill(row, prompt[start:end], last=end == len(prompt))
    assert logits is not None
    return logits


@pytest.mark.parametrize(("write", "rows_of_lane"), [(scatter_write, 6), (scatter_write, 7), (slice_write, 7)])
def test_rows_far_past_the_window_are_as_if_alone(loaded: adapter.LoadedModel, write: Any, rows_of_lane: int) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(5, loaded.vocab_size, length).tolist() for length in LENGTHS]
    forced = rng.integers(5, loaded.vocab_size, (len(LENGTHS), STEPS)).tolist()
    lane = lane_of(loaded, rows_of_lane, write)
    for row in range(6):
        lane.acquire(row)
    rows = [0, 2, 3, 5]
    cuts = [[], [13, 40], [3, 4, 18], [7, 15, 29]]
    found = [[prefill(lane, row, prompt, mine)] for row, prompt, mine in zip(rows, prompts, cuts, strict=True)]
    lane.release(1)
    lane.release(4)
    lane.poison(inside=100.0, outside=float("nan"), span=max(LENGTHS) + STEPS)
    for step in range(STEPS):
        # All rows, then without the shortest.
        members = range(4) if step < 5 else (1, 2, 3)
        tokens = np.zeros((6, 1), np.int32)
        for i in members:
            tokens[rows[i]] = forced[i][step]
        logits = lane.decode([rows[i] for i in members], mx.array(tokens))[:, 0]
        for i in members:
            found[i].append(logits[rows[i] : rows[i] + 1])
    for prompt, tokens, mine in zip(prompts, forced, found, strict=True):
        expected = alone(loaded, prompt, tokens)[: len(mine)]
        np.testing.assert_allclose(np.array(mx.concatenate(mine)), expected, atol=1e-4 * np.abs(expected).max())


def test_several_tokens_a_row_past_the_window(loaded: adapter.LoadedModel) -> None:
    rng = np.random.default_rng(4)
    prompts = [rng.integers(5, loaded.vocab_size, length).tolist() for length in (23, 37)]
    forced = rng.integers(5, loaded.vocab_size, (2, 6)).tolist()
    lane = lane_of(loaded, 2)
    for row, prompt in enumerate(prompts):
        prefill(lane, lane.acquire(row), prompt, [])
    logits = mx.concatenate(
        [lane.decode(range(2), mx.array(forced)[:, part]) for part in (slice(0, 5), slice(5, 6))], axis=1
    )
    for row in range(2):
        expected = alone(loaded, prompts[row], forced[row])[1:]
        np.testing.assert_allclose(np.array(logits[row]), expected, atol=1e-4 * np.abs(expected).max())


def test_a_sliding_layer_is_shown_its_window(loaded: adapter.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    attention: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention

    def spy(queries: mx.array, keys: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        seen.add(keys.shape[2])
        return attention(queries, keys, *args, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)

    def slots_of(run: Callable[[], object]) -> set[int]:
        seen.clear()
        run()
        return set(seen)

    lane = lane_of(loaded, 2)
    first, second = lane.acquire(0), lane.acquire(1)
    assert slots_of(lambda: lane.prefill(first, [5] * 30, last=False)) == {30}
    assert slots_of(lambda: lane.prefill(first, [6] * 10, last=True)) == {40, 10 + WINDOW - 1}
    assert slots_of(lambda: lane.decode([first])) == {41, WINDOW}
    lane.prefill(second, [7] * 36, last=True)
    assert slots_of(lambda: lane.decode([first, second])) == {42, 42 - 36 - 1 + WINDOW}
    assert slots_of(lambda: lane.decode([first])) == {43, WINDOW}
