"""MLX verifies drafts: whatever the drafts are, and however many each row has, what is drawn is what single steps draw,
and the next step, with drafts or without, finds everything as they would have left it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.backend import Chunk, Draw, Sequence, verified
from lmx.engine.mlx import adapter, probe
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.backend import MLXBackend
from lmx.engine.mlx.layers import scatter_write
from lmx.protocol import Load, Logprobs, Sampling
from tests.models import build_model, write_tokenizer
from tests.test_grammars import Compiler
from tests.test_non_finite import POISON, clean_prompt, poison_folder

ROWS = 4
TOKENS = 24
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 2}, {}),
    "packed KV": ("llama", {"hidden_size": 128, "num_hidden_layers": 1}, {"kv_bits": 8}),
    "windows": ("gemma3_text", {}, {}),  # of 32
    "latent attention": ("deepseek_v2", {"num_hidden_layers": 2}, {}),
}
SAMPLINGS = [
    Sampling(1, temperature=0.9, top_p=0.9, repetition_penalty=1.3, logprobs=0),
    Sampling(0, temperature=0.0),
    Sampling(2, temperature=0.0, logprobs=2, frequency_penalty=0.4),
    Sampling(3, min_p=0.02, top_k=40, logit_bias={10: 3.0}),
]


@dataclass
class Answer:
    sequence: Sequence
    logprobs: list[Logprobs] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.sequence.prompt_tokens :]


class Hand:
    """Plays the step loop: rows that start, steps with drafts, and what comes of them."""

    def __init__(self, backend: MLXBackend) -> None:
        self.backend = backend
        self.answers: dict[int, Answer] = {}

    def start(self, prompt: list[int], sampling: Sampling, **fields: Any) -> Answer:
        seq = len(self.answers) + 1
        sequence = Sequence(seq, list(prompt), len(prompt), 999, sampling, True, **fields)
        answer = self.answers[seq] = Answer(sequence)
        self.backend.start(sequence)
        self._take(self.backend.launch([], [Chunk(sequence, 0, len(prompt), last=True)]))
        return answer

    def step(self, rows: list[Answer], drafts: list[list[int]] | None = None, chunk: Chunk | None = None) -> list[Draw]:
        launch = self.backend.launch([row.sequence for row in rows], [chunk] if chunk else [], drafts or [])
        for row, guess in zip(rows, drafts or [], strict=False):
            row.drafted += len(guess)
        return self._take(launch)

    def _take(self, launch: Any) -> list[Draw]:
        launch.start()
        launch.draw()
        draws: list[Draw] = launch.wait()
        for draw in draws:
            answer = self.answers[draw.sequence.seq]
            answer.logprobs += draw.logprobs
            answer.accepted += len(draw.tokens) - 1
            for token in draw.tokens:
                draw.sequence.tokens.append(token)
                if draw.sequence.constraint:
                    assert draw.sequence.constraint.advance(token)
        return draws

    def free(self) -> None:
        for answer in self.answers.values():
            self.backend.free(answer.sequence)
        assert self.backend.memory().rows == 0


Guess = Callable[[Answer], list[int]]


def oracle(right: dict[int, list[int]], seed: int, wrong: float, depth: int, vocab_size: int) -> Guess:
    """Drafts of any length, which know the text but for some of its tokens."""
    rng = np.random.default_rng(seed)

    def guess(answer: Answer) -> list[int]:
        at = len(answer.tokens)
        known = right[answer.sequence.seq][at : at + int(rng.integers(0, depth + 1))]
        return [int(rng.integers(0, vocab_size)) if rng.random() < wrong else token for token in known]

    return guess


def load(kind: str, folder: Path, sizes: dict[str, Any] | None = None, **options: Any) -> MLXBackend:
    path = build_model(kind, folder, **(sizes or {}))
    return MLXBackend(adapter.load(path), Load(str(path), max_rows=ROWS, **options))


@pytest.fixture(scope="module", params=MODELS)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MLXBackend:
    kind, sizes, options = MODELS[request.param]
    return load(kind, tmp_path_factory.mktemp("model") / kind, sizes, **options)


def prompts(vocab_size: int) -> list[list[int]]:
    """Of such lengths that there are two lanes, and that two rows come to a lane's end."""
    rng = np.random.default_rng(4)
    return [rng.integers(5, vocab_size, length).tolist() for length in (250, 700, 3, 60)]


def run(backend: MLXBackend, guess: Guess | None) -> tuple[list[Answer], int]:
    """Four rows until each has its tokens, and how many steps that took."""
    hand = Hand(backend)
    texts = prompts(backend.facts.vocab_size)
    rows = [hand.start(prompt, sampling) for prompt, sampling in zip(texts, SAMPLINGS, strict=True)]
    steps = 0
    while going := [row for row in rows if len(row.tokens) < TOKENS]:
        steps += 1
        hand.step(going, [guess(row) for row in going] if guess else None)
    hand.free()
    return rows, steps


@pytest.fixture(scope="module")
def right(backend: MLXBackend) -> list[Answer]:
    return run(backend, None)[0]


@pytest.mark.parametrize(("wrong", "depth"), [(0.0, 15), (0.3, 4), (1.0, 3)])
def test_drafts_change_nothing_but_the_number_of_steps(
    backend: MLXBackend, right: list[Answer], wrong: float, depth: int
) -> None:
    assert backend.facts.max_depth == 15
    texts = {answer.sequence.seq: [*answer.tokens, *range(20)] for answer in right}
    rows, steps = run(backend, oracle(texts, 5, wrong, depth, backend.facts.vocab_size))
    assert all(row.drafted for row in rows)
    assert (steps < 0.5 * TOKENS) if wrong == 0 else (steps > 0.5 * TOKENS / depth)
    # Packed, a value is now and then rounded to its neighbour.
    tolerance = 0.02 if backend.facts.dtype.endswith("KV") else 1e-3
    for row, expected in zip(rows, right, strict=True):
        assert row.tokens[:TOKENS] == expected.tokens[:TOKENS]
        assert 0 < row.accepted < row.drafted or wrong in (0.0, 1.0)
        assert len(row.logprobs) == (len(row.tokens) if row.sequence.sampling.logprobs >= 0 else 0)
        for one, other in zip(row.logprobs, expected.logprobs, strict=False):
            assert one.top_ids == other.top_ids
            assert (one.drawn, *one.top) == pytest.approx((other.drawn, *other.top), abs=tolerance)


def test_rows_with_drafts_beside_prefill_and_rows_that_come_and_go(backend: MLXBackend, right: list[Answer]) -> None:
    """Rows are where they are: moved, in lanes that grow, beside free rows and one in prefill."""
    texts = prompts(backend.facts.vocab_size)
    hand = Hand(backend)
    first, second, third, fourth = (
        hand.start(prompt, sampling) for prompt, sampling in zip(texts, SAMPLINGS, strict=True)
    )
    hand.step([first, second, third, fourth], [[], right[1].tokens[1:4], [], [7, 7]])
    assert len(second.tokens) == 5
    backend.free(first.sequence)
    newcomer = Sequence(9, [*texts[0]], 250, 99, SAMPLINGS[0], True)
    hand.answers[9] = Answer(newcomer)
    backend.start(newcomer)
    hand.step([second, third], [[], right[2].tokens[2:10]], Chunk(newcomer, 0, 128, last=False))
    assert len(third.tokens) == 11
    hand.step([fourth, second], [right[3].tokens[2:5], [3]], Chunk(newcomer, 128, 122, last=True))
    for _ in range(9):
        late = hand.answers[9]
        guess = right[0].tokens[len(late.tokens) : len(late.tokens) + 2]
        hand.step([late, second, third, fourth], [[guess[0], 5], [], guess, [1, 2, 3]])
    for row, expected in zip((late, second, third, fourth), right, strict=True):
        assert row.tokens == expected.tokens[: len(row.tokens)]
        assert len(row.tokens) >= 10
    assert len(late.tokens) == 19
    hand.free()


def test_what_is_copied_out_after_drafts_is_what_single_steps_leave(backend: MLXBackend, right: list[Answer]) -> None:
    """The KV of what counts, of no position more, and known to be finite."""
    prompt = prompts(backend.facts.vocab_size)[3]
    blocks = []
    for drafts in ([[]] * 12, [right[3].tokens[1:7], [1, 2, 3], [], [4], right[3].tokens[11:14]]):
        hand = Hand(backend)
        row = hand.start(prompt, SAMPLINGS[3])
        for guess in drafts:
            hand.step([row], [guess])
        tokens = len(row.sequence.tokens) - 1
        [block] = backend.copy_out(row.sequence, [(0, 72)])
        assert backend.rewind(row.sequence, 999) == tokens
        with pytest.raises(ValueError, match="are known to be finite"):
            backend.copy_out(row.sequence, [(0, tokens + 1)])
        blocks.append(block)
        hand.free()
    single, drafted = ([*block.arrays, *(block.windowed or [])] for block in blocks)  # type: ignore[attr-defined]
    for one, other in zip(single, drafted, strict=True):
        if one.dtype == mx.uint32:  # packed: now and then a value is rounded to its neighbour
            assert np.mean(np.array(one) == np.array(other)) > 0.95
        else:
            assert np.allclose(np.array(one), np.array(other), atol=1e-3)


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next"])
def test_recurrent_models_verify_none_and_say_why(kind: str, tmp_path: Path) -> None:
    facts = load(kind, tmp_path / "model").facts
    assert facts.max_depth == 0
    assert facts.probes["speculation"] == (
        "no drafts are verified: a recurrent state cannot go back to where a draft was wrong"
    )


def test_one_sequence_at_a_time_verifies_none_and_says_why(tmp_path: Path) -> None:
    facts = load("llama", tmp_path / "model", batching="single").facts
    assert facts.max_depth == 0
    assert "asked for by [engine] batching" in facts.probes["speculation"]


def test_the_load_probe_finds_widths_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = adapter.load(build_model("qwen3_moe", tmp_path / "model"))
    found = probe.run(loaded, scatter_write)
    assert found.max_depth == 15
    decode_each = Lane.decode_each

    def spoilt(lane: Lane, active: Any, tokens: Any) -> mx.array:
        wide = max(map(len, tokens)) > 8
        return decode_each(lane, active, tokens) * (1.1 if wide else 1.0)

    monkeypatch.setattr(Lane, "decode_each", spoilt)
    width, words = probe.compare_widths(loaded, found)
    assert (width, words.partition(":")[0]) == (8, "up to 7 drafts of a row are verified")
    monkeypatch.setattr(Lane, "decode_each", lambda *_: mx.array(0) @ mx.array(0))
    width, words = probe.compare_widths(loaded, found)
    assert width == 1
    assert words.startswith("no drafts are verified: its code refuses more tokens (")


def test_a_draft_that_the_model_does_not_bear_harms_nobody(tmp_path: Path) -> None:
    path = poison_folder(build_model("llama", tmp_path / "model"))
    backend = MLXBackend(adapter.load(path), Load(str(path), max_rows=ROWS))
    texts = [clean_prompt(length, length) for length in (20, 30)]
    answers = []
    for drafts in (None, [[POISON, 5], [9, POISON, 9]]):
        hand = Hand(backend)
        rows = [hand.start(text, Sampling(1, logprobs=1)) for text in texts]
        for _ in range(12):
            assert [draw.bad for draw in hand.step(rows, drafts)] == [False, False]
        answers.append([(row.tokens, [one.top_ids for one in row.logprobs]) for row in rows])
        hand.free()
    assert answers[0] == answers[1]


def test_a_row_that_turns_bad_behind_its_drafts_fails_alone(tmp_path: Path) -> None:
    path = poison_folder(build_model("llama", tmp_path / "model"))
    backend = MLXBackend(adapter.load(path), Load(str(path), max_rows=ROWS))
    hand = Hand(backend)
    good = hand.start(clean_prompt(20, 1), Sampling(1))
    alone = [tuple(hand.step([good])[0].tokens) for _ in range(4)]
    # It draws the poison, which was its draft, too.
    bad = hand.start(clean_prompt(30, 2), Sampling(0, temperature=0.0, logit_bias={POISON: 1e9}))
    assert bad.tokens == [POISON]
    backend.rewind(bad.sequence, 29)
    bad.sequence.tokens = bad.sequence.tokens[:30]
    hand.step([bad], [[POISON, 4]])
    assert bad.tokens == [POISON]
    again = hand.start(clean_prompt(20, 1), Sampling(1))
    for index in range(4):
        draws = hand.step([again, bad], [[], [1, 2]])
        assert [draw.bad for draw in draws] == [False, True]
        assert draws[0].tokens == alone[index]
    hand.free()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MLXBackend:
    return load("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def compile_(llama: MLXBackend, tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder)
    return Compiler(str(folder), llama.facts.vocab_size, llama.facts.eos_ids)


@pytest.mark.parametrize("depth", [1, 4, 15])
def test_masks_hold_along_the_drafts(llama: MLXBackend, compile_: Compiler, depth: int) -> None:
    """A grammar, and ends that must not come yet: with right drafts, and with such as the grammar refuses."""
    ends = tuple(range(5, 900))  # whatever comes first is one of them

    def rows(hand: Hand) -> list[Answer]:
        return [
            hand.start([7, 8, 9], Sampling(1), constraint=compile_('start: "one" /[a-z ]{400}/')),
            hand.start([9, 8], Sampling(2, temperature=0.0), min_tokens=9, stop_ids=ends),
            hand.start([5] * 30, Sampling(3, repetition_penalty=1.2)),
        ]

    hand = Hand(llama)
    right = rows(hand)
    for _ in range(TOKENS):
        hand.step(right)
    hand.free()
    assert not set(right[1].tokens[:9]) & set(ends)
    texts = {row.sequence.seq: row.tokens for row in right}
    for wrong in (0.0, 0.4):
        hand = Hand(llama)
        found = rows(hand)
        guess = oracle(texts, 6, wrong, depth, llama.facts.vocab_size)
        while going := [row for row in found if len(row.tokens) < TOKENS]:
            hand.step(going, [guess(row) for row in going])
        hand.free()
        for row, expected in zip(found, right, strict=True):
            assert row.tokens[:TOKENS] == expected.tokens[:TOKENS]
            assert row.accepted


def test_how_many_drafts_count() -> None:
    assert verified([], [1]) == 0
    assert verified([1, 2, 3], [1, 2, 3, 4]) == 3
    assert verified([1, 2, 3], [1, 9, 3, 4]) == 1
    assert verified([9, 2, 3], [1, 2, 3, 4]) == 0
