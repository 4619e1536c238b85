"""Speculation through the real loop, scheduler and MLX back end: whatever the drafts are, the answers are those of a
loop without, token by token; and nothing that may happen to a row in mid-verification harms it or others.

The clock is simulated, so that the scheduler sees the same costs each time: a step that verifies drafts costs hardly
more than one that does not, and drafts are worth it wherever some are right.
"""

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmx.engine.backend import Chunk, Draw, Facts, Sequence
from lmx.engine.loop import StepLoop
from lmx.engine.mlx import adapter
from lmx.engine.mlx.backend import MLXBackend, MLXLaunch
from lmx.engine.requests import Refused, check_answer
from lmx.protocol import Cancel, Failed, Freed, Load, Logprobs, Message, Sampling, Stats, Step, Submit, pack_tokens
from tests.engine_client import engine
from tests.models import build_model, write_tokenizer
from tests.sim import Clock, SimLink
from tests.test_grammars import Compiler
from tests.test_non_finite import POISON, clean_prompt, poison_folder

ROWS = 4
GRAMMAR = 'start: "one" (" " /[a-z]{3,5}/){3,9}'
GREEDY = Sampling(0, temperature=0.0)
# plain; with lookahead; made ahead and started late (the share of a step that starting it blocks)
LOOPS = {"plain": ("off", 0.0), "overlapped": ("on", 0.0), "made ahead, started late": ("auto", 0.5)}


class TimedLaunch:
    def __init__(self, device: "Timed", launch: MLXLaunch, drafted: list[int], tokens: int) -> None:
        self._device = device
        self._launch = launch
        self.drafted = drafted
        """The sequences that have drafts."""
        self._cost_ms = 10 + bool(drafted) + 0.001 * tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launch, name)

    def wait(self) -> list[Draw]:
        for seq in self.drafted:
            self._device.verified[seq] += 1
            self._device.on_verifying(seq, self._device.verified[seq])
        self._device.clock.pass_ms(self._cost_ms)
        assert self._device.unread.pop(0) is self
        return self._launch.wait()


class Timed:
    """A back end whose steps take simulated time, and which holds the loop to what ``Backend.launch`` asks for."""

    def __init__(self, backend: MLXBackend, clock: Clock) -> None:
        self.backend = backend
        self.clock = clock
        self.unread: list[TimedLaunch] = []
        self.drafted: list[list[int]] = []
        """Of each step with drafts, how many of each row."""
        self.beside = 0
        """Steps made while another one ran."""
        self.verified: defaultdict[int, int] = defaultdict(int)
        """Steps with drafts of each sequence."""
        self.on_verifying: Callable[[int, int], None] = lambda seq, times: None
        """Called in the midst of each."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def launch(self, decode: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[Seq[int]] = ()) -> TimedLaunch:
        if any(drafts):
            assert not self.unread, "beside a step that is not read"
            self.drafted.append([len(own) for own in drafts])
        else:
            assert not self.unread or not self.unread[-1].drafted, "beside a step with drafts"
        self.beside += bool(self.unread)
        tokens = len(decode) + sum(map(len, drafts)) + sum(chunk.tokens for chunk in chunks)
        drafted = [sequence.seq for sequence, own in zip(decode, drafts, strict=False) if own]
        launch = TimedLaunch(self, self.backend.launch(decode, chunks, drafts), drafted, tokens)
        self.unread.append(launch)
        return launch


class Oracle:
    """A source that knows the answers, but for some of their tokens, and some that come after their end."""

    def __init__(self, texts: dict[int, list[int]], wrong: float, vocab_size: int, source: int = 0) -> None:
        self._texts = texts
        self._wrong = wrong
        self._vocab_size = vocab_size
        self._source = source
        self._rng = np.random.default_rng(7)
        self._taken: dict[int, list[int]] = {}
        self.entered: set[int] = set()
        self.told_: list[tuple[int, int, int]] = []

    def enter(self, sequence: Sequence, submit: Submit) -> None:
        assert sequence.seq == submit.seq
        self.entered.add(sequence.seq)

    def leave(self, sequence: Sequence) -> None:
        self.entered.discard(sequence.seq)

    def _known(self, sequence: Sequence) -> list[int]:
        known = [*self._texts.get(sequence.seq, []), *range(5, 30)]
        return known[sequence.generated_tokens :]

    def wants(self, rows: Seq[Sequence]) -> bool:
        return False

    def catch_up(self, rows: Seq[Sequence]) -> None:
        pass

    def offer(self, sequence: Sequence) -> tuple[int, int]:
        return min(int(self._rng.integers(0, 16)), len(self._known(sequence))), self._source

    def take(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        found = []
        for sequence, count in zip(sequences, counts, strict=True):
            drafts = [
                int(self._rng.integers(0, self._vocab_size)) if self._rng.random() < self._wrong else token
                for token in self._known(sequence)[:count]
            ]
            self._taken[sequence.seq] = drafts
            found.append(list(drafts))
        return found

    def told(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        assert 0 <= accepted <= drafted
        self.told_.append((sequence.seq, drafted, accepted))

    def source_of(self, sequence: Sequence) -> str:
        return "prediction"


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish: str | None = None
    failed: str = ""
    freed: Freed | None = None
    drafted: int = 0
    accepted: int = 0


@dataclass
class Outcome:
    device: Timed
    answers: dict[int, Answer] = field(default_factory=lambda: defaultdict(Answer))
    messages: list[Message] = field(default_factory=list)
    stats: Stats | None = None

    def take(self, message: Message) -> None:
        self.messages.append(message)
        if isinstance(message, Step):
            for row in message.rows:
                answer = self.answers[row.seq]
                assert answer.finish is None
                answer.tokens += row.tokens
                answer.logprobs += row.logprobs
                answer.finish = row.finish
                assert len(row.tokens) - 1 <= row.drafted
                assert bool(row.source) == bool(row.drafted)
                answer.drafted += row.drafted
                answer.accepted += len(row.tokens) - 1
        elif isinstance(message, Failed):
            self.answers[message.seq].failed = message.code
        elif isinstance(message, Freed):
            self.answers[message.seq].freed = message
        elif isinstance(message, Stats):
            self.stats = message

    @property
    def texts(self) -> dict[int, list[int]]:
        return {seq: answer.tokens for seq, answer in self.answers.items()}

    @property
    def steps(self) -> int:
        return sum(isinstance(message, Step) for message in self.messages)


def run(
    backend: MLXBackend,
    messages: Seq[tuple[float, Message]],
    drafts: Oracle | None = None,
    loop: str = "plain",
    grammars: Any = None,
    cancelled: Seq[int] = (),
) -> Outcome:
    """Until nothing is left, which the loop checks itself: no row and no byte may be held then. ``cancelled``: in the
    midst of their second step with drafts."""
    lookahead, share = LOOPS[loop]
    backend.facts = replace(backend.facts, launch_share=share)
    clock = Clock()
    outcome = Outcome(Timed(backend, clock))
    link = SimLink(clock, outcome.take)
    for at_s, message in messages:
        link.post(at_s, message)

    def on_verifying(seq: int, times: int) -> None:
        if seq in cancelled and times == 2:
            link.post(clock(), Cancel(seq))
            outcome.messages.append(Cancel(seq))

    outcome.device.on_verifying = on_verifying
    device: Any = outcome.device
    StepLoop(link, device, Load("", lookahead=lookahead), clock, grammars, drafts=drafts).run()  # type: ignore[arg-type]
    assert backend.memory().rows == 0
    assert drafts is None or not drafts.entered
    return outcome


def load(kind: str, folder: Path, sizes: dict[str, Any], **options: Any) -> MLXBackend:
    path = build_model(kind, folder / kind, **sizes)
    return MLXBackend(adapter.load(path), Load(str(path), max_rows=ROWS, max_chunk_tokens=128, **options))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MLXBackend:
    return load("llama", tmp_path_factory.mktemp("model"), {"num_hidden_layers": 2})


@pytest.fixture(scope="module")
def compile_(llama: MLXBackend, tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder)
    compile_ = Compiler(str(folder), llama.facts.vocab_size, llama.facts.eos_ids)
    compile_(GRAMMAR)
    return compile_


def requests(facts: Facts) -> list[tuple[float, Submit]]:
    [end] = facts.eos_ids

    def prompt(length: int, seed: int = 0) -> bytes:
        return pack_tokens(np.random.default_rng((length, seed)).integers(5, facts.vocab_size, length).tolist())

    family = prompt(9)
    asked = [
        Submit(1, prompt(40), 50, GREEDY, ignore_eos=True),
        Submit(2, prompt(3), 33, Sampling(2, repetition_penalty=1.2, frequency_penalty=0.2, logprobs=2)),
        # Ends by itself, now and then.
        Submit(3, prompt(70), 90, Sampling(3, logit_bias={end: 6.0}, logprobs=0)),
        Submit(4, prompt(20), 90, Sampling(4, top_p=0.95), stop_ids=tuple(range(5, 1000, 15)), min_tokens=11),
        Submit(5, prompt(8), 60, Sampling(5), grammar=GRAMMAR),
        Submit(6, family, 20, Sampling(6), ignore_eos=True),
        Submit(7, family, 31, Sampling(7, top_k=20, min_p=0.01), ignore_eos=True, parent=6),
        Submit(8, family, 12, GREEDY, ignore_eos=True, parent=6),
        Submit(9, prompt(300), 25, Sampling(9, presence_penalty=0.5), ignore_eos=True),
        Submit(10, prompt(260), 1, Sampling(10), ignore_eos=True),
        Submit(11, prompt(5), 40, Sampling(11), grammar=GRAMMAR, ignore_eos=True),
    ]
    return [(0.003 * submit.seq, submit) for submit in asked]


@pytest.fixture(scope="module")
def alone(llama: MLXBackend, compile_: Compiler) -> Outcome:
    outcome = run(llama, requests(llama.facts), grammars=compile_.grammars)
    assert {answer.finish for answer in outcome.answers.values()} == {"length", "stop", "complete"}
    return outcome


def assert_same(found: Outcome, expected: Outcome, but: Seq[int] = ()) -> None:
    # Packed, a value of the KV is now and then rounded to its neighbour.
    tolerance = 0.02 if found.device.facts.dtype.endswith("KV") else 1e-3
    for seq, right in expected.answers.items():
        if seq in but:
            continue
        answer = found.answers[seq]
        assert (answer.tokens, answer.finish, answer.failed) == (right.tokens, right.finish, right.failed), seq
        assert answer.freed is not None
        assert answer.freed.generated_tokens == len(right.tokens)
        assert len(answer.logprobs) == len(right.logprobs)
        for one, other in zip(answer.logprobs, right.logprobs, strict=True):
            assert one.top_ids == other.top_ids
            assert (one.drawn, *one.top) == pytest.approx((other.drawn, *other.top), abs=tolerance)


def assert_speculated(found: Outcome, alone: Outcome) -> None:
    assert_same(found, alone)
    assert found.steps < 0.7 * alone.steps
    assert len({tuple(own) for own in found.device.drafted}) > 5
    accepted = sum(answer.accepted for answer in found.answers.values())
    drafted = sum(answer.drafted for answer in found.answers.values())
    assert 0 < accepted < drafted


@pytest.mark.parametrize(("wrong", "loop"), [(0.0, "overlapped"), (0.3, "plain"), (0.3, "made ahead, started late")])
def test_answers_are_those_without(
    llama: MLXBackend, alone: Outcome, compile_: Compiler, wrong: float, loop: str
) -> None:
    oracle = Oracle(alone.texts, wrong, llama.facts.vocab_size)
    assert_speculated(run(llama, requests(llama.facts), oracle, loop, compile_.grammars), alone)


@pytest.mark.parametrize(
    ("kind", "sizes", "kv_bits"), [("gemma3_text", {}, 16), ("llama", {"hidden_size": 128, "num_hidden_layers": 1}, 8)]
)
def test_with_windows_and_packed_kv(
    kind: str, sizes: dict[str, Any], kv_bits: int, compile_: Compiler, tmp_path: Path
) -> None:
    backend = load(kind, tmp_path, sizes, kv_bits=kv_bits)
    asked = requests(backend.facts)[:5]
    expected = run(backend, asked, grammars=compile_.grammars)
    oracle = Oracle(expected.texts, 0.2, backend.facts.vocab_size)
    assert_speculated(run(backend, asked, oracle, "overlapped", compile_.grammars), expected)


def test_where_drafts_are_wrong_few_steps_verify_any(llama: MLXBackend, alone: Outcome, compile_: Compiler) -> None:
    """And the loop looks ahead as if there were no source."""
    oracle = Oracle({}, 1.0, llama.facts.vocab_size)
    found = run(llama, requests(llama.facts), oracle, "overlapped", compile_.grammars)
    assert_same(found, alone)
    assert len(found.device.drafted) < 0.2 * found.steps
    without = run(llama, requests(llama.facts), None, "overlapped", compile_.grammars)
    assert found.device.beside > 0.8 * without.device.beside
    assert oracle.told_


@pytest.mark.parametrize("loop", LOOPS)
def test_cancelled_in_mid_verification_it_is_free_within_a_step(
    llama: MLXBackend, alone: Outcome, compile_: Compiler, loop: str
) -> None:
    texts = alone.texts
    cancelled = [1, 2, 5, 7]
    oracle = Oracle(texts, 0.1, llama.facts.vocab_size)
    found = run(llama, requests(llama.facts), oracle, loop, compile_.grammars, cancelled)
    assert_same(found, alone, but=cancelled)
    for seq in cancelled:
        answer = found.answers[seq]
        assert answer.freed is not None
        assert answer.finish is None
        assert answer.tokens == texts[seq][: len(answer.tokens)]
        since = found.messages[found.messages.index(Cancel(seq)) : found.messages.index(answer.freed)]
        assert sum(isinstance(message, Step) for message in since) == 1


def test_rows_that_give_way_in_mid_speculation_come_back_with_the_same_text(
    llama: MLXBackend, alone: Outcome, compile_: Compiler
) -> None:
    texts = alone.texts
    urgent = [(8 * at_s, replace(submit, priority=submit.seq)) for at_s, submit in requests(llama.facts)]
    found = run(llama, urgent, Oracle(texts, 0.2, llama.facts.vocab_size), "overlapped", compile_.grammars)
    assert found.stats is not None
    assert found.stats.preemptions > 1
    for seq, right in alone.answers.items():
        assert (found.answers[seq].tokens, found.answers[seq].finish) == (right.tokens, right.finish)
    assert sum(answer.accepted for answer in found.answers.values()) > 50


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> MLXBackend:
    path = poison_folder(build_model("llama", tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=2))
    return MLXBackend(adapter.load(path), Load(str(path), max_rows=ROWS))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_row_that_turns_bad_fails_alone(poisoned: MLXBackend, loop: str) -> None:
    """One draws the poison after some good tokens; another one's drafts hold it, which changes nothing."""
    shy = {POISON: -1000.0}
    asked = [
        (0.0, Submit(seq, pack_tokens(clean_prompt(20 + seq, seq)), 40, sampling, ignore_eos=True))
        for seq, sampling in enumerate(
            (
                Sampling(1, logit_bias=shy),
                Sampling(2, logit_bias={POISON: 5.0}),
                Sampling(3, temperature=0.0, logit_bias=shy, logprobs=1),
            ),
            1,
        )
    ]
    expected = run(poisoned, asked)
    bad = expected.answers[2]
    assert bad.failed == "non_finite"
    assert 4 < len(bad.tokens) < 30
    texts = {seq: list(answer.tokens) for seq, answer in expected.answers.items()}
    for at in (5, 6, 20):
        texts[3][at] = POISON
    found = run(poisoned, asked, Oracle(texts, 0.1, poisoned.facts.vocab_size), loop)
    assert_same(found, expected)
    assert bad.tokens[-1] == POISON
    assert found.answers[2].accepted


def test_an_engine_takes_the_drafts_of_predictions_and_of_the_text_itself(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(5, 1000, length).tolist() for length in (30, 7)]
    # The second one says the same token over and over.
    samplings = [Sampling(1, logprobs=1), Sampling(2, logit_bias={9: 1000.0})]
    with engine(build_model("llama", tmp_path / "model"), max_rows=2) as client:
        assert client.ready is not None
        assert client.ready.probes["speculation"].startswith("up to 15 drafts of a row are verified")

        def ask(speculation: str, predicted: Seq[Seq[int]] = ((), ())) -> tuple[list[list[int]], dict[str, int]]:
            """The answers, and how many drafts there were of each source."""
            seen = len(client.steps)
            seqs = [
                client.submit(prompt, 60, sampling, speculation=speculation, prediction=pack_tokens(prediction))
                for prompt, sampling, prediction in zip(prompts, samplings, predicted, strict=True)
            ]
            client.wait_freed(*seqs)
            drafted: dict[str, int] = defaultdict(int)
            for row in (row for step in client.steps[seen:] for row in step.rows):
                drafted[row.source] += row.drafted
            return [client.answers[seq].tokens for seq in seqs], drafted

        texts, drafted = ask("off")
        assert drafted == {"": 0}
        assert set(texts[1]) == {9}
        sources: dict[str, int] = defaultdict(int)
        for predicted in (((), ()), (texts[0], ())) * 3:
            found, drafted = ask("auto", predicted)
            assert found == texts
            for source, count in drafted.items():
                sources[source] += count
        assert sources["prediction"] > 20
        assert sources["lookup"] > 20


def test_what_a_request_may_say_of_drafts(poisoned: MLXBackend) -> None:
    facts = poisoned.facts
    submit = Submit(1, pack_tokens([5]), 9, GREEDY)
    for mode in ("off", "lookup", "auto"):
        check_answer(replace(submit, speculation=mode, prediction=pack_tokens([facts.vocab_size - 1])), facts)
    for fields, message in (
        ({"speculation": "always"}, "speculation must be off, lookup, auto, got 'always'"),
        ({"prediction": b"12345"}, "a prediction of 5 bytes is not made of 4-byte token ids"),
        (
            {"prediction": pack_tokens([5, facts.vocab_size])},
            f"the prediction holds token {facts.vocab_size}; this model's tokens go from 0 to {facts.vocab_size - 1}",
        ),
    ):
        with pytest.raises(Refused, match=message) as raised:
            check_answer(replace(submit, **fields), facts)  # type: ignore[arg-type]
        assert raised.value.code == "invalid_request"
