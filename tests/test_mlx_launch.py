"""Steps on MLX as the loop drives them: ``wait`` returns when the whole step is computed, also when it draws nothing;
and in whatever order steps are made, started and read, the tokens are the same."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.backend import Backend, Chunk, Sequence
from lmx.engine.loop import StepLoop
from lmx.engine.mlx import adapter
from lmx.engine.mlx.backend import MLXBackend
from lmx.protocol import Cancel, Freed, Load, Message, Sampling, Step, Submit, pack_tokens
from tests.models import build_model
from tests.sim import Clock, SimLink

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
        draw.sequence.tokens += draw.tokens
    return waited - started, time.perf_counter() - waited


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a decoding row"])
def test_nothing_is_left_of_a_step_that_was_waited_for(backend: Backend, beside: bool) -> None:
    if beside and backend.facts.path == "single":
        pytest.skip("one sequence at a time")
    decode = [sequence(2, 9)] if beside else []
    for other in decode:
        backend.start(other)
        other.tokens += [draw.tokens[0] for draw in backend.launch([], [Chunk(other, 0, 9, last=True)]).wait()]
    long = sequence(1, 5 * CHUNK)
    backend.start(long)
    # A ratio to the step's own time: what a wait that returns too early leaves is nearly all of it, each time; what
    # another process's turn on the cores adds, it adds now and then.
    times = [left_after(backend, decode, Chunk(long, i * CHUNK, CHUNK, False)) for i in range(4)]
    for one in (long, *decode):
        backend.free(one)
    assert min(left_s / took_s for took_s, left_s in times) < 0.25, times


CANCELLED = (4, 7, 9)
LOOPS = {"plain": ("off", 0.0), "overlapped": ("on", 0.0), "made ahead, started late": ("auto", 0.5)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> MLXBackend:
    path = build_model("llama", tmp_path_factory.mktemp("model") / "llama")
    options = Load(str(path), max_rows=3, max_chunk_tokens=64)
    return MLXBackend(adapter.load(path), options)


def answers(backend: MLXBackend, loop: str) -> dict[int, list[int]]:
    """Nine requests and three cancellations, on a clock that stands still while the device works."""
    lookahead, backend_share = LOOPS[loop]
    backend.facts = replace(backend.facts, launch_share=backend_share)
    clock, tokens, freed = Clock(), defaultdict(list), set()

    def take(message: Message) -> None:
        if isinstance(message, Step):
            for row in message.rows:
                tokens[row.seq] += row.tokens
        elif isinstance(message, Freed):
            freed.add(message.seq)

    link = SimLink(clock, take)
    for seq in range(1, 10):
        draw = np.random.default_rng(seq)
        prompt = draw.integers(5, backend.facts.vocab_size, (3, 250, 150, 253)[seq % 4]).tolist()
        sampling = Sampling(seq, temperature=float(seq % 2), repetition_penalty=1.1 if seq % 5 == 0 else 1.0)
        link.post(
            0.002 * seq, Submit(seq, pack_tokens(prompt), 20 + 60 * (seq % 3 == 0), sampling, ignore_eos=seq % 3 > 0)
        )
    for seq in CANCELLED:
        link.post(0.002 * seq + 0.003, Cancel(seq))
    StepLoop(link, backend, Load("", lookahead=lookahead), clock).run()  # type: ignore[arg-type]
    assert freed == set(range(1, 10))
    assert backend.memory().rows == 0
    return tokens


def test_every_loop_draws_the_same_on_a_real_device(small: MLXBackend) -> None:
    """Rows come, go, grow and are cancelled, also between a step that is made and its start."""
    plain = answers(small, "plain")
    for loop in ("overlapped", "made ahead, started late"):
        found = answers(small, loop)
        for seq in range(1, 10):
            if seq in CANCELLED:
                shorter, longer = sorted((found[seq], plain[seq]), key=len)
                assert longer[: len(shorter)] == shorter, (loop, seq)
            else:
                assert found[seq] == plain[seq], (loop, seq)
