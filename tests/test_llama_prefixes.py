"""llama.cpp's side of the prefix store: states that are cut, whatever their form, and rows that stay when their
sequence has ended."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lmx.engine.backend import Chunk, Sequence
from lmx.protocol import Load, Sampling
from tests.backends import needs_llama
from tests.models import build_gguf
from tests.recurrent_gguf import LAYERS, build_recurrent_gguf

if TYPE_CHECKING or importlib.util.find_spec("llama_cpp"):
    import llama_cpp

    from lmx.engine.llama import copies, native, state
    from lmx.engine.llama.backend import LlamaBackend

pytestmark = needs_llama

ROWS, CONTEXT = 4, 1024
Make = Callable[..., "LlamaBackend"]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Loads a small model: its kind, how its rows have cells, options. Heads of 32, for KV in fewer bits."""
    folder = tmp_path_factory.mktemp("models")

    def load(kind: str = "llama", kv: str = "streams", **options: int) -> "LlamaBackend":
        path = folder / f"{kind}.gguf"
        if not path.exists():
            build_recurrent_gguf(path, kind) if kind in LAYERS else build_gguf(path, kind=kind, hidden_size=128)
        fixed: dict[str, Any] = {
            "max_rows": ROWS,
            "max_chunk_tokens": 512,
            "context_length": CONTEXT,
            "threads": 1,
        } | options
        backend = LlamaBackend.load(Load(str(path), backend="llama", **fixed))
        if kv == "unified":
            budget = backend.facts.kv_budget_bytes // 2
            backend = LlamaBackend.load(Load(str(path), backend="llama", kv_budget_bytes=budget, **fixed))
        assert backend.facts.path == kv
        return backend

    return load


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(5, 1000, length)]


class Run:
    """Sequences of one back end, driven by hand."""

    def __init__(self, backend: "LlamaBackend") -> None:
        self.backend = backend
        self._made = 0
        self._live: list[Sequence] = []

    def sequence(self, tokens: list[int], salt: str | None = "") -> Sequence:
        self._made += 1
        sequence = Sequence(self._made, tokens.copy(), len(tokens), 500, Sampling(0, temperature=0.0), True, salt=salt)
        self._live.append(sequence)
        return sequence

    def start(self, tokens: list[int], salt: str | None = "") -> Sequence:
        sequence = self.sequence(tokens, salt)
        self.backend.start(sequence)
        return sequence

    def prefill(self, sequence: Sequence, start: int, end: int = 0) -> None:
        end = end or len(sequence.tokens)
        last = end == len(sequence.tokens)
        draws = self.backend.launch([], [Chunk(sequence, start, end - start, last)]).wait()
        sequence.tokens += [draw.tokens[0] for draw in draws]

    def decode(self, *sequences: Sequence, steps: int = 8) -> None:
        for _ in range(steps):
            for draw in self.backend.launch(sequences, []).wait():
                draw.sequence.tokens += draw.tokens

    def whole(self, tokens: list[int], salt: str | None = "") -> Sequence:
        """Computed, and free again."""
        sequence = self.start(tokens, salt)
        self.prefill(sequence, 0)
        self.free(sequence)
        return sequence

    def answer(self, sequence: Sequence, cached: int) -> list[int]:
        """Nine tokens, after what it has in its row."""
        self.prefill(sequence, cached)
        self.decode(sequence)
        self.free(sequence)
        return sequence.tokens[sequence.prompt_tokens :]

    def cold(self, tokens: list[int]) -> list[int]:
        return self.answer(self.start(tokens, None), 0)

    def resume(self, tokens: list[int], salt: str = "", most: int = 10**6) -> tuple[Sequence, int]:
        row, held = self.backend.parked(tokens[:-1], salt, ())
        held = min(held, most)
        sequence = self.sequence(tokens, salt)
        self.backend.resume(sequence, row, held)
        return sequence, held

    def held(self, tokens: list[int], salt: str = "") -> int:
        return self.backend.parked(tokens, salt, ())[1]

    def free(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.backend.free(sequence)
            self._live.remove(sequence)

    def end(self) -> None:
        self.free(*self._live.copy())
        assert self.backend.memory().rows == 0


@pytest.fixture
def run() -> Iterator[Callable[["LlamaBackend"], Run]]:
    made: list[Run] = []

    def start(backend: "LlamaBackend") -> Run:
        made.append(Run(backend))
        return made[-1]

    yield start
    for each in made:
        each.end()


Start = Callable[["LlamaBackend"], Run]
FORMS = ["f16 streams", "f16 unified", "q8 streams", "q4 unified", "transposed streams", "transposed unified"]


@pytest.mark.parametrize("form", FORMS)
def test_kv_of_every_form_is_cut_at_every_boundary(
    make: Make, run: Start, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    kind, kv = form.split()
    if kind == "f16":
        monkeypatch.setattr("lmx.engine.llama.backend._SCORES_BYTES", 0)
    if kind == "transposed":
        monkeypatch.setattr(llama_cpp, "LLAMA_FLASH_ATTN_TYPE_AUTO", llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)
    backend = make("llama", kv, kv_bits={"q8": 8, "q4": 4}.get(kind, 16))
    assert (backend.facts.prefixes, backend.facts.forks) == ("kv", True)
    layout = backend._copies._layout
    assert layout is not None
    assert layout.transposed == (kind == "transposed")
    steps = run(backend)
    tokens = prompt(400)
    expected = steps.cold(tokens)
    # Its cells between, then among others', in another order than its positions.
    other = steps.start(prompt(130, 1), None)
    steps.prefill(other, 0)
    source = steps.start(tokens, None)
    steps.prefill(source, 0, 100)
    steps.free(other)
    steps.prefill(source, 100, 399)
    if kv == "unified":
        assert state.read(backend._context.export_slot(backend._rows[source.seq].slot), 0).order is not None
    blocks = backend.copy_out(source, [(0, 256), (256, 399)])
    assert sum(block.nbytes for block in blocks) == 399 * layout.token_bytes
    for cached in (1, 255, 256, 257, 300, 399):
        target = steps.sequence(tokens, None)
        backend.copy_in(target, blocks, cached, None)
        assert steps.answer(target, cached) == expected, cached
        forked = steps.sequence(tokens, None)
        backend.fork(forked, source, cached)
        assert steps.answer(forked, cached) == expected, cached


@pytest.mark.parametrize("kind", ["gemma3_text", "jamba", "mamba"])
@pytest.mark.parametrize("kv", ["streams", "unified"])
def test_checkpoints_go_on(make: Make, run: Start, kind: str, kv: str) -> None:
    backend = make(kind, "streams" if kind == "mamba" else kv)
    steps = run(backend)
    tokens = prompt(400)
    expected = steps.cold(tokens)
    source = steps.start(tokens, None)
    kept = []
    for start, end in [(0, 10), (10, 256), (256, 300)]:  # a window is 32 tokens
        steps.prefill(source, start, end)
        made = backend.checkpoint(source)
        assert made is not None
        kept.append(made)
    steps.prefill(source, 300)
    blocks = backend.copy_out(source, [(0, 256), (256, 400)])
    for cached, checkpoint in kept:
        target = steps.sequence(tokens, None)
        backend.copy_in(target, blocks, cached, checkpoint)
        assert steps.answer(target, cached) == expected, cached


def test_a_state_that_cannot_be_cut_is_kept_whole(make: Make, run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("another format")

    monkeypatch.setattr(state, "read", refuse)
    backend = make()
    assert (backend.facts.prefixes, backend.facts.publishes, backend.facts.forks) == ("checkpoints", "chunks", False)
    steps = run(backend)
    tokens = prompt(300)
    expected = steps.cold(tokens)
    source = steps.start(tokens, None)
    steps.prefill(source, 0, 270)
    blocks, made = backend.copy_out(source, [(0, 256), (256, 270)]), backend.checkpoint(source)
    assert made is not None
    assert [block.nbytes for block in blocks] == [0, 0]
    target = steps.sequence(tokens, None)
    read = [backend.from_bytes(block.to_bytes()) for block in (*blocks, made[1])]
    backend.copy_in(target, read[:-1], 270, read[-1])
    assert steps.answer(target, 270) == expected


@pytest.mark.parametrize("fault", ["refused", "other bytes", "other logits"])
def test_nothing_is_restored_where_the_proof_at_load_fails(
    make: Make, run: Start, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    export, take, computed = native.Context.export_slot, native.Context.import_slot, copies.Copies._next_logits

    def other_bytes(self: "native.Context", slot: int, *, partial: bool = False) -> "state.Bytes":
        data = export(self, slot, partial=partial)
        data[-4:] ^= np.arange(other_bytes.calls, other_bytes.calls + 4).astype(np.uint8)  # type: ignore[attr-defined]
        other_bytes.calls += 1  # type: ignore[attr-defined]
        return data

    other_bytes.calls = 0  # type: ignore[attr-defined]
    if fault == "refused":
        monkeypatch.setattr(native.Context, "import_slot", lambda *_: False)
    elif fault == "other bytes":
        monkeypatch.setattr(native.Context, "export_slot", other_bytes)
    else:
        monkeypatch.setattr(copies.Copies, "_next_logits", lambda self, slot: computed(self, slot) * (1 + slot))
    backend = make()
    monkeypatch.undo()
    assert (backend.facts.prefixes, backend.facts.forks) == ("", False)
    assert native.Context.import_slot is take
    steps = run(backend)
    tokens = prompt(20)
    steps.whole(tokens)
    assert steps.held(tokens) == 0


def test_copies_of_what_is_not_there_are_refused(make: Make, run: Start) -> None:
    steps = run(make())
    sequence = steps.start(prompt(50))
    for span in [(0, 1), (0, 50)]:
        with pytest.raises(ValueError, match="holds 0"):
            steps.backend.copy_out(sequence, [span])
    steps.prefill(sequence, 0, 20)
    with pytest.raises(ValueError, match=r"\[10, 21\) of a row that holds 20"):
        steps.backend.copy_out(sequence, [(10, 21)])


@pytest.mark.parametrize("kv", ["streams", "unified"])
def test_a_parked_row_is_resumed(make: Make, run: Start, kv: str) -> None:
    steps = run(make("llama", kv))
    tokens = prompt(300)
    expected = steps.cold(tokens)
    for most in (299, 257, 1):  # and at fewer tokens, of which the others are lost
        steps.whole(tokens)
        sequence, held = steps.resume(tokens, most=most)
        assert held == most
        assert steps.backend.memory().rows == 1
        assert steps.answer(sequence, held) == expected


@pytest.mark.parametrize("kv", ["streams", "unified"])
def test_a_row_that_shares_only_its_beginning_stays(make: Make, run: Start, kv: str) -> None:
    steps = run(make("llama", kv))
    long, other = prompt(600), prompt(200) + prompt(50, 1)
    expected, theirs = steps.cold(long), steps.cold(other)
    steps.whole(long)
    sequence, held = steps.resume(other)
    assert held == 200
    assert steps.held(long) == 600
    first, kept = steps.resume(long)
    assert kept == 599
    assert steps.answer(first, kept) == expected
    assert steps.answer(sequence, held) == theirs


def test_parked_rows_go_in_the_order_of_use_and_empty_slots_first(make: Make, run: Start) -> None:
    steps = run(make())
    prompts = [prompt(40 + seed, seed) for seed in range(ROWS + 1)]
    for tokens in prompts[:3]:
        steps.whole(tokens)
    steps.whole(prompts[3])  # there was an empty one
    assert [steps.held(tokens) for tokens in prompts[:4]] == [40, 41, 42, 43]
    sequence, held = steps.resume(prompts[0])
    steps.prefill(sequence, held)
    steps.free(sequence)
    steps.whole(prompts[4])
    assert [steps.held(tokens) for tokens in prompts] == [40, 0, 42, 43, 44]
    row, _ = steps.backend.parked(prompts[2], "", ())
    assert steps.backend.parked(prompts[2], "", {row}) == (-1, 0)


def test_no_salt_sees_anothers_rows(make: Make, run: Start) -> None:
    steps = run(make())
    tokens = prompt(60)
    steps.whole(tokens, "a")
    steps.whole(tokens, None)
    assert steps.held(tokens, "a") == 60
    assert [steps.held(tokens, salt) for salt in ("", "b")] == [0, 0]


@pytest.mark.parametrize("kind", ["jamba", "gemma3_text"])
@pytest.mark.parametrize("kv", ["streams", "unified"])
def test_what_cannot_go_back_is_resumed_where_it_ended(make: Make, run: Start, kind: str, kv: str) -> None:
    steps = run(make(kind, kv))
    tokens = prompt(300)
    first = steps.whole(tokens)
    assert steps.held(tokens[:299]) == 0
    assert steps.held([*tokens[:200], 7, 7]) == 0
    longer = [*first.tokens, *prompt(30, 5)]
    sequence, held = steps.resume(longer)
    assert held == 300
    assert steps.answer(sequence, held) == steps.cold(longer)


def test_shared_cells_are_the_living_rows_first(make: Make, run: Start) -> None:
    """Half of the cells that all rows together would fill, less than three of them."""
    steps = run(make("llama", "unified"))
    prompts = [prompt(900, seed) for seed in range(4)]
    expected = [steps.cold(tokens) for tokens in prompts]
    for tokens in prompts[:2]:
        steps.whole(tokens)
    live = [steps.start(tokens) for tokens in prompts[2:]]
    for sequence in live:
        for start in range(0, 900, 450):
            steps.prefill(sequence, start, start + 450)
    steps.decode(*live)
    assert [sequence.tokens[900:] for sequence in live] == expected[2:]
    assert [steps.held(tokens) for tokens in prompts[:2]] == [0, 0]  # they were in the way of every attention
    assert steps.backend.memory().rows == 2


@pytest.mark.parametrize("kind", ["llama", "jamba", "gemma3_text"])
def test_rows_that_are_resumed_apart_move_together(make: Make, run: Start, kind: str) -> None:
    """They are computed in one forward then; those between stay what they are."""
    steps = run(make(kind))
    steps.backend._weights_bytes = 10**9  # as if there were something to gain
    prompts = [prompt(100 + seed, seed) for seed in range(ROWS)]
    ended = [steps.start(tokens) for tokens in prompts]
    for sequence in ended:
        steps.prefill(sequence, 0)
    steps.free(*ended)
    nexts = [[*sequence.tokens, 9, 9] for sequence in ended]
    live = [steps.resume(nexts[index]) for index in (0, 3)]
    assert sorted(steps.backend._rows[sequence.seq].slot for sequence, _ in live) == [0, 1]
    live += [steps.resume(nexts[index]) for index in (1, 2)]
    answers = [steps.answer(sequence, held) for sequence, held in live]
    assert answers == [steps.cold(nexts[index]) for index in (0, 3, 1, 2)]


@pytest.mark.parametrize("weights", [10**9, 0])
def test_a_row_parked_between_two_is_not_harmed(make: Make, run: Start, weights: int) -> None:
    """Whether a token of no use is computed in its slot or not."""
    steps = run(make())
    steps.backend._weights_bytes = weights
    prompts = [prompt(100 + seed, seed) for seed in range(3)]
    expected = [steps.cold(tokens) for tokens in prompts]
    rows = [steps.start(tokens) for tokens in prompts]
    for sequence in rows:
        steps.prefill(sequence, 0)
    steps.free(rows[1])
    steps.decode(rows[0], rows[2])
    assert [sequence.tokens[sequence.prompt_tokens :] for sequence in (rows[0], rows[2])] == [expected[0], expected[2]]
    sequence, held = steps.resume(prompts[1])
    assert held == 100
    assert steps.answer(sequence, held) == expected[1]
