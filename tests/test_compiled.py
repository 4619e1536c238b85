"""Compiled decode steps: the same tokens as eager ones, in place, from few graphs; chosen by comparing and measuring,
and given up where model code does not take it."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.mlx import adapter, compiled, probe
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.backend import MLXBackend
from lmx.engine.mlx.compiled import CompiledSteps, choose, traces
from lmx.engine.mlx.layers import Write, round_slots, scatter_write, slice_write
from lmx.protocol import Load
from tests.models import build_model
from tests.test_mlx_launch import CANCELLED, answers

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and not mx.metal.is_available(), reason="MLX compiles with g++"
)
# The second one's windows are shorter than the lengths below; it is no Gemma, because each kind of model has kernels of
# its own, for which g++ takes a second each, once a machine.
_SLIDING = ["sliding_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "sliding": ("llama", {"sliding_window": 32, "layer_types": [*_SLIDING, "full_attention", *_SLIDING]}),
    "recurrent": ("lfm2", {}),
}
CASES = [("llama", 16), ("llama", 8), ("sliding", 16), ("recurrent", 16)]

Loaded = Callable[[str], adapter.LoadedModel]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            kind, settings = MODELS[name]
            made[name] = build_model(kind, tmp_path_factory.mktemp(name) / "model", head_dim=32, **settings)
        return made[name]

    return folder


@pytest.fixture
def loaded(folders: Callable[[str], Path]) -> Loaded:
    return lambda name: adapter.load(folders(name))


def probed(model: adapter.LoadedModel, bits: int = 16, write: Write = scatter_write) -> probe.ProbeResult:
    kinds = adapter.layer_kinds(model.model)
    assert not isinstance(kinds, str)
    packed = tuple(replace(kind, bits=bits) if kind.kind == "kv" else kind for kind in kinds)
    return probe.ProbeResult("arena", "", packed, write, 0, 0, "")


class Pair:
    """The same rows in two lanes, of which one decodes eagerly and the other as ``decode`` does."""

    def __init__(self, model: adapter.LoadedModel, found: probe.ProbeResult, rows: int, tokens: int) -> None:
        self._model = model
        self.lanes = [Lane(model, found.kinds, rows, round_slots(tokens), found.write) for _ in range(2)]

    def join(self, length: int) -> int:
        prompt = np.random.default_rng(length).integers(5, self._model.vocab_size, length).tolist()
        for lane in self.lanes:
            row = lane.acquire(0)
            logits = lane.prefill(row, prompt, last=True)
            lane.last_tokens[row] = mx.argmax(logits[0])
        return row

    def leave(self, row: int) -> None:
        for lane in self.lanes:
            lane.release(row)

    def same(self, decode: Callable[[Lane, Sequence[int]], mx.array], steps: int = 1) -> None:
        for _ in range(steps):
            found = []
            for lane, run in zip(self.lanes, (Lane.decode, decode), strict=True):
                rows = lane.in_use
                logits = run(lane, rows)[mx.array(rows), 0]
                drawn = mx.argmax(logits, axis=-1).astype(mx.int32)
                lane.last_tokens[mx.array(rows)] = drawn
                mx.eval(drawn, lane.arrays)
                found.append((drawn.tolist(), np.array(logits)))
            (eager, right), (tokens, logits) = found
            assert tokens == eager
            assert np.allclose(logits, right, atol=1e-3 * np.abs(right).max())


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_rows_that_come_go_and_grow_get_the_same_tokens(loaded: Loaded, name: str, bits: int) -> None:
    model = loaded(name)
    found = probed(model, bits)
    assert any(kind.window for kind in found.kinds) == (name == "sliding")
    steps = CompiledSteps(model, found)
    pair = Pair(model, found, 4, 500)
    pair.join(250)
    pair.same(steps.decode, 3)  # one row of four
    short = pair.join(20)
    pair.same(steps.decode, 8)  # over the end of what was read until now
    last = pair.join(300), pair.join(310)
    pair.same(steps.decode, 2)
    pair.leave(short)  # a hole, and windows that begin later
    pair.same(steps.decode, 2)
    pair.leave(last[1])
    pair.join(7)
    pair.same(steps.decode, 2)
    assert not steps.failure


def test_the_other_write_is_in_graphs_too(loaded: Loaded) -> None:
    model = loaded("llama")
    found = probed(model, write=slice_write)
    pair = Pair(model, found, 3, 200)
    pair.join(9)
    pair.join(30)
    pair.same(CompiledSteps(model, found).decode, 3)


def test_a_whole_loop_draws_the_same_compiled(tmp_path: Path) -> None:
    """Penalties, cancellations and lookahead, in lanes that grow and shrink."""
    folder = build_model("llama", tmp_path / "llama", num_hidden_layers=1)

    def backend(compile_decode: str) -> MLXBackend:
        options = Load("", max_rows=3, max_chunk_tokens=64, compile_decode=compile_decode)
        return MLXBackend(adapter.load(folder), options)

    eager, graphs = backend("off"), backend("on")
    assert eager.facts.probes["compiled"] == "eager, as [engine] compile says"
    assert graphs.facts.probes["compiled"] == "compiled, as [engine] compile says"
    right = answers(eager, "plain")
    before = traces()
    for seq, tokens in answers(graphs, "overlapped").items():
        if seq in CANCELLED:
            both = min(len(tokens), len(right[seq]))
            assert tokens[:both] == right[seq][:both]
        else:
            assert tokens == right[seq]
    assert traces() > before


def test_a_step_writes_in_place(loaded: Loaded) -> None:
    model = loaded("llama")
    found = probed(model)
    steps, pair = CompiledSteps(model, found), Pair(model, found, 4, 8192)
    for length in (8, 12):
        pair.join(length)
    pair.same(steps.decode, 2)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pair.same(steps.decode, 2)
    assert mx.get_peak_memory() - before < pair.lanes[1].keys_and_values[0].nbytes / 2


def test_a_row_that_grows_is_traced_once_a_quantum(loaded: Loaded) -> None:
    model = loaded("llama")
    found = probed(model)
    steps, before = CompiledSteps(model, found), traces()
    lane = Pair(model, found, 1, 700).lanes[1]
    for _ in range(2):  # the second one finds all its graphs
        lane.prefill(lane.acquire(0), [7] * 200, last=True)
        for _ in range(100):
            mx.async_eval(steps.decode(lane, [0]), lane.arrays)
        lane.release(0)
        assert traces() - before == steps.kept == 2


def test_graphs_are_made_for_what_comes_often_and_few_are_kept(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_KEPT_GRAPHS", 2)
    monkeypatch.setattr(compiled, "_KEPT_SHAPES", 4)
    monkeypatch.setattr(compiled, "_MOST_PATIENCE", 6)
    model = loaded("llama")
    found = probed(model)
    steps, before = CompiledSteps(model, found), traces()
    steps.patience = 3
    pair = Pair(model, found, 4, 200)

    def made(steps_of_it: int) -> int:
        pair.same(steps.decode, steps_of_it)
        return traces() - before

    pair.join(5)
    assert [made(3), made(1), made(4)] == [0, 1, 1]
    pair.join(6)
    assert [made(3), made(2)] == [1, 2]
    pair.join(7)
    assert [made(6), made(2)] == [2, 3]  # in the place of the one for one row
    assert steps.kept == 2
    pair.leave(2)
    assert made(2) == 3
    pair.leave(1)
    assert [made(6), made(1)] == [3, 4]
    assert steps.kept == 2


class _Swapped:
    """Model code in the place of the first layer's attention, as long as the block lasts."""

    def __init__(self, model: adapter.LoadedModel, call: Callable[..., Any]) -> None:
        self._attention = model.model.model.layers[0].self_attn
        self._type = type(self._attention)
        self._call = call

    def __enter__(self) -> None:
        original, call = self._type.__call__, self._call

        def called(module: Any, x: mx.array, *args: Any, **options: Any) -> mx.array:
            return call(module, original(module, x, *args, **options))

        self._attention.__class__ = type("Other", (self._type,), {"__call__": called})

    def __exit__(self, *_: object) -> None:
        self._attention.__class__ = self._type


def looks_at_numbers(module: Any, x: mx.array) -> mx.array:
    return x if float(mx.sum(x).item()) < np.inf else -x


def counts_calls(module: Any, x: mx.array) -> mx.array:
    module.calls = getattr(module, "calls", 0) + 1
    return x * (-1) ** module.calls


def keeps_what_it_computed(module: Any, x: mx.array) -> mx.array:
    module.newest = x
    return x


def test_code_that_looks_at_numbers_stays_eager(loaded: Loaded) -> None:
    model = loaded("llama")
    with _Swapped(model, looks_at_numbers):
        steps, words = choose(model, probed(model), "on")
    assert steps is None
    assert words.startswith("eager: compiled, it fails: ValueError: [eval]"), words


def test_code_that_says_something_else_compiled_stays_eager(loaded: Loaded) -> None:
    model = loaded("llama")
    with _Swapped(model, counts_calls):
        steps, words = choose(model, probed(model), "on")
    assert steps is None
    assert "logits differ by" in words, words


def test_code_that_keeps_what_it_computed_can_be_compiled(loaded: Loaded) -> None:
    model = loaded("llama")
    found = probed(model)
    pair = Pair(model, found, 2, 100)
    with _Swapped(model, keeps_what_it_computed):
        steps = CompiledSteps(model, found)
        for length in (5, 6):
            pair.join(length)
            pair.same(steps.decode, 2)
        mx.eval(model.model.state)
    assert not steps.failure


def test_a_graph_that_cannot_be_made_ends_compilation_and_nothing_else(
    loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    model = loaded("llama")
    found = probed(model)
    steps, pair = CompiledSteps(model, found), Pair(model, found, 2, 100)
    pair.join(5)
    pair.same(steps.decode, 2)
    pair.join(6)
    with _Swapped(model, looks_at_numbers):
        pair.same(steps.decode)
    assert steps.failure.startswith("ValueError: [eval]")
    assert steps.failure in capsys.readouterr().err
    before = traces()
    pair.same(steps.decode, 2)
    assert traces() == before


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As far as the choice is concerned."""
    monkeypatch.setattr(compiled, "compiles", lambda xp: True)
    return monkeypatch


@pytest.mark.usefixtures("on_a_gpu")
def test_what_is_measured_is_told(loaded: Loaded) -> None:
    model = loaded("llama")
    steps, words = choose(model, probed(model), "auto")
    assert words.count("ms compiled") == 2
    assert (steps is None) == (words.count(" compiled (") == 0)


@pytest.mark.parametrize(("one", "several"), [(2.0, 1.01), (0.9, 2.0), (1.0, 1.02)])
def test_auto_takes_what_is_faster(loaded: Loaded, on_a_gpu: pytest.MonkeyPatch, one: float, several: float) -> None:
    figures = iter((one, several))
    on_a_gpu.setattr(compiled._Trial, "measure", lambda _: compiled._Measured(next(figures), 1.0, trace_ms=1.5))
    model = loaded("llama")
    found = probed(model)
    steps, words = choose(model, found, "auto")
    used = [one > 1.1, several > 1.1]
    parts = words.split("; ")
    assert [" compiled (" in part for part in parts] == used
    if steps is None:
        assert used == [False, False]
        return
    assert steps.patience == 2
    pair = Pair(model, found, 2, 100)
    for wanted in used:
        pair.join(5)
        before = traces()
        pair.same(steps.decode, 4)
        assert (traces() > before) == wanted


def test_what_is_not_tried(loaded: Loaded) -> None:
    model = loaded("llama")
    found, before = probed(model), traces()
    assert choose(model, found, "off") == (None, "eager, as [engine] compile says")
    steps, words = choose(model, replace(found, path="single"), "on")
    assert (steps, words) == (None, "eager: one sequence at a time runs on mlx-lm's caches")
    if mx.default_device() == mx.cpu:
        steps, words = choose(model, found, "auto")
        assert steps is None
        assert "g++" in words
    assert traces() == before


def test_where_mlx_does_not_compile_steps_are_eager(loaded: Loaded) -> None:
    model = loaded("llama")
    mx.disable_compile()
    try:
        steps, words = choose(model, probed(model), "on")
    finally:
        mx.enable_compile()
    assert steps is None
    assert "MLX makes no graphs here" in words
