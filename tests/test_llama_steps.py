"""llama.cpp's back end by itself: sequences driven by hand through single steps, each with cells of its own or all in
shared ones. Non-finite rows, gaps between rows, batches beyond a limit, the end of a context, windows."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf import GGUFReader

from lmx.engine.backend import Chunk, Draw, Sequence
from lmx.protocol import Load, Sampling
from tests.backends import needs_llama
from tests.engine_client import engine
from tests.models import build_gguf
from tests.recurrent_gguf import LAYERS, build_recurrent_gguf

if TYPE_CHECKING or importlib.util.find_spec("llama_cpp"):
    from lmx.engine.llama.backend import LlamaBackend

pytestmark = needs_llama

POISON = 77
"""Its embedding is NaN."""
ROWS, CHUNK, CONTEXT = 4, 256, 1024


def load(path: Path, kv: str, **options: object) -> "LlamaBackend":

    options = {"max_rows": ROWS, "max_chunk_tokens": CHUNK, "context_length": CONTEXT, **options}
    backend = LlamaBackend.load(Load(str(path), backend="llama", **options))  # type: ignore[arg-type]
    if kv == "unified":
        budget = backend.facts.kv_budget_bytes // 2
        backend = LlamaBackend.load(Load(str(path), backend="llama", **options, kv_budget_bytes=budget))  # type: ignore[arg-type]
    assert backend.facts.path == kv, backend.facts.path_reason
    return backend


@pytest.fixture(
    scope="module",
    params=[
        "llama streams",
        "llama unified",
        "jamba streams",
        "jamba unified",
        "mamba streams",
        "gemma3_text streams",
        "gemma3_text unified",
    ],
)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "LlamaBackend":
    kind, kv = request.param.split()
    path = tmp_path_factory.mktemp("poisoned") / "model.gguf"
    build_recurrent_gguf(path, kind) if kind in LAYERS else build_gguf(path, kind=kind)
    embeddings = next(t for t in GGUFReader(path, "r+").tensors if t.name == "token_embd.weight")
    embeddings.data[POISON] = np.nan
    return load(path, kv)


class Run:
    """Sequences of one back end, and how many tokens were computed for them."""

    def __init__(self, backend: "LlamaBackend", monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend = backend
        self.computed_tokens = 0
        self._live: dict[int, Sequence] = {}
        decode = backend._context.decode

        def counted(tokens: list[int], *rest: Any) -> Any:
            self.computed_tokens += len(tokens)
            return decode(tokens, *rest)

        monkeypatch.setattr(backend._context, "decode", counted)

    def start(self, seq: int, prompt: list[int], **sampling: Any) -> Sequence:
        parameters = Sampling(**{"seed": 0, "temperature": 0.0, **sampling})
        sequence = self._live[seq] = Sequence(seq, prompt.copy(), len(prompt), 500, parameters, True)
        self.backend.start(sequence)
        return sequence

    def step(self, decode: list[Sequence], *chunks: Chunk) -> list[Draw]:
        draws = self.backend.launch(decode, chunks).wait()
        for draw in draws:
            if not draw.bad:
                draw.sequence.tokens += draw.tokens
        return draws

    def prefill(self, *sequences: Sequence) -> None:
        self.step([], *(whole(sequence) for sequence in sequences))

    def free(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.backend.free(sequence)
            self._live.pop(sequence.seq, None)

    def end(self) -> None:
        self.free(*self._live.copy().values())
        assert self.backend.memory().rows == 0


def whole(sequence: Sequence) -> Chunk:
    return Chunk(sequence, 0, len(sequence.tokens), True)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [token + (token == POISON) for token in np.random.default_rng(seed).integers(5, 1000, length).tolist()]


def answer(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.prompt_tokens :]


@pytest.fixture
def run(loaded: "LlamaBackend", monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    run = Run(loaded, monkeypatch)
    yield run
    run.end()


def alone(run: Run, tokens: list[int], count: int) -> list[int]:
    sequence = run.start(100, tokens)
    run.prefill(sequence)
    while len(answer(sequence)) < count:
        run.step([sequence])
    run.free(sequence)
    return answer(sequence)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_prompt_costs_its_neighbours_nothing(run: Run, temperature: float) -> None:
    """One decodes, one is in the middle of its prompt, one begins together with the bad one."""
    prompts = [prompt(600, 1), prompt(160, 2), prompt(90, 3)]
    expected = [alone(run, tokens, 12) for tokens in prompts]
    first, second, third = (run.start(i, tokens) for i, tokens in enumerate(prompts))
    run.prefill(first)
    run.step([first], Chunk(second, 0, 30, False))
    bad = run.start(9, [POISON] * 10, temperature=temperature)
    run.computed_tokens = 0
    draws = run.step([first], Chunk(second, 30, 130, True), whole(third), whole(bad))
    assert [(draw.sequence.seq, draw.bad) for draw in draws] == [(0, False), (1, False), (2, False), (9, True)]
    # Nothing from before the step is computed again, but for a recurrent state that saw a NaN: it cannot go back.
    before = 30 if run.backend.facts.architecture == "jamba" else 0
    assert run.computed_tokens <= 2 * (1 + 130 + 90 + 10) + before
    while len(answer(first)) < 12 + 2:
        run.step([first, second, third])
    for sequence, tokens in zip((first, second, third), expected, strict=True):
        assert answer(sequence)[:12] == tokens[: len(answer(sequence))]
    assert run.step([bad])[0].bad, "a step that was planned before the row failed"


def test_a_bad_prompt_is_seen_in_its_first_chunk_and_leaves_nothing(run: Run) -> None:
    """Cancelled before its last chunk, too: whoever comes next into its cells, beside longer rows, is not harmed."""
    long = run.start(0, prompt(700, 4))
    run.prefill(long)
    for seq in range(1, 4):
        bad = run.start(seq, [POISON, *prompt(400, 5)])
        draws = run.step([long], Chunk(bad, 0, CHUNK, False))
        assert [(draw.sequence.seq, draw.bad) for draw in draws] == [(0, False), (seq, True)]
        run.free(bad)
        innocent = run.start(seq, prompt(100, 6))
        assert not any(draw.bad for draw in run.step([long], whole(innocent)))
        assert not any(draw.bad for draw in run.step([long, innocent]))
    run.end()
    assert answer(long) == alone(run, prompt(700, 4), len(answer(long)))


def test_every_row_bad_in_one_step(run: Run) -> None:
    bad = [run.start(seq, [POISON] * (seq + 1)) for seq in range(ROWS)]
    assert [draw.bad for draw in run.step([], *map(whole, bad))] == [True] * ROWS
    run.backend.canary()  # needs no row
    run.free(*bad)
    assert len(alone(run, prompt(30), 5)) == 5


def test_what_cannot_be_drawn_fails_its_own_row(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    good, bad = run.start(0, prompt(20)), run.start(1, prompt(20), logit_bias={5: "much"})
    assert [draw.bad for draw in run.step([], whole(good), whole(bad))] == [False, True]
    assert "TypeError" in capfd.readouterr().err
    assert [draw.bad for draw in run.step([good, bad])] == [False, True]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 5e-324},
        {"temperature": 1e308, "top_p": 5e-324},
        {"temperature": 1.0, "repetition_penalty": 5e-324},
        {"temperature": 1e-310, "repetition_penalty": 5e-324, "logit_bias": {5: 1e308, 6: -1e308}, "min_p": 1.0},
        {"presence_penalty": 1e308, "frequency_penalty": -1e308, "logit_bias": {5: 1e308}, "logprobs": 20},
    ],
    ids=str,
)
def test_no_value_of_a_request_ends_the_engine_or_touches_a_neighbour(run: Run, sampling: dict[str, Any]) -> None:
    good, odd = run.start(0, prompt(20)), run.start(1, prompt(20), **sampling)
    draws = run.step([], whole(good), whole(odd))
    for _ in range(3):
        draws += run.step([good, odd])
    assert not any(draw.bad for draw in draws)
    assert all(0 <= draw.tokens[0] < run.backend.facts.vocab_size for draw in draws)
    run.end()
    assert answer(good) == alone(run, prompt(20), 4)


def test_rows_with_gaps_between_them_compute_what_they_compute_alone(run: Run) -> None:
    prompts = [prompt(20 + seq, seq) for seq in range(ROWS)]
    sequences = [run.start(seq, tokens) for seq, tokens in enumerate(prompts)]
    run.prefill(*sequences)
    run.free(sequences[1], sequences[2])
    outer = [sequences[3], sequences[0]]
    for _ in range(8):
        assert [draw.sequence for draw in run.step(outer)] == outer
    newcomer = run.start(9, prompts[1])
    run.step(outer, whole(newcomer))
    run.step([newcomer, *outer])
    found = [answer(sequence) for sequence in (*outer, newcomer)]
    run.end()
    assert found == [alone(run, prompts[3], 11), alone(run, prompts[0], 11), alone(run, prompts[1], 2)]


def test_a_step_larger_than_any_batch(run: Run) -> None:
    sequences = [
        run.start(seq, prompt(400 if run.backend.facts.path == "unified" else 1000, seq)) for seq in range(ROWS)
    ]
    limit = run.backend._context.batch_tokens
    run.backend._context.batch_tokens = 300
    run.prefill(*sequences)
    run.backend._context.batch_tokens = limit
    found = [answer(sequence) for sequence in sequences]
    run.end()
    assert found == [alone(run, sequence.tokens[: sequence.prompt_tokens], 1) for sequence in sequences]


def test_every_row_reaches_the_end_of_its_context(tmp_path: Path) -> None:
    path = build_gguf(tmp_path / "model.gguf")
    with engine(path, backend="llama", max_rows=3, context_length=300) as client:
        assert client.ready is not None
        assert client.ready.path == "streams"
        answers = client.run([prompt(280, seed) for seed in range(6)], 1000)
        assert [len(tokens) for tokens in answers] == [20] * 6


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_recurrent_models_say_together_what_they_say_alone(kind: str, tmp_path: Path) -> None:
    with engine(build_recurrent_gguf(tmp_path / "model.gguf", kind), backend="llama", max_rows=3) as client:
        prompts = [prompt(length, length) for length in (5, 90, 40, 7, 60)]
        assert client.run(prompts, 12) == [client.run([tokens], 12)[0] for tokens in prompts]
        assert client.idle_stats().kv_used_bytes == 0


@pytest.mark.parametrize("kv", ["streams", "unified"])
def test_a_window_that_moved_on_cannot_be_gone_back_to(
    kv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(load(build_gguf(tmp_path / "model.gguf", kind="gemma3_text"), kv), monkeypatch)
    tokens = prompt(900)
    expected = alone(run, tokens, 3)
    sequence = run.start(0, tokens)
    for start in range(0, 900, CHUNK):
        run.step([], Chunk(sequence, start, min(CHUNK, 900 - start), start + CHUNK >= 900))
    assert run.backend.rewind(sequence, 890) == 890
    assert run.backend.rewind(sequence, 100) == 0
    del sequence.tokens[900:]
    run.prefill(sequence)
    run.step([sequence])
    run.step([sequence])
    assert answer(sequence) == expected
    run.end()
