"""The scheduler beside a store of prefixes: a step loop with real tokens in its rows, in any order of events.

Rows hold what was computed into them, the store what was published and not evicted yet; an answer's tokens depend on
every token before them. So each answer shows whether its row held the right ones, whichever way they came there.
"""

import random
from dataclasses import dataclass, field

import pytest

from lmx._sched import NeverFits, Scheduler
from tests.sched_reference import ReferenceScheduler

BLOCK = 8
PLAN_FIELDS = ("step", "decode", "joins", "prefills", "preempted", "expired")


def next_token(tokens):
    return hash(tuple(tokens)) % 1000


def shared(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class Request:
    tokens: list[int]
    prompt_tokens: int
    max_tokens: int
    client: str
    stops: tuple[int, ...]
    computed: set[int] = field(default_factory=set)
    ended: bool = False


@dataclass
class StoreLoop:
    """Both schedulers, held to the same plans, around rows and a store. ``now`` counts steps."""

    random: random.Random
    compiled: Scheduler
    reference: ReferenceScheduler
    requests: dict[int, Request] = field(default_factory=dict)
    rows: dict[int, list[int]] = field(default_factory=dict)
    store: set[tuple[int, ...]] = field(default_factory=set)
    running: list = field(default_factory=list)
    now: float = 0.0
    hits: int = 0
    leaders: int = 0
    preemptions: int = 0

    def both(self, name, *args, **options):
        answers = [getattr(scheduler, name)(*args, **options) for scheduler in (self.compiled, self.reference)]
        assert answers[0] == answers[1], (name, args, options)
        return answers[0]

    def match(self, tokens):
        """How many of these the store has: whole blocks, and never all of them."""
        most = 0
        while most + BLOCK < len(tokens) and tuple(tokens[: most + BLOCK]) in self.store:
            most += BLOCK
        return most

    def submit(self, prompt, max_tokens, **options):
        seq = len(self.requests)
        lengths = {other: shared(prompt, r.tokens[: r.prompt_tokens]) for other, r in self.requests.items()}
        live = [other for other in lengths if not self.requests[other].ended]
        leader = max(live, key=lambda other: (lengths[other], -other), default=-1)
        cached = self.match(prompt)
        if leader >= 0 and min(lengths[leader], len(prompt) - 1) > cached:
            cached = min(lengths[leader], len(prompt) - 1)
        else:
            leader = -1
        stops = tuple(sorted(self.random.sample(range(1, len(prompt)), min(len(prompt) - 1, 2))))
        try:
            most = self.compiled.submit(
                seq, len(prompt), max_tokens, cached_tokens=cached, parent=leader, stops=stops, **options
            )
        except NeverFits:
            return
        assert most == self.reference.submit(
            seq, len(prompt), max_tokens, cached_tokens=cached, parent=leader, stops=stops, **options
        )
        self.requests[seq] = Request(list(prompt), len(prompt), most, options["client"], stops)

    def cancel(self, seq):
        if self.both("cancel", seq):
            self.requests[seq].ended = True

    def step(self, most):
        for seq in self.both("upcoming", most):
            tokens = self.requests[seq].tokens
            lengths = {other: min(shared(tokens, row), len(tokens) - 1) for other, row in self.rows.items()}
            row, cached = max(lengths, key=lambda other: (lengths[other], -other), default=-1), self.match(tokens)
            if row >= 0 and lengths[row] > cached:
                assert self.both("recache", seq, lengths[row], row)
            else:
                assert self.both("recache", seq, cached)
        served = dict(self.reference.served)
        plan, expected = self.compiled.plan(self.now), self.reference.plan(self.now)
        assert all(getattr(plan, name) == getattr(expected, name) for name in PLAN_FIELDS)
        for seq in plan.expired:
            self.requests[seq].ended = True
        for seq in plan.preempted:
            self.preemptions += 1
            self.publish(seq)
            del self.rows[seq]
        for join in plan.joins:
            request = self.requests[join.seq]
            if join.parent == -1:
                assert self.match(request.tokens) >= join.cached_tokens, "the store has forgotten it"
                self.hits += 1
            else:
                assert len(self.rows[join.parent]) >= join.cached_tokens, "it is not computed yet"
                self.leaders += 1
            source = self.rows[join.parent] if join.parent != -1 else request.tokens
            self.rows[join.seq] = source[: join.cached_tokens]
        for chunk in plan.prefills:
            request = self.requests[chunk.seq]
            row = self.rows.setdefault(chunk.seq, [])
            assert len(row) == chunk.start
            end = chunk.start + chunk.tokens
            assert not any(chunk.start < stop < end for stop in request.stops)
            fresh = set(range(chunk.start, end)) - request.computed
            row += request.tokens[chunk.start : end]
            request.computed |= fresh
            served[request.client] += len([i for i in fresh if i < request.prompt_tokens])
            if chunk.last:
                assert row == request.tokens
                self.draw(chunk.seq, served)
        for seq in plan.decode:
            self.requests[seq].computed.add(len(self.rows[seq]))
            self.rows[seq].append(self.requests[seq].tokens[-1])
            self.draw(seq, served)
        if self.preemptions == 0:  # after one, what had been cached is not charged either
            assert self.reference.served == served
        if plan.step:
            self.running.append((plan.step, [*plan.decode, *(c.seq for c in plan.prefills)]))
        return plan.step

    def draw(self, seq, served):
        request = self.requests[seq]
        request.tokens.append(next_token(self.rows[seq]))
        served[request.client] += 1
        if len(request.tokens) == request.prompt_tokens + request.max_tokens:
            request.ended = True

    def publish(self, seq):
        row = self.rows[seq]
        self.store |= {tuple(row[:end]) for end in range(BLOCK, len(row) + 1, BLOCK)}

    def commit(self):
        step, members = self.running.pop(0)
        finished = [seq for seq in members if self.random.random() < 0.02]
        self.both("commit", step, self.random.uniform(5.0, 50.0), finished)
        for seq in members:
            if seq in self.rows:
                self.publish(seq)
            self.requests[seq].ended |= seq in finished

    def release(self):
        for seq in sorted(self.compiled.releasable()):
            self.both("release", seq)
            self.rows.pop(seq, None)

    def evict(self):
        self.store -= set(self.random.sample(sorted(self.store), len(self.store) // 3))


@pytest.mark.parametrize("seed", range(25))
def test_any_order_of_events_gives_the_same_answers_and_forgets_nobody(seed):
    chance = random.Random(seed)
    sizes = {
        "max_rows": chance.choice([2, 4, 8]),
        "kv_budget_bytes": chance.choice([160, 320, 2000]),
        "kv_bytes_per_token": 1,
        "kv_quantum_tokens": 8,
        "max_chunk_tokens": chance.choice([32, 64]),
        "itl_target_ms": chance.choice([30.0, 250.0]),
    }
    loop = StoreLoop(chance, Scheduler(**sizes), ReferenceScheduler(**sizes))
    stems = [[chance.randrange(1000) for _ in range(length)] for length in (20, 60, 110)]
    most = chance.choice([1, 2, 8])
    for _ in range(120):
        loop.now += 1.0
        for _ in range(chance.choice([0, 0, 0, 1, 3])):
            stem = chance.choice(stems)
            prompt = stem[: chance.choice([len(stem), len(stem) // 2])]
            prompt = prompt + [chance.randrange(1000) for _ in range(chance.choice([1, 10, 30]))]
            loop.submit(
                prompt,
                chance.randint(1, 12),
                client=chance.choice("abc"),
                priority=chance.choice([0, 0, 0, 1]),
                deadline=loop.now + chance.choice([3.0, 30.0, 1000.0]),
            )
        if chance.random() < 0.15 and loop.requests:
            loop.cancel(chance.randrange(len(loop.requests)))
        if chance.random() < 0.1:
            loop.evict()
        if len(loop.running) < 2:
            loop.step(most)
        if loop.running and chance.random() < 0.7:
            loop.commit()
        loop.release()
    for _ in range(4000):
        if not loop.running and loop.both("statistics").queued + len(loop.rows) == 0:
            break
        if (len(loop.running) == 2 or not loop.step(most)) and loop.running:
            loop.commit()
        loop.release()
    figures = loop.both("statistics")
    assert (figures.queued, figures.prefilling, figures.decoding, figures.ending) == (0, 0, 0, 0)
    assert figures.kv_used_bytes == 0
    assert loop.hits
    assert loop.leaders
    for request in loop.requests.values():
        assert request.ended
        tokens = request.tokens[: request.prompt_tokens]
        while len(tokens) < len(request.tokens):
            tokens.append(next_token(tokens))
        assert tokens == request.tokens
