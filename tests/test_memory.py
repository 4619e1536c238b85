"""Memory goes back: while others live, when the last one leaves, and what moves costs no more than itself."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.backend import Sequence
from lmx.engine.mlx import adapter
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.backend import MLXBackend
from lmx.engine.mlx.device import LaneCosts
from lmx.engine.mlx.layers import KVLayer, round_slots, scatter_write
from lmx.engine.mlx.placement import Placement
from lmx.protocol import Load, Sampling
from tests.engine_client import engine
from tests.models import build_model
from tests.server import Server

QUANTUM = 256
# A lane costs as much as 10,000 slots read for nothing.
COSTS = LaneCosts(lane_ms=1.0, slot_ms=0.0001, copy_ms=0.1, byte_ms=1e-8, late_ms=80.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("memory") / "model", num_hidden_layers=2, hidden_size=32)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> adapter.LoadedModel:
    return adapter.load(folder)


@pytest.fixture
def backend(loaded: adapter.LoadedModel) -> Iterator[MLXBackend]:
    backend = MLXBackend(loaded, Load(path="", max_rows=8))
    backend._placement.costs = COSTS
    yield backend
    assert backend.memory().arena_bytes == 0


class Rows:
    """Sequences of any length in a placement, each with its own number in its prompt's slots instead of a prefill."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.live: dict[int, Sequence] = {}
        self._next = 0

    def add(self, tokens: int) -> Sequence:
        self._next += 1
        sequence = Sequence(self._next, [0] * tokens, tokens, 9999, Sampling(seed=0), ignore_eos=True)
        self.placement.enter(sequence)
        self.live[sequence.seq] = sequence
        return sequence

    def write(self, sequence: Sequence) -> None:
        place = self.placement[sequence]
        for layer in place.lane._layers:
            for array in layer.arrays:
                array[place.row, :, : sequence.prompt_tokens] = sequence.seq
        mx.eval(place.lane.arrays)

    def step(self, joining: list[Sequence]) -> None:
        """As the back end does it: room, then settle, then write."""
        decoding = [sequence for sequence in self.live.values() if sequence not in joining]
        for sequence in decoding:
            sequence.tokens.append(0)
            self.placement.make_room(self.placement[sequence], 1)
        self.placement.settle()
        for sequence in self.live.values():
            place = self.placement[sequence]
            place.lane.lengths[place.row] = len(sequence.tokens)
        for sequence in joining:
            self.write(sequence)

    def remove(self, sequence: Sequence) -> None:
        del self.live[sequence.seq]
        self.placement.leave(sequence)

    def held(self) -> int:
        """Tokens, as the scheduler counts them: whole quanta."""
        return sum(-(-self.placement[sequence].tokens // QUANTUM) * QUANTUM for sequence in self.live.values())

    def slots(self) -> int:
        return sum(lane.rows * lane.slots for lane in self.placement.lanes)

    def check(self) -> None:
        """Everybody has a row, and in it what was written there."""
        for lane in self.placement.lanes:
            places = self.placement.of_lane(lane)
            assert sorted(place.row for place in places) == lane.in_use
            for place in places:
                assert lane.owners[place.row] == place.sequence.seq
                length = int(lane.lengths[place.row])
                assert length == len(place.sequence.tokens)
                for layer in lane._layers:
                    for array in layer.arrays:
                        written = array[place.row, :, : place.sequence.prompt_tokens]
                        assert bool((written == place.sequence.seq).all())


def test_padding_stays_within_half_of_the_kv_in_traffic_that_never_idles(backend: MLXBackend) -> None:
    """300 sequences of 100 to 8,000 tokens, eight at a time; the buffers are real ones."""
    rng = np.random.default_rng(1)
    rows = Rows(backend._placement)
    ratios, lanes, served, left = [], [], 0, {}
    while rows._next < 300 or rows.live:
        joining = []
        if len(rows.live) < 8 and rows._next < 300:
            joining = [rows.add(int(np.exp(rng.uniform(np.log(100), np.log(8000)))))]
            left[joining[0].seq] = int(rng.integers(3, 60))
            served += len(joining[0].tokens)
        rows.step(joining)
        served += len(rows.live)
        if rows._next % 50 == 0:
            rows.check()
        ratios.append((rows.slots(), rows.held()))
        lanes.append(len(rows.placement.lanes))
        for sequence in list(rows.live.values()):
            left[sequence.seq] -= 1
            if left[sequence.seq] == 0:
                rows.remove(sequence)
        if rows.live:
            arena_bytes = sum(lane.nbytes for lane in rows.placement.lanes)
            assert arena_bytes <= rows.slots() * backend.facts.kv_bytes_per_token + 1024
    slots, held = np.array(ratios).T
    assert np.sum(slots) / np.sum(held) <= 1.4
    assert np.max(slots / held) <= 1.5
    assert np.mean(lanes) <= 3.5
    # Of the thousands of tokens that each one reads.
    assert backend._placement.copied_bytes <= 10 * served * backend.facts.kv_bytes_per_token


def test_short_newcomers_do_not_keep_a_long_ones_lane(backend: MLXBackend) -> None:
    rows = Rows(backend._placement)
    rows.step([long := rows.add(7000)])
    for _ in range(10):
        rows.step([short := rows.add(100)])
        if long.seq in rows.live:
            rows.remove(long)
        rows.step([following := rows.add(120)])
        rows.remove(short)
        rows.step([])
        assert rows.slots() <= 1.5 * rows.held()
        rows.check()
        rows.step([last := rows.add(130)])
        rows.remove(following)
        rows.step([])
        rows.remove(last)


def test_rows_of_like_lengths_share_one_lane(backend: MLXBackend) -> None:
    """Each lane is another pass through attention."""
    rows = Rows(backend._placement)
    for tokens in (700, 600, 650, 500, 720, 640, 580, 610):
        rows.step([rows.add(tokens)])
    assert len(rows.placement.lanes) == 1
    for _ in range(300):
        rows.step([])
    assert len(rows.placement.lanes) == 1
    for sequence in list(rows.live.values()):
        rows.remove(sequence)


def test_padding_that_is_little_beside_the_weights_stays(loaded: adapter.LoadedModel) -> None:
    """Of a model whose weights weigh as much as a million tokens of KV: here it is 20,000 tokens."""
    backend = MLXBackend(loaded, Load(path="", max_rows=8))
    facts = replace(backend.facts, weights_bytes=10**6 * backend.facts.kv_bytes_per_token)
    backend._placement = Placement(loaded, backend._probe, facts, replace(COSTS, slot_ms=0.0))
    rows = Rows(backend._placement)
    for tokens in (100, 5000, 300, 700):
        rows.step([rows.add(tokens)])
    assert len(rows.placement.lanes) == 1
    for sequence in list(rows.live.values()):
        rows.remove(sequence)


@pytest.fixture
def lane(loaded: adapter.LoadedModel) -> Lane:
    """8 × 8,192 slots; rows 0 and 5 hold 40 tokens."""
    lane = Lane(loaded, adapter.layer_kinds(loaded.model), 8, round_slots(8192), scatter_write)
    for row in range(6):
        lane.acquire(row)
    for row in (0, 5):
        lane.prefill(row, list(range(5, 45)), last=True)
    for row in range(1, 5):
        lane.release(row)
    mx.eval(lane.arrays)
    return lane


def peak_bytes_of(action: Callable[[], None]) -> int:
    """What is held at some time during the action, more than before."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    action()
    return mx.get_peak_memory() - before


def test_a_move_within_a_lane_costs_the_row(lane: Lane) -> None:
    layer = lane._layers[0]
    assert isinstance(layer, KVLayer)
    row_bytes = 40 * layer.keys[0][0, :, 0].nbytes

    def move() -> None:
        lane.move(5, 1)
        mx.eval(lane.arrays)

    assert peak_bytes_of(move) <= 8 * row_bytes + 4096
    assert layer.keys[0].nbytes > 100 * row_bytes


def test_a_move_to_another_lane_costs_the_row(lane: Lane, loaded: adapter.LoadedModel) -> None:
    layer = lane._layers[0]
    assert isinstance(layer, KVLayer)
    other = Lane(loaded, adapter.layer_kinds(loaded.model), 2, round_slots(8192), scatter_write)
    mx.eval(other.arrays)

    def adopt() -> None:
        other.adopt(other.acquire(5), lane, 5)
        mx.eval(other.arrays, lane.arrays)

    assert peak_bytes_of(adopt) <= 8 * 40 * layer.keys[0][0, :, 0].nbytes + 4096


def test_another_shape_holds_one_buffer_twice(lane: Lane) -> None:
    layer = lane._layers[0]
    assert isinstance(layer, KVLayer)
    one = layer.keys[0].nbytes
    del layer

    def grow() -> None:
        lane.resize(8, round_slots(9000))
        mx.eval(lane.arrays)

    # Four buffers grow by a tenth each; one is held twice.
    assert peak_bytes_of(grow) <= 1.2 * one + 4 * 0.15 * one
    before = mx.get_active_memory()
    lane.resize(2, round_slots(300))
    mx.eval(lane.arrays)
    assert before - mx.get_active_memory() >= 4 * one


@pytest.mark.parametrize("lookahead", ["on", "off"])
def test_the_pool_is_empty_when_nobody_is_left(folder: Path, lookahead: str) -> None:
    with engine(folder, max_rows=4, lookahead=lookahead, stats_interval_s=0.0, prefix_cache=False) as client:
        fresh = client.idle_stats()
        assert fresh.mlx_cache_bytes <= 4096
        long, short = [client.submit([token] * length, 300) for token, length in ((5, 3000), (6, 50))]
        client.wait(lambda: all(len(client.answers[seq].tokens) > 3 for seq in (long, short)))
        both = client.stats[-1]
        assert both.arena_bytes <= 1.5 * both.kv_used_bytes
        client.cancel(long)
        client.wait_freed(long)
        seen = len(client.stats)
        client.wait(lambda: len(client.stats) > seen + 5)
        one = client.stats[-1]
        # It grows over several quanta; neither the long one's buffers nor its own old ones stay.
        assert one.arena_bytes <= 1.5 * one.kv_used_bytes < both.arena_bytes / 2
        assert both.mlx_active_bytes + both.mlx_cache_bytes - one.mlx_active_bytes - one.mlx_cache_bytes > 0
        client.wait_freed(short)
        idle = client.idle_stats()
        assert idle.arena_bytes == 0
        assert idle.mlx_cache_bytes <= 4096
        assert abs(idle.mlx_active_bytes - fresh.mlx_active_bytes) <= 4096


def test_the_share_of_padding_is_a_metric(tiny_server: Server) -> None:
    body = {"model": "default", "prompt": "Hello", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{tiny_server.url}/v1/completions", json=body, timeout=60) as answer:
        for _ in answer.iter_lines():
            ratio = tiny_server.metrics().get("lmx_kv_arena_ratio")  # none before the engine's first account
            if ratio:
                break
    assert 1 <= ratio <= 1.5
    tiny_server.idle()
    assert tiny_server.metrics()["lmx_kv_arena_ratio"] == 0
