"""MLX rows copied out and in by blocks: of every kind of architecture, at every boundary, through bytes too, a sequence
goes on as if it had computed all of its prompt; and only what is finite, and the row's own, gets into a block."""

from collections.abc import Sequence as Seq
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.backend import Block, Chunk, Draw, Sequence
from lmx.engine.mlx import adapter
from lmx.engine.mlx.backend import MLXBackend
from lmx.protocol import Load, Sampling
from tests import architectures
from tests.models import build_model

BLOCK = 256
PROMPT = np.random.default_rng(0).integers(5, 90, 310).tolist()
KINDS = {
    "llama": {},
    "llama half": {"kind": "llama", "num_hidden_layers": 1},  # a block's array of one layer; see ``load``
    "qwen3_moe": {},
    "deepseek_v2": {},  # latent attention
    "gemma3_text": {},  # windows shorter than a block
    "gemma3_text 280": {"kind": "gemma3_text", "sliding_window": 280},  # longer than one
    "gemma3_text 1000": {"kind": "gemma3_text", "sliding_window": 1000},  # longer than the prompt
    "lfm2": {},  # convolutions
    "qwen3_next": {},  # recurrent states
}
PURE = ("mamba", "mamba2", "rwkv7")
# Greedy tokens agree, and log-probabilities to rounding: chunks of other lengths are other matrix products.
TOLERANCE = {"llama half": 0.05}


@pytest.fixture(scope="module", autouse=True)
def _without_compiler():
    """MLX compiles a kernel for each new chain of operations, a second each; nothing tested here depends on it."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def load(path: Path, dtype: mx.Dtype = mx.float32) -> MLXBackend:
    loaded = adapter.load(path)
    loaded.model.set_dtype(dtype)
    return MLXBackend(loaded, Load(str(path), max_rows=4, max_chunk_tokens=1024))


@pytest.fixture(scope="module", params=[*KINDS, *PURE])
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, MLXBackend]:
    name, folder = request.param, tmp_path_factory.mktemp("model") / "model"
    if name in PURE:
        return name, load(architectures.build(name, folder))
    options = {"kind": name, **KINDS[name]}
    return name, load(build_model(folder=folder, **options), mx.bfloat16 if "half" in name else mx.float32)


class Run:
    """One sequence, driven as the step loop drives it."""

    def __init__(self, backend: MLXBackend, seq: int, prompt: Seq[int] = PROMPT, **fields: object) -> None:
        self.backend = backend
        sampling = Sampling(0, temperature=0.0, logprobs=3)
        self.sequence = Sequence(seq, list(prompt), len(prompt), 99, sampling, True, **fields)
        self.draws: list[Draw] = []

    def prefill(self, *ends: int) -> None:
        """On to each of these lengths, in a step each."""
        sequence = self.sequence
        if sequence.kv_tokens == 0:
            self.backend.start(sequence)
        for end in ends:
            start = sequence.kv_tokens
            self.step(chunks=[Chunk(sequence, start, end - start, end == len(sequence.tokens))])
            sequence.kv_tokens = end

    def restore(self, blocks: Seq[Block], tokens: int, checkpoint: Block | None = None) -> None:
        self.backend.copy_in(self.sequence, blocks, tokens, checkpoint)
        self.sequence.kv_tokens = tokens

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.step(decode=[self.sequence])

    def step(self, decode: Seq[Sequence] = (), chunks: Seq[Chunk] = ()) -> None:
        for draw in self.backend.launch(decode, chunks).wait():
            draw.sequence.tokens.append(draw.token)
            draw.sequence.kv_tokens = len(draw.sequence.tokens) - 1
            self.draws.append(draw)

    def copy(self, end: int) -> tuple[list[Block], Block | None]:
        """All blocks of the first ``end`` tokens, and the checkpoint there, through bytes."""
        spans = [(start, min(start + BLOCK, end)) for start in range(0, end, BLOCK)]
        blocks = self.backend.copy_out(self.sequence, spans)
        assert [block.nbytes for block in blocks] == [
            (stop - start) * self.backend.facts.kv_bytes_per_token for start, stop in spans
        ]
        checkpoint = None
        if self.backend.facts.prefixes == "checkpoints":
            found = self.backend.checkpoint(self.sequence)
            assert found is not None
            at, checkpoint = found
            assert at == end
            assert checkpoint.nbytes == self.backend.facts.kv_bytes_per_sequence
        through = [self.backend.from_bytes(block.to_bytes()) for block in blocks]
        return through, self.backend.from_bytes(checkpoint.to_bytes()) if checkpoint else None

    def end(self) -> None:
        self.backend.free(self.sequence)


def assert_alike(name: str, expected: Seq[Draw], found: Seq[Draw]) -> None:
    assert [draw.token for draw in found] == [draw.token for draw in expected]
    for one, other in zip(expected, found, strict=True):
        assert not other.bad
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert np.allclose(one.logprobs.top, other.logprobs.top, atol=TOLERANCE.get(name, 2e-3))


def test_goes_on_at_every_boundary(named: tuple[str, MLXBackend]) -> None:
    """From a row in the middle of its prefill, whose end the restored one goes on from."""
    name, backend = named
    cold = Run(backend, 1)
    cold.prefill(len(PROMPT))
    cold.decode(7)
    cold.end()
    source = Run(backend, 2)
    for seq, cut in enumerate((1, 255, 256, 257, 300), start=3):
        source.prefill(cut)
        blocks, checkpoint = source.copy(cut)
        warm = Run(backend, seq)
        warm.restore(blocks, cut, checkpoint)
        warm.prefill(len(PROMPT))
        warm.decode(7)
        assert_alike(name, cold.draws, warm.draws)
        warm.end()
    source.end()
    assert backend.memory().rows == 0


def test_goes_on_after_an_answer(named: tuple[str, MLXBackend]) -> None:
    """What decode steps computed, too, beside another row; and the last block only in part, where there is no state."""
    name, backend = named
    first, other = Run(backend, 1, PROMPT[:250]), Run(backend, 2, PROMPT[:30])
    other.prefill(30)
    first.prefill(100, 250)
    for _ in range(20):
        first.step([other.sequence, first.sequence])
    held = first.sequence.kv_tokens
    assert held == 270
    blocks, checkpoint = first.copy(held)
    prompt = [*first.sequence.tokens, *PROMPT[:40]]
    first.end()
    cold = Run(backend, 3, prompt)
    cold.prefill(len(prompt))
    cold.decode(7)
    for seq, cut in enumerate((held,) if checkpoint else (held, held - 3, BLOCK, 200), start=4):
        warm = Run(backend, seq, prompt)
        warm.restore(blocks, cut, checkpoint)
        warm.prefill(len(prompt))
        warm.decode(7)
        assert_alike(name, cold.draws, warm.draws)
        warm.end()
    for run in (other, cold):
        run.end()


def test_states_are_kept_where_chunks_were_to_stop(named: tuple[str, MLXBackend]) -> None:
    """Also of a step before the last one that runs."""
    _, backend = named
    if backend.facts.prefixes != "checkpoints":
        pytest.skip("no states")
    run = Run(backend, 1, stops=(64, 72))
    sequence = run.sequence
    backend.start(sequence)
    launches = []
    for start, end in ((0, 64), (64, 72), (72, 80)):
        launches.append(backend.launch([], [Chunk(sequence, start, end - start, False)]))
        launches[-1].start()
    for launch, end in zip(launches, (64, 72, 80), strict=True):
        launch.wait()
        sequence.kv_tokens = end
        found = backend.checkpoint(sequence)
        assert found is not None
        assert found[0] == end
    run.end()
