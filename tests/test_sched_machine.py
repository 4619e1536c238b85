"""The compiled scheduler and the pure-Python reference, driven together by Hypothesis in any order of calls."""

import os

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

PLAN_FIELDS = ("step", "decode", "joins", "prefills", "preempted", "expired")


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
    ):
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
        }
        self.compiled, self.reference = Scheduler(**sizes), ReferenceScheduler(**sizes)
        self.now = 0.0
        self.next_seq = 0
        self.live = {}  # seq -> deadline
        self.planned_members = {}  # uncommitted step -> its sequences
        self.ended = set()  # cancelled or finished: in no later plan
        self.released = set()
        self.tokens_left = {}
        self.prefilled = {}  # seq -> where its last chunk ended
        self.prompts = {}
        self.taken_over = {}  # seq -> (its parent or -1, tokens), until it starts
        self.done_in = {}  # seq -> the step that ends its prefill
        self.plans, self.ended_in = 0, {}

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
    )
    def submit(self, prompt_tokens, max_tokens, client, priority, patience):
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        deadline = self.now + patience
        answer = self.both(
            "submit", seq, prompt_tokens, max_tokens, client=client, priority=priority, deadline=deadline
        )
        if answer is NeverFits:
            return multiple()
        assert 1 <= answer <= max_tokens
        self.prompts[seq] = prompt_tokens
        self.live[seq] = deadline
        self.tokens_left[seq] = answer
        return seq

    @rule(
        target=seqs,
        prompts=st.lists(st.tuples(st.integers(1, 70), st.sampled_from(["a", "b", "c"])), min_size=2, max_size=6),
        max_tokens=st.integers(1, 5),
    )
    def submit_several(self, prompts, max_tokens):
        """Short prompts at one moment, which may start in one step."""
        seqs = []
        for prompt_tokens, client in prompts:
            seq, self.next_seq = self.next_seq, self.next_seq + 1
            answer = self.both("submit", seq, prompt_tokens, max_tokens, client=client)
            if answer is not NeverFits:
                self.live[seq], self.tokens_left[seq] = float("inf"), answer
                seqs.append(seq)
        return multiple(*seqs)

    @rule(
        target=seqs,
        parent=seqs,
        count=st.integers(1, 4),
        share=st.sampled_from([1.0, 1.0, 0.5, 0.0]),
        max_tokens=st.integers(1, 60),
        others=st.sampled_from([{}, {}, {"client": "b"}, {"priority": 1}]),
    )
    def submit_children(self, parent, count, share, max_tokens, others):
        """Sequences of the same prompt, which take over what the parent has of it, or a part of that."""
        seqs = []
        for _ in range(count):
            seq, self.next_seq = self.next_seq, self.next_seq + 1
            prompt_tokens = self.prompts.get(parent, 50)
            cached = int(share * (prompt_tokens - 1))
            answer = self.both(
                "submit",
                seq,
                prompt_tokens,
                max_tokens,
                **({"client": "a"} | others),
                cached_tokens=cached,
                parent=parent,
            )
            if answer is not NeverFits:
                self.live[seq], self.tokens_left[seq] = float("inf"), answer
                self.prompts[seq], self.taken_over[seq] = prompt_tokens, (parent, cached)
                seqs.append(seq)
        return multiple(*seqs)

    @rule(target=seqs, prompt_tokens=st.integers(2, 300), left=st.integers(1, 40), max_tokens=st.integers(1, 20))
    def submit_cached(self, prompt_tokens, left, max_tokens):
        """One that starts with tokens from a store."""
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        cached = max(prompt_tokens - left, 0)
        answer = self.both("submit", seq, prompt_tokens, max_tokens, cached_tokens=cached)
        if answer is NeverFits:
            return multiple()
        self.live[seq], self.tokens_left[seq] = float("inf"), answer
        self.prompts[seq], self.taken_over[seq] = prompt_tokens, (-1, cached)
        return seq

    @rule(visitors=st.integers(1, 20), prompt_tokens=st.integers(1, 20))
    def visit(self, visitors, prompt_tokens):
        """New clients that go at once: the client table has to grow or forget them, without changing any order."""
        for _ in range(visitors):
            seq, self.next_seq = self.next_seq, self.next_seq + 1
            if self.both("submit", seq, prompt_tokens, 1, client=f"visitor {seq}") is not NeverFits:
                assert self.both("cancel", seq)
                assert self.both("release", seq) == 0

    @rule(seq=seqs)
    def cancel(self, seq):
        was_live = self.both("cancel", seq)
        assert was_live == (seq in self.live)
        self.end(seq)

    def end(self, seq):
        if self.live.pop(seq, None) is not None:
            self.ended.add(seq)
            self.ended_in[seq] = self.plans

    @precondition(lambda self: len(self.planned_members) < 2)
    @rule(seconds=st.sampled_from([0.0, 0.1, 3.0]))
    def plan(self, seconds):
        self.now += seconds
        self.plan_step()

    def plan_step(self):
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
            self.done_in.pop(seq, None)
        self.check_joins(plan)
        self.check_prefills(plan)
        if plan.step:
            self.planned_members[plan.step] = members
        else:
            assert not members
        for seq in (*plan.decode, *(chunk.seq for chunk in plan.prefills if chunk.last)):
            self.tokens_left[seq] -= 1
            if self.tokens_left[seq] == 0:
                self.end(seq)
        return plan

    def check_joins(self, plan):
        assert {join.seq for join in plan.joins} <= {chunk.seq for chunk in plan.prefills}
        for join in plan.joins:
            assert (join.parent, join.cached_tokens) == self.taken_over[join.seq], "at the first start, and only then"
            if join.parent != -1:
                assert self.done_in[join.parent] < plan.step, "what it takes over is not computed yet"
                assert join.parent not in self.released
            self.prefilled[join.seq] = join.cached_tokens
        for chunk in plan.prefills:
            parent, cached = self.taken_over.pop(chunk.seq, (0, 0))
            assert parent != -1 or chunk.start == cached
        for chunk in plan.prefills:
            if chunk.last:
                self.done_in[chunk.seq] = plan.step

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
            assert chunk.start == (0 if chunk.start == 0 else self.prefilled[chunk.seq])
            self.prefilled[chunk.seq] = chunk.start + chunk.tokens

    @precondition(lambda self: self.planned_members)
    @rule(elapsed_ms=st.floats(0.0, 5000.0), learn=st.sampled_from([True, True, False]), data=st.data())
    def commit(self, elapsed_ms, learn, data):
        step = min(self.planned_members)
        members = sorted(self.planned_members[step])
        finished = data.draw(st.lists(st.sampled_from(members), unique=True)) if members else []
        self.commit_step(elapsed_ms, finished, learn)

    def commit_step(self, elapsed_ms, finished, learn=True):
        step = min(self.planned_members)
        finished = [seq for seq in finished if seq not in self.released]
        before_ms = self.compiled.predict_ms(2, 100, [(0, 50)])
        self.both("commit", step, elapsed_ms, finished, learn)
        assert learn or self.compiled.predict_ms(2, 100, [(0, 50)]) == before_ms
        del self.planned_members[step]
        for seq in finished:
            self.end(seq)

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
        assert self.compiled.statistics().kv_used_bytes == before

    def has_children(self, seq):
        return any(parent == seq and child in self.live for child, (parent, _) in self.taken_over.items())

    @rule(
        rows=st.integers(0, 4),
        context=st.integers(0, 999),
        chunks=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 200)), max_size=3),
    )
    def predict(self, rows, context, chunks):
        cost_ms = self.both("predict_ms", rows, context, chunks)
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
            while len(self.planned_members) >= 2 or (self.planned_members and not self.live):
                self.commit_step(100.0, [])
            self.release()
            if self.live and self.plan_step().step == 0 and self.planned_members:
                self.commit_step(100.0, [])
        self.release()
        assert not self.live, f"{len(self.live)} sequences starve"
        assert not self.ended
        assert self.both("statistics").kv_used_bytes == 0
        assert self.released.isdisjoint(self.compiled.releasable())


EXAMPLES = 150
"""Of 60 calls each, others in every run; ``make soak`` asks for more."""
SchedulerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("LMX_SOAK_EXAMPLES", EXAMPLES)), stateful_step_count=60, deadline=None
)
TestScheduler = SchedulerMachine.TestCase
