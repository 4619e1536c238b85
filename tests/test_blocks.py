"""MLX rows copied out and in by blocks: of every kind of architecture, at every boundary, through bytes too, a sequence
goes on as if it had computed all of its prompt; and only what is finite, and the row's own, gets into a block."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.backend import Block, Chunk, Draw, Sequence
from lmx.engine.mlx import adapter
from lmx.engine.mlx.backend import MLXBackend
from lmx.engine.mlx.device import _address
from lmx.protocol import Load, Sampling
from tests import architectures
from tests.models import build_model
from tests.test_non_finite import POISON, poison_folder

BLOCK = 256
PROMPT = np.random.default_rng(0).integers(5, 90, 310).tolist()
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama half": {"kind": "llama", "num_hidden_layers": 1},  # a block's array of one layer; see ``load``
    "deepseek_v2": {},  # latent attention
    "gemma3_text": {},  # windows shorter than a block
    "gemma3_text 280": {"kind": "gemma3_text", "sliding_window": 280},  # longer than one
    "gemma3_text 1000": {"kind": "gemma3_text", "sliding_window": 1000},  # longer than the prompt
    "lfm2": {},  # convolutions
    "qwen3_next": {},  # recurrent states
}
PURE = ("mamba", "rwkv7")
# Greedy tokens agree, and log-probabilities to rounding: chunks of other lengths are other matrix products.
TOLERANCE = {"llama half": 0.05}


@pytest.fixture(scope="module", autouse=True)
def _without_compiler() -> Iterator[None]:
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

    def __init__(self, backend: MLXBackend, seq: int, prompt: Seq[int] = PROMPT, **fields: Any) -> None:
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
            draw.sequence.tokens += draw.tokens
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
    assert [draw.tokens[0] for draw in found] == [draw.tokens[0] for draw in expected]
    for one, other in zip(expected, found, strict=True):
        assert not other.bad
        assert np.allclose(one.logprobs[0].top, other.logprobs[0].top, atol=TOLERANCE.get(name, 2e-3))


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


def small(tmp_path: Path, kind: str = "llama", **options: Any) -> MLXBackend:
    return load(build_model(kind, tmp_path / "model", **options))


def test_states_are_kept_where_chunks_were_to_stop(tmp_path: Path) -> None:
    """Also of a step before the last one that runs."""
    backend = small(tmp_path, "lfm2")
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


def test_a_state_that_a_step_is_changing_is_no_checkpoint(tmp_path: Path) -> None:
    run = Run(small(tmp_path, "lfm2"), 1, PROMPT[:20])
    run.prefill(20)
    launch = run.backend.launch([run.sequence], [])
    launch.start()
    assert run.backend.checkpoint(run.sequence) is None
    [draw] = launch.wait()
    run.sequence.tokens += draw.tokens
    run.sequence.ended = True  # by the token before; what the step added is good
    found = run.backend.checkpoint(run.sequence)
    assert found is not None
    assert found[0] == 21


@pytest.mark.parametrize("layers", [1, 3])
def test_what_is_written_later_does_not_change_a_block(layers: int, tmp_path: Path) -> None:
    run = Run(small(tmp_path, num_hidden_layers=layers, num_key_value_heads=1), 1)
    run.prefill(256)
    [block] = run.backend.copy_out(run.sequence, [(0, 256)])
    before = block.to_bytes()
    assert run.backend.rewind(run.sequence, 10) == 10
    run.sequence.tokens[10:] = PROMPT[100:]
    run.sequence.kv_tokens = 10
    run.prefill(200, len(run.sequence.tokens))
    assert block.to_bytes() == before
    [changed] = run.backend.copy_out(run.sequence, [(0, 200)])
    assert changed.to_bytes() != before
    run.end()


@pytest.mark.parametrize("kind", ["llama", "deepseek_v2"])
def test_copying_out_leaves_the_lane_where_it_is(kind: str, tmp_path: Path) -> None:
    """Also where an array of a block is of one layer alone, so that it could be a view of the lane; and beside a step
    that runs."""
    run = Run(small(tmp_path, kind, num_hidden_layers=1), 1)
    run.prefill(len(PROMPT))
    run.decode(1)
    [lane] = run.backend._placement.lanes
    mx.eval(lane.arrays)
    places = [_address(array) for array in lane.keys_and_values]
    launch = run.backend.launch([run.sequence], [])
    launch.start()
    blocks = run.backend.copy_out(run.sequence, [(0, 256), (256, 300)])
    following = run.backend.launch([run.sequence], [])
    following.start()
    for one in (launch, following):
        one.wait()
    assert sum(block.nbytes for block in blocks) == 300 * run.backend.facts.kv_bytes_per_token
    mx.eval(lane.arrays)
    assert [_address(array) for array in lane.keys_and_values] == places
    run.end()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_next"])
def test_nothing_that_is_not_finite_gets_into_a_block(kind: str, tmp_path: Path) -> None:
    backend = load(poison_folder(build_model(kind, tmp_path / "model")))
    clean = [token + (token == POISON) for token in PROMPT]
    run = Run(backend, 1, [*clean[:100], POISON, *clean[101:]])
    run.prefill(60)
    backend.copy_out(run.sequence, [(0, 60)])
    run.prefill(200)
    backend.copy_out(run.sequence, [(0, 60)])
    for span in ((0, 61), (60, 200), (150, 200)):
        with pytest.raises(ValueError, match="60 are known to be finite"):
            backend.copy_out(run.sequence, [span])
    if backend.facts.prefixes == "checkpoints":
        with pytest.raises(ValueError, match="60 are known to be finite"):
            backend.checkpoint(run.sequence)
    run.end()
    # What the next one in that row leaves is good.
    after = Run(backend, 2, clean)
    after.prefill(60, len(clean))
    after.decode(3)
    assert not any(draw.bad for draw in after.draws)
    backend.copy_out(after.sequence, [(0, len(clean) + 3)])
    after.end()


def test_an_answer_that_turns_bad_is_kept_before_that(tmp_path: Path) -> None:
    backend = load(poison_folder(build_model("llama", tmp_path / "model")))
    run = Run(backend, 1, [token + (token == POISON) for token in PROMPT[:40]])
    run.sequence.sampling = Sampling(0, temperature=0.0, logit_bias={POISON: 1000.0}, logprobs=3)
    run.prefill(40)
    run.decode(2)
    assert [draw.bad for draw in run.draws] == [False, True, True]
    backend.copy_out(run.sequence, [(0, 40)])
    with pytest.raises(ValueError, match="40 are known"):
        backend.copy_out(run.sequence, [(0, 41)])
    run.end()


def test_a_prefix_needs_the_windows_of_its_end_only(tmp_path: Path) -> None:
    backend = small(tmp_path, "gemma3_text")
    window, prompt = backend.facts.window, PROMPT[:300]
    assert window == 32
    cold = Run(backend, 1, prompt)
    cold.prefill(300)
    blocks = backend.copy_out(cold.sequence, [(0, 100), (100, 200), (200, 280)])
    cold.decode(5)
    for block in blocks[:2]:
        held, part = block.nbytes, block.window_bytes
        assert 0 < part < held
        block.drop_window()
        assert (block.nbytes, block.window_bytes) == (held - part, 0)
    through = [backend.from_bytes(block.to_bytes()) for block in blocks]
    assert [block.nbytes for block in through] == [block.nbytes for block in blocks]
    # Where the windows are missing there is what another sequence left.
    other = Run(backend, 2, PROMPT[::-1])
    other.prefill(len(PROMPT))
    other.end()
    warm = Run(backend, 3, prompt)
    warm.restore(through, 280)
    warm.prefill(300)
    warm.decode(5)
    assert_alike("gemma3_text", cold.draws, warm.draws)
    # It is no source of what it does not hold: neither for blocks, nor for a shorter prefix, nor for itself.
    early, late = backend.copy_out(warm.sequence, [(100, 256), (200, 280)])
    assert early.window_bytes == 0
    assert late.to_bytes() == blocks[2].to_bytes()
    with pytest.raises(AssertionError):
        Run(backend, 4, prompt).restore(through, 220)
    backend.free(Run(backend, 4, prompt).sequence)
    for shared in (150, 290):
        forked = Run(backend, 5, prompt)
        backend.fork(forked.sequence, warm.sequence, shared)
        forked.sequence.kv_tokens = shared
        forked.prefill(300)
        forked.decode(5)
        assert_alike("gemma3_text", cold.draws, forked.draws)
        forked.end()
    assert backend.rewind(warm.sequence, 290) == 290
    assert backend.rewind(warm.sequence, 210) == 0
    for run in (cold, warm):
        run.end()


def test_foreign_bytes_are_refused(tmp_path: Path) -> None:
    backend, wider = small(tmp_path / "a"), small(tmp_path / "b", hidden_size=128)
    run = Run(backend, 1)
    run.prefill(50)
    [block] = backend.copy_out(run.sequence, [(0, 50)])
    data = block.to_bytes()
    assert backend.from_bytes(data).nbytes == block.nbytes
    for damaged in (b"", data[:3], data[:-1], data + b"\0", data[:4] + b"x" + data[5:], b"\xff" * len(data)):
        with pytest.raises(ValueError, match="are no block of KV"):
            backend.from_bytes(damaged)
    with pytest.raises(ValueError, match="of another model"):
        wider.from_bytes(data)
    run.end()


def test_a_model_that_mlx_lm_runs_alone_keeps_nothing(tmp_path: Path) -> None:
    path = build_model("llama", tmp_path / "model")
    backend = MLXBackend(adapter.load(path), Load(str(path), batching="single"))
    assert backend.facts.prefixes == ""
