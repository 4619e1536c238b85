"""What both back ends let a prefix store and speculation do with a sequence's KV: take it back, copy it out and in."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lmx.engine.backend import Backend, Chunk, Sequence
from lmx.protocol import Load, Sampling
from tests.backends import needs_llama
from tests.models import build_gguf, build_model
from tests.recurrent_gguf import build_recurrent_gguf

PROMPT = np.random.default_rng(0).integers(5, 1000, 300).tolist()


def load_mlx(path: Path) -> Backend:
    from lmx.engine.mlx import adapter
    from lmx.engine.mlx.backend import MLXBackend

    # Not its ``load``, which freezes the process's objects for good.
    return MLXBackend(adapter.load(path), Load(str(path), max_rows=4, max_chunk_tokens=512))


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
    "mlx recurrent": (lambda folder: build_model("qwen3_next", folder / "model"), load_mlx),
    "llama.cpp llama": (lambda folder: build_gguf(folder / "model.gguf"), load_llama),
    "llama.cpp shared cells": (lambda folder: build_gguf(folder / "model.gguf"), load_llama_unified),
    "llama.cpp recurrent": (lambda folder: build_recurrent_gguf(folder / "model.gguf", "jamba"), load_llama),
    "llama.cpp windows": (lambda folder: build_gguf(folder / "model.gguf", kind="gemma3_text"), load_llama),
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=needs_llama if "cpp" in name else ()) for name in MODELS]
)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    build, load = MODELS[request.param]
    return load(build(tmp_path_factory.mktemp("model")))


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

    def __init__(self, backend: Backend, seq: int = 1) -> None:
        self.backend = backend
        self.sequence = sequence(seq)
        backend.start(self.sequence)

    def prefill(self, start: int, end: int | None = None) -> None:
        end = end or len(self.sequence.tokens)
        last = end == len(self.sequence.tokens)
        draws = self.backend.launch([], [Chunk(self.sequence, start, end - start, last)]).wait()
        self.sequence.tokens += [draw.token for draw in draws]

    def decode(self, steps: int) -> list[int]:
        for _ in range(steps):
            [draw] = self.backend.launch([self.sequence], []).wait()
            self.sequence.tokens.append(draw.token)
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


@pytest.mark.parametrize("prefilled", [128, len(PROMPT)])
def test_exported_kv_goes_on_in_another_sequence(backend: Backend, answer: list[int], prefilled: int) -> None:
    first = Run(backend, 1)
    first.prefill(0, prefilled)
    data = backend.export_kv(first.sequence)
    assert isinstance(data, bytes)
    second = Run(backend, 2)
    with pytest.raises(ValueError, match=r"\d+ bytes are no"):
        backend.import_kv(second.sequence, data[:-5])
    assert backend.import_kv(second.sequence, data) == prefilled
    if prefilled == len(PROMPT):
        assert backend.rewind(second.sequence, prefilled - 1) in (prefilled - 1, 0)
    backend.free(first.sequence)


def test_an_import_computes_what_was_exported(backend: Backend, answer: list[int]) -> None:
    first = Run(backend, 1)
    first.prefill(0, 256)
    data = backend.export_kv(first.sequence)
    backend.free(first.sequence)
    second = Run(backend, 2)
    assert backend.import_kv(second.sequence, data) == 256
    second.prefill(256)
    assert second.decode(19) == answer
