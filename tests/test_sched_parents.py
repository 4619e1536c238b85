"""Sequences that take over another one's KV, or start with tokens from elsewhere: one rule at a time, on the compiled
scheduler and on the reference. ``test_sched_machine`` does the same in any order of calls.
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
