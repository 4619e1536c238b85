"""The compiled scheduler and the pure-Python reference, driven together by Hypothesis in any order of calls."""

import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from lmx._sched import NeverFits, Scheduler
from tests.sched_reference import ReferenceScheduler

PLAN_FIELDS = ("step", "decode", "depth", "drafts", "joins", "prefills", "preempted", "expired")


class SchedulerMachine(RuleBasedStateMachine):
    seqs = Bundle("seqs")

    @initialize(
        max_rows=st.integers(1, 6),
        quanta=st.integers(1, 30),
        quantum_tokens=st.sampled_from([8, 32, 50]),
        per_token=st.sampled_from([10, 10, 10, 0]),
        per_sequence=st.sampled_from([0, 70]),
        max_chunk_tokens=st.sampled_from([32, 64, 200]),
        max_wave_tokens=st.sampled_from([1, 100, 400]),
        max_chunk_area=st.sampled_from([0, 0, 1, 5_000, 20_000]),
        itl_target_ms=st.sampled_from([1.0, 30.0, 250.0]),
        max_depth=st.sampled_from([15, 15, 3, 0]),
    )
    def start(
        self,
        max_rows,
        quanta,
        quantum_tokens,
        per_token,
        per_sequence,
        max_chunk_tokens,
        max_wave_tokens,
        max_chunk_area,
        itl_target_ms,
        max_depth,
    ):
        self.max_depth = max_depth
        self.max_chunk_area = max_chunk_area or float("inf")
        self.max_rows, self.max_chunk_tokens, self.max_wave_tokens = max_rows, max_chunk_tokens, max_wave_tokens
        self.budget_bytes = quanta * quantum_tokens * 10 + per_sequence
        sizes = {
            "max_rows": max_rows,
            "kv_budget_bytes": self.budget_bytes,
            "kv_bytes_per_token": per_token,
            "kv_bytes_per_sequence": per_sequence,
            "kv_quantum_tokens": quantum_tokens,
            "max_chunk_tokens": max_chunk_tokens,
            "max_wave_tokens": max_wave_tokens,
            "max_chunk_area": max_chunk_area,
            "itl_target_ms": itl_target_ms,
            "max_depth": max_depth,
        }
        self.compiled, self.reference = Scheduler(**sizes), ReferenceScheduler(**sizes)
        self.now = 0.0
        self.next_seq = 0
        self.live = {}  # seq -> deadline
        self.planned_members = {}  # uncommitted step -> its sequences
        self.ended = set()  # cancelled or finished: in no later plan
        self.released = set()
        self.tokens_left = {}
        self.prompts = {}
        self.clients = {}
        self.stops = {}
        self.told = {}  # seq -> (parent or -1, cached tokens, after how many plans), the last that was said
        self.reached = {}  # seq with a row -> tokens in its KV
        self.charged = {}  # seq -> tokens that its client was charged for, from its first start on
        self.plans, self.ended_in = 0, {}
        self.offered = {}  # seq -> drafts, since the last plan
        self.open = {}  # seq -> drafts, in the uncommitted step that has some
        self.listed = None  # what upcoming() said, if nothing came between that and plan()

    def both(self, name, *args, **kwargs):
        """The same call to both; the same answer or the same kind of error."""
        answers = []
        for scheduler in (self.reference, self.compiled):
            try:
                answers.append(getattr(scheduler, name)(*args, **kwargs))
            except ValueError as error:
                answers.append(type(error))
        assert answers[0] == answers[1], (name, args, answers)
        return answers[1]

    @rule(
        target=seqs,
        prompt_tokens=st.integers(1, 300),
        max_tokens=st.integers(1, 60),
        client=st.sampled_from(["a", "b", "c"]),
        priority=st.sampled_from([0, 0, 0, 1]),
        patience=st.sampled_from([0.0, 2.0, 9.0, float("inf")]),
        stops=st.sets(st.integers(1, 299), max_size=4),
    )
    def submit(self, prompt_tokens, max_tokens, client, priority, patience, stops):
        stops = tuple(sorted(stop for stop in stops if stop < prompt_tokens))
        options = {"client": client, "priority": priority, "deadline": self.now + patience, "stops": stops}
        return multiple(*self.submit_one(prompt_tokens, max_tokens, **options))

    def submit_one(self, prompt_tokens, max_tokens, **options):
        """Its seq, or nothing if it never fits."""
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        answer = self.both("submit", seq, prompt_tokens, max_tokens, **options)
        if answer is NeverFits:
            return []
        assert 1 <= answer <= max_tokens
        self.live[seq], self.tokens_left[seq] = options.get("deadline", float("inf")), answer
        self.prompts[seq], self.stops[seq] = prompt_tokens, options.get("stops", ())
        self.clients[seq] = options.get("client", "")
        self.told[seq] = options.get("parent", -1), options.get("cached_tokens", 0), self.plans
        self.listed = None
        return [seq]

    @rule(
        target=seqs,
        prompts=st.lists(st.tuples(st.integers(1, 70), st.sampled_from(["a", "b", "c"])), min_size=2, max_size=6),
        max_tokens=st.integers(1, 5),
    )
    def submit_several(self, prompts, max_tokens):
        """Short prompts at one moment, which may start in one step."""
        return multiple(
            *(seq for tokens, client in prompts for seq in self.submit_one(tokens, max_tokens, client=client))
        )

    @rule(
        target=seqs,
        parent=seqs,
        count=st.integers(1, 4),
        share=st.sampled_from([1.0, 1.0, 0.5, 0.3, 0.0]),
        longer=st.sampled_from([1, 1, 5, 100]),
        max_tokens=st.integers(1, 60),
        client=st.sampled_from(["a", "a", "b", "c"]),
        priority=st.sampled_from([0, 0, 0, 1]),
        patience=st.sampled_from([2.0, float("inf"), float("inf")]),
    )
    def submit_children(self, parent, count, share, longer, max_tokens, client, priority, patience):
        """Sequences whose prompts begin with the parent's, or with a part of it, and take that over from there."""
        seqs = []
        for _ in range(count):
            shared = int(share * (self.prompts[parent] - (longer == 1)))
            options = {"client": client, "priority": priority, "deadline": self.now + patience, "parent": parent}
            seqs += self.submit_one(shared + longer, max_tokens, **options, cached_tokens=shared)
        return multiple(*seqs)

    @rule(target=seqs, prompt_tokens=st.integers(2, 300), left=st.integers(1, 40), max_tokens=st.integers(1, 20))
    def submit_cached(self, prompt_tokens, left, max_tokens):
        """One that starts with tokens from a store."""
        return multiple(*self.submit_one(prompt_tokens, max_tokens, cached_tokens=max(prompt_tokens - left, 0)))

    @rule(seq=seqs, share=st.sampled_from([0.0, 0.3, 0.9, 1.0]), parent=st.one_of(st.just(-1), seqs))
    def recache(self, seq, share, parent):
        """A store, or another one's row, has more or less of its tokens than before."""
        self.recache_one(seq, share, parent)
        self.listed = None

    def recache_one(self, seq, share, parent):
        sequence = self.reference.sequences.get(seq)
        tokens = int(share * ((sequence.target if sequence else self.prompts[seq]) - 1))
        queued = sequence is not None and sequence.state == "queued"
        answer = self.both("recache", seq, tokens, parent)
        assert answer == (queued and (parent == -1 or self.reached.get(parent, -1) >= tokens))
        if queued:
            self.told[seq] = (parent, tokens, self.plans) if answer else (-1, 0, self.plans)

    @rule(most=st.sampled_from([0, 1, 3, 100]), shares=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1))
    def recache_upcoming(self, most, shares):
        """As the step loop does before each plan."""
        seqs = self.both("upcoming", most)
        assert len(seqs) == len(set(seqs)) <= most
        for i, seq in enumerate(seqs):
            assert self.both("recache", seq, 10**9) is ValueError, "it is queued"
            self.recache_one(seq, shares[i % len(shares)], -1)
        self.listed = seqs if most == 100 else None

    @rule(visitors=st.integers(1, 20), prompt_tokens=st.integers(1, 20))
    def visit(self, visitors, prompt_tokens):
        """New clients that go at once: the client table has to grow or forget them, without changing any order."""
        for _ in range(visitors):
            seq, self.next_seq = self.next_seq, self.next_seq + 1
            if self.both("submit", seq, prompt_tokens, 1, client=f"visitor {seq}") is not NeverFits:
                assert self.both("cancel", seq)
                assert self.both("release", seq) == 0
        self.listed = None

    @rule(seq=seqs)
    def cancel(self, seq):
        was_live = self.both("cancel", seq)
        assert was_live == (seq in self.live)
        self.end(seq)
        self.listed = None

    def end(self, seq):
        if self.live.pop(seq, None) is not None:
            self.ended.add(seq)
            self.ended_in[seq] = self.plans

    @rule(seq=seqs, tokens=st.integers(0, 20), source=st.sampled_from([0, 0, 1]))
    def offer(self, seq, tokens, source):
        self.both("offer", seq, tokens, source)
        self.offered[seq] = tokens

    @rule(seq=seqs, right=st.integers(0, 20), wrong=st.integers(0, 3), source=st.sampled_from([0, 1]))
    def foresee(self, seq, right, wrong, source):
        self.both("foresaw", seq, right + wrong, right, source)

    @rule(
        rounds=st.integers(1, 10),
        tokens=st.lists(st.integers(0, 20), min_size=1, max_size=6),
        sources=st.sampled_from([0, 0, 1, 3]),
        right=st.sampled_from([0, 1, 5, 15]),
    )
    def plan_with_drafts(self, rounds, tokens, sources, right):
        """As the step loop does: everything is read, and then drafts are offered for all."""
        for _ in range(rounds):
            while self.planned_members:
                self.commit_step(50.0, [], accepted={seq: min(drafts, right) for seq, drafts in self.open.items()})
            self.release()
            for i, seq in enumerate(sorted(self.live)):
                self.offer(seq, tokens[i % len(tokens)], sources >> i % 2 & 1)
            self.both("expected_depth")
            self.plan_step()

    @precondition(lambda self: self.open)
    @rule()
    def plan_too_early(self):
        for scheduler in (self.reference, self.compiled):
            with pytest.raises(RuntimeError):
                scheduler.plan(self.now)

    @precondition(lambda self: len(self.planned_members) < 2 and not self.open)
    @rule(seconds=st.sampled_from([0.0, 0.1, 3.0]))
    def plan(self, seconds):
        self.now += seconds
        self.plan_step()

    def plan_step(self):
        served = dict(self.reference.served)
        expected, plan = self.reference.plan(self.now), self.compiled.plan(self.now)
        self.plans += 1
        for field in PLAN_FIELDS:
            assert getattr(plan, field) == getattr(expected, field), field
        assert set(plan.expired) == {seq for seq, deadline in self.live.items() if deadline <= self.now}
        for seq in plan.expired:
            self.end(seq)
        prefilling = [chunk.seq for chunk in plan.prefills]
        members = {*plan.decode, *prefilling}
        assert members <= self.live.keys(), "an ended sequence is in a later plan"
        assert not members & set(plan.preempted)
        assert len(members) <= self.max_rows
        assert len(members) == len(plan.decode) + len(prefilling), "a sequence is in a plan twice"
        for seq in plan.preempted:
            decoded = self.reached.pop(seq) >= self.prompts[seq]
            self.told[seq] = -1, 0, self.plans
            self.charged[seq] += decoded  # its newest token, which is not in the KV yet
        self.check_joins(plan)
        self.check_prefills(plan)
        self.check_charges(plan, served)
        self.check_drafts(plan)
        self.listed = None
        if plan.step:
            self.planned_members[plan.step] = members
        else:
            assert not members
        for seq in (*plan.decode, *(chunk.seq for chunk in plan.prefills if chunk.last)):
            self.tokens_left[seq] -= 1
            if self.tokens_left[seq] == 0:
                self.end(seq)
        return plan

    def check_drafts(self, plan):
        assert plan.depth == max(plan.drafts, default=0) <= self.max_depth
        assert len(plan.drafts) == (len(plan.decode) if plan.depth else 0)
        assert not (plan.depth and self.planned_members), "what was offered follows a token that is not drawn yet"
        for seq, drafts in zip(plan.decode, plan.drafts, strict=False):
            assert drafts <= self.offered.get(seq, 0)
            assert drafts < self.tokens_left[seq]
        self.offered = {}
        self.open = {seq: n for seq, n in zip(plan.decode, plan.drafts, strict=False) if n}

    def check_joins(self, plan):
        assert {join.seq for join in plan.joins} <= {chunk.seq for chunk in plan.prefills}
        for join in plan.joins:
            parent, cached, plans = self.told[join.seq]
            assert (join.parent, join.cached_tokens) == (parent, cached)
            if join.parent == -1:
                assert plans == self.plans - 1, "a store may have forgotten it"
            else:
                assert self.reached.get(join.parent, 0) >= cached, "what it takes over is not computed, or gone"
        starting = {chunk.seq: chunk.start for chunk in plan.prefills if chunk.seq not in self.reached}
        assert {join.seq: join.cached_tokens for join in plan.joins} == {k: v for k, v in starting.items() if v}
        for seq, start in starting.items():
            parent, cached, plans = self.told[seq]
            assert start or parent != -1 or cached == 0 or plans < self.plans - 1, "a hit was forgotten"
            self.reached[seq] = start
            self.charged.setdefault(seq, start)
        if self.listed is not None and not plan.expired:
            assert starting.keys() <= set(self.listed)

    def check_prefills(self, plan):
        if len(plan.prefills) > 1:
            assert all(chunk.last for chunk in plan.prefills)
            assert sum(chunk.tokens for chunk in plan.prefills) <= self.max_wave_tokens
            whole = [chunk.tokens for chunk in plan.prefills if chunk.start == 0]
            rest = sum(chunk.tokens * (chunk.start + chunk.tokens) for chunk in plan.prefills if chunk.start)
            assert len(whole) * max(whole, default=0) ** 2 + rest <= self.max_chunk_area
        for chunk in plan.prefills:
            assert chunk.tokens <= 32 or chunk.tokens * (chunk.start + chunk.tokens) <= self.max_chunk_area
            assert 0 < chunk.tokens <= self.max_chunk_tokens
            assert chunk.start == self.reached[chunk.seq]
            assert not any(0 < stop - chunk.start < chunk.tokens for stop in self.stops[chunk.seq])
            self.reached[chunk.seq] += chunk.tokens

    def check_charges(self, plan, served):
        """Each token that is computed is charged once, and each that is drawn."""
        for chunk in plan.prefills:
            reached = self.reached[chunk.seq]
            served[self.clients[chunk.seq]] += max(reached - self.charged[chunk.seq], 0) + chunk.last
            self.charged[chunk.seq] = max(reached, self.charged[chunk.seq])
        for seq in plan.decode:
            self.reached[seq] += 1
            self.charged[seq] = self.reached[seq]
            served[self.clients[seq]] += 1
        assert self.reference.served == served

    @precondition(lambda self: self.planned_members)
    @rule(
        elapsed_ms=st.one_of(st.just(50.0), st.floats(0.0, 5000.0)),
        learn=st.sampled_from([True, True, False]),
        data=st.data(),
    )
    def commit(self, elapsed_ms, learn, data):
        step = min(self.planned_members)
        members = sorted(self.planned_members[step])
        finished = data.draw(st.lists(st.sampled_from(members), unique=True)) if members else []
        accepted = {seq: data.draw(st.integers(0, drafts)) for seq, drafts in self.open.items()}
        if accepted and data.draw(st.booleans()):
            del accepted[min(accepted)]
        self.commit_step(elapsed_ms, finished, learn, accepted)

    @precondition(lambda self: self.planned_members)
    @rule(seq=seqs)
    def commit_too_much(self, seq):
        step, accepted = min(self.planned_members), {seq: self.open.get(seq, 0) + 1}
        assert self.both("commit", step, 50.0, (), True, accepted) is ValueError

    def commit_step(self, elapsed_ms, finished, learn=True, accepted=None):
        step = min(self.planned_members)
        finished = [seq for seq in finished if seq not in self.released]
        before_ms = self.compiled.predict_ms(2, 100, [(0, 50)])
        served = dict(self.reference.served)
        self.both("commit", step, elapsed_ms, finished, learn, accepted or {})
        assert learn or self.compiled.predict_ms(2, 100, [(0, 50)]) == before_ms
        del self.planned_members[step]
        for seq, right in (accepted or {}).items():
            if seq in self.live:
                served[self.clients[seq]] += right
                self.reached[seq] += right
                self.charged[seq] = self.reached[seq]
                self.tokens_left[seq] -= right
                if self.tokens_left[seq] == 0:
                    self.end(seq)
        assert self.reference.served == served
        self.open = {}
        for seq in finished:
            self.end(seq)
        self.listed = None

    @rule(share=st.sampled_from([0.1, 0.4, 0.7, 1.0]), cancels=st.booleans())
    def resize(self, share, cancels):
        for seq in self.both("resize", max(int(share * self.budget_bytes), 1)):
            if cancels:
                self.both("cancel", seq)
                self.end(seq)
        self.listed = None

    @rule()
    def release(self):
        before = self.compiled.statistics().kv_used_bytes
        releasable = sorted(self.compiled.releasable())
        assert releasable == sorted(self.reference.releasable())
        in_flight = set().union(*self.planned_members.values())
        held = {seq for seq in self.ended if seq not in in_flight} - set(releasable)
        assert set(releasable) <= self.ended - in_flight
        # Until the next plan, for those who may start in it.
        assert all(self.ended_in[seq] == self.plans and self.has_children(seq) for seq in held)
        for seq in releasable:
            before -= self.both("release", seq)
            self.ended.remove(seq)
            self.released.add(seq)
            self.reached.pop(seq, None)
        self.listed = None
        assert self.compiled.statistics().kv_used_bytes == before

    def has_children(self, seq):
        return any(
            told[0] == seq and child in self.live and child not in self.reached for child, told in self.told.items()
        )

    @rule(
        rows=st.integers(0, 4),
        context=st.integers(0, 999),
        chunks=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 200)), max_size=3),
        depth=st.integers(0, 15),
    )
    def predict(self, rows, context, chunks, depth):
        cost_ms = self.both("predict_ms", rows, context, chunks, depth)
        assert 0.0 <= cost_ms < float("inf")

    @invariant()
    def same_figures(self):
        if not hasattr(self, "compiled"):
            return
        figures = self.both("statistics")
        assert 0 <= figures.kv_used_bytes <= self.budget_bytes
        assert figures.queued + figures.prefilling + figures.decoding == len(self.live)
        assert figures.ending == len(self.ended)
        assert figures.prefilling + figures.decoding <= self.max_rows
        assert self.both("next_deadline") == min(self.live.values(), default=float("inf"))

    def teardown(self):
        """Drain: everything that lives ends, within a bound of steps, and no byte is left."""
        if not hasattr(self, "compiled"):
            return
        # Each round of MAX_OVERTAKEN admissions lets the next waiting one in; 40 steps run any one sequence alone.
        bound = 100 + 80 * (len(self.live) + 1) * 2
        for _ in range(bound):
            if not self.live and not self.planned_members:
                break
            while self.open or len(self.planned_members) >= 2 or (self.planned_members and not self.live):
                self.commit_step(100.0, [])
            self.release()
            if self.live and self.plan_step().step == 0 and self.planned_members:
                self.commit_step(100.0, [])
        self.release()
        assert not self.live, f"{len(self.live)} sequences starve"
        assert not self.ended
        assert self.both("statistics").kv_used_bytes == 0
        assert self.released.isdisjoint(self.compiled.releasable())


EXAMPLES = 100
"""Of 60 calls each, others in every run; ``make soak`` asks for more."""
SchedulerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("LMX_SOAK_EXAMPLES", EXAMPLES)), stateful_step_count=60, deadline=None
)
TestScheduler = SchedulerMachine.TestCase
