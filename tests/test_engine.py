"""The engine process alone, over its socketpair, on real (small, random) models of each architecture."""

import json
import shutil
import signal

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader

from lmx.engine.mlx import adapter
from lmx.protocol import Failed, Sampling
from tests.backends import BACKENDS, needs_llama
from tests.engine_client import GREEDY, engine, engine_process
from tests.models import KINDS, build_gguf, build_model

PROMPT_LENGTHS = (1, 7, 64, 150, 33, 301)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The same weights for both back ends: a GGUF file, and the MLX folder beside it."""
    return build_gguf(tmp_path_factory.mktemp("llama") / "model.gguf")


@pytest.fixture(scope="module")
def folder(gguf):
    return gguf.with_suffix(".mlx")


@pytest.fixture(params=BACKENDS)
def load(request, gguf, folder):
    """What makes an engine load the model on one back end or the other."""
    return {"folder": gguf if request.param == "llama" else folder, "backend": request.param}


@pytest.fixture(scope="module", params=["mlx overlapped", "mlx plain", pytest.param("llama plain", marks=needs_llama)])
def client(request, folder, gguf):
    """One engine for the tests that leave it as they found it: every test ends with nothing held."""
    backend, loop = request.param.split()
    path = gguf if backend == "llama" else folder
    lookahead = "on" if loop == "overlapped" else "off"
    with engine(
        path, backend=backend, lookahead=lookahead, max_rows=4, max_chunk_tokens=64, context_length=2560
    ) as client:
        yield client
        assert_nothing_held(client)


def assert_nothing_held(client):
    """The scheduler's account, and the back end's own: ``rows`` counts what llama.cpp itself says of its cells."""
    stats = client.idle_stats()
    assert (stats.queued, stats.prefilling, stats.decoding, stats.ending) == (0, 0, 0, 0)
    assert stats.kv_used_bytes == 0
    # llama.cpp keeps its buffer from load to exit.
    assert stats.arena_bytes == (stats.kv_budget_bytes if client.ready.backend == "llama" else 0)


def prompts_for(vocab_size, lengths=PROMPT_LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, vocab_size, length).tolist() for length in lengths]


def alone(folder, prompts, max_tokens):
    """Greedy answers by mlx-lm's own model and caches, one prompt at a time."""
    loaded = adapter.load(folder)
    answers = []
    for prompt in prompts:
        caches = adapter.make_prompt_cache(loaded.model)
        logits = loaded.model(mx.array([prompt]), cache=caches)
        answer = []
        for _ in range(max_tokens):
            answer.append(int(mx.argmax(logits[0, -1])))
            logits = loaded.model(mx.array([[answer[-1]]]), cache=caches)
        answers.append(answer)
    return answers


def assert_greedy(folder, prompts, answers, within=0.05, never=()):
    """Every token has the largest logit, or one that is close, after what stands before it.

    For llama.cpp, whose KV is F16 and whose sums depend on the batch's shape: a near tie may fall either way (logits
    have a spread of about 1.5). ``never``: tokens that were forbidden.
    """
    loaded = adapter.load(folder)
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = loaded.model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1]
        for token in never:
            logits[:, token] = -mx.inf
        short = mx.max(logits, axis=-1) - mx.take_along_axis(logits, mx.array(answer)[:, None], axis=-1)[:, 0]
        assert float(mx.max(short)) <= within


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_batched_equals_alone_for_every_architecture(kind, tmp_path):
    """Prompts that wait for a row and take several chunks; then prompts that start in one step."""
    folder = build_model(kind, tmp_path / "model")
    with engine(folder, max_rows=4, max_chunk_tokens=64, lookahead="on") as client:
        assert client.ready.path == "arena", client.ready.path_reason
        prompts = prompts_for(client.ready.vocab_size)
        starts = prompts_for(client.ready.vocab_size, (40, 64, 7, 55))
        expected = alone(folder, prompts + starts, 16)
        assert client.run(prompts, 16) == expected[: len(prompts)]
        client.steps.clear()
        assert client.run(starts, 16) == expected[len(prompts) :]
        assert max(len(step.prefills) for step in client.steps) == 4
        assert_nothing_held(client)


@needs_llama
@pytest.mark.parametrize("lookahead", ["on", "off"])
def test_llama_says_what_mlx_says_batched_and_alone(folder, gguf, lookahead):
    prompts = prompts_for(1000)
    with engine(gguf, backend="llama", max_rows=4, max_chunk_tokens=64, lookahead=lookahead) as client:
        assert_greedy(folder, prompts, client.run(prompts, 24))
        assert_greedy(folder, prompts, [client.run([prompt], 24)[0] for prompt in prompts])
        assert_nothing_held(client)


def test_one_at_a_time_where_rows_cannot_share_a_step(load, folder):
    with engine(**load, batching="single") as client:
        assert client.ready.path == "single"
        prompts = prompts_for(client.ready.vocab_size, (5, 40, 300))
        assert client.run(prompts, 8) == alone(folder, prompts, 8)
        assert_nothing_held(client)


def test_a_sampled_row_gives_what_it_gives_alone(client):
    prompts = prompts_for(client.ready.vocab_size, (9, 20, 31, 42))
    rows = [
        GREEDY,
        Sampling(2**63 + 5, temperature=1.0),
        Sampling(7, temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.5),
        Sampling(8, temperature=1.5, min_p=0.02, logit_bias={10: 3.0}, logprobs=3),
    ]
    client.run(prompts[:1], 2)
    seqs = client.submit_together([(p, 24, s) for p, s in zip(prompts, rows, strict=True)])
    client.wait_freed(*seqs)
    assert any({seq for seq, _ in step.prefills} == set(seqs) for step in client.steps)
    together = [client.answers[seq].tokens for seq in seqs]
    assert [client.run([p], 24, s)[0] for p, s in zip(prompts, rows, strict=True)] == together
    assert len({tuple(tokens) for tokens in together}) == 4
    wanted = client.answers[seqs[3]].logprobs
    assert len(wanted) == 24
    assert all(len(entry.top_ids) == 3 and list(entry.top) == sorted(entry.top, reverse=True) for entry in wanted)
    assert client.answers[seqs[1]].logprobs == []


def test_ends_at_max_tokens_and_at_the_end_of_the_context(client):
    context = client.ready.context_length
    (short, near) = prompts_for(client.ready.vocab_size, (4, 60))
    seq = client.submit(short, 3)
    client.wait_freed(seq)
    assert (len(client.answers[seq].tokens), client.answers[seq].finish) == (3, "length")
    seq = client.submit(near * (context // 60) + near[: context % 60 - 2], 1000)
    client.wait_freed(seq)
    assert (len(client.answers[seq].tokens), client.answers[seq].finish) == (2, "length")


def test_eos_ends_a_sequence_and_is_its_last_token(client):
    (prompt,) = prompts_for(client.ready.vocab_size, (12,))
    eos = client.ready.eos_ids[0]
    seq = client.submit(prompt, 50, Sampling(1, temperature=0.0, logit_bias={eos: 1000.0}), ignore_eos=False)
    client.wait_freed(seq)
    assert (client.answers[seq].tokens, client.answers[seq].finish) == ([eos], "stop")


@pytest.mark.parametrize("state", ["queued", "prefill", "decode", "finishing"])
def test_cancel_frees_in_every_state(client, state):
    prompts = prompts_for(client.ready.vocab_size, (2000, 10, 10, 10, 10))
    others = []
    if state == "queued":
        others = [client.submit(p, 400) for p in prompts[1:]]
        client.wait(lambda: all(client.answers[seq].tokens for seq in others))
    victim = client.submit(
        prompts[0] if state in ("queued", "prefill") else prompts[1], 30 if state == "finishing" else 5000
    )
    answer = client.answers[victim]
    if state == "prefill":
        client.wait(lambda: any(seq == victim for step in client.steps for seq, _ in step.prefills))
        assert not answer.tokens
    elif state == "decode":
        client.wait(lambda: len(answer.tokens) >= 3)
    elif state == "finishing":
        client.wait(lambda: len(answer.tokens) >= 29)
    client.cancel(victim)
    client.wait_freed(victim)
    if state == "queued":
        assert (answer.freed.kv_bytes, answer.started) == (0, 0)
    else:
        assert answer.freed.kv_bytes > 0
    for seq in others:
        client.cancel(seq)
    client.wait_freed(*others)
    client.cancel(victim)  # late and unknown cancels are ignored
    assert_nothing_held(client)


def test_cancelling_one_row_leaves_the_others_alone(client):
    prompts = prompts_for(client.ready.vocab_size, (40, 50, 60, 70))
    expected = client.run(prompts, 40)
    for gone in range(4):
        seqs = [client.submit(p, 40) for p in prompts]
        client.wait(lambda seq=seqs[gone]: len(client.answers[seq].tokens) >= 5)
        client.cancel(seqs[gone])
        client.wait_freed(*seqs)
        kept = [client.answers[seq].tokens for i, seq in enumerate(seqs) if i != gone]
        assert kept == [tokens for i, tokens in enumerate(expected) if i != gone]


def test_streams_get_a_token_in_every_step_of_a_long_prompt(client):
    prompts = prompts_for(client.ready.vocab_size, (10, 11, 12, 2000))
    streams = [client.submit(p, 2000) for p in prompts[:3]]
    client.wait(lambda: all(client.answers[seq].tokens for seq in streams))
    late = client.submit(prompts[3], 2)
    client.wait_freed(late)
    beside = [step for step in client.steps if any(seq == late for seq, _ in step.prefills)]
    assert len(beside) >= 2000 / 64
    assert all({row.seq for row in step.rows} >= set(streams) for step in beside)
    for seq in streams:
        client.cancel(seq)
    client.wait_freed(*streams)


def test_a_deadline_passes_in_the_engine(client):
    prompts = prompts_for(client.ready.vocab_size, (10, 10))
    seq = client.submit(prompts[0], 7000, deadline_s=0.05)
    client.wait_freed(seq)
    assert client.answers[seq].failed.code == "timeout"
    assert_nothing_held(client)


def test_what_cannot_run_is_refused_with_the_numbers(client):
    context = client.ready.context_length
    too_long = client.submit([5] * context, 1)
    unknown = client.submit([client.ready.vocab_size], 1)
    client.wait_freed(too_long, unknown)
    assert client.answers[too_long].failed.code == "never_fits"
    assert str(context) in client.answers[too_long].failed.message
    assert client.answers[unknown].failed.code == "invalid_token"


def test_preempted_sequences_come_back_and_say_the_same(load, folder):
    prompts = prompts_for(1000, (200, 220, 240, 230))
    with engine(**load, max_rows=4) as client:
        expected = client.run(prompts, 120)
        per_token = client.ready.kv_bytes_per_token
    # With room for growth (5 quanta for 4 rows that need 2 each) two run at a time; the last two take their rows.
    with engine(**load, max_rows=4, context_length=512, kv_budget_bytes=5 * 256 * per_token) as client:
        seqs = client.submit_together([(prompt, 120, GREEDY) for prompt in prompts[:2]])
        client.wait(lambda: all(len(client.answers[seq].tokens) >= 5 for seq in seqs))
        seqs += [client.submit(prompt, 120, priority=1) for prompt in prompts[2:]]
        client.wait_freed(*seqs)
        answers = [client.answers[seq].tokens for seq in seqs]
        assert_greedy(folder, prompts, answers)
        assert answers == expected or client.ready.backend == "llama"
        assert client.idle_stats().preemptions >= 2
        assert max(answer.started for answer in client.answers.values()) > 1
        assert_nothing_held(client)


def test_prompts_that_share_a_step_beside_decoding_rows_say_the_same(load, folder):
    prompts = prompts_for(1000, (30, 40, 35, 40, 20, 33))
    with engine(**load, max_rows=6, itl_target_ms=5000.0) as client:
        expected = client.run(prompts, 40)
        first = client.submit(prompts[0], 200)
        client.wait(lambda: len(client.answers[first].tokens) >= 3)
        seqs = client.submit_together([(prompt, 40, GREEDY) for prompt in prompts[1:]])
        client.wait_freed(first, *seqs)
        answers = [client.answers[seq].tokens[:40] for seq in (first, *seqs)]
        assert_greedy(folder, prompts, answers)
        assert answers == expected or client.ready.backend == "llama"
        shared = [step for step in client.steps if len(step.prefills) == 5 and first in [row.seq for row in step.rows]]
        assert len(shared) == 1
        assert_nothing_held(client)


def test_lengths_far_apart_live_in_lanes_within_the_padding_share(folder):
    prompts = prompts_for(1000, (3000, 20, 30, 40))
    with engine(folder, max_rows=4) as client:
        expected = client.run(prompts, 240)
        budget = 16 * 256 * client.ready.kv_bytes_per_token
    with engine(folder, max_rows=4, kv_budget_bytes=budget, stats_interval_s=0.0) as client:
        assert client.run(prompts, 240) == expected
        # One buffer for all would be 4 × 3,328 slots, 3.25 times the budget.
        assert 0 < max(stats.arena_bytes for stats in client.stats) <= 1.3 * budget
        assert_nothing_held(client)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_turns_non_finite_fails_alone(backend, tmp_path):
    poison = 77
    path = build_gguf(tmp_path / "model.gguf")
    if backend == "llama":
        embeddings = next(t for t in GGUFReader(path, "r+").tensors if t.name == "token_embd.weight")
        embeddings.data[poison] = np.nan
    else:
        path = path.with_suffix(".mlx")
        weights = mx.load(str(path / "model.safetensors"))
        weights["model.embed_tokens.weight"][poison] = mx.nan
        mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    prompts = [[t + 1 if t == poison else t for t in p] for p in prompts_for(1000, (30, 40))]
    with engine(path, backend=backend, max_rows=4) as client:
        expected = client.run(prompts, 30)

        def check(answers):
            assert_greedy(tmp_path / "model.mlx", prompts, answers)
            assert answers == expected or backend == "llama"

        for _ in range(2):  # the second time in the row that held NaN
            seqs = client.submit_together([(p, 30, GREEDY) for p in (prompts[0], [poison] * 20, prompts[1])])
            client.wait_freed(*seqs)
            assert any(len(step.prefills) == 3 for step in client.steps), "they shared their first pass, too"
            assert client.answers[seqs[1]].failed.code == "non_finite"
            check([client.answers[seqs[0]].tokens, client.answers[seqs[2]].tokens])
        check(client.run(prompts, 30))
        assert_nothing_held(client)


def test_thousands_of_steps_with_joins_and_leaves_keep_memory_flat(tmp_path):
    folder = build_model("llama", tmp_path / "model", num_hidden_layers=1, hidden_size=32)
    with engine(folder, max_rows=4, lookahead="on", prefix_cache=False) as client:
        rng = np.random.default_rng(0)
        live = []
        figures = []

        def churn(steps):
            target = client.stats[-1].step + steps if client.stats else steps
            while not client.stats or client.stats[-1].step < target:
                while len(live) < 5:
                    live.append(
                        client.submit(rng.integers(5, 1000, rng.integers(1, 90)).tolist(), int(rng.integers(2, 60)))
                    )
                if rng.random() < 0.3:
                    client.cancel(live[int(rng.integers(len(live)))])
                client.wait(lambda: any(client.answers[seq].freed for seq in live))
                live[:] = [seq for seq in live if not client.answers[seq].freed]
            for seq in live:
                client.cancel(seq)
            client.wait_freed(*live)
            live.clear()
            return client.idle_stats()

        for _ in range(5):
            figures.append(churn(400))
        assert figures[-1].step >= 2_000
        assert {stats.arena_bytes for stats in figures} == {0}
        active = [stats.mlx_active_bytes for stats in figures]
        arrays = [stats.live_arrays for stats in figures]
        assert max(active) - min(active) <= 4096, active
        assert max(arrays) - min(arrays) <= 2, arrays


def test_the_engine_ends_with_its_server(load):
    with engine_process(**load) as client:
        client.wait(lambda: client.ready is not None)
        client.submit([5] * 10, 5000)
        client.wait(lambda: len(client.answers[1].tokens) > 2)
        client._sock.close()
        assert client.process.wait(60) == 0


def test_a_request_right_behind_the_load_is_not_lost(load):
    with engine_process(**load) as client:
        seq = client.submit([5, 6, 7], 3)
        client.wait_freed(seq)
        assert len(client.answers[seq].tokens) == 3


def test_a_terminal_interrupt_is_not_for_the_engine(client):
    client.process.send_signal(signal.SIGINT)
    assert len(client.run([[5, 6, 7]], 4)[0]) == 4


@pytest.mark.parametrize("damage", ["truncated", "missing_tensor", "wrong_shape", "bad_config"])
def test_a_broken_model_folder_is_named(folder, tmp_path, damage):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "bad_config":
        config = json.loads((broken / "config.json").read_text()) | {"model_type": "no_such_architecture"}
        (broken / "config.json").write_text(json.dumps(config))
    else:
        weights = mx.load(str(file))
        name = "model.layers.0.mlp.up_proj.weight"
        if damage == "missing_tensor":
            del weights[name]
        else:
            weights[name] = weights[name][:, :-1]
        mx.eval(weights)
        mx.save_safetensors(str(tmp_path / "new.safetensors"), weights, {"format": "mlx"})
        shutil.move(tmp_path / "new.safetensors", file)
    with engine_process(broken) as client:
        client.wait(lambda: any(isinstance(message, Failed) for message in client.messages))
        failed = client.messages[-1]
        assert (failed.seq, failed.code) == (-1, "model_invalid")
        assert str(broken) in failed.message
        assert client.process.wait(60) == 3
