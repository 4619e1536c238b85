"""Where sequences live: padding within its limit, changes that do not grow with the other rows, lanes as they cost."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx.engine.backend import Sequence
from lmx.engine.mlx import adapter, device, together
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.backend import MLXBackend
from lmx.engine.mlx.device import LaneCosts
from lmx.engine.mlx.layers import scatter_write
from lmx.engine.mlx.placement import Placement
from lmx.protocol import Load
from tests.models import build_model
from tests.test_memory import QUANTUM, Rows

TOKEN = 128
"""Bytes of KV of the model's one layer."""
# By what a further lane costs in slots that are read for nothing, and in what may be copied at once.
CPU = LaneCosts(lane_ms=1.0, slot_ms=0.01, copy_ms=0.1, byte_ms=0.01 / TOKEN, late_ms=40.0)
GPU = LaneCosts(lane_ms=2.0, slot_ms=0.0002, copy_ms=0.1, byte_ms=0.001 / TOKEN, late_ms=80.0)
FREE = LaneCosts(lane_ms=0.0, slot_ms=0.0, copy_ms=0.0, byte_ms=0.0, late_ms=80.0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> adapter.LoadedModel:
    folder = tmp_path_factory.mktemp("placement") / "model"
    overrides = {"num_hidden_layers": 1, "hidden_size": 32, "num_key_value_heads": 1, "head_dim": 16}
    return adapter.load(build_model("llama", folder, **overrides))


@pytest.fixture(scope="module")
def make(loaded: adapter.LoadedModel) -> Callable[[LaneCosts], Rows]:
    backend = MLXBackend(loaded, Load(path="", max_rows=8))
    assert backend.facts.kv_bytes_per_token == TOKEN
    assert backend.facts.probes["lane costs"].startswith("a further lane takes")

    def made(costs: LaneCosts, *, weights_tokens: int = 0, max_rows: int = 8) -> Rows:
        """``weights_tokens``: the weights weigh as much as the KV of so many."""
        facts = replace(backend.facts, weights_bytes=weights_tokens * TOKEN, max_rows=max_rows)
        return Rows(Placement(loaded, backend._probe, facts, costs))

    return made


def shared(rows: Rows) -> list[Lane]:
    return [lane for lane in rows.placement.lanes if len(lane.in_use) > 1]


def rest(rows: Rows, steps: int = 300) -> None:
    """So many steps in which nobody grows."""
    for _ in range(steps):
        rows.placement.settle()


def grow(rows: Rows, sequence: Sequence, tokens: int) -> None:
    """By as much at once, as if they had been decoded."""
    place = rows.placement[sequence]
    sequence.tokens += [0] * tokens
    rows.placement.make_room(place, tokens)
    place = rows.placement[sequence]
    place.lane.lengths[place.row] = len(sequence.tokens)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.sampled_from([1, 100, 255, 256, 400, 900, 2000, 5000])),
        st.tuples(st.just("leave"), st.integers(0, 7)),
        st.tuples(st.just("decode"), st.sampled_from([1, 3, 70, 140])),
        st.tuples(st.just("grow"), st.integers(0, 7)),
    ),
    max_size=60,
)


@given(EVENTS, st.sampled_from([CPU, GPU, FREE]), st.sampled_from([0, 100_000]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_comes_and_goes(
    make: Callable[..., Rows], events: list[tuple[str, int]], costs: LaneCosts, weights_tokens: int
) -> None:
    rows = make(costs, weights_tokens=weights_tokens)
    written = 0
    for name, value in [*events, ("decode", 1)]:
        live = list(rows.live.values())
        if name == "join" and len(live) < 8:
            rows.step([rows.add(value)])
            written += value + len(live)
        elif name == "decode":
            for _ in range(value):
                rows.step([])
            written += value * len(live)
        elif name == "grow" and value < len(live):
            grow(rows, live[value], 300)
            rows.step([])
            written += 300 + len(live)
        elif name == "leave" and value < len(live):
            rows.remove(live[value])
            rows.placement.settle()
        rows.check()
        assert rows.slots() <= 1.5 * rows.held() + 0.02 * weights_tokens
        for lane in shared(rows):
            assert costs.copy_ms + costs.byte_ms * len(lane.in_use) * lane.slots * TOKEN <= costs.late_ms
    # At every change of one row up to eight may be copied, at each but a join; each of them lasts a quantum.
    assert rows.placement.copied_bytes <= 12 * written * TOKEN
    for sequence in list(rows.live.values()):
        rows.remove(sequence)
    assert rows.placement.lanes == []
    assert len(rows.placement) == 0


@pytest.mark.parametrize("costs", [CPU, GPU])
def test_a_change_copies_its_own_row_and_no_longer_one(make: Callable[..., Rows], costs: LaneCosts) -> None:
    """Beside seven of 8,000 tokens, which would take longer than a copy may."""
    rows = make(replace(costs, late_ms=costs.copy_ms + costs.byte_ms * 15000 * TOKEN))
    for _ in range(7):
        rows.step([rows.add(8000)])
    rest(rows)
    before = rows.placement.copied_bytes
    short = rows.add(500)
    rows.step([short])
    assert rows.placement.copied_bytes == before
    grow(rows, short, 300)
    rows.placement.settle()
    assert rows.placement.copied_bytes - before == 500 * TOKEN
    rows.step([rows.add(500)])
    rows.remove(short)
    rows.placement.settle()
    assert rows.placement.copied_bytes - before <= 2000 * TOKEN
    rows.check()
    for sequence in list(rows.live.values()):
        rows.remove(sequence)


def test_long_rows_that_grow_in_step_are_copied_one_by_one(make: Callable[..., Rows]) -> None:
    rows = make(CPU)  # two of them would be late
    for tokens in (4000,) * 8:
        rows.step([rows.add(tokens)])
    start = max(len(sequence.tokens) for sequence in rows.live.values())
    for sequence in rows.live.values():
        grow(rows, sequence, start - len(sequence.tokens))
    rest(rows, 1)
    copied, most = rows.placement.copied_bytes, 0
    for _ in range(800):
        rows.step([])
        now = rows.placement.copied_bytes
        copied, most = now, max(most, now - copied)
    assert len(rows.placement.lanes) == 8
    assert 0 < most <= 5000 * TOKEN
    rows.check()
    for sequence in list(rows.live.values()):
        rows.remove(sequence)


def test_there_are_fewer_lanes_where_they_are_dear(make: Callable[..., Rows]) -> None:
    lanes = []
    for costs in (CPU, GPU):
        rows = make(costs)
        for tokens in (1500, 1100, 1200, 700, 1300, 900, 1400, 1000):
            rows.step([rows.add(tokens)])
        rest(rows)
        rows.check()
        lanes.append(len(rows.placement.lanes))
        for sequence in list(rows.live.values()):
            rows.remove(sequence)
    cpu, gpu = lanes
    assert gpu == 1
    assert cpu >= 3


def test_lanes_are_joined_when_what_they_cost_has_paid_for_it(make: Callable[..., Rows]) -> None:
    rows = make(replace(GPU, byte_ms=0.02 / TOKEN))  # 18 ms for 900 tokens
    for _ in range(2):
        rows.step([rows.add(900)])
    for _ in range(4):
        assert len(rows.placement.lanes) == 2
        rows.placement.settle(decodes=False)  # which costs nothing
        rows.placement.settle()
    rest(rows, 30)
    assert len(rows.placement.lanes) == 1
    assert 900 * TOKEN <= rows.placement.copied_bytes <= 1810 * TOKEN
    for sequence in list(rows.live.values()):
        rows.remove(sequence)


def test_prompts_that_come_together_share_a_lane(make: Callable[..., Rows]) -> None:
    """And so a pass of prefill; nothing is copied for that."""
    rows = make(CPU)
    for tokens in (85, 70, 90, 66, 80, 84, 71, 91):
        rows.add(tokens)
    rows.placement.settle(decodes=False)
    assert len(rows.placement.lanes) == 1
    assert rows.placement.copied_bytes == 0
    for sequence in list(rows.live.values()):
        rows.remove(sequence)


def test_padding_never_takes_more_than_a_quarter_of_the_budget(make: Callable[..., Rows]) -> None:
    rows = make(GPU, weights_tokens=10**6)
    rows.placement.facts = replace(rows.placement.facts, kv_budget_bytes=8192 * TOKEN)
    for tokens in (3000, 2000, 1500, 1000):
        rows.step([rows.add(tokens)])
        assert rows.slots() - rows.held() <= 8192 // 4
    # Less than is held already: nothing can be given back, and nothing is undone for it.
    rows.placement.facts = replace(rows.placement.facts, kv_budget_bytes=QUANTUM * TOKEN)
    rows.step([])
    rows.step([])
    rows.check()
    for sequence in list(rows.live.values()):
        rows.remove(sequence)


def test_a_model_whose_lanes_decode_one_by_one_is_measured_so(loaded: adapter.LoadedModel) -> None:
    kinds = adapter.layer_kinds(loaded.model)
    assert isinstance(kinds, list)
    together.install(loaded)
    for at_once in (True, False):
        costs, words = device.lane_costs(loaded, kinds, scatter_write, at_once=at_once, itl_target_ms=300.0)
        assert words == costs.words
        assert costs.lane_ms > 0
        assert costs.copy_ms > 0
        assert costs.slot_ms >= 0
        assert costs.byte_ms >= 0
        assert costs.late_ms == 100.0


def test_what_cannot_be_measured_is_assumed(loaded: adapter.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = adapter.layer_kinds(loaded.model)
    assert isinstance(kinds, list)

    def fail(*args: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Lane, "decode", fail)
    costs, words = device.lane_costs(loaded, kinds, scatter_write, at_once=True, itl_target_ms=300.0)
    assert words == "not measured (RuntimeError: no such kernel)"
    assert costs.lane_ms > 0
    own = [replace(kind, kind="own") for kind in kinds]
    assert device.lane_costs(loaded, own, scatter_write, at_once=False, itl_target_ms=300.0)[0] == costs
