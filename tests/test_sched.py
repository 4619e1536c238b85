"""The scheduler's policy, one rule at a time, on the compiled core and on the pure-Python reference."""

import math
import random
import statistics
import sys

import pytest

from lmx._sched import NeverFits, Prefill, Scheduler
from tests.sched_reference import ReferenceScheduler
from tests.sched_simulation import Request, Simulation, gpu_ms, memory_tight, recomputed_share, torn_wave

BOTH = pytest.mark.parametrize("implementation", [Scheduler, ReferenceScheduler], ids=["compiled", "reference"])


def make(implementation, **changes):
    sizes = {"max_rows": 4, "kv_budget_bytes": 1_000_000, "kv_bytes_per_token": 1, "kv_quantum_tokens": 32}
    return implementation(**(sizes | changes))


def run(scheduler, now=0.0, cost_ms=50.0, finished=()):
    """One step from plan to release; what was planned, as plain values."""
    plan = scheduler.plan(now)
    if plan.step:
        scheduler.commit(plan.step, cost_ms(plan) if callable(cost_ms) else cost_ms, finished)
    for seq in scheduler.releasable():
        scheduler.release(seq)
    return plan.decode, tuple((chunk.seq, chunk.start, chunk.tokens) for chunk in plan.prefills)


def drain(scheduler, bound=1000, **options):
    """Every step until nothing lives."""
    steps = []
    while (figures := scheduler.statistics()).queued + figures.prefilling + figures.decoding + figures.ending:
        steps.append(run(scheduler, **options))
        assert len(steps) < bound
    assert figures.kv_used_bytes == 0
    return steps


def prefill_order(steps):
    return [seq for _, chunks in steps for seq, _, _ in chunks]


def chunk_tokens(plan):
    return sum(chunk.tokens for chunk in plan.prefills)


# --- a sequence's life --------------------------------------------------------------------------------


@BOTH
def test_a_prompt_prefills_in_chunks_then_decodes_to_max_tokens(implementation):
    scheduler = make(implementation, max_chunk_tokens=64)
    assert scheduler.submit(7, 150, 3) == 3
    chunks = [((7, 0, 64),), ((7, 64, 64),), ((7, 128, 22),)]
    assert drain(scheduler) == [*(((), chunk) for chunk in chunks), ((7,), ()), ((7,), ())]
    assert scheduler.plan(0.0).step == 0


@BOTH
def test_lookahead_counts_planned_tokens_and_holds_the_kv_until_the_last_step_is_committed(implementation):
    scheduler = make(implementation)
    scheduler.submit(1, 20, 2)
    assert scheduler.plan(0.0).prefills == (Prefill(1, 0, 20, last=True),)
    assert scheduler.plan(0.0).decode == (1,)
    scheduler.commit(1, 50.0)
    assert scheduler.plan(0.0).step == 0
    assert scheduler.releasable() == ()
    assert not scheduler.cancel(1)
    with pytest.raises(ValueError, match="seq 1 cannot be released"):
        scheduler.release(1)
    scheduler.commit(2, 50.0)
    assert scheduler.releasable() == (1,)
    assert scheduler.release(1) == 32


@BOTH
def test_a_sequence_that_ended_in_a_step_is_released_after_the_step_planned_meanwhile(implementation):
    scheduler = make(implementation)
    scheduler.submit(1, 20, 100)
    scheduler.plan(0.0)
    assert scheduler.plan(0.0).decode == (1,)
    scheduler.commit(1, 50.0, finished=(1,))
    assert scheduler.plan(0.0).step == 0
    assert scheduler.releasable() == ()
    scheduler.commit(2, 50.0, finished=(1,))  # its second end changes nothing
    assert scheduler.releasable() == (1,)


@BOTH
def test_cancel_in_every_state(implementation):
    scheduler = make(implementation, max_rows=2, max_chunk_tokens=32)
    scheduler.submit(1, 10, 50)
    run(scheduler)
    scheduler.submit(2, 100, 50)
    run(scheduler)
    scheduler.submit(3, 10, 50)
    figures = scheduler.statistics()
    assert (figures.decoding, figures.prefilling, figures.queued) == (1, 1, 1)
    assert [scheduler.cancel(seq) for seq in (1, 2, 3, 3, 4)] == [True, True, True, False, False]
    assert scheduler.plan(0.0).step == 0
    assert sorted(scheduler.releasable()) == [1, 2, 3]
    assert [scheduler.release(seq) for seq in (1, 2, 3)] == [32, 128, 0]
    assert scheduler.statistics().kv_used_bytes == 0


@BOTH
def test_deadlines(implementation):
    scheduler = make(implementation)
    assert scheduler.next_deadline() == math.inf
    scheduler.submit(1, 10, 50, deadline=5.0)
    scheduler.submit(2, 10, 50, deadline=4.0)
    scheduler.submit(3, 10, 50)
    assert scheduler.next_deadline() == 4.0
    assert scheduler.plan(3.9).expired == ()
    plan = scheduler.plan(4.0)
    assert (plan.expired, plan.decode) == ((2,), (1,))
    scheduler.commit(1, 50.0)
    assert scheduler.next_deadline() == 5.0
    assert scheduler.plan(4.5).expired == ()
    scheduler.commit(2, 50.0)
    assert scheduler.plan(100.0).expired == (1,)
    assert scheduler.next_deadline() == math.inf


# --- order --------------------------------------------------------------------------------------------


@BOTH
def test_one_client_is_served_in_order_of_arrival(implementation):
    scheduler = make(implementation)
    for seq, prompt_tokens in ((5, 200), (3, 10), (4, 100)):
        scheduler.submit(seq, prompt_tokens, 1)
    assert prefill_order(drain(scheduler)) == [5, 3, 4]


@BOTH
def test_a_clients_prompts_of_one_chunk_pass_its_long_ones_eight_times(implementation):
    scheduler = make(implementation, max_chunk_tokens=64)
    scheduler.submit(0, 200, 1)
    scheduler.submit(1, 300, 1)
    for seq in range(2, 14):
        scheduler.submit(seq, 10, 1)
    scheduler.submit(20, 400, 1)
    scheduler.submit(21, 10, 1)  # may not pass the short ones that still wait
    order = list(dict.fromkeys(prefill_order(drain(scheduler))))
    assert order == [*range(2, 10), 0, 1, *range(10, 14), 21, 20]


@BOTH
def test_a_begun_long_prompt_is_passed_too_but_not_when_one_chunk_is_left(implementation):
    scheduler = make(implementation, max_chunk_tokens=64)
    scheduler.submit(1, 200, 1)
    run(scheduler)
    scheduler.submit(2, 10, 1)
    assert prefill_order(run(scheduler) for _ in range(3)) == [2, 1, 1]
    scheduler.submit(3, 10, 1)
    assert prefill_order(run(scheduler) for _ in range(1)) == [1, 3]


@BOTH
def test_a_bot_behind_a_very_long_prompt_of_its_own_client_waits_for_a_chunk_of_it(implementation):
    simulation = Simulation(make(implementation, max_chunk_tokens=2048), gpu_ms)
    simulation.arrive(0.0, Request(62_000, 200))
    short = simulation.arrive(1000.0, Request(300, 50))
    simulation.run()
    assert simulation.runs[short].ttft_ms < 2500.0


@BOTH
def test_a_long_prompt_does_not_block_another_clients_short_one(implementation):
    scheduler = make(implementation, max_chunk_tokens=512)
    scheduler.submit(1, 100_000, 1, client="long")
    run(scheduler)
    scheduler.submit(2, 80, 1, client="short")
    # Equal counters: arrival; then the least served.
    assert prefill_order(run(scheduler) for _ in range(3)) == [1, 2, 1]


@BOTH
def test_clients_get_equal_tokens_not_equal_requests(implementation):
    scheduler = make(implementation, max_rows=2)
    served = [0, 0]
    for seq in range(400):
        scheduler.submit(seq, (300, 30)[seq % 2], 10, client="ab"[seq % 2])
    for _ in range(800):
        decode, chunks = run(scheduler)
        for seq in decode:
            served[seq % 2] += 1
        for seq, _, tokens in chunks:
            served[seq % 2] += tokens + 1
    assert min(served) > 3000
    assert abs(served[0] - served[1]) <= 2 * 310


@BOTH
def test_idleness_is_no_credit(implementation):
    scheduler = make(implementation, max_rows=1)
    scheduler.submit(0, 300, 1, client="early")
    run(scheduler)  # "early" was served 301 tokens and goes idle
    for seq in range(1, 11):
        scheduler.submit(seq, 300, 1, client="busy")
    for _ in range(5):
        run(scheduler)
    for seq in range(11, 16):
        scheduler.submit(seq, 300, 1, client="early")
        scheduler.submit(seq + 5, 300, 1, client="new")
    clients = ["early" if seq < 1 or 11 <= seq < 16 else "new" if seq >= 16 else "busy" for seq in range(21)]
    order = [clients[seq] for seq in prefill_order([run(scheduler) for _ in range(12)])]
    for turn in range(0, 12, 3):  # nobody works off a credit: all three take turns from the start
        assert sorted(order[turn : turn + 3]) == ["busy", "early", "new"]


@BOTH
def test_after_an_idle_time_nobody_starts_ahead(implementation):
    scheduler = make(implementation)
    scheduler.submit(0, 300, 1, client="regular")
    drain(scheduler)
    for seq, client in enumerate(["new", "new", "regular", "new", "regular"], start=1):
        scheduler.submit(seq, 100, 1, client=client)
    assert prefill_order(drain(scheduler)) == [1, 3, 2, 5, 4]


@BOTH
def test_an_idle_client_keeps_its_debt_however_many_others_come_and_go(implementation):
    scheduler = make(implementation, max_rows=2)
    scheduler.submit(0, 10, 1000, client="steady")
    run(scheduler)
    scheduler.submit(1, 900, 1, client="heavy")
    for _ in range(900 // 32):  # then "heavy" is idle, far ahead of "steady"
        run(scheduler)
    for seq in range(100, 200):
        scheduler.submit(seq, 10, 1, client=f"visitor {seq}")
        scheduler.cancel(seq)
        scheduler.release(seq)
    scheduler.submit(2, 30, 1, client="heavy")
    scheduler.submit(3, 30, 1, client="new")
    assert prefill_order(run(scheduler) for _ in range(4)) == [3, 2]


@BOTH
def test_priority_goes_first(implementation):
    scheduler = make(implementation, max_rows=1)
    for seq, priority in enumerate([0, -1, 2, 2, 1]):
        scheduler.submit(seq, 10, 1, priority=priority)
    assert prefill_order(drain(scheduler)) == [2, 3, 4, 0, 1]


def used_to_short_answers(implementation, **changes):
    """It expects that answers are short, and leaves room for no more."""
    scheduler = make(implementation, **changes)
    for seq in range(1000, 1200):
        scheduler.submit(seq, 1, 1, client="short")
        run(scheduler)
    drain(scheduler)
    return scheduler


# --- giving way ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("full", [{"max_rows": 2}, {"kv_budget_bytes": 120 * 32}], ids=["rows", "kv"])
def test_a_higher_priority_gets_its_place_within_a_preemption(implementation, full):
    scheduler = make(implementation, **full)
    for seq in (1, 2):
        scheduler.submit(seq, 1000 * seq, 300)
    for _ in range(10):
        run(scheduler)
    assert scheduler.statistics().decoding == 2
    scheduler.submit(3, 1500, 20, priority=10)
    if "kv_budget_bytes" in full:
        run(scheduler)  # in which it is seen to lack KV
    plan = scheduler.plan(0.0)
    assert (plan.preempted, plan.decode) == ((1,), (2,)), "who is computed again soonest"
    scheduler.commit(plan.step, 50.0)
    assert prefill_order([run(scheduler)]) == [3]
    steps = drain(scheduler, bound=10_000)
    assert sum((1 in decode) + (2 in decode) for decode, _ in steps) > 500, "both went on to their ends"
    assert scheduler.statistics().preemptions == 1


@BOTH
def test_nobody_gives_way_where_it_would_not_help_or_where_rows_come_back_by_themselves(implementation):
    scheduler = make(implementation, max_rows=2, kv_budget_bytes=100 * 32)
    scheduler.submit(1, 1500, 500, priority=10)
    scheduler.submit(2, 500, 500)
    for _ in range(8):
        run(scheduler)
    scheduler.submit(3, 2000, 20, priority=10)  # does not fit beside 1
    assert scheduler.plan(0.0).preempted == ()
    scheduler.cancel(3)
    scheduler.cancel(1)
    scheduler.submit(4, 10, 20, priority=10)
    assert scheduler.plan(0.0).preempted == ()


@BOTH
def test_a_client_far_behind_gets_a_row_of_one_that_holds_them_all(implementation):
    scheduler = make(implementation, max_rows=8)
    for seq in range(8):
        scheduler.submit(seq, 100, 4000, client="all rows")
    while scheduler.statistics().decoding < 8:
        run(scheduler)
    for seq in range(100, 110):
        scheduler.submit(seq, 50, 2000, client="behind")
    rows, preempted = [], []
    for step in range(700):
        plan = scheduler.plan(0.0)
        preempted += plan.preempted
        rows.append(sum(seq >= 100 for seq in plan.decode))
        scheduler.commit(plan.step, 50.0)
        if step < 512 // 8:
            assert not preempted
    assert rows.index(1) <= 512 // 8 + 5
    assert rows[-1] == 4, "its share, and not more"
    assert len(preempted) == len(set(preempted)) == 4
    assert preempted[0] == 7, "of equal ones the last started"
    drain(scheduler, bound=20_000)
    assert scheduler.statistics().preemptions <= 2 * 18


@BOTH
def test_clients_with_a_row_each_take_turns_seldom(implementation):
    scheduler = make(implementation, max_rows=2)
    for seq in range(3):
        scheduler.submit(seq, 100, 6000, client=f"client-{seq}")
    first = {}
    for step in range(8000):
        for seq in run(scheduler)[0]:
            first.setdefault(seq, step)
    assert 2048 - 100 <= first[2] < 2048  # the others were charged for their prompts before
    drain(scheduler, bound=20_000)
    assert 1 <= scheduler.statistics().preemptions <= 2 * 3


# --- memory -------------------------------------------------------------------------------------------


@BOTH
def test_a_smaller_budget_holds_for_all_but_the_first_started(implementation):
    scheduler = make(implementation, kv_budget_bytes=40 * 32)
    for seq in (1, 2):
        scheduler.submit(seq, 300, 200)
    while scheduler.statistics().decoding < 2:
        run(scheduler)
    scheduler.submit(3, 500, 8)
    scheduler.submit(4, 100, 8)
    assert scheduler.resize(8 * 32) == (3,)
    assert scheduler.statistics().kv_budget_bytes == 8 * 32
    plan = scheduler.plan(0.0)
    assert (plan.preempted, plan.decode, plan.prefills) == ((2,), (1,), ())
    scheduler.commit(plan.step, 1.0)
    with pytest.raises(NeverFits):
        scheduler.submit(5, 256, 1)
    assert scheduler.submit(6, 250, 99) == 7
    # 2 has answered in part: it may exceed the budget too, alone, as 3 does unless it is cancelled.
    most = 0
    while scheduler.statistics().queued or scheduler.statistics().decoding or scheduler.statistics().prefilling:
        plan = scheduler.plan(0.0)
        scheduler.commit(plan.step, 1.0)
        for seq in scheduler.releasable():
            scheduler.release(seq)
        used = scheduler.statistics().kv_used_bytes
        most = max(most, used)
        assert used <= 8 * 32 or len({*plan.decode, *(chunk.seq for chunk in plan.prefills)}) == 1
    assert most == 16 * 32


@BOTH
def test_a_larger_budget_lets_more_in(implementation):
    scheduler = make(implementation, kv_budget_bytes=4 * 32)
    with pytest.raises(NeverFits):
        scheduler.submit(1, 300, 8)
    assert scheduler.resize(40 * 32) == ()
    assert scheduler.submit(1, 300, 8) == 8
    drain(scheduler, bound=50)
    for wrong in (0, -1, 1.5, "many"):
        with pytest.raises((ValueError, TypeError)):
            scheduler.resize(wrong)


@BOTH
def test_never_fits_and_the_budget_as_a_limit_of_max_tokens(implementation):
    scheduler = make(implementation, kv_budget_bytes=330, kv_bytes_per_token=3, kv_bytes_per_sequence=10)
    with pytest.raises(NeverFits) as refusal:  # 320 bytes hold 3 quanta, 96 tokens
        scheduler.submit(1, 96, 1)
    assert (refusal.value.needed_bytes, refusal.value.budget_bytes) == (10 + 4 * 96, 330)
    assert scheduler.submit(1, 95, 2**40) == 2
    assert scheduler.submit(2, 60, 1000) == 37
    steps = drain(scheduler)
    assert sum(decode == (2,) for decode, *_ in steps) == 36
    assert scheduler.statistics().preemptions == 0


@BOTH
@pytest.mark.parametrize("per_sequence", [0, 100])
def test_where_nothing_grows_with_the_tokens_only_rows_and_the_constant_part_limit(implementation, per_sequence):
    sizes = {"kv_bytes_per_token": 0, "kv_bytes_per_sequence": per_sequence, "kv_budget_bytes": 250, "max_rows": 3}
    scheduler = make(implementation, **sizes)
    for seq in range(4):
        assert scheduler.submit(seq, 100_000, 2**40) == 2**40
    for _ in range(1000):
        run(scheduler)
    figures = scheduler.statistics()
    assert (figures.decoding, figures.kv_used_bytes) == ((2, 200) if per_sequence else (3, 0))
    for seq in range(4):
        scheduler.cancel(seq)
    run(scheduler)
    scheduler.submit(9, 10, 2)
    assert [decode for decode, _ in drain(scheduler)] == [(), (9,)]


@BOTH
def test_a_constant_part_beyond_the_budget_never_fits(implementation):
    scheduler = make(implementation, kv_bytes_per_token=0, kv_bytes_per_sequence=300, kv_budget_bytes=250)
    with pytest.raises(NeverFits) as refusal:
        scheduler.submit(1, 1, 1)
    assert (refusal.value.needed_bytes, refusal.value.budget_bytes) == (300, 250)


@BOTH
@pytest.mark.parametrize(("prompt_tokens", "max_tokens", "quanta"), [(63, 9, 2), (64, 9, 3), (64, 1, 2), (1, 1, 1)])
def test_admission_takes_whole_quanta_for_the_prompt_and_the_first_decode(
    implementation, prompt_tokens, max_tokens, quanta
):
    scheduler = make(implementation, kv_bytes_per_token=3, kv_bytes_per_sequence=7)
    scheduler.submit(1, prompt_tokens, max_tokens)
    assert scheduler.statistics().kv_used_bytes == 0
    scheduler.plan(0.0)
    assert scheduler.statistics().kv_used_bytes == 7 + quanta * 32 * 3


@BOTH
def test_growth_preempts_a_later_started_one_which_comes_back_and_loses_nothing(implementation):
    scheduler = used_to_short_answers(implementation, kv_budget_bytes=6 * 32)
    scheduler.submit(1, 60, 60)  # 2 quanta, then up to 4
    scheduler.submit(2, 50, 40)  # 2 quanta, then 3
    given = {1: 0, 2: 0}
    prefills = []
    while any(given[seq] < limit for seq, limit in ((1, 60), (2, 40))):
        plan = scheduler.plan(0.0)
        assert plan.preempted in ((), (2,))
        for seq in plan.decode:
            given[seq] += 1
        for chunk in plan.prefills:
            prefills.append((chunk.seq, chunk.start, chunk.tokens, given[chunk.seq]))
            given[chunk.seq] += chunk.last
        scheduler.commit(plan.step, 50.0)
        for seq in scheduler.releasable():
            scheduler.release(seq)
    assert given == {1: 60, 2: 40}
    assert scheduler.statistics().preemptions == 1
    assert scheduler.statistics().kv_used_bytes == 0
    first, second, again = prefills
    assert (first[0], second) == (1, (2, 0, 50, 0))
    assert again[:2] == (2, 0)
    assert again[2] == 50 + again[3], "it prefills its prompt and its answer so far"


@BOTH
def test_of_the_later_started_the_one_that_is_soonest_computed_again_gives_way_and_is_not_charged_again(implementation):
    scheduler = used_to_short_answers(implementation, kv_budget_bytes=11 * 32)
    for seq, prompt_tokens in enumerate((90, 60, 90)):
        scheduler.submit(seq, prompt_tokens, 100, client=f"client-{seq}")
    given = [0, 0, 0]
    while not (plan := scheduler.plan(0.0)).preempted:
        for seq in (*plan.decode, *(chunk.seq for chunk in plan.prefills if chunk.last)):
            given[seq] += 1
        scheduler.commit(plan.step, 50.0)
    assert plan.preempted == (1,)
    scheduler.commit(plan.step, 50.0)
    for seq in (0, 2):
        scheduler.cancel(seq)
    for seq in scheduler.releasable():
        scheduler.release(seq)
    assert run(scheduler)[1] == ((1, 0, 60 + given[1]),)
    scheduler.submit(10, 1, 2, client="client-2")  # charged 90 and its answer
    scheduler.submit(11, 1, 2, client="client-1")  # charged 60 and its answer, not 60 and its answer again
    assert prefill_order([run(scheduler), run(scheduler)]) == [11, 10]


@BOTH
def test_growth_preempts_the_lowest_priority_first(implementation):
    scheduler = used_to_short_answers(implementation, kv_budget_bytes=4 * 32)
    scheduler.submit(1, 10, 100)
    run(scheduler)
    scheduler.submit(2, 30, 90, priority=1)
    preempted = []
    for _ in range(60):
        plan = scheduler.plan(0.0)
        preempted += plan.preempted
        scheduler.commit(plan.step, 50.0)
    assert preempted == [1]


@BOTH
def test_rows_wait_for_kv_that_ended_sequences_still_hold(implementation):
    scheduler = used_to_short_answers(implementation, kv_budget_bytes=6 * 32)
    scheduler.submit(1, 61, 60)  # its 36th decode needs a fourth quantum
    scheduler.submit(2, 40, 100)
    decoded = 0
    while decoded < 35:
        plan = scheduler.plan(0.0)
        decoded += 1 in plan.decode
        if decoded < 35:
            scheduler.commit(plan.step, 50.0)
    step = plan.step
    scheduler.cancel(2)
    assert scheduler.plan(0.0).step == 0
    scheduler.commit(step, 50.0)
    assert scheduler.release(2) == 96
    plan = scheduler.plan(0.0)
    assert (plan.decode, plan.preempted) == ((1,), ())
    assert scheduler.statistics().preemptions == 0


@BOTH
def test_a_waiting_sequence_is_overtaken_a_bounded_number_of_times(implementation):
    scheduler = make(implementation, kv_budget_bytes=10 * 32, max_rows=8)
    scheduler.submit(0, 30, 200)
    run(scheduler)
    scheduler.submit(1, 300, 1)  # 10 quanta: waits for the first to end
    for seq in range(2, 40):
        scheduler.submit(seq, 10, 1)
    order = prefill_order(drain(scheduler))
    assert order.index(1) == 8
    assert order[:8] == list(range(2, 10))


@BOTH
def test_at_most_max_rows_hold_rows_the_unreleased_included(implementation):
    scheduler = make(implementation, max_rows=2)
    for seq in range(3):
        scheduler.submit(seq, 10, 1)
    for step in (1, 2):
        assert [chunk.seq for chunk in scheduler.plan(0.0).prefills] == [step - 1]
        scheduler.commit(step, 50.0)
    assert scheduler.plan(0.0).step == 0
    scheduler.release(0)
    assert [chunk.seq for chunk in scheduler.plan(0.0).prefills] == [2]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_where_kv_is_short_little_is_computed_twice(seed):
    simulation = memory_tight(Scheduler, seed)
    runs = [run for run in simulation.runs.values() if run.token_times]
    assert recomputed_share(simulation) <= 0.1
    # Without room for growth 17 to 28 % were computed twice, and 37,000 to 39,000 tokens generated.
    assert sum(len(run.token_times) for run in runs) > 60_000
    assert sum(run.done and run.request.prompt_tokens == 40_000 for run in runs) >= 4, "long prompts go on, too"
    assert simulation.scheduler.statistics().decoding >= 2, "not one after the other"


# --- prompts that start together ----------------------------------------------------------------------


def measured(implementation, cost_ms=50.0, **changes):
    """An idle scheduler that has seen a prompt's cost."""
    scheduler = make(implementation, **({"max_rows": 8} | changes))
    scheduler.submit(0, 85, 1, client="first")
    drain(scheduler, cost_ms=cost_ms)
    return scheduler


def starting(scheduler):
    return [seq for seq, _, _ in run(scheduler)[1]]


@BOTH
def test_with_nobody_decoding_prompts_that_wait_start_in_one_step(implementation):
    scheduler = measured(implementation)
    for seq in range(1, 10):
        scheduler.submit(seq, 80 + seq, 3)
    eight = tuple(range(1, 9))
    assert run(scheduler) == ((), tuple((seq, 0, 80 + seq) for seq in eight))
    assert run(scheduler) == (eight, ())


@BOTH
def test_at_most_64_prompts_start_in_one_step(implementation):
    scheduler = measured(implementation, max_rows=100)
    for seq in range(1, 81):
        scheduler.submit(seq, 1, 3)
    assert starting(scheduler) == list(range(1, 65))


@BOTH
def test_before_any_measurement_one_prompt_starts_a_step(implementation):
    scheduler = make(implementation, max_rows=8)
    for seq in range(4):
        scheduler.submit(seq, 20, 50)
    assert [scheduler.plan(0.0).prefills for _ in range(2)] == [
        (Prefill(0, 0, 20, last=True),),
        (Prefill(1, 0, 20, last=True),),
    ]


@BOTH
def test_the_end_of_a_long_prompt_is_joined_too(implementation):
    scheduler = measured(implementation, max_chunk_tokens=64)
    scheduler.submit(1, 100, 5)
    assert run(scheduler)[1] == ((1, 0, 64),)
    scheduler.submit(2, 30, 5)
    assert run(scheduler)[1] == ((1, 64, 36), (2, 0, 30))


@BOTH
@pytest.mark.parametrize(
    ("changes", "third"),
    [
        ({"max_wave_tokens": 150}, {}),
        ({"max_rows": 2}, {}),
        ({"kv_budget_bytes": 7 * 32}, {}),
        ({}, {"priority": -1}),
    ],
    ids=["wave", "rows", "kv", "priority"],
)
def test_it_ends_at_the_first_that_does_not_fit(implementation, changes, third):
    scheduler = measured(implementation, **changes)
    for seq in (1, 2):
        scheduler.submit(seq, 70, 5)
    scheduler.submit(3, **({"prompt_tokens": 70, "max_tokens": 5} | third))
    scheduler.submit(4, 10, 5, priority=third.get("priority", 0))
    assert starting(scheduler) == [1, 2]


@BOTH
def test_it_ends_where_the_step_would_take_too_long(implementation):
    scheduler = measured(implementation, itl_target_ms=100.0, cost_ms=lambda plan: cpu_ms(0, 0, chunk_tokens(plan), 0))
    for seq in range(1, 9):
        scheduler.submit(seq, 85, 5)
    allowed = [count for count in range(1, 9) if scheduler.predict_ms(0, 0, [(0, 85)] * count) <= 8 * 100.0]
    assert starting(scheduler) == allowed == [1, 2, 3, 4]


@BOTH
def test_its_members_are_in_the_order_of_fairness_as_if_taken_one_by_one(implementation):
    scheduler = measured(implementation)
    for seq in (1, 2, 3):
        scheduler.submit(seq, 50, 5, client="many")
    scheduler.submit(4, 120, 5, client="other")
    scheduler.submit(5, 10, 5, client="other")
    scheduler.submit(6, 10, 5, client="third")
    scheduler.submit(7, 10, 5, client="urgent", priority=1)
    assert starting(scheduler) == [7]
    scheduler.cancel(7)
    assert starting(scheduler) == [1, 4, 6, 2, 3, 5]


@BOTH
def test_a_token_drawn_counts_for_the_order_too(implementation):
    scheduler = measured(implementation)
    for seq, client in enumerate("aabb", start=1):
        scheduler.submit(seq, 50, 5, client=client)
    assert starting(scheduler) == [1, 3, 2, 4]  # both at 51 after one: arrival


@BOTH
def test_a_higher_priority_that_waits_for_kv_is_passed_by_one_a_step(implementation):
    scheduler = measured(implementation, kv_budget_bytes=10 * 32)
    scheduler.submit(1, 200, 5)
    step = scheduler.plan(0.0).step
    scheduler.cancel(1)  # not released: its KV is held
    scheduler.submit(3, 10, 5)
    scheduler.submit(4, 10, 5)
    scheduler.submit(2, 300, 5, priority=1)  # last, so that nothing but its priority puts it before 4
    assert [chunk.seq for chunk in scheduler.plan(0.0).prefills] == [3]
    scheduler.commit(step, 50.0)


@BOTH
@pytest.mark.parametrize(("prompt_tokens", "expected"), [(60, [2, 3]), (64, [2])])
def test_a_begun_prompt_that_is_next_in_order_is_not_overtaken(implementation, prompt_tokens, expected):
    scheduler = measured(implementation, max_chunk_tokens=64)
    scheduler.submit(1, 200, 5, client="a")
    assert run(scheduler)[1] == ((1, 0, 64),)
    scheduler.submit(2, prompt_tokens, 5, client="b")  # "b" comes in at the 64 tokens that "a" was served
    scheduler.submit(3, prompt_tokens, 5, client="b")
    assert starting(scheduler) == [1]  # now "a" has 128, and "b" after one prompt 125 or 129
    assert starting(scheduler) == expected


# --- beside decoding rows, and moments after a wave -----------------------------------------------------


@BOTH
def test_prompts_share_a_step_beside_decoding_rows_as_far_as_its_time_allows(implementation):
    scheduler = with_decoding_rows(implementation, 2, itl_target_ms=400.0)
    for seq in range(100, 110):
        scheduler.submit(seq, 30, 5, client="new")
    decode, chunks = run(scheduler, cost_ms=lambda plan: cpu_ms(2, 200, chunk_tokens(plan), 0))
    assert decode == (0, 1)
    assert [(seq, start, tokens) for seq, start, tokens in chunks] == [(100 + i, 0, 30) for i in range(len(chunks))]
    taken = [(0, 30)] * len(chunks)
    assert 2 <= len(chunks) < 10
    assert scheduler.predict_ms(2, 250, taken) <= 400.0 < scheduler.predict_ms(2, 250, [*taken, (0, 30)])


@BOTH
def test_the_rest_of_a_begun_prompt_shares_a_step_with_the_next_in_order(implementation):
    scheduler = with_decoding_rows(implementation, 1, itl_target_ms=300.0)
    scheduler.submit(100, 100, 5, client="long")
    assert run(scheduler)[1] == ((100, 0, 64),)
    scheduler.submit(101, 20, 5, client="a new one")
    # The new client comes in at the smallest counter, that of the decoding row's; both end in this step.
    assert sorted(run(scheduler)[1]) == [(100, 64, 36), (101, 0, 20)]


@BOTH
def test_what_comes_while_a_wave_runs_starts_before_its_rows_go_on(implementation):
    scheduler = measured(implementation)
    scheduler.submit(1, 85, 5)
    assert run(scheduler) == ((), ((1, 0, 85),))
    for seq in (2, 3, 4):
        scheduler.submit(seq, 85, 5)
    assert run(scheduler) == ((), ((2, 0, 85), (3, 0, 85), (4, 0, 85)))
    scheduler.submit(5, 85, 5)
    assert run(scheduler) == ((), ((5, 0, 85),))
    assert run(scheduler) == ((1, 2, 3, 4, 5), ())
    scheduler.submit(6, 85, 5)
    assert run(scheduler) == ((1, 2, 3, 4, 5), ((6, 0, 85),)), "rows that have gone on do not wait"


@BOTH
def test_with_lookahead_too(implementation):
    scheduler = measured(implementation)
    scheduler.submit(1, 85, 5)
    first = scheduler.plan(0.0).step
    scheduler.submit(2, 85, 5)
    plan = scheduler.plan(0.0)
    assert (plan.decode, [chunk.seq for chunk in plan.prefills]) == ((), [2])
    scheduler.commit(first, 50.0)
    assert scheduler.plan(0.0).decode == (1, 2)


@BOTH
@pytest.mark.parametrize(
    "request_",
    [{"prompt_tokens": 700}, {"prompt_tokens": 85, "priority": -1}],
    ids=["longer than a chunk", "lower priority"],
)
def test_rows_do_not_wait_for(implementation, request_):
    scheduler = measured(implementation)
    scheduler.submit(1, 85, 5)
    run(scheduler)
    scheduler.submit(2, max_tokens=5, **request_)
    assert run(scheduler)[0] == (1,)


@BOTH
def test_rows_wait_no_longer_than_a_wave_may_take(implementation):
    cost = {"cost_ms": lambda plan: cpu_ms(len(plan.decode), 0, chunk_tokens(plan), 0)}
    scheduler = measured(implementation, max_rows=50, **cost)
    waited_ms, seq = 0.0, 1
    scheduler.submit(seq, 85, 5)
    run(scheduler, **cost)
    while True:
        seq += 1
        scheduler.submit(seq, 85, 5)
        plan = scheduler.plan(0.0)
        elapsed_ms = cpu_ms(len(plan.decode), 0, chunk_tokens(plan), 0)
        waited_ms += elapsed_ms
        scheduler.commit(plan.step, elapsed_ms)
        if plan.decode:
            break
    assert 1500.0 < waited_ms <= 8 * 250.0


@BOTH
@pytest.mark.parametrize("apart_ms", [12.0, 50.0])
def test_requests_that_come_one_after_the_other_are_served_as_fast_as_those_that_come_at_once(implementation, apart_ms):
    speeds, gaps = zip(
        *(torn_wave(make(implementation, max_rows=8, max_chunk_tokens=192), apart) for apart in (0.0, apart_ms)),
        strict=True,
    )
    assert speeds[1] > 0.95 * speeds[0]
    assert max(gaps) <= 8 * 250.0


# --- the cost model and the chunk ---------------------------------------------------------------------


def cpu_ms(rows, context, tokens, start):
    """Measured on a CPU with SmolLM2 in float32: a pass costs 55 ms, a prompt token 2.1, a decoding row 3.5."""
    decode_ms = 52.0 + 3.5 * rows + 0.004 * context if rows else 0.0
    return decode_ms + (55.0 + 2.1 * tokens + 0.0005 * tokens * (start + tokens / 2) if tokens else 0.0)


def with_decoding_rows(implementation, rows=1, **changes):
    """A scheduler that has just decoded a while with this many rows on that CPU."""
    scheduler = make(implementation, max_rows=16, **changes)
    for seq in range(rows):
        scheduler.submit(seq, 85, 100_000, client="decoding")
    for _ in range(4 * rows + 10):
        run(scheduler, cost_ms=lambda plan: cpu_ms(len(plan.decode), 100 * len(plan.decode), chunk_tokens(plan), 0))
    return scheduler


@BOTH
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_an_85_token_prompt_goes_in_one_chunk_where_the_target_allows_it(implementation, rows):
    scheduler = with_decoding_rows(implementation, rows, itl_target_ms=330.0)
    scheduler.submit(100, 85, 1, client="new")
    assert run(scheduler)[1] == ((100, 0, 85),)


@BOTH
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_steps_with_a_chunk_keep_the_target_on_average(implementation, rows):
    noise = random.Random(rows)
    scheduler = with_decoding_rows(implementation, rows, itl_target_ms=250.0)
    costs_ms = []

    def cost_ms(plan):
        start = plan.prefills[0].start if plan.prefills else 0
        exact_ms = cpu_ms(len(plan.decode), 200 * len(plan.decode), chunk_tokens(plan), start)
        if plan.prefills:
            costs_ms.append(exact_ms)
        return exact_ms * noise.uniform(0.9, 1.1)

    for seq in range(100, 150):
        scheduler.submit(seq, 40 + 31 * seq % 200, 1, client="new")
    while scheduler.statistics().queued + scheduler.statistics().prefilling:
        run(scheduler, cost_ms=cost_ms)
    assert 150.0 < statistics.mean(costs_ms) <= 250.0
    assert max(costs_ms) <= 1.25 * 250.0


@BOTH
def test_chunks_are_whole_tiles_and_a_short_tail_is_not_left_behind(implementation):
    scheduler = with_decoding_rows(implementation, 2)
    scheduler.submit(100, 69, 1, client="new")
    assert run(scheduler)[1] == ((100, 0, 69),)  # 64 tokens keep the target; 5 more cost less than a pass of their own
    scheduler.submit(101, 500, 1, client="new")
    chunks = []
    while sum(chunks) < 500:
        ((_, _, tokens),) = run(scheduler)[1]
        chunks.append(tokens)
    assert all(tokens % 32 == 0 for tokens in chunks[:-1])
    assert len(chunks) < 500 // 32


@BOTH
def test_with_nobody_decoding_the_chunk_is_the_largest_that_the_step_limit_allows(implementation):
    scheduler = make(implementation, max_chunk_tokens=512, max_step_ms=420.0)
    scheduler.submit(1, 5000, 1)
    for _ in range(8):
        _, ((_, _, tokens),) = run(scheduler, cost_ms=lambda plan: cpu_ms(0, 0, chunk_tokens(plan), 0))
    assert tokens == 160  # 397 ms
    scheduler = make(implementation, max_chunk_tokens=512)
    scheduler.submit(1, 5000, 1)
    assert [run(scheduler)[1] for _ in range(2)] == [((1, 0, 512),), ((1, 512, 512),)]


@BOTH
def test_before_any_measurement_a_chunk_beside_decoding_rows_is_modest_and_progress_is_certain(implementation):
    for itl_target_ms, expected in ((1.0, [32]), (250.0, [32, 64, 96, 128]), (1e6, [128])):
        scheduler = make(implementation, itl_target_ms=itl_target_ms)
        scheduler.submit(1, 10, 100)
        scheduler.plan(0.0)
        scheduler.submit(2, 1000, 1)
        plan = scheduler.plan(0.0)
        assert plan.decode == (1,)
        assert chunk_tokens(plan) in expected


@BOTH
def test_predictions_converge_after_few_steps(implementation):
    scheduler = make(implementation)
    scheduler.submit(0, 100, 30)
    scheduler.submit(1, 1000, 30)
    drain(
        scheduler,
        cost_ms=lambda plan: cpu_ms(
            len(plan.decode), 100, chunk_tokens(plan), sum(chunk.start for chunk in plan.prefills)
        ),
    )
    for tokens in (64, 128, 256, 512):
        assert scheduler.predict_ms(0, 0, [(0, tokens)]) == pytest.approx(cpu_ms(0, 0, tokens, 0), rel=0.1)
    assert scheduler.predict_ms(1, 100, [(0, 64)]) == pytest.approx(cpu_ms(1, 100, 64, 0), rel=0.1)


@BOTH
@pytest.mark.parametrize("speed", [0.01, 1.0, 30.0])
def test_equal_chunks_give_right_predictions_there_and_cautious_ones_elsewhere(implementation, speed):
    noise = random.Random(1)
    scheduler = make(implementation, max_chunk_tokens=64, max_step_ms=1e9)
    scheduler.submit(0, 64 * 60, 1)
    for _ in range(60):
        run(scheduler, cost_ms=lambda plan: speed * noise.uniform(0.9, 1.1) * cpu_ms(0, 0, chunk_tokens(plan), 0))
    seen_ms = speed * cpu_ms(0, 0, 64, 0)
    assert scheduler.predict_ms(0, 0, [(32 * 60, 64)]) == pytest.approx(seen_ms, rel=0.1)
    assert 0.6 * speed * cpu_ms(0, 0, 512, 0) < scheduler.predict_ms(0, 0, [(0, 512)]) < 9 * seen_ms


@BOTH
@pytest.mark.parametrize("outlier", [0.0, 0.001, 20.0, 1e6])
@pytest.mark.parametrize("at", [0, 1, 20])
def test_one_outlier_does_not_ruin_the_fit(implementation, outlier, at):
    scheduler = make(implementation, max_chunk_tokens=128)
    scheduler.submit(0, 128 * 40, 1)
    for step in range(40):
        factor = outlier if step == at else 1.0
        run(scheduler, cost_ms=lambda plan, factor=factor: factor * cpu_ms(0, 0, chunk_tokens(plan), 0))
        if step >= at + 12:
            assert scheduler.predict_ms(0, 0, [(128 * step, 128)]) == pytest.approx(cpu_ms(0, 0, 128, 0), rel=0.2)


@BOTH
def test_a_lasting_change_of_speed_is_learned_in_three_steps(implementation):
    scheduler = with_decoding_rows(implementation)
    for _ in range(3):
        run(scheduler, cost_ms=400.0)
    assert scheduler.predict_ms(1, 100) == pytest.approx(400.0, rel=0.05)


@BOTH
def test_a_chunk_keeps_to_the_area_of_tokens_times_context(implementation):
    scheduler = make(implementation, max_chunk_tokens=512, max_chunk_area=200_000)
    scheduler.submit(1, 5000, 1)
    chunks = [chunk for _, [chunk] in drain(scheduler)]
    assert all(tokens == 32 or tokens * (start + tokens) <= 200_000 for _, start, tokens in chunks)
    assert [tokens for *_, tokens in chunks[:3]] == [416, 256, 192]
    assert chunks[-1] == (1, 4960, 40)


@BOTH
def test_prompts_that_start_together_keep_to_the_area_as_padded_to_the_longest(implementation):
    scheduler = measured(implementation, max_chunk_area=4 * 100 * 100)
    for seq, prompt_tokens in enumerate((60, 60, 100, 60, 60), start=1):
        scheduler.submit(seq, prompt_tokens, 3)
    assert starting(scheduler) == [1, 2, 3, 4]


# --- errors -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("cold_steps", [2, 3, 4, 5])
def test_cold_first_steps_do_not_make_chunks_look_free(implementation, cold_steps):
    """Decoding is predicted too long after them: that a step with a chunk took less must teach the decode cost, else
    the chunk's is learnt as nothing, and the next long prompt stops everybody for a second."""
    scheduler = make(implementation, max_rows=8)
    for seq in range(8):
        scheduler.submit(seq, 60, 100)
    for step in range(1, 60):
        plan = scheduler.plan(0.0)
        chunk_tokens = sum(chunk.tokens for chunk in plan.prefills)
        cost_ms = (9 + 1.5 * len(plan.decode)) * bool(plan.decode) + (25 + 0.4 * chunk_tokens) * bool(chunk_tokens)
        scheduler.commit(step, cost_ms + 3000 * (step <= cold_steps))
    assert scheduler.predict_ms(8, 8 * 100) == pytest.approx(21.0, rel=0.1)
    assert 0.5 * 844 < scheduler.predict_ms(0, 0, [(0, 2048)]) < 4 * 844


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, -0.5])
def test_values_that_make_no_sense_are_refused_by_name_and_change_nothing(implementation, value):
    scheduler = make(implementation)
    for name in ("max_rows", "kv_budget_bytes", "kv_bytes_per_token", "kv_bytes_per_sequence", "kv_quantum_tokens"):
        with pytest.raises(ValueError, match=f"{name} .*{value}"):
            make(implementation, **{name: value})
    for name in ("max_chunk_tokens", "max_wave_tokens", "max_chunk_area", "itl_target_ms", "max_step_ms"):
        with pytest.raises(ValueError, match=f"{name} .*{value}"):
            make(implementation, **{name: value})
    good = {"seq": 1, "prompt_tokens": 10, "max_tokens": 5, "priority": 0, "deadline": 9.0}
    for name in good:
        if (name, value) not in (("deadline", math.inf), ("priority", -1)):
            with pytest.raises(ValueError, match=f"{name} .*{value}"):
                scheduler.submit(**(good | {name: value}))
    for name in ("decode_rows", "decode_context"):
        arguments = dict.fromkeys(("decode_rows", "decode_context"), 1)
        with pytest.raises(ValueError, match=f"{name} .*{value}"):
            scheduler.predict_ms(**(arguments | {name: value}))
    for chunk, name in (((value, 1), "chunk start"), ((1, value), "chunk tokens")):
        with pytest.raises(ValueError, match=f"{name} .*{value}"):
            scheduler.predict_ms(1, 1, [chunk])
    scheduler.submit(**good)
    with pytest.raises(ValueError, match=f"now .*{value}"):
        scheduler.plan(value)
    scheduler.plan(0.0)
    with pytest.raises(ValueError, match=f"elapsed_ms .*{value}"):
        scheduler.commit(1, value)
    with pytest.raises(ValueError, match=f"step {value} "):
        scheduler.commit(value, 1.0)
    scheduler.commit(1, 1.0)


@BOTH
def test_calls_out_of_order_are_refused(implementation):
    scheduler = make(implementation)
    with pytest.raises(ValueError, match="step 1 cannot be committed"):
        scheduler.commit(1, 1.0)
    scheduler.submit(1, 10, 100)
    with pytest.raises(ValueError, match="seq 1 is known"):
        scheduler.submit(1, 10, 100)
    with pytest.raises(ValueError, match="seq 1 cannot be released"):
        scheduler.release(1)
    with pytest.raises(ValueError, match="seq 2 cannot be released"):
        scheduler.release(2)
    scheduler.plan(0.0)
    scheduler.plan(0.0)
    with pytest.raises(RuntimeError, match="steps 1 and 2"):
        scheduler.plan(0.0)
    with pytest.raises(ValueError, match="step 2 cannot be committed"):
        scheduler.commit(2, 1.0)
    with pytest.raises(ValueError, match="seq 9 cannot have finished"):
        scheduler.commit(1, 1.0, (9,))
    scheduler.commit(1, 1.0)
    scheduler.commit(2, 1.0, (1,))
    scheduler.release(1)
    scheduler.submit(1, 10, 100)


@pytest.mark.parametrize(
    ("sizes", "longest_answer", "clients", "priorities"),
    [({"kv_budget_bytes": 900}, 250, 1, 1), ({"max_rows": 3}, 900, 2, 1), ({"kv_budget_bytes": 2000}, 200, 3, 3)],
    ids=["little KV", "few rows", "priorities"],
)
def test_the_same_calls_give_the_same_plans(sizes, longest_answer, clients, priorities):
    def history(implementation):
        calls = random.Random(3)
        scheduler = used_to_short_answers(implementation, max_chunk_tokens=128, **sizes)
        plans = []
        for seq in range(120):
            scheduler.submit(
                seq,
                calls.randint(1, 300),
                calls.randint(1, longest_answer),
                client=f"client-{calls.randrange(clients)}",
                priority=calls.randrange(priorities),
            )
            for _ in range(calls.randrange(12)):
                plans.append(run(scheduler, cost_ms=calls.uniform(1.0, 500.0)))
            if calls.random() < 0.7:
                scheduler.cancel(calls.randrange(seq + 1))
        return plans, drain(scheduler, bound=20_000), scheduler.statistics()

    first = history(Scheduler)
    assert first[2].preemptions > 0
    assert history(Scheduler) == first
    assert history(ReferenceScheduler) == first


# --- the compiled core alone --------------------------------------------------------------------------


def test_the_steady_state_allocates_nothing():
    scheduler = make(Scheduler, max_rows=8, kv_budget_bytes=2**40)
    for seq in range(1008):
        scheduler.submit(seq, 100, 1_000_000, client=f"client-{seq % 7}", deadline=1e9)
    while scheduler.statistics().decoding < 8:
        scheduler.commit(scheduler.plan(0.0).step, 50.0)
    plan = scheduler.plan(0.0)
    decode = plan.decode
    grown = []
    for _ in range(5):  # what another thread of the test run allocates, it allocates now and then
        before = sys.getallocatedblocks()
        for step in range(plan.step, plan.step + 1000):
            scheduler.commit(step, 50.0)
            assert scheduler.plan(1.0) is plan
            assert plan.decode is decode
            assert scheduler.releasable() == ()
        grown.append(sys.getallocatedblocks() - before)
    assert min(grown) <= 4, grown  # the loop's own variables


def test_ten_thousand_sequences_and_their_ids_come_and_go():
    scheduler = make(Scheduler, max_rows=3)
    shuffled = random.Random(0)
    for seq in range(10_000):
        scheduler.submit(2**40 + seq, 100, 1, client=f"client-{seq}", priority=shuffled.randrange(3))
    cancelled = shuffled.sample(range(10_000), 9_000)
    for seq in cancelled:
        assert scheduler.cancel(2**40 + seq)
    assert len(scheduler.releasable()) == 9_000
    order = [seq - 2**40 for seq in prefill_order(drain(scheduler, bound=3000))]
    assert set(order) == set(range(10_000)) - set(cancelled)
