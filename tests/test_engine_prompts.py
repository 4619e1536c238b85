"""What the engine makes of a prompt besides an answer, on both back ends: the log-probabilities of its own tokens, and
one prefill for several answers. On real (small, random) models, against mlx-lm's own logits.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from lmx.protocol import Logprobs, PromptLogprobs, Sampling
from tests.backends import needs_llama
from tests.engine_client import GREEDY, EngineClient, engine
from tests.models import build_gguf
from tests.test_engine import assert_nothing_held, prompts_for

TOLERANCE = {"mlx": 2e-3, "llama": 0.1}
"""llama.cpp keeps KV in 16 bits."""
DRAWS = Sampling(seed=5, temperature=1.0)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_gguf(tmp_path_factory.mktemp("prompts") / "model.gguf")


@pytest.fixture(
    scope="module",
    params=[
        "mlx on",
        pytest.param("llama off", marks=needs_llama),
        pytest.param("llama off shared", marks=needs_llama),
    ],
)
def client(request: pytest.FixtureRequest, gguf: Path) -> Iterator[EngineClient]:
    backend, lookahead, *shared = request.param.split()
    path = gguf if backend == "llama" else gguf.with_suffix(".mlx")
    options: dict[str, Any] = {}
    if shared:
        with engine(path, backend=backend, max_rows=4, context_length=1024) as whole:
            assert whole.ready is not None
            options["kv_budget_bytes"] = whole.ready.kv_budget_bytes // 2
    with engine(
        path, backend=backend, lookahead=lookahead, max_rows=4, max_chunk_tokens=64, context_length=1024, **options
    ) as client:
        assert client.ready is not None
        assert client.ready.path == {"mlx": "arena", "llama": "unified" if shared else "streams"}[backend]
        yield client
        assert_nothing_held(client)


def told(client: EngineClient, seq: int) -> list[Logprobs]:
    messages = [message for message in client.messages if isinstance(message, PromptLogprobs)]
    return [logprobs for message in messages if message.seq == seq for logprobs in message.logprobs]


def oracle(gguf: Path, prompt: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """mlx-lm's log-probabilities for what follows each position."""
    model, *_ = mlx_lm.utils.load_model(gguf.with_suffix(".mlx"))
    logits = model(mx.array([prompt]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def test_the_prompts_logprobs_are_mlx_lms(client: EngineClient, gguf: Path) -> None:
    """Of prompts of one token, of one chunk and of several, beside rows that decode."""
    assert client.ready is not None
    prompts = prompts_for(client.ready.vocab_size, (1, 2, 33, 64, 65, 301))
    off = TOLERANCE[client.ready.backend]
    other = client.submit(prompts[2], max_tokens=400, sampling=DRAWS)
    client.wait(lambda: len(client.answers[other].tokens) > 1)
    for prompt, top in zip(prompts, (5, 0, 5, 20, 1, 5), strict=True):
        seq = client.submit(prompt, max_tokens=2, sampling=replace(GREEDY, logprobs=5), prompt_logprobs=top)
        client.wait_freed(seq)
        found, expected = told(client, seq), oracle(gguf, prompt)
        assert len(found) == len(prompt) - 1
        for position, logprobs in enumerate(found):
            likeliest = np.argsort(-expected[position], kind="stable")[:top]
            assert logprobs.drawn == pytest.approx(expected[position][prompt[position + 1]], abs=off)
            assert logprobs.top == pytest.approx(expected[position][likeliest].tolist(), abs=off)
            assert len(set(logprobs.top_ids)) == len(logprobs.top_ids) == top
            if prompt[position + 1] in logprobs.top_ids:
                assert logprobs.top[logprobs.top_ids.index(prompt[position + 1])] == logprobs.drawn
        assert client.answers[seq].logprobs[0].drawn == pytest.approx(expected[-1].max(), abs=off)
    client.cancel(other)
    client.wait_freed(other)


def test_several_answers_of_a_prompt_prefill_it_once_and_are_those_of_single_requests(client: EngineClient) -> None:
    assert client.ready is not None
    for prompt in prompts_for(client.ready.vocab_size, (1, 2, 40, 150), seed=3):
        sampling = [replace(DRAWS, seed=seed, repetition_penalty=1.3 if seed == 2 else 1.0) for seed in range(4)]
        singles = []
        for one in sampling:
            single = client.submit(prompt, 12, one, salt=None)
            client.wait_freed(single)
            singles.append(client.answers[single].tokens)
        seqs = client.submit_family(prompt, 12, sampling)
        client.wait_freed(*seqs)
        assert [client.answers[seq].tokens for seq in seqs] == singles
        computed = [client.answers[seq].freed.prompt_tokens_computed for seq in seqs]  # type: ignore[union-attr]
        assert computed == [len(prompt), 1, 1, 1]
        started = {one.seq: one.cached_tokens for step in client.steps for one in step.started}
        assert [started[seq] for seq in seqs] == [0, *[len(prompt) - 1] * 3]


@pytest.mark.parametrize("victim", ["parent", "child"])
@pytest.mark.parametrize("when", ["queued", "prefilling", "started", "decoding"])
def test_cancelling_one_leaves_the_others_their_answers(client: EngineClient, victim: str, when: str) -> None:
    assert client.ready is not None
    (prompt,) = prompts_for(client.ready.vocab_size, (150,), seed=4)
    expected = client.run([prompt], 10, DRAWS)[0]
    first = client.submit(prompt, max_tokens=200, sampling=DRAWS)
    others = [client.submit(prompt, max_tokens=10, sampling=DRAWS, parent=first) for _ in range(2)]
    gone, stays = (first, others) if victim == "parent" else (others[0], [others[1]])
    if when == "prefilling":
        client.wait(lambda: any(seq == first for step in client.steps for seq, _ in step.prefills))
    elif when == "started":
        client.wait(lambda: bool(client.answers[first].tokens))
    elif when == "decoding":
        client.wait(lambda: len(client.answers[others[1]].tokens) > 1)
    client.cancel(gone)
    client.wait_freed(gone, *stays)
    assert [client.answers[seq].tokens for seq in stays] == [expected] * len(stays)
    client.cancel(first)
    client.wait_freed(first, *others)


def test_a_parent_that_is_another_prompt_or_unknown_gives_nothing(client: EngineClient) -> None:
    assert client.ready is not None
    one, two = prompts_for(client.ready.vocab_size, (40, 40), seed=6)
    first = client.submit(one, max_tokens=5)
    seqs = [client.submit(two, max_tokens=5, parent=first), client.submit(one, max_tokens=5, parent=10**6)]
    scored = client.submit(one, max_tokens=5, parent=first, prompt_logprobs=0)
    client.wait_freed(first, *seqs, scored)
    assert [client.answers[seq].freed.prompt_tokens_computed for seq in (*seqs, scored)] == [40] * 3  # type: ignore[union-attr]
    assert len(told(client, scored)) == 39
