"""Sequences that take over another one's KV, or start with tokens from a store: one rule at a time, on the compiled
scheduler and on the reference. ``test_sched_machine`` and ``test_sched_store`` do the same in any order of calls.
"""

import pytest

from lmx._sched import Join, Prefill
from tests.sched_reference import ReferenceScheduler
from tests.test_sched import BOTH, drain, make, run


def family(scheduler, count=4, prompt=100, max_tokens=5, **options):
    """One parent, seq 0, and its children."""
    scheduler.submit(0, prompt, max_tokens, **options)
    for seq in range(1, count):
        scheduler.submit(seq, prompt, max_tokens, cached_tokens=prompt - 1, parent=0, **options)


def computed(steps):
    return sum(tokens for _, chunks in steps for _, _, tokens in chunks)


@BOTH
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_a_prompt_is_prefilled_once_for_all_its_answers(implementation, max_tokens):
    scheduler = make(implementation, max_chunk_tokens=64)
    family(scheduler, max_tokens=max_tokens)
    assert scheduler.statistics().queued == 4
    steps = drain(scheduler)
    assert [chunks for _, chunks in steps[:3]] == [
        ((0, 0, 64),),
        ((0, 64, 36),),
        ((1, 99, 1), (2, 99, 1), (3, 99, 1)),
    ]
    assert computed(steps) == 103
    assert len(steps) == 2 + max_tokens


@BOTH
def test_with_lookahead_the_children_start_in_the_step_after_the_parents_last_chunk(implementation):
    scheduler = make(implementation)
    family(scheduler, count=2, max_tokens=1)
    first = scheduler.plan(0.0)
    assert first.joins == ()
    second = scheduler.plan(0.0)
    assert second.joins == (Join(1, 99, 0),)
    scheduler.commit(1, 50.0)
    assert scheduler.releasable() == (0,)
    assert scheduler.release(0) == 128
    scheduler.commit(2, 50.0)
    assert scheduler.statistics().kv_used_bytes == 128


@BOTH
def test_what_is_taken_over_counts_as_kv(implementation):
    scheduler = make(implementation, kv_budget_bytes=256)
    family(scheduler, count=3, max_tokens=3)
    run(scheduler)
    run(scheduler)
    assert scheduler.statistics().kv_used_bytes == 256
    assert scheduler.statistics().queued == 1
    drain(scheduler)


def test_what_is_taken_over_is_not_charged():
    scheduler = make(ReferenceScheduler)
    family(scheduler, count=3, max_tokens=1, client="a")
    drain(scheduler)
    assert scheduler.served["a"] == 100 + 3 + 2


@BOTH
def test_a_child_that_finds_no_row_until_the_parent_is_gone_prefills_itself(implementation):
    scheduler = make(implementation, max_rows=1)
    family(scheduler, count=2, max_tokens=2)
    assert drain(scheduler) == [
        ((), ((0, 0, 100),)),
        ((0,), ()),
        ((), ()),
        ((), ((1, 0, 100),)),
        ((1,), ()),
    ]


@BOTH
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_cancelled_parent_or_child_leaves_the_others_whole(implementation, steps, victim):
    """In every state: queued and waiting, in prefill, the children about to start, all decoding."""
    scheduler = make(implementation, max_chunk_tokens=64)
    family(scheduler, count=3)
    done = [run(scheduler) for _ in range(steps)]
    assert scheduler.cancel(victim)
    done += drain(scheduler)
    tokens = dict.fromkeys(range(3), 0)
    for decode, chunks in done:
        for seq in (*decode, *(seq for seq, start, count in chunks if start + count == 100)):
            tokens[seq] += 1
    assert [tokens[seq] for seq in range(3) if seq != victim] == [5, 5]
    again = victim == 0 and steps < 2
    prefilled = [seq for _, chunks in done for seq, start, _ in chunks if start == 0]
    assert prefilled == ([0] if steps else []) + [1, 2] if again else [0]


@BOTH
def test_a_cancelled_parent_is_given_back_with_the_next_plan(implementation):
    scheduler = make(implementation, max_rows=2)
    family(scheduler, count=3)
    run(scheduler)
    scheduler.cancel(0)
    assert scheduler.releasable() == ()
    assert scheduler.plan(0.0).joins == (Join(1, 99, 0),)
    assert scheduler.releasable() == (0,)
    assert scheduler.release(0) == 128
    scheduler.commit(2, 50.0)
    last = scheduler.plan(0.0)
    assert (last.joins, last.prefills) == ((), (Prefill(2, 0, 100, last=True),))


@BOTH
def test_an_expired_or_failed_parent_gives_what_it_has(implementation):
    for end in ("expired", "failed"):
        scheduler = make(implementation)
        scheduler.submit(0, 100, 5, deadline=1.0 if end == "expired" else 9.0)
        scheduler.submit(1, 100, 1, cached_tokens=99, parent=0)
        plan = scheduler.plan(0.0)
        scheduler.commit(plan.step, 50.0, (0,) if end == "failed" else ())
        assert scheduler.plan(1.0).joins == (Join(1, 99, 0),)
    scheduler = make(implementation)
    scheduler.submit(0, 100, 5, deadline=1.0)
    scheduler.submit(1, 100, 1, cached_tokens=99, parent=0)
    plan = scheduler.plan(1.0)
    assert (plan.expired, plan.joins, plan.prefills) == ((0,), (), (Prefill(1, 0, 100, last=True),))


@BOTH
def test_a_preempted_parent_gives_nothing_more(implementation):
    scheduler = make(implementation, max_rows=2, max_chunk_tokens=512)
    scheduler.submit(0, 100, 50)
    run(scheduler)
    scheduler.submit(1, 100, 50)
    run(scheduler)
    scheduler.submit(2, 100, 5, cached_tokens=99, parent=0)
    run(scheduler)
    scheduler.submit(5, 100, 5, priority=1)
    scheduler.submit(6, 100, 5, priority=1)
    steps = drain(scheduler)
    assert [chunk for _, chunks in steps for chunk in chunks if chunk[0] == 2] == [(2, 0, 100)]


@BOTH
def test_one_that_starts_with_tokens_from_a_store(implementation):
    scheduler = make(implementation, max_chunk_tokens=64)
    scheduler.submit(1, 200, 2, cached_tokens=150)
    assert scheduler.plan(0.0).joins == (Join(1, 150, -1),)
    scheduler.commit(1, 50.0)
    assert scheduler.statistics().kv_used_bytes == 224
    assert drain(scheduler) == [((1,), ())]


@BOTH
def test_an_unknown_parent_or_a_shorter_one_gives_nothing(implementation):
    scheduler = make(implementation)
    scheduler.submit(1, 100, 1, cached_tokens=99, parent=77)
    scheduler.submit(2, 50, 1)
    scheduler.submit(3, 100, 1, cached_tokens=99, parent=2)
    scheduler.submit(4, 1, 1, parent=2)
    assert computed(drain(scheduler)) == 251
    with pytest.raises(ValueError, match="cached_tokens must leave one of 100"):
        scheduler.submit(5, 100, 1, cached_tokens=100)
    with pytest.raises(ValueError, match="cached_tokens"):
        scheduler.submit(5, 100, 1, cached_tokens=-1)


# --- waiting for a leader: a parent of whose prompt they share a part -----------------------------------


def starts(scheduler, seq, bound=50, **options):
    """Where its first chunk starts."""
    for _ in range(bound):
        for chunk, start, _ in run(scheduler, **options)[1]:
            if chunk == seq:
                return start
    raise AssertionError(f"seq {seq} never starts")


@BOTH
def test_a_follower_starts_once_its_leader_is_past_what_they_share(implementation):
    scheduler = make(implementation, max_chunk_tokens=64, max_rows=2)
    scheduler.submit(0, 300, 1)
    scheduler.submit(1, 150, 1, cached_tokens=128, parent=0, client="b")
    joins = []
    for _ in range(3):
        plan = scheduler.plan(0.0)
        joins.append(plan.joins)
        scheduler.commit(plan.step, 50.0)
    assert joins == [(), (), (Join(1, 128, 0),)]
    drain(scheduler)


@BOTH
def test_a_follower_of_one_that_is_past_it_already_need_not_wait_for_its_end(implementation):
    scheduler = make(implementation, max_chunk_tokens=64)
    scheduler.submit(0, 1000, 1)
    run(scheduler)
    scheduler.submit(1, 100, 1, cached_tokens=60, parent=0)
    assert scheduler.plan(0.0).joins == (Join(1, 60, 0),)


@BOTH
@pytest.mark.parametrize("end", ["cancel", "expire", "finish", "preempt"])
def test_a_follower_is_never_forgotten(implementation, end):
    scheduler = make(implementation, max_chunk_tokens=32, max_rows=2)
    scheduler.submit(0, 200, 1, deadline=1.0 if end == "expire" else 99.0)
    scheduler.submit(1, 150, 1, cached_tokens=128, parent=0)
    run(scheduler)
    run(scheduler, finished=(0,) if end == "finish" else ())
    if end == "cancel":
        scheduler.cancel(0)
    if end == "preempt":
        for seq in (5, 6):
            scheduler.submit(seq, 10, 1, priority=1)
    tokens = sum(n for _, chunks in drain(scheduler, now=1.0) for seq, _, n in chunks if seq == 1)
    assert tokens == (22 if end == "preempt" else 150)


@BOTH
def test_nobody_waits_for_a_lower_priority(implementation):
    scheduler = make(implementation)
    scheduler.submit(0, 200, 1)
    scheduler.submit(1, 150, 1, cached_tokens=128, parent=0, priority=1)
    assert run(scheduler)[1] == ((1, 0, 150),)


@BOTH
def test_a_short_prompt_does_not_wait_for_a_long_one_that_it_passes(implementation):
    scheduler = make(implementation, max_chunk_tokens=64)
    scheduler.submit(0, 1000, 1)
    scheduler.submit(1, 60, 1, cached_tokens=40, parent=0)
    assert run(scheduler)[1][0] == (1, 0, 60)


@BOTH
@pytest.mark.parametrize(("served", "waits"), [(300, True), (600, False)])
def test_a_leaders_client_may_be_ahead_by_what_is_saved_for_each_client(implementation, served, waits):
    """Three clients that all decode; 1,200 shared tokens."""
    scheduler = make(implementation, max_rows=8)
    for seq, client in enumerate("cba"):
        scheduler.submit(seq, served if client == "a" else 10, 1000, client=client)
    for _ in range(3):
        run(scheduler)
    scheduler.submit(6, 3000, 1, client="c")
    scheduler.submit(7, 1300, 1, client="a")
    scheduler.submit(8, 1300, 1, client="b", cached_tokens=1200, parent=7)
    assert starts(scheduler, 8) == (1200 if waits else 0)


@BOTH
def test_a_leaders_client_may_be_ahead_by_any_number_where_nobody_else_waits(implementation):
    scheduler = make(implementation)
    scheduler.submit(8, 10, 90, client="b")
    scheduler.submit(9, 5000, 1, client="a")
    while scheduler.statistics().decoding + scheduler.statistics().prefilling + scheduler.statistics().queued > 1:
        run(scheduler)
    scheduler.submit(0, 1300, 1, client="a")
    scheduler.submit(1, 300, 1, client="b", cached_tokens=200, parent=0)
    assert starts(scheduler, 1) == 200


@BOTH
def test_a_leader_behind_others_of_its_own_client_is_not_waited_for(implementation):
    scheduler = make(implementation)
    for seq in range(3):
        scheduler.submit(seq, 2000, 1, client="a")
    scheduler.submit(5, 300, 1, client="b", cached_tokens=200, parent=2)
    assert starts(scheduler, 5) == 0


@BOTH
def test_a_follower_that_finds_a_place_does_not_wait_for_a_leader_that_does_not(implementation):
    scheduler = make(implementation, kv_budget_bytes=640)
    scheduler.submit(0, 300, 100)
    run(scheduler)
    scheduler.submit(1, 400, 5)
    scheduler.submit(2, 60, 5, cached_tokens=50, parent=1)
    assert run(scheduler)[1] == ((2, 0, 60),)


# --- tokens from a store ------------------------------------------------------------------------------


@BOTH
def test_what_a_store_had_is_believed_in_the_next_plan_only(implementation):
    scheduler = make(implementation, max_rows=1)
    scheduler.submit(0, 10, 2)
    scheduler.submit(1, 100, 1, cached_tokens=90)
    run(scheduler)
    run(scheduler)
    assert scheduler.upcoming(5) == (1,)
    assert scheduler.plan(0.0).prefills == (Prefill(1, 0, 100, last=True),)


@BOTH
def test_recache_says_what_it_starts_with_now(implementation):
    scheduler = make(implementation)
    scheduler.submit(1, 100, 1, cached_tokens=50)
    assert scheduler.recache(1, 60)
    assert scheduler.recache(1, 40)
    assert scheduler.plan(0.0).joins == (Join(1, 40, -1),)
    assert not scheduler.recache(1, 50)
    assert not scheduler.recache(77, 50)
    scheduler.submit(2, 100, 1)
    with pytest.raises(ValueError, match="tokens"):
        scheduler.recache(2, 100)


@BOTH
def test_recache_from_a_row_that_has_so_many_or_from_nothing(implementation):
    scheduler = make(implementation, max_chunk_tokens=64)
    scheduler.submit(0, 200, 1)
    run(scheduler)
    scheduler.submit(1, 100, 1, priority=1)
    assert not scheduler.recache(1, 65, parent=0)
    assert not scheduler.recache(1, 10, parent=77)
    assert scheduler.recache(1, 64, parent=0)
    assert scheduler.plan(0.0).joins == (Join(1, 64, 0),)


@BOTH
def test_a_preempted_one_goes_on_from_the_store_and_is_not_charged_again(implementation):
    scheduler = make(implementation, max_rows=1)
    scheduler.submit(0, 100, 20)
    for _ in range(5):
        run(scheduler)
    scheduler.submit(1, 10, 1, priority=1)
    plan = scheduler.plan(0.0)
    assert plan.preempted == (0,)
    scheduler.commit(plan.step, 50.0)
    scheduler.release(1)
    assert scheduler.upcoming(1) == (0,)
    assert scheduler.recache(0, 104)
    if implementation is ReferenceScheduler:
        served = scheduler.served[""]
        assert run(scheduler)[1] == ((0, 104, 1),)
        assert scheduler.served[""] == served + 1
    else:
        assert run(scheduler)[1] == ((0, 104, 1),)
    drain(scheduler)


@BOTH
def test_upcoming_names_those_that_may_start(implementation):
    scheduler = make(implementation, max_rows=3, kv_budget_bytes=1024)
    scheduler.submit(0, 700, 20)
    run(scheduler)
    run(scheduler)
    scheduler.submit(3, 500, 1, client="b")
    scheduler.submit(4, 10, 1, client="c")
    scheduler.submit(5, 10, 1, client="c")
    assert scheduler.upcoming(9) == (3, 4, 5)
    assert scheduler.upcoming(2) == (3, 4)
    assert scheduler.upcoming(0) == ()


# --- stops --------------------------------------------------------------------------------------------


@BOTH
def test_chunks_end_at_stops(implementation):
    scheduler = make(implementation, max_chunk_tokens=64)
    scheduler.submit(1, 200, 1, stops=(10, 100, 196))
    assert [chunks for _, chunks in drain(scheduler)] == [
        ((1, 0, 10),),
        ((1, 10, 64),),
        ((1, 74, 26),),
        ((1, 100, 64),),
        ((1, 164, 32),),
        ((1, 196, 4),),
    ]


@BOTH
def test_one_with_a_stop_left_is_in_no_wave_and_no_row_waits_for_it(implementation):
    scheduler = make(implementation)
    scheduler.submit(0, 10, 1)
    run(scheduler)
    for seq in (1, 2, 3):
        scheduler.submit(seq, 50, 3, stops=(40,) if seq == 2 else ())
    assert [run(scheduler) for _ in range(3)] == [
        ((), ((1, 0, 50),)),
        ((1,), ((2, 0, 40),)),
        ((1,), ((2, 40, 10), (3, 0, 50))),
    ]


@BOTH
def test_stops_before_the_cached_tokens_are_passed_over(implementation):
    scheduler = make(implementation)
    scheduler.submit(1, 100, 1, cached_tokens=50, stops=(20, 50, 80))
    assert [chunks for _, chunks in drain(scheduler)] == [((1, 50, 30),), ((1, 80, 20),)]


@BOTH
@pytest.mark.parametrize("stops", [(0,), (100,), (50, 50), (60, 50), tuple(range(1, 18))])
def test_stops_that_cannot_be(implementation, stops):
    scheduler = make(implementation)
    with pytest.raises(ValueError, match="stops"):
        scheduler.submit(1, 100, 1, stops=stops)
    assert scheduler.statistics().queued == 0
