"""The prefix store through the engine's face: whoever begins with tokens that were computed before gets the same answer
as without, sooner; nobody else's; after a restart too."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmx.protocol import Cancel, Freed, Sampling, Started
from tests.backends import needs_llama
from tests.engine_client import GREEDY, Answer, EngineClient, engine
from tests.models import build_gguf, build_model

# A dense model, sliding windows shorter than a prefix, recurrent states beside attention; llama.cpp's streams.
MODELS = ("llama", "gemma3_text", "qwen3_next", pytest.param("llama.cpp", marks=needs_llama))


def load(kind: str, folder: Path) -> tuple[Path, str]:
    if kind == "llama.cpp":
        return build_gguf(folder / "model.gguf"), "llama"
    return build_model(kind, folder / "model"), "mlx"


@pytest.fixture(scope="module", params=MODELS)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineClient]:
    path, backend = load(request.param, tmp_path_factory.mktemp("model"))
    with engine(path, backend=backend, max_rows=4, max_chunk_tokens=256, context_length=4096) as client:
        yield client
        stats = client.idle_stats()
        assert (stats.queued, stats.prefilling, stats.decoding, stats.ending, stats.kv_used_bytes) == (0, 0, 0, 0, 0)


TOLD = Sampling(seed=0, temperature=0.0, logprobs=2)
_seeds = iter(range(10**6))


def tokens(count: int) -> list[int]:
    """That no other call gave."""
    return np.random.default_rng(next(_seeds)).integers(5, 1000, count).tolist()


def started(client: EngineClient, seq: int) -> Started:
    """The sequence's first start."""
    found = (started for step in client.steps for started in step.started if started.seq == seq)
    return next(found)


def ask(client: EngineClient, prompt: list[int], count: int = 8, **options: object) -> tuple[Answer, int]:
    """The answer, and how many tokens of the prompt were not computed for it."""
    seq = client.submit(prompt, count, TOLD, **options)
    client.wait_freed(seq)
    return client.answers[seq], started(client, seq).cached_tokens


def assert_same(answer: Answer, alone: Answer) -> None:
    """Token for token; but where two tokens are as likely as each other, other shapes of batches may choose the other
    (llama.cpp's KV has 16 bits)."""
    for index, (token, other) in enumerate(zip(answer.tokens, alone.tokens, strict=True)):
        if token != other:
            likeliest = alone.logprobs[index].top
            assert likeliest[0] - likeliest[1] < 0.02, (index, answer, alone)
            assert abs(answer.logprobs[index].drawn - likeliest[0]) < 0.02
            return


@pytest.mark.parametrize("shared", [255, 256, 257, 700])
def test_an_answer_is_the_same_with_a_hit(client: EngineClient, shared: int) -> None:
    prefix = tokens(shared)
    ask(client, [*prefix, 5, *tokens(30)])
    prompt = [*prefix, 6, *tokens(40)]
    alone, cached = ask(client, prompt, salt=None)
    assert cached == 0
    answer, cached = ask(client, prompt)
    assert_same(answer, alone)
    assert cached <= shared
    again, cached = ask(client, prompt)
    assert_same(again, alone)
    # Recurrent models do not pause in short prompts.
    assert client.ready is not None
    if client.ready.architecture != "qwen3_next" or len(prompt) >= 512:
        assert len(prompt) - 8 <= cached < len(prompt)


def test_the_next_turn_costs_its_new_tokens(client: EngineClient) -> None:
    history = tokens(500)
    for _ in range(4):
        answer, _ = ask(client, history, 20)
        history = history + answer.tokens + tokens(30)
        seq = client.submit(history, 4, TOLD)
        client.wait_freed(seq)
        cached = started(client, seq).cached_tokens
        # All but the newest answer's last token, whose KV nobody computed.
        assert cached >= len(history) - 31, cached
        freed = client.answers[seq].freed
        assert freed is not None
        assert freed.prompt_tokens_computed == len(history) - cached
        assert_same(client.answers[seq], ask(client, history, 4, salt=None)[0])


def test_salts_share_nothing(client: EngineClient) -> None:
    prompt = tokens(600)
    ask(client, prompt, salt="a")
    assert ask(client, prompt, salt="b")[1] == 0
    assert ask(client, prompt)[1] == 0
    assert ask(client, prompt, salt=None)[1] == 0
    assert ask(client, prompt, salt="a")[1] > 0
    private = tokens(600)
    ask(client, private, salt=None)
    assert ask(client, private)[1] == 0  # nothing was kept of it


def test_a_prefill_whose_client_left_loses_nothing(client: EngineClient) -> None:
    prompt = tokens(2000)
    seq = client.submit(prompt)
    client.wait(lambda: any(seq == row and done >= 512 for step in client.steps for row, done in step.prefills))
    client.send(Cancel(seq))
    client.wait_freed(seq)
    computed = client.answers[seq].freed
    assert computed is not None
    answer, cached = ask(client, prompt)
    assert cached >= min(computed.prompt_tokens_computed, len(prompt) - 1) // 256 * 256
    assert_same(answer, ask(client, prompt, salt=None)[0])


def test_those_who_come_together_compute_what_they_share_once(client: EngineClient) -> None:
    prefix = tokens(900)
    prompts = [prefix + tokens(20) for _ in range(4)]
    seqs = client.submit_together([(prompt, 6, TOLD) for prompt in prompts])
    client.wait_freed(*seqs)
    computed = [client.answers[seq].freed for seq in seqs]
    assert all(isinstance(freed, Freed) for freed in computed)
    assert client.ready is not None
    for seq, prompt in zip(seqs, prompts, strict=True):
        assert_same(client.answers[seq], ask(client, prompt, 6, salt=None)[0])


def test_conversations_never_see_each_other(client: EngineClient) -> None:
    """Random joins, branches and cancels; every answer is compared with the one of the same prompt alone."""
    choose = random.Random(5)
    system = tokens(300)
    histories = [system + tokens(choose.randrange(1, 300)) for _ in range(6)]
    running: dict[int, list[int]] = {}
    finished: list[tuple[int, list[int]]] = []
    for _ in range(60):
        index = choose.randrange(len(histories))
        prompt = histories[index]
        seq = client.submit(prompt, 6, TOLD)
        running[seq] = prompt
        if choose.random() < 0.2:
            client.send(Cancel(seq))
        if choose.random() < 0.5:
            histories[index] = prompt[: choose.randrange(1, len(prompt))] + tokens(choose.randrange(1, 120))
        if len(running) > 6:
            client.wait(lambda: any(client.answers[seq].freed for seq in running))
            ended = [seq for seq in running if client.answers[seq].freed]
            finished += [(seq, running.pop(seq)) for seq in ended]
    client.wait_freed(*running)
    finished += running.items()
    for seq, prompt in choose.sample(finished, 20):
        if client.answers[seq].finish is not None:
            assert_same(client.answers[seq], ask(client, prompt, 6, salt=None)[0])


@pytest.mark.parametrize("kind", MODELS)
def test_a_restart_keeps_what_was_computed(kind: str, tmp_path: Path) -> None:
    path, backend = load(kind, tmp_path)
    options = {"backend": backend, "prefix_disk_bytes": 2**30, "prefix_dir": str(tmp_path / "prefixes")}
    prompt = tokens(900)
    with engine(path, **options) as client:
        before, _ = ask(client, prompt)
    with engine(path, **options) as client:
        answer, cached = ask(client, prompt)
        assert_same(answer, before)
        assert cached >= 768 if kind != "qwen3_next" else cached > 0
        assert client.idle_stats().prefix.disk_hit_tokens == cached
        other = prompt[:800] + tokens(50)
        assert_same(ask(client, other)[0], ask(client, other, salt=None)[0])


def test_preempted_sequences_come_back_from_the_store(tmp_path: Path) -> None:
    path = build_model("llama", tmp_path / "model")
    with engine(path, max_rows=2, max_chunk_tokens=256) as client:
        assert client.ready is not None
        budget = 6 * 256 * client.ready.kv_bytes_per_token
    with engine(path, max_rows=2, max_chunk_tokens=256, kv_budget_bytes=budget, prefix_ram_bytes=2**30) as client:
        seqs = client.submit_together([(tokens(500), 600, GREEDY) for _ in range(2)])
        client.wait_freed(*seqs)
        assert client.stats[-1].preemptions > 0
        computed = [client.answers[seq].freed for seq in seqs]
        assert all(freed is not None and freed.prompt_tokens_computed <= 500 + 256 for freed in computed)
