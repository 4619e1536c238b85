"""The load probes: what goes wrong with rows, windows or writes in an arena is found; a device is measured."""

import dataclasses
import re

import mlx.core as mx
import pytest

from lmx.engine.budget import chunk_area
from lmx.engine.mlx import adapter, device, probe
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.backend import MLXBackend
from lmx.engine.mlx.layers import scatter_write
from lmx.protocol import Load
from tests import architectures
from tests.models import build_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    made = {}

    def load(kind, **overrides):
        key = (kind, *sorted(overrides.items()))
        if key not in made:
            made[key] = adapter.load(build_model(kind, tmp_path_factory.mktemp(kind) / "model", **overrides))
        return made[key]

    return load


class OtherWindows(adapter.LoadedModel):
    """A model to whose layers the arena's masks show other windows than the model asked for."""

    def of(self, window):
        raise NotImplementedError

    def hidden(self, tokens, caches):
        return super().hidden(tokens, [OtherWindow(cache, self.of) for cache in caches])


class OtherWindow:
    def __init__(self, view, of):
        self._view, self._of = view, of

    def __getattr__(self, name):
        return getattr(self._view, name)

    def make_mask(self, N, return_array=False, window_size=None):
        window = window_size or self._view._layer.window
        return self._view.make_mask(N, return_array, window and self._of(window))


def with_windows(loaded, of):
    fields = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)}
    kinds = [
        dataclasses.replace(kind, window=kind.window and of(kind.window)) for kind in adapter.layer_kinds(loaded.model)
    ]
    return type("Wrong", (OtherWindows,), {"of": staticmethod(of)})(**fields), kinds


@pytest.mark.parametrize("window", [32, 512, 4096])
def test_a_window_that_is_ignored_or_off_by_one_fails_the_probe(loaded, window):
    model = loaded("gemma3_text", sliding_window=window)
    kinds = adapter.layer_kinds(model.model)
    assert probe.compare_windows(model, kinds, scatter_write) == ("", f"; beyond a window of {window} too")
    for of in (lambda _: 10**6, lambda window: window - 1, lambda window: window + 1):
        wrong, wrong_kinds = with_windows(model, of)
        failure = probe._beyond(wrong, wrong_kinds, scatter_write, window, window + 8)
        assert failure > 0.05
    wrong, _ = with_windows(model, lambda window: window + 1)
    failure, _ = probe.compare_windows(wrong, kinds, scatter_write)
    assert f"beyond its window of {window}" in failure


def test_windows_are_told_in_the_reason_and_other_models_have_none(loaded):
    for kind, words in (("gemma3_text", "beyond a window of 32 too"), ("llama", "poisoned")):
        backend = MLXBackend(loaded(kind), Load(path=""))
        assert (backend.facts.path, backend.facts.path_reason[-len(words) :]) == ("arena", words)


def test_a_window_that_the_memory_does_not_hold_is_said_not_to_be_exercised(loaded, monkeypatch):
    monkeypatch.setattr(probe, "_WINDOW_MEMORY_SHARE", 0.0)
    model = loaded("gemma3_text")
    failure, beyond = probe.compare_windows(model, adapter.layer_kinds(model.model), scatter_write)
    assert (failure, "a window of 32 was not exercised" in beyond) == ("", True)


@pytest.mark.parametrize("partial", [True, False])
def test_a_write_that_is_wrong_in_a_partial_or_in_a_whole_lane_fails_the_probe(loaded, partial):
    model = loaded("llama")
    seen = set()

    def wrong(buffer, positions, new):
        is_partial = buffer.shape[0] > new.shape[0]
        seen.add(is_partial)
        return scatter_write(buffer, positions, new * 0.5 if is_partial == partial else new)

    assert "run alone" in probe.compare(model, adapter.layer_kinds(model.model), wrong)
    assert seen == {True, False}


def test_a_model_that_raises_beyond_its_window_runs_alone(loaded):
    model = loaded("gemma3_text")

    def refuse(window):
        raise ValueError("no such window")

    wrong, _ = with_windows(model, lambda window: window)
    type(wrong).of = staticmethod(refuse)
    failure, _ = probe.compare_windows(wrong, adapter.layer_kinds(model.model), scatter_write)
    assert "ValueError: no such window" in failure


def test_what_a_device_does_is_measured_and_told(loaded):
    backend = MLXBackend(loaded("llama"), Load(path=""))
    names = {"launch", "writes in flight", "write", "attention", "lanes", "compiled", "speculation"}
    assert set(backend.facts.probes) == names
    assert mx.get_cache_memory() < 2**20  # what the probes leave is not kept
    if mx.default_device() == mx.cpu:  # MLX takes 10 operations ahead there
        assert backend.facts.launch_share == 1.0
        assert re.match(r"a launch blocks for \d+% of its step", backend.facts.probes["launch"])
        assert "no step is started while another one runs" in backend.facts.probes["writes in flight"]


@pytest.mark.parametrize("kind", ["llama", "lfm2", "gemma3_text"])
def test_writes_stay_in_place_where_nobody_holds_the_buffers(loaded, kind):
    model = loaded(kind)
    steps = device._Steps(model, adapter.layer_kinds(model.model), scatter_write)
    assert device._copied(steps, None)[1] == 0


class InFlight(device._Steps):
    """What a step left is held until it is waited for, as a GPU's commands hold it."""

    def launch(self):
        blocked_s = super().launch()
        self.held = self._lane.keys_and_values
        return blocked_s

    def wait(self):
        super().wait()
        self.held = []


def test_a_device_that_copies_what_a_running_step_holds_starts_steps_one_by_one(loaded):
    model = loaded("llama")
    kinds = adapter.layer_kinds(model.model)
    copied, words = device._donation(InFlight(model, kinds, scatter_write))
    assert copied
    assert words.startswith("of 6 buffers 0 are copied by a step launched when the last one is done, 6 by one")
    assert words.endswith("steps are started one after the other")


def test_a_write_that_always_copies_is_told_and_is_no_matter_of_lookahead(loaded):
    model = loaded("llama")

    def copying(buffer, positions, new):
        return scatter_write(mx.concatenate([buffer[:1], buffer[1:]]), positions, new)

    steps = device._Steps(model, adapter.layer_kinds(model.model), copying)
    copied, words = device._donation(steps)
    assert (copied, words.startswith("of 6 buffers 0")) == (False, False)


def test_a_measurement_that_fails_is_told_and_does_not_fail_the_load(loaded):
    def broken(*_):
        raise RuntimeError("no such kernel")

    model = loaded("llama")
    facts = device.measure(model, adapter.layer_kinds(model.model), broken)
    assert "RuntimeError: no such kernel" in facts.words["launch"]
    assert facts.launch_share == float(mx.default_device() == mx.cpu)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v2"])
def test_what_attention_takes_is_what_a_chunk_takes(loaded, kind):
    model = loaded(kind)
    kinds = adapter.layer_kinds(model.model)
    lane = Lane(model, kinds, 1, 2048, scatter_write)
    row = lane.acquire(0)
    lane.prefill(row, [5] * 1500, last=False)
    mx.eval(lane.arrays)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    lane.prefill(row, [5] * 128, last=False)
    mx.eval(lane.arrays)
    taken = (mx.get_peak_memory() - before) / (128 * 1628)
    assert 0.4 * taken < device.measure(model, kinds, scatter_write).attention_bytes < 1.5 * taken


def test_models_without_mlxs_attention(loaded, tmp_path):
    recurrent = adapter.load(architectures.build("mamba", tmp_path / "mamba"))
    assert device._attention(recurrent, adapter.layer_kinds(recurrent.model)) == (0.0, "the model has none")
    capped = adapter.load(architectures.build("gemma2", tmp_path / "gemma2"))
    needed, words = device._attention(capped, adapter.layer_kinds(capped.model))
    assert needed > 0
    assert "the model's own code" in words


def test_the_area_of_a_chunk_by_the_memory_there_is(loaded):
    assert chunk_area(0.0, 10**9, 0) == 0
    assert chunk_area(96.0, 28 * 10**9, 14 * 10**9) == 7 * 10**9 // 96
    assert chunk_area(96.0, 10**9, 10**12) == 5 * 10**7 // 96
    assert chunk_area(96.0, 0, 1) == 1
    model = loaded("llama")
    small, large = (MLXBackend(model, Load(path="", kv_budget_bytes=budget)).facts for budget in (2**22, 2**60))
    assert small.max_chunk_area > 5 * large.max_chunk_area > 0
