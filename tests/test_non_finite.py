"""Logits that are not finite fail their own sequence, and nobody else's: with any sampling, in any state in which the
sequence may be left, on both engines and in both loops.

One token's embedding is NaN, so that a prompt with it is bad from there on, and an answer after it was drawn.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader

from lmx.engine.backend import Backend, Chunk, Sequence
from lmx.engine.mlx import adapter
from lmx.engine.mlx.backend import MLXBackend
from lmx.protocol import Load, Sampling
from tests.backends import BACKENDS, needs_llama
from tests.engine_client import GREEDY, EngineClient, engine
from tests.models import build_gguf, build_model
from tests.server import serve
from tests.test_engine import assert_greedy, assert_nothing_held

POISON = 77
# From a near tie on, which may fall either way, an answer can come upon the poison by itself.
INNOCENT = Sampling(seed=0, temperature=0.0, logit_bias={POISON: -1000.0})
SAMPLINGS = {
    "greedy": GREEDY,
    "as the API's default": Sampling(3, temperature=1.0),
    "top-p": Sampling(3, temperature=0.8, top_k=40, top_p=0.9),
    "all of them": Sampling(3, 1.2, 50, 0.9, 0.05, 1.3, 0.5, 0.2, logprobs=3),
    "greedy, bias and logprobs": Sampling(3, temperature=0.0, logit_bias={10: 1.0}, logprobs=0),
}
LOOPS = [
    "mlx plain",
    "mlx overlapped",
    pytest.param("llama plain", marks=needs_llama),
    pytest.param("llama overlapped", marks=needs_llama),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights for both engines."""
    gguf = build_gguf(tmp_path_factory.mktemp("poisoned") / "model.gguf", num_hidden_layers=2)
    embeddings = next(t for t in GGUFReader(gguf, "r+").tensors if t.name == "token_embd.weight")
    embeddings.data[POISON] = np.nan
    folder = gguf.with_suffix(".mlx")
    poison_folder(folder)
    return {"llama": gguf, "mlx": folder}


def poison_folder(folder: Path) -> Path:
    file = str(folder / "model.safetensors")
    weights = mx.load(file)
    assert isinstance(weights, dict)
    weights["model.embed_tokens.weight"][POISON] = mx.nan
    mx.save_safetensors(file, weights, {"format": "mlx"})
    return folder


def clean_prompt(length: int, seed: int) -> list[int]:
    return [token + (token == POISON) for token in np.random.default_rng(seed).integers(5, 1000, length).tolist()]


class Neighbours:
    """Two that decode all the while, and the ones that come after; what each of them says alone."""

    def __init__(self, client: EngineClient, folder: Path) -> None:
        self.client = client
        self._folder = folder
        self.prompts = [clean_prompt(length, length) for length in (100, 60, 20)]
        self.alone: list[list[int]] = []
        if client.ready and client.ready.backend == "mlx":  # llama.cpp's near ties are judged by their logits
            lengths = (150, 150, 12)
            self.alone = [client.run([p], n, INNOCENT)[0] for p, n in zip(self.prompts, lengths, strict=True)]
        self._running: list[int] = []

    def start(self) -> None:
        self._running = [self.client.submit(prompt, 150, INNOCENT) for prompt in self.prompts[:2]]
        self.client.wait(lambda: all(self.client.answers[seq].tokens for seq in self._running))

    def check(self) -> None:
        """The next one lands in the row that was left, beside longer ones; then nothing is held."""
        last = self.client.submit(self.prompts[2], 12, INNOCENT)
        self.client.wait_freed(last)
        for seq in self._running:
            self.client.cancel(seq)
        self.client.wait_freed(*self._running)
        assert [self.client.answers[seq].failed for seq in (*self._running, last)] == [None] * 3
        answers = [self.client.answers[seq].tokens for seq in (*self._running, last)]
        if self.client.ready and self.client.ready.backend == "llama":
            assert_greedy(self._folder, self.prompts, answers, never=[POISON])  # near ties may fall either way
        else:
            assert answers == [alone[: len(answer)] for alone, answer in zip(self.alone, answers, strict=True)]
        assert len(answers[2]) == 12
        assert_nothing_held(self.client)


@pytest.fixture(scope="module", params=LOOPS)
def neighbours(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[Neighbours]:
    backend, loop = request.param.split()
    lookahead = "on" if loop == "overlapped" else "off"
    with engine(
        models[backend], backend=backend, lookahead=lookahead, max_rows=4, max_chunk_tokens=32, prefix_cache=False
    ) as client:
        yield Neighbours(client, models["mlx"])


def until(attempt: Callable[[], bool]) -> None:
    """A state that lasts a few steps is reached sooner or later, whatever else the machine does."""
    assert any(attempt() for _ in range(50))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_bad_prompt_fails_alone(neighbours: Neighbours, sampling: Sampling) -> None:
    client = neighbours.client
    neighbours.start()
    bad = client.submit([*clean_prompt(40, 1), POISON, *clean_prompt(30, 2)], 50, sampling)
    client.wait_freed(bad)
    failed = client.answers[bad].failed
    assert failed is not None
    assert failed.code == "non_finite"
    assert not client.answers[bad].tokens
    neighbours.check()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_an_answer_that_turns_bad_fails_alone(neighbours: Neighbours, sampling: Sampling) -> None:
    client = neighbours.client
    neighbours.start()
    bad = client.submit(clean_prompt(30, 3), 50, drawing_poison(sampling))
    client.wait_freed(bad)
    failed = client.answers[bad].failed
    assert failed is not None
    assert failed.code == "non_finite"
    assert client.answers[bad].tokens == [POISON]
    neighbours.check()


def drawing_poison(sampling: Sampling) -> Sampling:
    fields = {name: getattr(sampling, name) for name in Sampling.__slots__}
    return Sampling(**{**fields, "logit_bias": {POISON: 1000.0}})


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("state", ["queued", "prefill", "last chunk", "decode", "expired"])
def test_left_in_any_state_it_harms_nobody(neighbours: Neighbours, sampling: Sampling, state: str) -> None:
    client = neighbours.client
    neighbours.start()
    others = []
    if state == "queued":
        others = [client.submit(clean_prompt(10, seed), 3000, INNOCENT) for seed in (4, 5)]
        client.wait(lambda: all(client.answers[seq].tokens for seq in others))
    tokens = {"prefill": 200, "expired": 200, "queued": 40, "last chunk": 30}.get(state, 0)
    prompt = [POISON] * tokens or clean_prompt(30, 3)

    def attempt() -> bool:
        steps, messages = len(client.steps), len(client.messages)
        bad = client.submit(
            prompt,
            50,
            drawing_poison(sampling) if state == "decode" else sampling,
            deadline_s=0.006 if state == "expired" else None,
        )
        answer = client.answers[bad]
        if state == "prefill":
            client.wait(lambda: any(seq == bad for step in client.steps[steps:] for seq, _ in step.prefills))
        elif state == "last chunk":
            client.wait(lambda: any(bad in getattr(message, "seqs", ()) for message in client.messages[messages:]))
        elif state == "decode":
            client.wait(lambda: bool(answer.tokens))
        if state != "expired":
            client.cancel(bad)
        client.wait_freed(bad)
        if answer.failed:
            assert answer.failed.code in ("non_finite", "timeout")
        assert answer.tokens in ([], [POISON])
        if state in ("last chunk", "decode"):
            return True  # whether the cancellation or the step's end came first
        if state in ("prefill", "expired") and client.ready and client.ready.backend == "llama":
            return answer.started > 0  # that it is bad is seen in the chunk that computes it
        if state == "expired":
            return answer.started > 0 and answer.failed is not None and answer.failed.code == "timeout"
        return answer.failed is None and answer.started == (state == "prefill")

    until(attempt)
    for seq in others:
        client.cancel(seq)
    client.wait_freed(*others)
    neighbours.check()


def load(backend: str, path: Path) -> Backend:
    if backend == "llama":
        from lmx.engine.llama.backend import LlamaBackend

        return LlamaBackend.load(Load(str(path), backend="llama", max_rows=4, max_chunk_tokens=512))
    # Not its ``load``, which freezes the process's objects for good.
    return MLXBackend(adapter.load(path), Load(str(path), max_rows=4, max_chunk_tokens=512))


class Hand:
    """Plays the step loop, so that each launch and each reading has its place."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._next = 0

    def sequence(self, prompt: list[int], sampling: Sampling = INNOCENT) -> Sequence:
        self._next += 1
        sequence = Sequence(self._next, list(prompt), len(prompt), 99, sampling, ignore_eos=True)
        self.backend.start(sequence)
        return sequence

    def step(self, decode: list[Sequence], chunks: list[Chunk] | None = None) -> Callable[[], list[bool]]:
        """Launch and start; the function returned reads the draws: which of them are bad."""
        launch = self.backend.launch(decode, chunks or [])
        launch.start()

        def read() -> list[bool]:
            draws = launch.wait()
            for draw in draws:
                draw.sequence.tokens += draw.tokens
            return [draw.bad for draw in draws]

        return read

    def prefill(self, sequence: Sequence, end: int = 0, start: int = 0) -> Callable[[], list[bool]]:
        end = end or len(sequence.tokens)
        return self.step([], [Chunk(sequence, start, end - start, end == len(sequence.tokens))])

    def answer(self, prompt: list[int], beside: list[Sequence]) -> list[int]:
        """Six tokens of a new sequence while others decode."""
        sequence = self.sequence(prompt)
        assert self.prefill(sequence)() == [False]
        for _ in range(5):
            assert self.step([*beside, sequence])() == [False] * (len(beside) + 1)
        self.backend.free(sequence)
        return sequence.tokens[len(prompt) :]


@pytest.fixture(scope="module", params=BACKENDS)
def hand(request: pytest.FixtureRequest, models: dict[str, Path]) -> Hand:
    return Hand(load(request.param, models[request.param]))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("state", ["prefill", "last chunk", "decode"])
@pytest.mark.parametrize("in_flight", [True, False])
def test_preempted_it_leaves_nothing_to_the_next_in_its_row(
    hand: Hand, sampling: Sampling, state: str, in_flight: bool
) -> None:
    """``in_flight``: the step that spoils it is not read yet when its row is given to the next one."""
    innocent = clean_prompt(20, 6)
    alone = hand.answer(innocent, [])
    longer = [hand.sequence(clean_prompt(length, length)) for length in (180, 150)]
    for sequence in longer:
        assert hand.prefill(sequence)() == [False]
    prompt = clean_prompt(30, 7) if state == "decode" else [POISON] * 100
    bad = hand.sequence(prompt, drawing_poison(sampling) if state == "decode" else sampling)
    spoils = hand.prefill(bad, 60 if state == "prefill" else 0)
    if state == "decode":
        assert spoils() == [False]
        assert bad.tokens[-1] == POISON
        spoils = hand.step([bad])
    # llama.cpp gives logits of every chunk.
    expected = [] if state == "prefill" and isinstance(hand.backend, MLXBackend) else [True]
    if not in_flight:
        assert spoils() == expected
    hand.backend.free(bad)
    assert hand.answer(innocent, longer) == alone
    if in_flight:
        assert spoils() == expected
    for sequence in longer:
        hand.backend.free(sequence)
    assert hand.backend.memory().rows == 0


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("cut", [0, 60])
def test_windows_and_recurrent_states_keep_nothing_either(kind: str, cut: int, tmp_path: Path) -> None:
    """With ``cut``, the prompt is left in its middle. Without, one bad token stands so far before its end that no draw
    of a sliding layer sees it, only the full layer's."""
    hand = Hand(load("mlx", poison_folder(build_model(kind, tmp_path / "model"))))
    innocent = clean_prompt(20, 6)
    alone = hand.answer(innocent, [])
    longer = [hand.sequence(clean_prompt(length, length)) for length in (180, 150)]
    for sequence in longer:
        hand.prefill(sequence)()
    bad = hand.sequence([*clean_prompt(8, 8), POISON, *clean_prompt(141, 9)])
    spoiled = hand.prefill(bad, cut)()
    assert spoiled == ([] if cut else [True])
    hand.backend.free(bad)
    assert hand.answer(innocent, longer) == alone
    for sequence in longer:
        hand.backend.free(sequence)


def test_a_rewind_leaves_nothing_that_was_not_seen(models: dict[str, Path]) -> None:
    hand = Hand(load("mlx", models["mlx"]))
    prompt = clean_prompt(100, 8)
    alone = hand.answer(prompt, [])
    sequence = hand.sequence([*prompt[:60], *[POISON] * 100])
    hand.prefill(sequence, 60)()
    hand.prefill(sequence, 150, 60)()
    assert hand.backend.rewind(sequence, 60) == 60
    sequence.tokens[60:] = prompt[60:]
    assert hand.prefill(sequence, 0, 60)() == [False]
    longer = hand.sequence(clean_prompt(180, 9))
    hand.prefill(longer)()
    for _ in range(5):
        assert hand.step([longer, sequence])() == [False, False]
    assert sequence.tokens[100:] == alone


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_client_is_told_and_the_server_goes_on(backend: str, models: dict[str, Path], tmp_path: Path) -> None:
    """With the API's own defaults: temperature 1."""
    settings = {"model": {"backend": backend}}
    with serve(tmp_path, "--model", str(models[backend]), settings=settings) as server:
        server.line(r"lmx: model \S+ ready")
        body = {"model": "default", "max_tokens": 8, "ignore_eos": True}
        for _ in range(2):
            answer = httpx.post(f"{server.url}/v1/completions", json={**body, "prompt": [5, POISON, 6]}, timeout=60)
            assert answer.status_code == 500
            assert "not finite" in answer.json()["error"]["message"]
            answer = httpx.post(f"{server.url}/v1/completions", json={**body, "prompt": [5, 6, 7]}, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 8
        server.idle()
        assert server.engine()["restarts"] == 0
