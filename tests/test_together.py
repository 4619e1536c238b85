"""The decoding rows of several lanes in one forward pass: as if each were alone."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.mlx import adapter, together
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.layers import DUMMY_SLOTS, scatter_write
from lmx.protocol import Sampling
from tests.engine_client import GREEDY, engine
from tests.models import KINDS, build_model
from tests.test_arena import greedy_alone, prompts_for


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_lanes_decode_together_as_if_alone(kind: str, tmp_path: Path) -> None:
    loaded = adapter.load(build_model(kind, tmp_path / "model"))
    kinds = adapter.layer_kinds(loaded.model)
    assert isinstance(kinds, list)
    assert together.check(loaded, kinds, scatter_write) == ""
    lanes = [Lane(loaded, kinds, rows, slots + DUMMY_SLOTS, scatter_write) for rows, slots in ((3, 256), (1, 512))]
    places = [(lanes[0], 0), (lanes[0], 1), (lanes[0], 2), (lanes[1], 0)]
    prompts = prompts_for(loaded, 6, 31, 18, 280)
    expected = [greedy_alone(loaded, prompt, 9) for prompt in prompts]
    answers: list[list[int]] = []
    for index, ((lane, row), prompt) in enumerate(zip(places, prompts, strict=True)):
        assert lane.acquire(index) == row
        logits = lane.prefill(row, prompt, last=True)
        assert logits is not None
        answers.append([int(mx.argmax(logits[0]))])
        lane.last_tokens[row] = answers[index][0]
    for step in range(8):
        # From the third step on without the row in the middle, which is computed as a dummy.
        active = [0, 1, 2] if step < 2 else [0, 2]
        for lane, logits in zip(lanes, together.decode(loaded, [(lanes[0], active), (lanes[1], [0])]), strict=True):
            for index, (home, row) in enumerate(places):
                if home is lane and (lane is lanes[1] or row in active):
                    answers[index].append(int(mx.argmax(logits[row, 0])))
                    lane.last_tokens[row] = answers[index][-1]
    assert [len(answer) for answer in answers] == [9, 3, 9, 9]
    for answer, right in zip(answers, expected, strict=True):
        assert answer == right[: len(answer)]


def test_a_model_that_looks_into_what_it_fetched_decodes_lane_by_lane(tmp_path: Path) -> None:
    loaded = adapter.load(build_model("llama", tmp_path / "model"))
    kinds = adapter.layer_kinds(loaded.model)
    assert isinstance(kinds, list)
    attention = loaded.model.model.layers[0].self_attn
    original = type(attention).__call__

    class Curious(type(attention)):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: mx.array | None = None, cache: object = None) -> mx.array:
            if isinstance(cache, together._Views):
                cache.update_and_fetch = lambda keys, values: (keys + together.Parts(()), values)  # type: ignore
            return original(self, x, mask, cache)

    attention.__class__ = Curious
    assert "Parts" in together.check(loaded, kinds, scatter_write)


def test_every_kind_of_draw_from_several_lanes(tmp_path: Path) -> None:
    """Penalties, log-probabilities and bias belong to their rows, whichever lane those are in."""
    folder = build_model("llama", tmp_path / "model")
    rng = np.random.default_rng(3)
    prompts = [rng.integers(5, 1000, length).tolist() for length in (900, 20, 500, 60)]
    samplings = [
        Sampling(1, temperature=0.9, top_p=0.9, repetition_penalty=1.2),
        GREEDY,
        Sampling(2, temperature=0.0, logprobs=2, frequency_penalty=0.4),
        Sampling(3, min_p=0.02, logit_bias={10: 3.0}),
    ]
    with engine(folder, max_rows=4, stats_interval_s=0.0) as client:
        assert client.ready is not None
        assert client.ready.probes["lanes"] == "in one pass over the weights"
        alone = [client.run([prompt], 20, sampling)[0] for prompt, sampling in zip(prompts, samplings, strict=True)]
        seqs = client.submit_together([(p, 20, s) for p, s in zip(prompts, samplings, strict=True)])
        client.wait_freed(*seqs)
        assert [client.answers[seq].tokens for seq in seqs] == alone
        # 4 rows of 1,024 slots would be more.
        assert max(stats.arena_bytes / client.ready.kv_bytes_per_token for stats in client.stats) < 3500
