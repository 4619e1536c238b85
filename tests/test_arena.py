"""Arena lanes under mlx-lm's unmodified models: rows of different lengths, writes of several tokens, rewinds, moves."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from lmx.engine.backend import Chunk, Sequence
from lmx.engine.mlx import adapter, cpu, probe
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.backend import MLXBackend
from lmx.engine.mlx.layers import DUMMY_SLOTS, Slots, scatter_write, slice_write
from lmx.protocol import Load, Sampling
from tests.models import build_model

ATTENTION = ("llama", "qwen3", "qwen3_moe", "gemma3_text", "deepseek_v2")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    made = {}

    def load(kind):
        if kind not in made:
            made[kind] = adapter.load(build_model(kind, tmp_path_factory.mktemp(kind) / "model"))
        return made[kind]

    return load


def make_lane(loaded, rows=4, slots=256, write=scatter_write):
    return Lane(loaded, adapter.layer_kinds(loaded.model), rows, slots, write)


def prompts_for(loaded, *lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(5, loaded.vocab_size, length).tolist() for length in lengths]


def greedy_alone(loaded, prompt, count):
    caches = adapter.make_prompt_cache(loaded.model)
    logits = loaded.model(mx.array([prompt]), cache=caches)
    answer = []
    for _ in range(count):
        answer.append(int(mx.argmax(logits[0, -1])))
        logits = loaded.model(mx.array([[answer[-1]]]), cache=caches)
    return answer


@pytest.mark.parametrize("write", [scatter_write, slice_write])
@pytest.mark.parametrize("kind", ATTENTION)
def test_drafts_with_another_accepted_count_in_every_row(loaded, kind, write):
    """One forward verifies 4 draft tokens in each row; rows accept 0 to 4 of them and go on from there, as if alone."""
    model = loaded(kind)
    lane = make_lane(model, write=write)
    prompts = prompts_for(model, 3, 17, 40, 29)
    expected = [greedy_alone(model, prompt, 24) for prompt in prompts]
    answers = []
    for index, prompt in enumerate(prompts):
        row = lane.acquire(index)
        answers.append([int(mx.argmax(lane.prefill(row, prompt, last=True)[0]))])
    rng = np.random.default_rng(2)
    while min(map(len, answers)) < 20:
        drafts = []
        wanted = rng.permutation(5)[:4]
        for answer, right, good in zip(answers, expected, wanted, strict=True):
            guess = [right[len(answer) + i] if len(answer) + i < len(right) else 0 for i in range(4)]
            if good < 4:
                guess[good] = (guess[good] + 1) % model.vocab_size
            drafts.append([answer[-1], *guess])
        before = lane.lengths.copy()
        logits = lane.decode(range(4), mx.array(drafts))
        drawn = np.array(mx.argmax(logits, axis=-1))
        for row, (answer, draft) in enumerate(zip(answers, drafts, strict=True)):
            accepted = 0
            while accepted < 4 and draft[accepted + 1] == drawn[row][accepted]:
                accepted += 1
            answer += drawn[row][: accepted + 1].tolist()
            lane.rewind(row, int(before[row]) + accepted + 1)
    for answer, right in zip(answers, expected, strict=True):
        assert answer[:20] == right[:20]


@pytest.mark.parametrize("kind", ATTENTION)
def test_whole_prompts_in_one_pass_equal_single_ones_and_write_only_their_own_slots(loaded, kind):
    model = loaded(kind)
    lane = make_lane(model)
    prompts = prompts_for(model, 37, 50, 1)
    rows = [2, 0, 3]
    for row in range(4):
        lane.acquire(row)
    lane.poison(inside=7.0, outside=7.0, span=0)
    answers = [[int(token)] for token in mx.argmax(lane.prefill_whole(rows, prompts), axis=-1)]
    for layer in lane._layers:
        for array in layer.arrays:
            written = np.array((array != 7.0).any(axis=(1, 3)))
            assert written.sum(axis=1).tolist() == [50, 0, 37, 1]
    for _ in range(9):
        for row, answer in zip(rows, answers, strict=True):
            lane.last_tokens[row] = answer[-1]
        logits = lane.decode(rows)[:, 0]
        for row, answer in zip(rows, answers, strict=True):
            answer.append(int(mx.argmax(logits[row])))
    assert answers == [greedy_alone(model, prompt, 10) for prompt in prompts]


def test_the_last_chunk_of_a_long_prompt_beside_decoding_rows_copies_no_buffer(loaded, monkeypatch):
    # Whose scores are no larger than a buffer here.
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", cpu.mlx_attention)
    backend = MLXBackend(loaded("llama"), Load(path="", max_rows=4))
    # So that both are in one lane, whatever was measured.
    backend._placement.costs = replace(backend._placement.costs, slot_ms=0.0, byte_ms=0.0)
    short, long = (
        Sequence(seq, [5 + seq] * tokens, tokens, 99, Sampling(seed=0, temperature=0.0), ignore_eos=True)
        for seq, tokens in enumerate((1500, 3000))
    )
    for sequence in (short, long):
        backend.start(sequence)
    backend.launch([], [Chunk(short, 0, 1500, last=True), Chunk(long, 0, 1000, last=False)]).wait()
    backend.launch([short], [Chunk(long, 1000, 1996, last=False)]).wait()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    draws = backend.launch([short], [Chunk(long, 2996, 4, last=True)]).wait()
    assert [draw.sequence for draw in draws] == [short, long]
    [lane] = backend._placement.lanes
    assert mx.get_peak_memory() - before < min(array.nbytes for layer in lane._layers for array in layer.arrays)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "lfm2", "qwen3_next"])
def test_rows_join_leave_move_and_change_lanes_without_touching_each_other(loaded, kind):
    model = loaded(kind)
    prompts = prompts_for(model, 6, 31, 18)
    expected = [greedy_alone(model, prompt, 16) for prompt in prompts]
    lane, wide = make_lane(model, rows=3), make_lane(model, rows=1, slots=512)
    answers = [[], [], []]
    rows = {}

    def decode(where, members):
        """One step of the sequences ``members``, all in lane ``where``."""
        logits = where.decode([rows[i] for i in members])[:, 0]
        for i in members:
            answers[i].append(int(mx.argmax(logits[rows[i]])))
            where.last_tokens[rows[i]] = answers[i][-1]

    def join(i, pieces):
        rows[i] = lane.acquire(i)
        start = 0
        for end in pieces:
            logits = lane.prefill(rows[i], prompts[i][start:end], last=end == len(prompts[i]))
            start = end
        answers[i].append(int(mx.argmax(logits[0])))
        lane.last_tokens[rows[i]] = answers[i][-1]

    join(0, [6])
    decode(lane, [0])
    rows[1] = lane.acquire(1)
    lane.prefill(rows[1], prompts[1][:8], last=False)  # a prompt half done while another row decodes
    decode(lane, [0])
    answers[1].append(int(mx.argmax(lane.prefill(rows[1], prompts[1][8:], last=True)[0])))
    lane.last_tokens[rows[1]] = answers[1][-1]
    join(2, [5, 18])
    decode(lane, [0, 1, 2])
    lane.release(rows.pop(0))
    decode(lane, [1, 2])
    lane.move(rows[2], 0)
    rows[2] = 0
    decode(lane, [1, 2])
    lane.resize(4, 512)
    rows[2], rows[1] = 0, 1
    decode(lane, [1, 2])
    row = wide.acquire(1)
    wide.adopt(row, lane, rows[1])
    lane.release(rows[1])
    rows[1] = row
    decode(wide, [1])
    decode(lane, [2])
    for answer, right in zip(answers, expected, strict=True):
        assert answer == right[: len(answer)]
    assert [len(answer) for answer in answers] == [4, 6, 6]


def test_the_cache_shows_a_model_nothing_past_a_rows_length(loaded):
    model = loaded("llama")
    lane = make_lane(model, rows=1)
    lane.prefill(lane.acquire(0), [5] * 9, last=True)
    seen = []
    original = lane._loaded.hidden

    class Spy:
        logits = model.logits
        vocab_size = model.vocab_size
        query_heads = model.query_heads

        def hidden(self, tokens, caches):
            found = original(tokens, caches)
            seen.extend(array.shape[2] for cache in caches for array in cache.state)
            return found

    lane._loaded = Spy()
    lane.decode([0])
    assert set(seen) == {10}


def test_the_probe_refuses_a_model_whose_rows_see_each_other(loaded):
    model = loaded("llama")
    kinds = adapter.layer_kinds(model.model)

    def leaky(buffer, positions, new):
        return scatter_write(buffer, positions, new + 0.5 * mx.roll(new, 1, axis=0))

    assert probe.compare(model, kinds, scatter_write) == ""
    assert "run alone" in probe.compare(model, kinds, leaky)


def test_a_recurrent_state_is_not_rewound_silently(loaded):
    lane = make_lane(loaded("lfm2"))
    row = lane.acquire(1)
    lane.prefill(row, [5, 6, 7, 8], last=True)
    assert lane.rewind(row, 2) == 0


@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("write", [scatter_write, slice_write])
def test_writes_are_in_place_and_reach_only_their_slots(write, rows):
    rng = np.random.default_rng(0)
    content = rng.normal(size=(4, 2, 64, 8)).astype(np.float32)
    new = rng.normal(size=(rows, 2, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1], [7, 8], [64 - DUMMY_SLOTS, 64 - DUMMY_SLOTS + 1], [20, 21]])[:rows]
    expected = content.copy()
    for row in range(rows):
        expected[row, :, positions[row]] = new[row].swapaxes(0, 1)
    buffer = mx.array(content)
    mx.eval(buffer)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    buffer = write(buffer, Slots(positions), mx.array(new))
    mx.eval(buffer)
    assert np.array_equal(np.array(buffer), expected)
    assert mx.get_peak_memory() - before < content.nbytes


def test_more_tokens_a_row_than_there_are_dummy_slots_are_refused(loaded):
    lane = make_lane(loaded("llama"), rows=1)
    lane.prefill(lane.acquire(0), [5, 6], last=True)
    assert lane.decode([0], mx.zeros((1, DUMMY_SLOTS), mx.int32)).shape[1] == DUMMY_SLOTS
    with pytest.raises(AssertionError, match=str(DUMMY_SLOTS + 1)):
        lane.decode([0], mx.zeros((1, DUMMY_SLOTS + 1), mx.int32))
