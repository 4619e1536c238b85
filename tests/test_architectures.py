"""Every architecture of the installed mlx-lm, each as a small random model: loaded by the MLX back end, run in steps as
the step loop runs it, and equal to mlx-lm alone. A release of mlx-lm with a new module fails here until
tests/architectures.py can build it or says why not."""

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.backend import Chunk, Sequence
from lmx.engine.mlx import adapter
from lmx.engine.mlx.backend import MLXBackend
from lmx.errors import ModelInvalid
from lmx.protocol import Load, Sampling
from tests import architectures
from tests.engine_client import engine

SINGLE = {
    # What of a model's code keeps its rows from sharing a step: words of the reason that is told at load.
    "afm7": "run alone",  # its layers without keys of their own count positions from the end of the longest row
    "deepseek_v41": "LayerCache",
    "gpt_bigcode": "Only length-1 arrays can be converted",
    "llama4": "ChunkedKVCache",
    "longcat_flash_ngram": "Cannot broadcast",  # a state that grows with the first tokens
    "minimax_m3_vl": "counts blocks from the end",
    "phi3small": "broadcast_shapes",
    "plamo3": "run alone",
}
# mlx-lm itself gives other logits when it prefills these in chunks: plamo3 masks with one position more than the window
# that its cache keeps, phi3small adds its mask of true and false to the scores, so that a query sees its whole chunk.
CHUNKS_MATTER = ("plamo3", "phi3small")
METAL_ONLY = ("bitnet", "muse_spark")
BUILT = [name for name in architectures.modules() if name not in architectures.NOT_BUILT]
PROMPTS = (29, 11, 4, 7)
TOKENS = 5
TOLERANCE = 2e-3


@pytest.fixture(scope="module", autouse=True)
def _without_compiler():
    """MLX compiles a kernel for each new chain of operations, a second each; nothing tested here depends on it."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_every_architecture_is_built_or_said_not_to_be():
    known = {*architectures.SPECIAL, *architectures.NOT_BUILT, *SINGLE, *METAL_ONLY}
    assert known <= set(architectures.modules())
    assert len(BUILT) > 120


@pytest.mark.parametrize("name", [name for name in BUILT if name not in METAL_ONLY])
def test_equals_mlx_lm_alone(name, tmp_path):
    backend = MLXBackend(adapter.load(architectures.build(name, tmp_path / "model")), Load(path="", max_rows=4))
    words = SINGLE.get(name)
    assert (backend.facts.path, words or "") == ("single" if words else "arena", words or ""), backend.facts.path_reason
    assert (words or "") in backend.facts.path_reason
    # A model may do with keys and values what lanes in one pass do not allow; it decodes them one by one.
    assert [
        name for name, words in backend.facts.probes.items() if "Error" in words and name not in ("lanes", "compiled")
    ] == []
    rng = np.random.default_rng(1)
    sampling = Sampling(seed=0, temperature=0.0, logprobs=3)
    sequences = [
        Sequence(seq, rng.integers(3, architectures.VOCABULARY, length).tolist(), length, 99, sampling, True)
        for seq, length in enumerate(PROMPTS)
    ]
    prompts = [list(sequence.tokens) for sequence in sequences]
    drawn = together(backend, sequences) if backend.facts.max_rows > 1 else one_by_one(backend, sequences)
    assert backend.memory().rows == 0
    for prompt, sequence in zip(prompts, sequences, strict=True):
        found = drawn[sequence.seq]
        assert len(found) >= TOKENS
        cut = len(prompt) // 2 if name in CHUNKS_MATTER else 0
        for draw, expected in zip(found, alone(backend, prompt, sequence.tokens[len(prompt) :], cut), strict=True):
            assert not draw.bad
            value, ids, values = draw.logprobs[0].drawn, draw.logprobs[0].top_ids, draw.logprobs[0].top
            assert np.allclose([value, *values], expected[[*draw.tokens, *ids]], atol=TOLERANCE)
            assert np.isclose(expected.max(), value, atol=TOLERANCE)


def alone(backend, prompt, tokens, cut):
    """mlx-lm's log-probabilities over the vocabulary at each position of the answer."""
    model = backend._loaded.model
    caches = adapter.make_prompt_cache(model)
    if cut:
        model(mx.array([prompt[:cut]]), cache=caches)
        prompt = prompt[cut:]
    rows = [model(mx.array([prompt]), cache=caches)[:, -1]]
    rows += [model(mx.array([[token]]), cache=caches)[:, -1] for token in tokens[:-1]]
    logits = mx.concatenate(rows).astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


class Steps:
    """Runs steps of a back end and keeps what was drawn."""

    def __init__(self, backend):
        self.backend = backend
        self.drawn = {}

    def __call__(self, decode=(), chunks=()):
        """``chunks``: (sequence, end) each."""
        made = []
        for sequence, end in chunks:
            if sequence.computed_tokens == 0:
                self.backend.start(sequence)
            start, sequence.computed_tokens = sequence.computed_tokens, end
            made.append(Chunk(sequence, start, end - start, last=end == sequence.prompt_tokens))
        for draw in self.backend.launch(list(decode), made).wait():
            draw.sequence.tokens += draw.tokens
            self.drawn.setdefault(draw.sequence.seq, []).append(draw)


def together(backend, sequences):
    """Rows of different lengths that join, with a prompt in two chunks or two prompts in one pass, and leave one after
    the other."""
    step = Steps(backend)
    a, b, c, d = sequences
    step(chunks=[(a, 13)])
    step(chunks=[(a, a.prompt_tokens)])
    step([a], [(b, 4)])
    step([a], [(b, b.prompt_tokens), (c, c.prompt_tokens), (d, d.prompt_tokens)])
    for _ in range(3):
        step([a, b, c, d])
    backend.free(a)  # a hole below the others
    step([b, c, d])
    for sequence in (b, c, d):
        backend.free(sequence)
    return step.drawn


def one_by_one(backend, sequences):
    step = Steps(backend)
    for sequence in sequences:
        step(chunks=[(sequence, sequence.prompt_tokens // 2)])
        step(chunks=[(sequence, sequence.prompt_tokens)])
        for _ in range(TOKENS - 1):
            step([sequence])
        backend.free(sequence)
    return step.drawn


def test_a_model_whose_kv_does_not_grow_serves_as_any_other(tmp_path):
    """mamba: no keys and values, one state a sequence."""
    folder = architectures.build("mamba", tmp_path / "model")
    with engine(folder, max_rows=3, max_chunk_tokens=64) as client:
        assert (client.ready.path, client.ready.kv_bytes_per_token) == ("arena", 0)
        rng = np.random.default_rng(3)
        prompts = [rng.integers(3, architectures.VOCABULARY, length).tolist() for length in (5, 200, 31, 64, 90)]
        together = client.run(prompts, 12)
        assert together == [client.run([prompt], 12)[0] for prompt in prompts]
        cancelled = client.submit(prompts[1], 10_000)
        client.wait(lambda: len(client.answers[cancelled].tokens) > 3)
        client.cancel(cancelled)
        client.wait_freed(cancelled)
        assert client.answers[cancelled].freed.kv_bytes > 0
        stats = client.idle_stats()
        assert (stats.kv_used_bytes, stats.arena_bytes) == (0, 0)


@pytest.mark.skipif(mx.metal.is_available(), reason="has Metal")
@pytest.mark.parametrize("name", METAL_ONLY)
def test_what_the_device_cannot_run_is_refused_at_load(name, tmp_path):
    folder = architectures.build(name, tmp_path / "model")
    with pytest.raises(ModelInvalid, match="No Metal back-end"):
        MLXBackend.load(Load(path=str(folder)))


def test_a_module_that_needs_another_package_is_refused_at_load(tmp_path):
    folder = architectures.build("llama", tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "olmo"'))
    with pytest.raises(ModelInvalid, match="a package that is not installed"):
        MLXBackend.load(Load(path=str(folder)))
