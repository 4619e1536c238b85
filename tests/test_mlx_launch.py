"""``MLXLaunch.wait`` returns when the whole step is computed, also a step that draws nothing."""

import time
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.backend import Backend, Chunk, Sequence
from lmx.engine.mlx import adapter
from lmx.engine.mlx.backend import MLXBackend
from lmx.protocol import Load, Sampling
from tests.models import build_model

CHUNK = 400
SIZES = {
    "llama": {"num_hidden_layers": 1, "hidden_size": 256},
    "qwen3_next": {"num_hidden_layers": 3, "full_attention_interval": 2},  # the last layer is recurrent
    "gemma3_text": {"num_hidden_layers": 2, "sliding_window_pattern": 2},
}


@pytest.fixture(scope="module", params=[*((kind, "auto") for kind in SIZES), ("llama", "single")], ids=" ".join)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """Few layers, so that a launch returns before its step is done: MLX's CPU stream takes ten operations ahead."""
    kind, batching = request.param
    path = build_model(kind, tmp_path_factory.mktemp("model") / kind, **SIZES[kind])
    options = Load(str(path), max_rows=2, max_chunk_tokens=CHUNK, batching=batching)
    backend = MLXBackend(adapter.load(path), options)
    yield backend
    assert backend.memory().rows == 0


def sequence(seq: int, length: int) -> Sequence:
    tokens = np.random.default_rng(seq).integers(5, 300, length).tolist()
    return Sequence(seq, tokens, length, 100, Sampling(0, temperature=0.0), True)


def left_after(backend: Backend, decode: list[Sequence], chunk: Chunk) -> tuple[float, float]:
    """Seconds until ``wait`` returned, and seconds of work that were left then."""
    started = time.perf_counter()
    draws = backend.launch(decode, [chunk]).wait()
    waited = time.perf_counter()
    mx.synchronize()
    for draw in draws:
        draw.sequence.tokens.append(draw.token)
    return waited - started, time.perf_counter() - waited


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a decoding row"])
def test_nothing_is_left_of_a_step_that_was_waited_for(backend: Backend, beside: bool) -> None:
    if beside and backend.facts.path == "single":
        pytest.skip("one sequence at a time")
    decode = [sequence(2, 9)] if beside else []
    for other in decode:
        backend.start(other)
        other.tokens += [draw.token for draw in backend.launch([], [Chunk(other, 0, 9, last=True)]).wait()]
    long = sequence(1, 3 * CHUNK)
    backend.start(long)
    # A ratio to the step's own time: what a wait that returns too early leaves is nearly all of it.
    took_s, left_s = zip(
        *(left_after(backend, decode, Chunk(long, i * CHUNK, CHUNK, False)) for i in range(2)), strict=True
    )
    assert sum(left_s) < 0.25 * sum(took_s), (took_s, left_s)
    for one in (long, *decode):
        backend.free(one)
