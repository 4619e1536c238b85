"""llama.cpp's side of speculation: whatever the drafts are, how many each row has and what runs beside them, every row
draws what it draws without any."""

import importlib.util
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf import GGUFReader

from lmx.engine.backend import Chunk, Draw, Sequence
from lmx.engine.grammar import Grammars
from lmx.errors import ModelInvalid
from lmx.protocol import Load, Logprobs, Sampling
from tests.backends import needs_llama
from tests.engine_client import engine
from tests.models import add_vocabulary, build_gguf, train_tokenizer
from tests.recurrent_gguf import build_recurrent_gguf

if TYPE_CHECKING or importlib.util.find_spec("llama_cpp"):
    from lmx.engine.llama import native
    from lmx.engine.llama.backend import LlamaBackend
    from lmx.engine.llama.batch import forwards

pytestmark = needs_llama

POISON = 77
"""Its embedding is NaN."""
ROWS, CHUNK, CONTEXT, DEPTH = 4, 256, 1024, 15
LENGTH = 24
"""Of most answers."""
TOLERANCE = 0.05
"""Between log-probabilities in batches of other shapes, with KV in F16."""
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9, "seed": 7},
    {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3, "seed": 8},
    {"temperature": 1.0, "top_k": 40, "logit_bias": {9: 4.0, 10: 4.0, 11: -100.0}, "presence_penalty": 0.2, "seed": 9},
]


def load(path: Path, kv: str = "streams", **options: Any) -> "LlamaBackend":
    fixed = {"max_rows": ROWS, "max_chunk_tokens": CHUNK, "context_length": CONTEXT, "threads": 1, **options}
    backend = LlamaBackend.load(Load(str(path), backend="llama", **fixed))
    if kv == "unified":
        budget = backend.facts.kv_budget_bytes // 2
        backend = LlamaBackend.load(Load(str(path), backend="llama", kv_budget_bytes=budget, **fixed))
    assert backend.facts.path == kv
    return backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=["llama streams", "llama unified", "gemma3_text streams", "gemma3_text unified"])
def loaded(request: pytest.FixtureRequest, folder: Path) -> "LlamaBackend":
    kind, kv = request.param.split()
    path = folder / f"{kind}.gguf"
    if not path.exists():
        build_gguf(path, kind=kind)
        next(t for t in GGUFReader(path, "r+").tensors if t.name == "token_embd.weight").data[POISON] = np.nan
    return load(path, kv)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [token + (token == POISON) for token in np.random.default_rng(seed).integers(5, 1000, length).tolist()]


@dataclass
class Row:
    sequence: Sequence
    logprobs: list[Logprobs] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        return self.sequence.tokens[self.sequence.prompt_tokens :]


class Run:
    """Sequences of one back end, driven by hand as the step loop drives them."""

    def __init__(self, backend: "LlamaBackend") -> None:
        self.backend = backend
        self.rows: dict[int, Row] = {}

    def row(self, tokens: list[int], sampling: dict[str, Any], **fields: Any) -> Row:
        seq = max(self.rows, default=0) + 1
        bias = {POISON: -1000.0, **sampling.get("logit_bias", {})}
        parameters = Sampling(**{"seed": 0, "temperature": 0.0, "logprobs": 20, **sampling, "logit_bias": bias})
        row = self.rows[seq] = Row(Sequence(seq, tokens.copy(), len(tokens), 500, parameters, True, **fields))
        return row

    def start(self, tokens: list[int], sampling: dict[str, Any] = SAMPLINGS[0], **fields: Any) -> Row:
        row = self.row(tokens, sampling, **fields)
        self.backend.start(row.sequence)
        return row

    def step(
        self, decode: list[Row], *chunks: Chunk, drafts: list[list[int]] | None = None, bad: Row | None = None
    ) -> list[Draw]:
        draws = self.backend.launch([row.sequence for row in decode], chunks, drafts or ()).wait()
        for draw in draws:
            assert draw.bad == (bad is not None and draw.sequence is bad.sequence)
            if draw.bad:
                continue
            row, sequence = self.rows[draw.sequence.seq], draw.sequence
            sequence.tokens += draw.tokens
            row.logprobs += draw.logprobs
            for token in draw.tokens if sequence.constraint else ():
                assert sequence.constraint.advance(token)
            held = self.backend._rows[sequence.seq]
            assert held.tokens == sequence.tokens[:-1]
            assert self.backend._context.last_position(held.slot) == len(held.tokens) - 1
        return draws

    def prefill(self, *rows: Row, start: int = 0) -> None:
        parts = (Chunk(row.sequence, start, len(row.sequence.tokens) - start, True) for row in rows)
        self.step([], *parts)

    def alone(
        self, tokens: list[int], sampling: dict[str, Any] = SAMPLINGS[0], count: int = LENGTH, **fields: Any
    ) -> Row:
        """Without drafts."""
        row = self.start(tokens, sampling, salt=None, **fields)
        self.prefill(row)
        while len(row.answer) < count and not (row.sequence.constraint and row.sequence.constraint.complete):
            self.step([row])
        self.free(row)
        return row

    def free(self, *rows: Row) -> None:
        for row in rows:
            self.backend.free(row.sequence)
            self.rows.pop(row.sequence.seq, None)

    def end(self) -> None:
        self.free(*self.rows.copy().values())
        assert self.backend.memory().rows == 0


@pytest.fixture
def run(loaded: "LlamaBackend") -> Iterator[Run]:
    run = Run(loaded)
    yield run
    run.end()


class Oracle:
    """Drafts of any length from what is drawn without them, some of them wrong."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def drafts(self, row: Row, expected: Row, most: int = DEPTH) -> list[int]:
        count = int(self._random.integers(0, most + 1)) if self._random.random() < 0.8 else 0
        come = expected.answer[len(row.answer) :][:count]
        wrong = self._random.random() * 0.4
        return [token if self._random.random() > wrong else prompt(1, token)[0] for token in come]


def assert_same(found: Row, expected: Row, count: int) -> None:
    """The same tokens from the same distributions, up to a near tie that fell the other way."""
    pairs = zip(found.answer, expected.answer, found.logprobs, expected.logprobs, strict=False)
    for index, (token, other, one, two) in enumerate(pairs):
        assert np.allclose(one.top, two.top, atol=TOLERANCE), index
        if token != other:
            likely = dict(zip(two.top_ids, two.top, strict=True))
            greedy = not expected.sequence.sampling.temperature and {token, other} <= likely.keys()
            assert not greedy or abs(likely[token] - likely[other]) <= TOLERANCE, index
            assert index > 2, "one near tie is bad luck"
            return
        assert abs(one.drawn - two.drawn) <= TOLERANCE
    assert min(len(found.answer), len(expected.answer)) >= count


@pytest.mark.parametrize("forward_tokens", [1.5, 100.0])
def test_rows_with_drafts_of_any_number_draw_what_they_draw_without(
    run: Run, monkeypatch: pytest.MonkeyPatch, forward_tokens: float
) -> None:
    """Beside chunks, joining and leaving; with shorter runs made as long as others (forwards that cost much), or not;
    over more logits than one pass gives."""
    monkeypatch.setattr(run.backend._batches, "_forward_tokens", forward_tokens)
    monkeypatch.setattr(run.backend._context, "outputs", 20)
    prompts = [prompt(90 + 30 * seed, seed) for seed in range(ROWS)]
    expected = [run.alone(tokens, sampling) for tokens, sampling in zip(prompts, SAMPLINGS, strict=True)]
    oracle = Oracle(int(forward_tokens))
    rows = [run.start(tokens, sampling) for tokens, sampling in zip(prompts, SAMPLINGS, strict=True)]
    run.prefill(*rows[:2])
    cuts = (0, 5, 60, 61)
    chunks = [
        Chunk(row.sequence, start, end - start, end == row.sequence.prompt_tokens)
        for row in rows[2:]
        for start, end in zip(cuts, (*cuts[1:], row.sequence.prompt_tokens), strict=True)
    ]
    several = 0
    while live := [row for row in rows if 0 < len(row.answer) < LENGTH]:
        drafts = [oracle.drafts(row, alone) for row, alone in zip(rows, expected, strict=True) if row in live]
        draws = run.step(live, *chunks[:1], drafts=drafts)
        del chunks[:1]
        several += sum(len(draw.tokens) > 3 for draw in draws)
    assert not chunks
    assert several > 3
    for row, alone in zip(rows, expected, strict=True):
        assert_same(row, alone, LENGTH)


def test_the_right_drafts_all_count_and_wrong_ones_cost_nothing(run: Run) -> None:
    expected = run.alone(prompt(300), count=2 * (DEPTH + 1) + 1)
    right, wrong = run.start(prompt(300)), run.start(prompt(300))
    run.prefill(right, wrong)
    for _ in range(2):
        come = expected.answer[len(right.answer) :][:DEPTH]
        draws = run.step([right, wrong], drafts=[come, [come[0] + 1, *come[1:]]])
        assert [len(draw.tokens) for draw in draws] == [DEPTH + 1, 1]
    assert_same(right, expected, 2 * (DEPTH + 1))
    assert_same(wrong, expected, 3)


def test_a_row_goes_on_where_it_was_when_its_window_cannot_go_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's rings of sliding windows have room for a forward, so it takes a fault to see it."""
    expected = run.alone(prompt(300), SAMPLINGS[2], 20)
    row, other = run.start(prompt(300), SAMPLINGS[2]), run.start(prompt(40))
    run.prefill(row, other)
    forget, refused = run.backend._context.forget, []

    def refuse(slot: int, start: int = 0) -> bool:
        if start and slot == run.backend._rows[row.sequence.seq].slot:
            refused.append(start)
            return False
        return forget(slot, start)

    while len(row.answer) < 20:
        with monkeypatch.context() as patch:
            patch.setattr(run.backend._context, "forget", refuse)
            run.step([row, other], drafts=[[*expected.answer[len(row.answer) :][:2], 9, 9], []])
    assert refused
    assert_same(row, expected, 20)


def test_a_draft_that_is_not_finite_is_wrong_and_leaves_nothing(run: Run) -> None:
    prompts = [prompt(60 + seed, seed) for seed in range(3)]
    expected = [run.alone(tokens, SAMPLINGS[2], 12) for tokens in prompts]
    rows = [run.start(tokens, SAMPLINGS[2]) for tokens in prompts]
    run.prefill(*rows)
    for place in range(4):
        come = [alone.answer[len(row.answer) :][:place] for row, alone in zip(rows, expected, strict=True)]
        run.step(rows, drafts=[come[0], [*come[1], POISON, *come[1]], come[2]])
    for row, alone in zip(rows, expected, strict=True):
        assert_same(row, alone, 4)
    late = run.start(prompts[0], SAMPLINGS[2])
    run.prefill(late)
    for _ in range(3):
        run.step([*rows, late])
    assert_same(late, expected[0], 4)


def test_a_row_that_turns_bad_at_a_draft_fails_alone(run: Run) -> None:
    expected = run.alone(prompt(50), SAMPLINGS[1], 10)
    good, bad = run.start(prompt(50), SAMPLINGS[1]), run.start(prompt(50), {"logit_bias": {POISON: 1000.0}})
    run.prefill(good, bad)
    assert bad.answer == [POISON]
    run.step([good, bad], drafts=[expected.answer[1:4], [POISON, POISON]], bad=bad)
    while len(good.answer) < 10:
        run.step([good], drafts=[expected.answer[len(good.answer) :][:2]])
    assert_same(good, expected, 10)


def test_rewound_and_restarted_rows_go_on(run: Run) -> None:
    """As after a preemption: with its answer so far as prompt, or from some of its tokens on."""
    oracle, expected = Oracle(3), run.alone(prompt(200), SAMPLINGS[2])
    row = run.start(prompt(200), SAMPLINGS[2])
    run.prefill(row)
    for restart in (False, True, False, True):
        run.step([row], drafts=[oracle.drafts(row, expected, 5)])
        tokens = len(row.sequence.tokens)
        if restart:
            run.backend.free(row.sequence)
            run.backend.start(row.sequence)
        kept = 0 if restart else run.backend.rewind(row.sequence, tokens - 4)
        assert restart or kept in (0, tokens - 4)
        run.prefill(row, start=kept)
    assert_same(row, expected, 12)


def test_a_row_that_ended_at_a_draft_is_parked_without_what_follows(run: Run) -> None:
    tokens = prompt(100)
    expected = run.alone(tokens, count=20)
    row = run.start(tokens)
    run.prefill(row)
    run.step([row], drafts=[expected.answer[1:9]])
    del row.sequence.tokens[104:]  # the fourth token was an end
    ended = row.sequence.tokens.copy()
    made = run.backend.checkpoint(row.sequence)
    assert made is None or made[0] == 103
    run.free(row)
    held = run.backend.parked([*ended, 5, 5], "", ())
    assert held[1] == 103
    again = run.row([*ended, 5, 5], {})
    run.backend.resume(again.sequence, *held)
    run.prefill(again, start=103)
    run.step([again], drafts=[[5, 5]])
    assert_same(again, run.alone([*ended, 5, 5], count=3), 2)


def test_rows_reach_the_end_of_their_cells(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed behind it, however much forwards cost."""
    monkeypatch.setattr(run.backend._batches, "_forward_tokens", 100.0)
    long, short = run.start(prompt(CONTEXT - 3)), run.start(prompt(20))
    for start in range(0, CONTEXT - 3, CHUNK):
        end = min(start + CHUNK, CONTEXT - 3)
        run.step([], Chunk(long.sequence, start, end - start, end == CONTEXT - 3))
    run.prefill(short)
    run.step([long, short], drafts=[[5], [5] * DEPTH])
    assert len(long.sequence.tokens) <= CONTEXT
    assert_same(short, run.alone(prompt(20), count=3), 2)


GRAMMAR = """start: "[" item ("," item)* "]"
item: /[a-c]{2,4}/ | /[0-9]{1,3}/
"""


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Iterator[Callable[[str], Any]]:
    build_gguf(folder / "words.gguf")
    woken = threading.Event()
    grammars = Grammars(str(folder / "words.mlx"), train_tokenizer().get_vocab_size(), (2,), wake=woken.set)

    def compile_it(grammar: str) -> Any:
        while (found := grammars.compile(grammar)) is None:
            woken.wait()
            woken.clear()
        return found

    yield compile_it
    grammars._pool.shutdown()


@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=["greedy", "sampled", "penalised"])
def test_masks_follow_the_drafts(run: Run, compiled: Callable[[str], Any], sampling: dict[str, Any]) -> None:
    """Grammars and ``min_tokens``, beside a free row. What a grammar refuses is not even computed."""
    ends = run.backend.facts.eos_ids[0]
    fields: list[Any] = [lambda: {"constraint": compiled(GRAMMAR)}, lambda: {"min_tokens": 9}, dict]
    biased = {**sampling, "logit_bias": {ends: 3.0}}
    expected = [run.alone(prompt(60), biased, 30, **make()) for make in fields]
    rows = [run.start(prompt(60), biased, **make()) for make in fields]
    run.prefill(*rows)
    oracle = Oracle(4)
    constraint = rows[0].sequence.constraint
    while live := [row for row in rows if len(row.answer) < 30 and not (row is rows[0] and constraint.complete)]:
        drafts = [oracle.drafts(row, expected[rows.index(row)]) for row in live]
        tokens = constraint.tokens
        draws = run.step(live, drafts=drafts)
        assert constraint.tokens - tokens == sum(len(draw.tokens) for draw in draws if draw.sequence.constraint)
    for row, alone in zip(rows, expected, strict=True):
        assert_same(row, alone, min(30, len(alone.answer)))


def test_refused_drafts_are_not_computed(run: Run, compiled: Callable[[str], Any], monkeypatch: Any) -> None:
    row = run.start(prompt(60), constraint=compiled(GRAMMAR))
    run.prefill(row)
    computed: list[int] = []
    compute = run.backend._batches.compute
    monkeypatch.setattr(
        run.backend._batches, "compute", lambda runs: (computed.extend(len(r.tokens) for r in runs), compute(runs))[1]
    )
    [refused] = train_tokenizer().encode("zebra").ids[:1]
    [draw] = run.step([row], drafts=[[refused] * 5])
    assert computed == [1]
    assert len(draw.tokens) == 1


def test_recurrent_models_verify_nothing(folder: Path) -> None:
    facts = load(build_recurrent_gguf(folder / "jamba.gguf", "jamba")).facts
    assert facts.max_depth == 0
    assert "recurrent state" in facts.probes["speculation"]
    assert load(folder / "words.gguf", speculation="off").facts.max_depth == 0


def test_a_memory_that_remembers_wrong_drafts_verifies_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget = native.Context.forget
    monkeypatch.setattr(native.Context, "forget", lambda self, slot, start=0: not start and forget(self, slot))
    facts = load(folder / "words.gguf").facts
    assert facts.max_depth == 0
    assert "does not go back" in facts.probes["speculation"]


@pytest.mark.parametrize(
    ("lengths", "count"),
    [
        ({0: 5}, 1),
        ({0: 4, 1: 4, 2: 4}, 1),
        ({0: 1, 2: 1}, 2),
        ({0: 1, 1: 4, 2: 4}, 2),
        ({0: 1, 1: 4, 2: 1, 3: 4}, 3),
        ({0: 4, 1: 3, 2: 2, 3: 1}, 4),
    ],
)
def test_forwards_of_slots_that_are_computed_by_equal_parts(lengths: dict[int, int], count: int) -> None:
    assert forwards(lengths) == count


# --- the draft model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(folder: Path) -> Callable[..., "LlamaBackend"]:
    """A target with a draft model: itself, one of other weights, one with windows; POISON's embedding is NaN in all."""
    made: dict[tuple[str, str], LlamaBackend] = {}

    def backend(drafts: str, kv: str = "streams") -> "LlamaBackend":
        kinds: dict[str, dict[str, Any]] = {
            "llama": {},
            "other": {"seed": 1, "num_hidden_layers": 1},
            "gemma3_text": {"kind": "gemma3_text"},
            "short": {"max_position_embeddings": 140},
        }
        for name in ("llama", drafts):
            if not (folder / f"{name}.gguf").exists():
                build_gguf(folder / f"{name}.gguf", **kinds[name])
            embeddings = next(
                t for t in GGUFReader(folder / f"{name}.gguf", "r+").tensors if t.name == "token_embd.weight"
            )
            embeddings.data[POISON] = np.nan
        if (drafts, kv) not in made:
            made[drafts, kv] = load(folder / "llama.gguf", kv, draft_path=str(folder / f"{drafts}.gguf"))
        return made[drafts, kv]

    return backend


class Swapped:
    """A writer of GGUF under which two tokens have each other's ids."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def add_token_list(self, tokens: list[str]) -> None:
        tokens[300], tokens[301] = tokens[301], tokens[300]
        self._writer.add_token_list(tokens)


def draft_until(run: Run, rows: list[Row], most: int) -> tuple[int, int]:
    """Steps with what the draft model says until each row has so many tokens; how many drafts there were, and how many
    counted."""
    drafted = counted = 0
    while live := [row for row in rows if len(row.answer) < most]:
        depths = [1 + len(row.answer) % 7 for row in live]
        drafts = run.backend.draft([row.sequence for row in live], depths)
        assert all(len(each) <= depth for each, depth in zip(drafts, depths, strict=True))
        draws = run.step(live, drafts=drafts)
        drafted += sum(map(len, drafts))
        counted += sum(len(draw.tokens) - 1 for draw in draws)
    return drafted, counted


@pytest.mark.parametrize("kv", ["streams", "unified"])
@pytest.mark.parametrize("drafts", ["llama", "other", "gemma3_text"])
def test_a_draft_model_changes_no_text(pair: Callable[..., "LlamaBackend"], drafts: str, kv: str) -> None:
    """The same model is right all the time. Rows join while others draft, and one is never drafted for."""
    run = Run(pair(drafts, kv))
    samplings = SAMPLINGS[:1] * 2 if drafts == "llama" else SAMPLINGS[:2]
    prompts = [prompt(130, 1), prompt(40, 2)]
    expected = [run.alone(tokens, sampling) for tokens, sampling in zip(prompts, samplings, strict=True)]
    rows = [run.start(prompts[0], samplings[0]), run.start(prompt(30, 3))]
    run.prefill(*rows)
    drafted, counted = draft_until(run, rows[:1], 12)
    rows.append(run.start(prompts[1], samplings[1]))
    run.prefill(rows[2])
    more, right = draft_until(run, [rows[0], rows[2]], LENGTH)
    for row, alone in zip((rows[0], rows[2]), expected, strict=True):
        assert_same(row, alone, LENGTH)
    assert drafted + more > 20
    if drafts == "llama":
        assert counted + right >= 0.9 * (drafted + more)
    assert run.backend.memory().rows >= 2
    run.end()
    assert run.backend._drafter is not None
    assert (run.backend._drafter.rows, run.backend._drafter._rows) == (0, {})


def test_its_cost_is_counted(pair: Callable[..., "LlamaBackend"], folder: Path) -> None:
    with_it, without = pair("llama").facts, load(folder / "llama.gguf").facts
    assert with_it.draft_model == str(folder / "llama.gguf")
    assert with_it.kv_bytes_per_token == 2 * without.kv_bytes_per_token
    assert with_it.weights_bytes == 2 * without.weights_bytes
    facts = load(folder / "llama.gguf", draft_path=str(folder / "llama.gguf"), speculation="lookup").facts
    assert (facts.draft_model, facts.kv_bytes_per_token) == ("", without.kv_bytes_per_token)


def test_a_long_prompt_is_caught_up_by_the_piece(pair: Callable[..., "LlamaBackend"], monkeypatch: Any) -> None:
    """And whoever is near drafts meanwhile."""
    run = Run(pair("llama"))
    long, near = run.start(prompt(200)), run.start(prompt(20))
    run.prefill(long, near)
    drafter = run.backend._drafter
    assert drafter is not None
    decode, computed = drafter._context.decode, []

    def counted(tokens: list[int], *rest: Any) -> Any:
        computed.append(len(tokens))
        return decode(tokens, *rest)

    monkeypatch.setattr(drafter._context, "decode", counted)
    calls = 0
    while not (drafts := run.backend.draft([long.sequence, near.sequence], [2, 2]))[0]:
        assert len(drafts[1]) == 2
        calls += 1
    assert calls == 3
    assert max(computed) <= 64 + 20
    assert [len(each) for each in drafts] == [2, 2]
    run.end()


def test_what_it_cannot_read_it_does_not_draft_for(pair: Callable[..., "LlamaBackend"]) -> None:
    """Beside others, which get theirs."""
    run = Run(pair("other"))
    odd, good = run.start([*prompt(10), *prompt(10, 1)]), run.start(prompt(20))
    run.prefill(odd, good)
    odd.sequence.tokens[5] = POISON
    assert run.backend.draft([odd.sequence, good.sequence], [3, 3]) == [[], []]
    for _ in range(2):
        drafts = run.backend.draft([odd.sequence, good.sequence], [3, 3])
        assert [len(each) for each in drafts] == [0, 3]
    run.free(odd)
    late = run.start(prompt(25))
    run.prefill(late)
    assert [len(each) for each in run.backend.draft([late.sequence, good.sequence], [3, 3])] == [3, 3]
    run.end()


def test_it_drafts_up_to_the_end_of_its_own_context(pair: Callable[..., "LlamaBackend"]) -> None:
    run = Run(pair("short"))
    row = run.start(prompt(130))
    run.prefill(row)
    lengths = []
    while len(row.answer) < 20:
        [drafts] = run.backend.draft([row.sequence], [4])
        lengths.append((len(row.sequence.tokens), len(drafts)))
        run.step([row], drafts=[[]])
    for tokens, drafts in lengths[2:]:
        assert drafts == max(min(4, 141 - tokens), 0)
    run.end()


def test_models_that_cannot_draft_are_refused(pair: Callable[..., "LlamaBackend"], folder: Path) -> None:
    pair("other")
    swapped = build_gguf(folder / "swapped.gguf", vocabulary=lambda writer: add_vocabulary(Swapped(writer)))
    jamba = build_recurrent_gguf(folder / "jamba.gguf", "jamba")
    for target, drafts, words in [
        ("llama", swapped, "another tokenizer: its token 300"),
        ("llama", jamba, "recurrent state"),
        ("jamba", folder / "llama.gguf", "no drafts: a recurrent state"),
        ("llama", folder / "none.gguf", "none.gguf"),
    ]:
        with pytest.raises(ModelInvalid, match=words):
            load(folder / f"{target}.gguf", draft_path=str(drafts))


def test_an_engine_with_a_draft_model_holds_nothing_in_the_end(
    pair: Callable[..., "LlamaBackend"], folder: Path
) -> None:
    pair("other")
    options = {"backend": "llama", "max_rows": 3, "context_length": 512, "draft_path": str(folder / "llama.gguf")}
    with engine(folder / "llama.gguf", **options) as client:
        answers = client.run([prompt(20 + 30 * seed, seed) for seed in range(5)], 60)
        assert [len(answer) for answer in answers] == [60] * 5
        assert client.idle_stats().kv_used_bytes == 0
        assert any(tokens.source == "model" for step in client.steps for tokens in step.rows)
