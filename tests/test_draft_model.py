"""A draft model in the MLX engine: what it says is right where it is the same model, never changes a text whatever it
is, costs no step more than a bounded piece of a long prompt, and leaves nothing behind."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.backend import Chunk, Sequence
from lmx.engine.drafts import Drafts
from lmx.engine.drafts.model import Model
from lmx.engine.mlx import adapter, draft
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.backend import MLXBackend
from lmx.errors import ModelInvalid
from lmx.protocol import Load, Sampling, Step, Submit, pack_tokens
from tests.engine_client import engine
from tests.models import build_model, train_tokenizer
from tests.test_non_finite import POISON, clean_prompt, poison_folder
from tests.test_speculation import run
from tests.test_verify import Hand

GREEDY = Sampling(0, temperature=0.0)
SAMPLED = Sampling(5, temperature=0.8, top_p=0.9, repetition_penalty=1.2)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "target": ("llama", {}),
    "smaller": ("llama", {"num_hidden_layers": 1, "seed": 1}),
    "padded": ("llama", {"num_hidden_layers": 1, "seed": 2, "vocab_size": 1600}),
    "short": ("llama", {"max_position_embeddings": 48}),
    "windows": ("gemma3_text", {}),  # of 32
    "recurrent": ("lfm2", {}),
}
Folder = Callable[[str], Path]
Pair = Callable[..., MLXBackend]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        kind, overrides = MODELS[name]
        return root / name if (root / name).exists() else build_model(kind, root / name, **overrides)

    return made


@pytest.fixture(scope="module")
def pair(folder: Folder) -> Pair:
    """A target with a draft model; "": none."""
    made: dict[tuple[str, str, int], MLXBackend] = {}

    def backend(target: str = "target", drafts: str = "target", kv_bits: int = 16) -> MLXBackend:
        if (target, drafts, kv_bits) not in made:
            path = str(folder(target))
            options = Load(path, draft_path=str(folder(drafts)) if drafts else "", max_rows=4, kv_bits=kv_bits)
            made[target, drafts, kv_bits] = _backend(options)
        return made[target, drafts, kv_bits]

    return backend


def _backend(options: Load) -> MLXBackend:
    loaded = adapter.load(Path(options.path))
    drafts = None
    if options.draft_path:
        drafts = draft.load(options.draft_path, loaded, Path(options.path), options.kv_bits)
    return MLXBackend(loaded, options, drafts)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((length, seed)).integers(5, 1400, length).tolist()


class Drafted(Hand):
    """Plays the step loop, with what the draft model says."""

    def run(self, rows: list[Any], depths: list[int]) -> list[tuple[int, int]]:
        """A step: for each row how many drafts there were, and how many were right."""
        drafts = self.backend.draft([row.sequence for row in rows], depths)
        assert all(len(own) <= depth for own, depth in zip(drafts, depths, strict=True))
        right = [row.accepted for row in rows]
        self.step(rows, drafts)
        return [(len(own), row.accepted - was) for own, row, was in zip(drafts, rows, right, strict=True)]

    def resume(self, row: Any) -> None:
        """Prefill all that it has, on a row of its own."""
        self.backend.start(row.sequence)
        self._take(self.backend.launch([], [Chunk(row.sequence, 0, len(row.sequence.tokens), last=True)]))


def alone(backend: MLXBackend, tokens: list[int], sampling: Sampling, answer: int) -> list[int]:
    hand = Hand(backend)
    row = hand.start(tokens, sampling)
    while len(row.tokens) < answer:
        hand.step([row])
    hand.free()
    return row.tokens[:answer]


@pytest.mark.parametrize(
    ("model", "kv_bits"), [("target", 16), ("target", 8), ("windows", 16)], ids=["llama", "packed KV", "windows"]
)
def test_a_model_foresees_its_own_text(pair: Pair, model: str, kv_bits: int) -> None:
    """Rows of lanes of their own, at depths that differ and change, and not in each step."""
    hand = Drafted(pair(model, model, kv_bits))
    rows = [hand.start(prompt(length), GREEDY) for length in (1, 40, 300, 600)]
    while not all(hand.backend.draft([row.sequence for row in rows], [1] * 4)):
        pass  # until the long ones have caught up
    for depths in ([2, 3, 4, 1], [15, 15, 15, 15], [1, 0, 5, 2], [0, 0, 3, 0], [4, 6, 4, 4]):
        assert hand.run(rows, depths) == [(depth, depth) for depth in depths]
    for _ in range(6):
        hand.step(rows)
    assert hand.run(rows, [3] * 4) == [(3, 3)] * 4
    hand.free()
    assert hand.backend.memory().arena_bytes == 0


@pytest.mark.parametrize("drafts", ["smaller", "padded", "windows"])
def test_no_draft_changes_a_text(pair: Pair, drafts: str) -> None:
    """Greedy or sampled, while rows come and go between."""
    plain, hand = pair(drafts=""), Drafted(pair(drafts=drafts))
    asked = [(prompt(7), SAMPLED), (prompt(30), GREEDY), (prompt(270), SAMPLED), (prompt(12), GREEDY)]
    rows = [hand.start(*one) for one in asked[:2]]
    drafted = 0
    for step in range(12):
        if step in (2, 5):
            rows.append(hand.start(*asked[len(hand.answers)]))
        if step == 8:
            hand.backend.free(rows.pop(0).sequence)
        drafted += sum(count for count, _ in hand.run(rows, [1 + (step + i) % 5 for i in range(len(rows))]))
    assert drafted > 50
    for answer, (tokens, sampling) in zip(hand.answers.values(), asked, strict=True):
        assert answer.tokens == alone(plain, tokens, sampling, len(answer.tokens))
    hand.free()
    assert hand.backend.memory().arena_bytes == 0


def test_wrong_drafts_are_forgotten(pair: Pair) -> None:
    """The text goes another way than was drafted, by one token or all: what comes after it is foreseen all the same."""
    hand = Drafted(pair())
    row = hand.start(prompt(20), GREEDY)
    for wrong_at in (0, 2, 5):
        drafts = hand.backend.draft([row.sequence], [6])
        row.sequence.tokens += drafts[0][:wrong_at]
        row.sequence.tokens.append((drafts[0][wrong_at] + 1) % 1400)
        resumed = Drafted(pair(drafts=""))
        other = resumed.start(list(row.sequence.tokens), GREEDY)
        while len(other.tokens) < 4:
            resumed.step([other])
        resumed.free()
        assert hand.backend.draft([row.sequence], [4]) == [other.tokens[:4]]
    hand.free()


def test_a_row_that_was_preempted_is_drafted_again(pair: Pair) -> None:
    hand = Drafted(pair())
    row, other = hand.start(prompt(20), GREEDY), hand.start(prompt(33), GREEDY)
    hand.run([row, other], [3, 3])
    hand.backend.free(row.sequence)
    assert hand.run([other], [3]) == [(3, 3)]
    hand.resume(row)
    assert hand.run([row, other], [4, 2]) == [(4, 4), (2, 2)]
    hand.free()


def test_a_long_prompt_holds_no_step_for_long(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It catches up in bounded pieces, which are all its rows' together; who has caught up is drafted beside it."""
    hand = Drafted(pair())
    rows = [hand.start(prompt(length), GREEDY) for length in (20, 700, 300)]
    pieces: list[int] = []
    prefill = Lane.prefill

    def seen(lane: Lane, row: int, tokens: list[int], **options: Any) -> Any:
        pieces.append(len(tokens))
        return prefill(lane, row, tokens, **options)

    monkeypatch.setattr(Lane, "prefill", seen)
    drafted = []
    while not drafted or not all(drafted[-1]):
        pieces.clear()
        drafted.append([count for count, _ in hand.run(rows, [2, 2, 2])])
        assert sum(pieces) <= 64 or mx.default_device() == mx.gpu
    assert [row[0] for row in drafted] == [2] * len(drafted)
    assert len(drafted) > 10 or mx.default_device() == mx.gpu
    hand.free()


def test_what_a_row_cannot_have_it_does_not_get(pair: Pair) -> None:
    """Beyond the draft model's context, and with a token that it does not know."""
    hand = Drafted(pair(drafts="short"))
    row = hand.start(prompt(40), GREEDY)
    assert hand.run([row], [15]) == [(8, 8)]  # of 41 tokens and the first 7 drafts the last is at 48
    assert hand.run([row], [3]) == [(0, 0)]
    hand.free()
    hand = Drafted(pair("padded", "smaller"))
    known, unknown = hand.start(prompt(40), GREEDY), hand.start([*prompt(40), 1550], GREEDY)
    for _ in range(2):
        assert [count for count, _ in hand.run([known, unknown], [3, 3])] == [3, 0]
    hand.free()


def test_a_row_that_is_not_finite_spoils_no_other(folder: Folder, tmp_path: Path) -> None:
    """The draft model does not bear a token that the target bears."""
    poisoned = poison_folder(build_model("llama", tmp_path / "poisoned"))
    hand = Drafted(_backend(Load(str(folder("target")), draft_path=str(poisoned), max_rows=4)))
    sampling = Sampling(0, temperature=0.0, logit_bias={POISON: -1000.0})
    good = hand.start(clean_prompt(20, 1), sampling)
    for length in (9, 100):  # found by a pass, and by a piece of the prompt
        bad = hand.start([*clean_prompt(length, 2), POISON, 7], sampling)
        for _ in range(4):
            assert [count for count, _ in hand.run([good, bad], [3, 3])] == [3, 0]
        after = hand.start(clean_prompt(length, 3), sampling)
        while not hand.run([good, after], [3, 3])[1][0]:
            pass
        assert hand.run([good, after], [3, 3])[1] == (3, 3)
        hand.backend.free(bad.sequence)
        hand.backend.free(after.sequence)
    hand.free()


def test_its_memory_is_in_the_accounts(pair: Pair, folder: Folder) -> None:
    target, smaller, both = pair(drafts=""), pair("smaller", ""), pair(drafts="smaller")
    assert both.facts.draft_model == str(folder("smaller"))
    assert both.facts.kv_bytes_per_token == target.facts.kv_bytes_per_token + smaller.facts.kv_bytes_per_token
    assert both.facts.weights_bytes == target.facts.weights_bytes + smaller.facts.weights_bytes
    hand = Drafted(both)
    row = hand.start(prompt(20), GREEDY)
    before = both.memory()
    both.draft([row.sequence], [3])
    assert both.memory().arena_bytes > before.arena_bytes
    assert both.memory().rows == before.rows == 1
    both.limit_kv(1 << 20)
    assert hand.run([row], [2])[0][0] == 2
    hand.free()
    assert both.memory().arena_bytes == 0


def test_what_cannot_draft_is_refused(folder: Folder, tmp_path: Path) -> None:
    def refusal(path: Path, target: str = "target") -> str:
        with pytest.raises(ModelInvalid) as error:
            _backend(Load(str(folder(target)), draft_path=str(path)))
        assert error.value.param == "model.draft_model"
        assert error.value.message.startswith(str(path))
        return error.value.message

    assert "recurrent state" in refusal(folder("recurrent"))
    assert "no drafts are verified: a recurrent state" in refusal(folder("target"), "recurrent")
    other = build_model("llama", tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = words["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    assert "another tokenizer" in refusal(other)
    (other / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelInvalid, match="cannot be read"):
        _backend(Load(str(folder("target")), draft_path=str(other)))
    larger = build_model("llama", tmp_path / "larger", vocab_size=1600)
    (larger / "tokenizer.json").unlink()
    assert f"1600 tokens, the model {train_tokenizer().get_vocab_size()}" in refusal(larger)


class Whole(Drafts):
    """All sources, as an engine has them."""

    @property
    def entered(self) -> set[int]:
        return set(self._sources)


def requests(seed: int) -> list[tuple[float, Submit]]:
    """Six, for four rows; later ones before earlier ones."""
    asked = [
        (40, 25, GREEDY),
        (9, 30, SAMPLED),
        (3, 20, Sampling(1, temperature=0.0, repetition_penalty=1.2)),
        (270, 15, GREEDY),
        (20, 25, GREEDY),
        (60, 12, GREEDY),
    ]
    return [
        (0.02 * seq, Submit(seq, pack_tokens(prompt(length, seed)), most, sampling, "", seq, ignore_eos=True))
        for seq, (length, most, sampling) in enumerate(asked)
    ]


@pytest.mark.parametrize(("drafts", "loop"), [("target", "overlapped"), ("smaller", "plain")])
def test_answers_are_the_same_through_the_loop(pair: Pair, drafts: str, loop: str) -> None:
    """Also while rows are preempted and cancelled; and nothing is held in the end."""
    backend, cancelled = pair(drafts=drafts), 4
    asked = requests(len(drafts))
    expected = run(pair(drafts=""), asked)
    facts = backend.facts
    backend.facts = replace(facts, kv_budget_bytes=3 * 256 * facts.kv_bytes_per_token)
    sources: Any = Whole(Load(""), facts, backend)
    found = run(backend, asked, sources, loop, cancelled=[cancelled])
    backend.facts = facts
    for seq, text in expected.texts.items():
        answer = found.answers[seq]
        assert answer.tokens == (text[: len(answer.tokens)] if seq == cancelled else text)
    assert found.stats is not None
    assert found.stats.preemptions
    told = [row for step in found.messages if isinstance(step, Step) for row in step.rows if row.source == "model"]
    assert len({row.seq for row in told}) > 4
    plain = [seq for seq, (_, submit) in enumerate(asked) if submit.sampling == GREEDY]
    right = [len(row.tokens) - 1 == row.drafted for row in told if row.seq in plain]
    assert all(right) if drafts == "target" else not all(right)
    assert backend.memory().arena_bytes == 0


def test_an_engine_asks_its_draft_model(folder: Folder) -> None:
    path = str(folder("target"))
    with engine(Path(path), max_rows=2, draft_path=path) as client:
        assert client.ready is not None
        assert client.ready.probes["draft model"].startswith("llama, float32")
        texts = []
        for mode in ("off", "lookup", "auto"):
            seen = len(client.steps)
            seqs = [client.submit(prompt(length), 40, GREEDY, speculation=mode) for length in (20, 90)]
            client.wait_freed(*seqs)
            texts.append([client.answers[seq].tokens for seq in seqs])
            asked = {row.source for step in client.steps[seen:] for row in step.rows}
            assert ("model" in asked) is (mode == "auto")
        assert texts[0] == texts[1] == texts[2]
    with engine(Path(path), draft_path=path, speculation="lookup") as client:
        assert client.ready is not None
        assert "draft model" not in client.ready.probes


class Reader:
    """Stands where the back end does: a draft model that reads so many tokens at a time, and never ``never``."""

    def __init__(self, piece: int = 100, never: int = -1) -> None:
        self._piece = piece
        self._never = never
        self.read: dict[int, int] = {}
        self.calls = 0

    def draft(self, sequences: list[Sequence], depths: list[int]) -> list[list[int]]:
        self.calls += 1
        found = []
        for sequence, depth in zip(sequences, depths, strict=True):
            read = self.read.get(sequence.seq, 0)
            self.read[sequence.seq] = min(read + self._piece, len(sequence.tokens))
            ready = self.read[sequence.seq] == len(sequence.tokens) and sequence.seq != self._never
            found.append([7] * depth if ready else [])
        return found


def row_of(model: Model, seq: int, length: int) -> Sequence:
    sequence = Sequence(seq, [5] * (length + 1), length, 9999, GREEDY, True)
    model.enter(sequence)
    return sequence


def test_nobody_is_offered_before_it_has_caught_up() -> None:
    reader = Reader()
    model = Model(reader, 4)  # type: ignore[arg-type]
    short, long = row_of(model, 1, 20), row_of(model, 2, 350)
    prefilling = Sequence(3, [5] * 90, 90, 99, GREEDY, True)
    model.enter(prefilling)
    offers = []
    while not all(offers[-1:]) or not offers:
        assert model.wants([short, long, prefilling])
        model.catch_up([prefilling, short, long])
        offers.append(model.offer(long))
    assert offers == [0, 0, 0, 4]
    assert model.offer(short) == 4
    assert not model.wants([short, long, prefilling])
    long.tokens += [5] * 20
    assert model.take([short, long], [2, 3]) == [[7, 7], [7, 7, 7]]
    long.tokens += [5] * 40
    assert not model.offer(long), "too far behind to be read on in one step"
    assert model.wants([long])
    model.leave(long)
    assert not model.wants([long])
    assert model.offer(long) == 0


@pytest.mark.parametrize(("asked", "pieces"), [(False, 16 + 1000 // 128), (True, 16 + 1000 // 8)])
def test_what_is_not_asked_for_is_hardly_read(asked: bool, pieces: int) -> None:
    """Steps earn what a long prompt costs."""
    reader = Reader(piece=100)
    model = Model(reader, 4)  # type: ignore[arg-type]
    short, long = row_of(model, 1, 20), row_of(model, 2, 50_000)
    for _ in range(1000):
        model.catch_up([short, long])
        if asked:
            model.take([short], [2])
    assert pieces - 3 <= reader.calls - 1000 * asked <= pieces + 1


def test_a_row_that_never_says_anything_is_left_alone() -> None:
    reader = Reader(never=1)
    model = Model(reader, 4)  # type: ignore[arg-type]
    row, other = row_of(model, 1, 30), row_of(model, 2, 600)
    model.take([row], [2])
    for _ in range(12):
        model.catch_up([row, other])
    assert model.offer(row) == 0
    assert not model.wants([row])
    assert model.offer(other) == 4
