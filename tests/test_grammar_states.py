"""Sequences that follow a grammar, on both engines and in both loops, in every state in which they may be left: as
``test_engine.py`` and ``test_non_finite.py`` have it for free ones."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer

from lmx.chat.pieces import read_pieces
from lmx.protocol import Sampling
from tests.backends import BACKENDS, needs_llama
from tests.engine_client import GREEDY, EngineClient, engine
from tests.models import build_gguf
from tests.test_engine import assert_nothing_held

COUNT = 'start: "[" (/[0-9]{1,3}/ ",")*'
WORDS = "start: /[a-z ]+/"
PROMPT = list(range(10, 40))
POISON = 77


def slow(name: str, rules: int = 3500) -> str:
    """A grammar that takes about a second to compile, and another for each name."""
    chain = "".join(f'R{i}: "x" R{i + 1} "y"\n' for i in range(rules))
    return f'start: "{name}" | R0\n{chain}R{rules}: "a"\n'


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_gguf(tmp_path_factory.mktemp("states") / "model.gguf")


def options(gguf: Path, backend: str, **more: Any) -> dict[str, Any]:
    folder = gguf.with_suffix(".mlx")
    return {"folder": gguf if backend == "llama" else folder, "backend": backend, "words": str(folder), **more}


@pytest.fixture(scope="module", params=["mlx overlapped", "mlx plain", pytest.param("llama plain", marks=needs_llama)])
def client(request: pytest.FixtureRequest, gguf: Path) -> Iterator[EngineClient]:
    backend, loop = request.param.split()
    lookahead = "on" if loop == "overlapped" else "off"
    sizes = {"max_rows": 4, "max_chunk_tokens": 64, "context_length": 2560}
    with engine(**options(gguf, backend, lookahead=lookahead, **sizes)) as client:
        yield client
        assert_nothing_held(client)


@pytest.fixture(scope="module")
def pieces(gguf: Path) -> tuple[bytes, ...]:
    return read_pieces(Tokenizer.from_file(str(gguf.with_suffix(".mlx") / "tokenizer.json"))).all


def text(client: EngineClient, seq: int, pieces: tuple[bytes, ...]) -> str:
    answer = client.answers[seq]
    assert answer.failed is None, answer.failed
    return b"".join(pieces[token] for token in answer.tokens if token > 2).decode()


@pytest.mark.parametrize("state", ["compiling", "compiling beside others", "queued", "prefill", "decode", "finishing"])
def test_cancelled_in_every_state(client: EngineClient, state: str) -> None:
    others = []
    if state in ("queued", "compiling beside others"):
        others = [client.submit(PROMPT, 2000, Sampling(seed), grammar=WORDS) for seq, seed in enumerate(range(4))]
        client.wait(lambda: all(client.answers[seq].tokens for seq in others))
    prompt = PROMPT * 60 if state in ("queued", "prefill") else PROMPT
    grammar = slow(f"{state} {client.ready.path if client.ready else ''}") if state.startswith("compiling") else COUNT
    victim = client.submit(prompt, 30 if state == "finishing" else 2000, GREEDY, grammar=grammar)
    answer = client.answers[victim]
    if state == "prefill":
        client.wait(lambda: any(seq == victim for step in client.steps for seq, _ in step.prefills))
        assert not answer.tokens
    elif state == "decode":
        client.wait(lambda: len(answer.tokens) >= 3)
    elif state == "finishing":
        client.wait(lambda: len(answer.tokens) >= 29 or answer.finish is not None)
    client.cancel(victim)
    client.wait_freed(victim)
    assert answer.freed is not None
    assert (answer.freed.kv_bytes == 0) == (state == "queued" or state.startswith("compiling"))
    for seq in others:
        assert not client.answers[seq].freed
        client.cancel(seq)
    client.wait_freed(*others)
    client.cancel(victim)  # late and unknown cancels are ignored
    assert_nothing_held(client)


def test_a_deadline_passes_while_a_grammar_compiles_and_while_it_is_followed(client: EngineClient) -> None:
    following = client.submit(PROMPT, 2400, Sampling(1), grammar=WORDS, deadline_s=0.2)
    compiling = client.submit(PROMPT, 5, GREEDY, grammar=slow("deadline"), deadline_s=0.1)
    client.wait_freed(following, compiling)
    for seq in (following, compiling):
        failed = client.answers[seq].failed
        assert failed is not None
        assert failed.code == "timeout"


def test_streams_go_on_while_a_grammar_compiles(client: EngineClient) -> None:
    stream = client.submit(PROMPT, 2000, Sampling(1), grammar=WORDS)
    client.wait(lambda: len(client.answers[stream].tokens) > 2)
    late = client.submit(PROMPT, 5, GREEDY, grammar=slow("beside"))
    before = len(client.answers[stream].tokens)
    client.wait_freed(late)
    assert len(client.answers[stream].tokens) > before + 5
    assert client.answers[late].failed is None
    client.cancel(stream)
    client.wait_freed(stream)


def test_ignored_ends_and_a_grammar(client: EngineClient, pieces: tuple[bytes, ...]) -> None:
    """What wants to end goes on while anything else can follow, and ends where nothing can."""
    assert client.ready
    wants_end = Sampling(1, temperature=0.0, logit_bias={client.ready.eos_ids[0]: 1000.0})
    seqs = [
        client.submit(PROMPT, 20, wants_end, grammar='start: "~" ("#" "~")?', ignore_eos=ignored)
        for ignored in (True, False)
    ]
    client.wait_freed(*seqs)
    assert (text(client, seqs[0], pieces), client.answers[seqs[0]].finish) == ("~#~", "complete")
    assert (len(client.answers[seqs[1]].tokens), client.answers[seqs[1]].finish) == (2, "stop")


def test_an_end_that_a_grammar_asks_for_is_no_end(client: EngineClient, pieces: tuple[bytes, ...]) -> None:
    """Some models end a call with a token that ends answers too, and go on to the next one."""
    assert client.ready
    end = client.ready.eos_ids[0]
    seq = client.submit(PROMPT, 20, GREEDY, grammar=f'start: "a" <[{end}]> "b"', ignore_eos=False)
    client.wait_freed(seq)
    assert text(client, seq, pieces) == "ab"
    assert client.answers[seq].tokens.count(end) == 1
    seq = client.submit(PROMPT, 20, GREEDY, grammar='start: "a<" "b"', stop_ids=(pieces.index(b"<"),))
    client.wait_freed(seq)
    assert text(client, seq, pieces) == "a<b"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_of_all_tokens_changes_no_draw(client: EngineClient, temperature: float) -> None:
    assert client.ready
    sampling = Sampling(5, temperature=temperature, logit_bias=dict.fromkeys(client.ready.eos_ids, -1000.0), logprobs=2)
    grammar = f"start: <[0-{client.ready.vocab_size - 1}]>*"
    free, held = (client.submit(PROMPT, 40, sampling, grammar=one) for one in ("", grammar))
    client.wait_freed(free, held)
    assert client.answers[held].tokens == client.answers[free].tokens
    assert len(client.answers[held].tokens) == 40
    for one, other in zip(client.answers[held].logprobs, client.answers[free].logprobs, strict=True):
        assert one.drawn == pytest.approx(other.drawn, abs=0.01)  # llama.cpp keeps KV in F16
        assert one.top == pytest.approx(other.top, abs=0.01)


def test_logprobs_are_those_of_the_free_distribution(client: EngineClient) -> None:
    """A token that the model finds unlikely is drawn; its log-probability is told, and so are the likeliest ones."""
    sampling = replace(GREEDY, logprobs=3)
    free = client.submit(PROMPT, 1, replace(sampling, logit_bias={700: 1000.0}))
    held = client.submit(PROMPT, 1, sampling, grammar="start: <[700]>*")
    client.wait_freed(free, held)
    assert client.answers[held].tokens == client.answers[free].tokens == [700]
    ours, theirs = client.answers[held].logprobs[0], client.answers[free].logprobs[0]
    assert ours.top == pytest.approx(theirs.top, abs=0.01)
    assert 700 not in ours.top_ids
    assert (ours.drawn, *ours.top) == pytest.approx((theirs.drawn, *theirs.top), abs=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_preempted_ones_come_back_and_say_the_same(backend: str, gguf: Path, pieces: tuple[bytes, ...]) -> None:
    prompts = [np.random.default_rng(n).integers(5, 1000, n).tolist() for n in (200, 220, 240, 230)]
    samplings = [Sampling(seed) for seed in range(4)]
    grammars = [COUNT, WORDS, COUNT, ""]

    def submit(client: EngineClient, i: int, priority: int = 0) -> int:
        return client.submit(prompts[i], 120, samplings[i], grammar=grammars[i], priority=priority)

    with engine(**options(gguf, backend, max_rows=4)) as client:
        seqs = [submit(client, i) for i in range(4)]
        client.wait_freed(*seqs)
        expected = [client.answers[seq].tokens for seq in seqs]
        assert client.ready
        budget = 5 * 256 * client.ready.kv_bytes_per_token
    with engine(**options(gguf, backend, max_rows=4, context_length=512, kv_budget_bytes=budget)) as client:
        seqs = [submit(client, i) for i in range(2)]
        client.wait(lambda: all(len(client.answers[seq].tokens) >= 5 for seq in seqs))
        seqs += [submit(client, i, priority=1) for i in (2, 3)]
        client.wait_freed(*seqs)
        answers = [client.answers[seq].tokens for seq in seqs]
        assert answers == expected or backend == "llama"
        for seq, allowed in zip(
            seqs[:3], ("[]0123456789,", "abcdefghijklmnopqrstuvwxyz ", "[]0123456789,"), strict=True
        ):
            assert set(text(client, seq, pieces)) <= set(allowed)
        assert client.idle_stats().preemptions >= 2
        assert_nothing_held(client)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_turns_non_finite_in_its_grammar_fails_alone(
    backend: str, tmp_path: Path, pieces: tuple[bytes, ...]
) -> None:
    """By its prompt; and by a token that its grammar makes it draw."""
    path = build_gguf(tmp_path / "model.gguf")
    embeddings = next(t for t in GGUFReader(path, "r+").tensors if t.name == "token_embd.weight")
    embeddings.data[POISON] = np.nan
    file = str(path.with_suffix(".mlx") / "model.safetensors")
    weights = mx.load(file)
    assert isinstance(weights, dict)
    weights["model.embed_tokens.weight"][POISON] = mx.nan
    mx.save_safetensors(file, weights, {"format": "mlx"})
    with engine(**options(path, backend, max_rows=4)) as client:
        sound = client.submit(PROMPT, 60, Sampling(1), grammar=COUNT)
        by_prompt = client.submit([POISON] * 20, 60, Sampling(2), grammar=COUNT)
        by_draw = client.submit(PROMPT, 60, Sampling(3), grammar=f'start: "ab" <[{POISON}]> "cd"')
        client.wait_freed(sound, by_prompt, by_draw)
        for seq in (by_prompt, by_draw):
            failed = client.answers[seq].failed
            assert failed is not None
            assert failed.code == "non_finite"
        assert client.answers[by_draw].tokens[-1] == POISON
        assert text(client, sound, pieces).startswith("[")
        assert_nothing_held(client)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engine_ends_while_a_grammar_compiles(backend: str, gguf: Path) -> None:
    with engine(**options(gguf, backend)) as client:
        client.submit(PROMPT, 5, GREEDY, grammar=slow("end", rules=4900))
        stats = client.idle_stats()
        assert (stats.queued, stats.prefilling, stats.decoding) == (1, 0, 0)
