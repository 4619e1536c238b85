"""What both back ends let a prefix store and speculation do with a sequence's KV: take it back, copy it out and in."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lmx.engine.backend import Backend, Block, Chunk, Sequence
from lmx.protocol import Load, Sampling
from tests.backends import needs_llama
from tests.models import build_gguf, build_model
from tests.recurrent_gguf import build_recurrent_gguf

PROMPT = np.random.default_rng(0).integers(5, 1000, 300).tolist()


def load_mlx(path: Path, **options: int) -> Backend:
    from lmx.engine.mlx import adapter
    from lmx.engine.mlx.backend import MLXBackend

    # Not its ``load``, which freezes the process's objects for good.
    return MLXBackend(adapter.load(path), Load(str(path), max_rows=4, max_chunk_tokens=512, **options))


def load_llama(path: Path, **options: int) -> Backend:
    from lmx.engine.llama.backend import LlamaBackend

    return LlamaBackend.load(Load(str(path), backend="llama", max_rows=4, max_chunk_tokens=512, **options))


def load_llama_unified(path: Path) -> Backend:
    """With so little memory that all rows share their cells."""
    backend = load_llama(path, context_length=1024, kv_budget_bytes=load_llama(path).facts.kv_budget_bytes // 16)
    assert backend.facts.path == "unified"
    return backend


MODELS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Backend]]] = {
    "mlx llama": (lambda folder: build_model("llama", folder / "model"), load_mlx),
    "mlx packed": (
        lambda folder: build_model("llama", folder / "model", head_dim=32),
        lambda path: load_mlx(path, kv_bits=8),
    ),
    "mlx recurrent": (lambda folder: build_model("qwen3_next", folder / "model"), load_mlx),
    "llama.cpp llama": (lambda folder: build_gguf(folder / "model.gguf"), load_llama),
    "llama.cpp shared cells": (lambda folder: build_gguf(folder / "model.gguf"), load_llama_unified),
    "llama.cpp recurrent": (lambda folder: build_recurrent_gguf(folder / "model.gguf", "jamba"), load_llama),
    "llama.cpp windows": (lambda folder: build_gguf(folder / "model.gguf", kind="gemma3_text"), load_llama),
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=needs_llama if "cpp" in name else ()) for name in MODELS]
)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Backend, Backend]:
    """The same model twice."""
    build, load = MODELS[request.param]
    path = build(tmp_path_factory.mktemp("model"))
    return load(path), load(path)


@pytest.fixture(scope="module")
def loaded(both: tuple[Backend, Backend]) -> Backend:
    return both[0]


@pytest.fixture
def again(both: tuple[Backend, Backend]) -> Backend:
    return both[1]


@pytest.fixture
def backend(loaded: Backend) -> Iterator[Backend]:
    """Nothing is held after a test."""
    yield loaded
    for seq in (1, 2):
        loaded.free(sequence(seq))
    assert loaded.memory().rows == 0


def sequence(seq: int) -> Sequence:
    return Sequence(seq, PROMPT.copy(), len(PROMPT), 100, Sampling(0, temperature=0.0), True)


class Run:
    """One sequence driven by hand."""

    def __init__(self, backend: Backend, seq: int = 1, *, start: bool = True) -> None:
        self.backend = backend
        self.sequence = sequence(seq)
        if start:
            backend.start(self.sequence)

    def prefill(self, start: int, end: int | None = None) -> None:
        end = end or len(self.sequence.tokens)
        last = end == len(self.sequence.tokens)
        draws = self.backend.launch([], [Chunk(self.sequence, start, end - start, last)]).wait()
        self.sequence.kv_tokens = end
        self.sequence.tokens += [draw.tokens[0] for draw in draws]

    def decode(self, steps: int) -> list[int]:
        for _ in range(steps):
            [draw] = self.backend.launch([self.sequence], []).wait()
            self.sequence.kv_tokens = len(self.sequence.tokens)
            self.sequence.tokens += draw.tokens
        return self.sequence.tokens[len(PROMPT) :]


@pytest.fixture(scope="module")
def answer(loaded: Backend) -> list[int]:
    """Twenty tokens without anything special."""
    run = Run(loaded)
    run.prefill(0)
    tokens = run.decode(19)
    loaded.free(run.sequence)
    return tokens


@pytest.mark.parametrize("back_to", [len(PROMPT) + 2, 100, 0])
def test_a_sequence_goes_on_after_a_rewind(backend: Backend, answer: list[int], back_to: int) -> None:
    run = Run(backend)
    run.prefill(0)
    run.decode(9)
    assert run.backend.rewind(run.sequence, 10**6) == len(PROMPT) + 9  # nothing to forget
    kept = backend.rewind(run.sequence, back_to)
    assert kept in (back_to, 0)
    del run.sequence.tokens[max(back_to + 1, len(PROMPT)) :]  # a prefill has at least one token
    run.prefill(kept)
    assert run.decode(20)[:20] == answer


def restore(first: Run, end: int, kept: int) -> tuple[list[Block], Block | None]:
    """Copies of what a row holds of its first ``end`` tokens, cut at multiples of 100, in a form good for ``kept``."""
    spans = [(start, min(start + 100, end)) for start in range(0, end, 100)]
    blocks = first.backend.copy_out(first.sequence, spans)
    made = first.backend.checkpoint(first.sequence)
    if first.backend.facts.prefixes == "checkpoints":
        assert made is not None
        assert made[0] == kept
    return blocks, made[1] if made else None


@pytest.mark.parametrize("kept", [1, 99, 100, 101, 250, 299])
def test_copies_compute_what_was_copied(backend: Backend, answer: list[int], kept: int) -> None:
    """A part of a block too, but of models whose state stands for all tokens."""
    first = Run(backend, 1)
    whole = backend.facts.prefixes == "checkpoints"
    first.prefill(0, kept if whole else 299)
    blocks, checkpoint = restore(first, kept if whole else min(kept + 50, 299), kept)
    backend.free(first.sequence)
    second = Run(backend, 2, start=False)
    backend.copy_in(second.sequence, blocks, kept, checkpoint)
    second.prefill(kept)
    assert second.decode(19) == answer


def test_copies_stay_good_while_their_row_goes_on(backend: Backend, answer: list[int]) -> None:
    first = Run(backend, 1)
    first.prefill(0, 256)
    blocks, checkpoint = restore(first, 256, 256)
    first.prefill(256)
    assert first.decode(19) == answer
    second = Run(backend, 2, start=False)
    backend.copy_in(second.sequence, blocks, 256, checkpoint)
    second.prefill(256)
    assert second.decode(19) == answer


def test_bytes_are_blocks_in_another_process(backend: Backend, again: Backend, answer: list[int]) -> None:
    """Another back end with the same model; what is cut or foreign is refused."""
    first = Run(backend, 1)
    first.prefill(0, 256)
    blocks, checkpoint = restore(first, 256, 256)
    data = [block.to_bytes() for block in blocks]
    read = [again.from_bytes(block) for block in data]
    assert [block.nbytes for block in read] == [block.nbytes for block in blocks]
    kept = again.from_bytes(checkpoint.to_bytes()) if checkpoint else None
    second = Run(again, 2, start=False)
    again.copy_in(second.sequence, read, 256, kept)
    second.prefill(256)
    assert second.decode(19) == answer
    again.free(second.sequence)
    for broken in (data[0][:-5], b"", data[0][:10], b"x" * 200):
        with pytest.raises(ValueError, match="block"):
            again.from_bytes(broken)
