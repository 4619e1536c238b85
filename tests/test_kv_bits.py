"""KV in 8 and 4 bits on MLX: near what 16 bits say, the same in any row, cut anywhere, with and without a prefix hit;
or 16 bits, and the reason."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.mlx import adapter, probe
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.backend import MLXBackend
from lmx.engine.mlx.layers import KVLayer, round_slots, scatter_write
from lmx.protocol import Load
from tests.engine_client import engine
from tests.models import build_model
from tests.test_prefix import ask, assert_same, tokens

KINDS = ("llama", "gemma3_text", "qwen3_next")
TEXT = np.random.default_rng(0).integers(5, 1000, 300).tolist()


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(request.param, tmp_path_factory.mktemp("model") / request.param, head_dim=32)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> adapter.LoadedModel:
    return adapter.load(folder)


def kinds_of(loaded: adapter.LoadedModel, bits: int) -> list[adapter.LayerKind]:
    kinds = adapter.layer_kinds(loaded.model)
    assert not isinstance(kinds, str)
    return [replace(kind, bits=bits) if kind.kind == "kv" else kind for kind in kinds]


def forced(loaded: adapter.LoadedModel, bits: int, *, prefill: int, rows: int = 1) -> np.ndarray:
    """Logits of the last row after each token of the text behind the first ``prefill``, decoded one by one; rows before
    it stand elsewhere."""
    lane = Lane(loaded, kinds_of(loaded, bits), rows, round_slots(len(TEXT)), scatter_write)
    for row in range(rows):
        start = TEXT[: prefill if row == rows - 1 else 7 + row]
        lane.prefill(lane.acquire(row), start, last=True)
    found = []
    for token in TEXT[prefill:]:
        logits = lane.decode(range(rows), mx.array([[token]] * rows, mx.int32))[rows - 1, 0]
        mx.eval(logits, lane.arrays)
        found.append(np.array(logits))
    return np.array(found)


def test_eight_bits_agree_with_sixteen(loaded: adapter.LoadedModel) -> None:
    whole, packed = (forced(loaded, bits, prefill=100) for bits in (16, 8))
    # A random model's best tokens lie close together.
    assert np.mean(whole.argmax(-1) == packed.argmax(-1)) > 0.85
    assert np.abs(whole - packed).max() > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_among_others_equals_one_alone(loaded: adapter.LoadedModel, bits: int) -> None:
    alone, among = (forced(loaded, bits, prefill=280, rows=rows) for rows in (1, 3))
    np.testing.assert_allclose(among, alone, rtol=0, atol=1e-3 * np.abs(alone).max())


@pytest.mark.parametrize("bits", [8, 4])
def test_decoding_packed_equals_chunks_unpacked(loaded: adapter.LoadedModel, bits: int) -> None:
    lane = Lane(loaded, kinds_of(loaded, bits), 1, round_slots(len(TEXT)), scatter_write)
    hidden: list[mx.array] = []
    row = lane.acquire(0)
    for start, end in ((0, 130), (130, len(TEXT))):
        lane.prefill(row, TEXT[start:end], last=False, see=hidden.append)
    chunks = np.array(loaded.logits(hidden[-1])[0, 280 - 130 :])
    decoded = forced(loaded, bits, prefill=280)
    np.testing.assert_allclose(decoded, chunks, rtol=0, atol=1e-3 * np.abs(chunks).max())


@pytest.mark.parametrize("bits", [8, 4])
def test_what_a_token_takes(folder: Path, loaded: adapter.LoadedModel, bits: int) -> None:
    whole, packed = (MLXBackend(loaded, Load(str(folder), kv_bits=given)).facts for given in (16, bits))
    assert packed.path == "arena"
    assert packed.dtype == f"{whole.dtype}, {bits}-bit KV"  # a part of the prefix store's fingerprint
    # float32: of 32 bits the packed ones are left, and a scale and a bias for each 32 values.
    assert packed.kv_bytes_per_token * 32 == whole.kv_bytes_per_token * (bits + 2)
    lane = Lane(loaded, kinds_of(loaded, bits), 2, 272, scatter_write)
    assert sum(array.nbytes for array in lane.keys_and_values) == 2 * 272 * packed.kv_bytes_per_token


def test_a_hit_answers_as_no_hit(folder: Path) -> None:
    with engine(folder, kv_bits=8, max_rows=2, max_chunk_tokens=256, context_length=2048) as client:
        assert client.ready is not None
        assert client.ready.dtype.endswith("8-bit KV")
        for shared in (511, 512, 513):
            prefix = tokens(shared)
            ask(client, [*prefix, 5, *tokens(30)])
            prompt = [*prefix, 6, *tokens(40)]
            alone, _ = ask(client, prompt, salt=None)
            ask(client, prompt)
            answer, cached = ask(client, prompt)
            assert cached > 0
            assert_same(answer, alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_stays_so(bits: int, bad: float) -> None:
    """MLX's own packing makes a number of it, and the row's later draws would be finite and wrong."""
    layer = KVLayer(adapter.LayerKind("kv", None, ((2, 64), (2, 64)), (mx.float16,) * 2, bits=bits), 1, 16)
    keys = mx.ones((1, 2, 3, 64), mx.float16)
    keys[0, 1, 2, 5] = bad
    finite = np.isfinite(np.array(layer.unpacked(layer.packed(keys)))).all(-1)
    assert finite.tolist() == [[[True, True, True], [True, True, False]]]


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("llama", {}, "16 wide, not a multiple of 32"),
        ("gpt_oss", {"head_dim": 32}, "attention sinks"),
        ("gemma2", {"head_dim": 32}, "refuses packed keys and values"),
    ],
)
def test_who_cannot_keeps_sixteen_bits_and_says_why(
    kind: str, options: dict[str, int], why: str, tmp_path: Path
) -> None:
    loaded = adapter.load(build_model(kind, tmp_path / "model", **options))
    whole, asked = (probe.run(loaded, scatter_write, kv_bits=bits) for bits in (16, 8))
    assert asked.path == whole.path
    assert asked.kv_bits == 16
    assert why in asked.kv
    assert asked.kv_bytes_per_token == whole.kv_bytes_per_token
