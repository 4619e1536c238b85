"""The scheduler's policy in plain lists and dicts: the reference that ``lmx/_sched.pyx`` is held against.

It has the face of ``lmx._sched.Scheduler``. Where the compiled one keeps a sum or an index, this one computes it anew
from the sequences, so that its accounting cannot drift. Slow on purpose; used by tests and ``bench/sched.py`` only.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

from lmx._sched import Join, NeverFits, Prefill, SchedulerStatistics
from tests.depth_reference import MAX_DEPTH, Acceptance, Choice, Depths, Offer, bucket_of

TILE = 32
FIRST_CHUNK = 128
MAX_OVERTAKEN = 8
FAR_BEHIND = 512
MUCH_BEHIND = 2048
MAX_YIELDED = 2
EARNED_PREFILLED, EARNED_GENERATED, FIRST_EARNED, MAX_EARNED = 1, 4, 4 * 1024 * 16, 32 * 1024 * 16
NO_LIMIT = 2**62
ANSWER_TOKENS = 256.0
ANSWER_SHARE = 1 / 16
TAIL_SLACK = 1.1
WAVE_TARGETS = 8
MAX_WAVE = 64
MAX_STOPS = 16


@dataclass
class Plan:
    step: int = 0
    decode: tuple[int, ...] = ()
    depth: int = 0
    drafts: tuple[int, ...] = ()
    joins: tuple[Join, ...] = ()
    prefills: tuple[Prefill, ...] = ()
    preempted: tuple[int, ...] = ()
    expired: tuple[int, ...] = ()


@dataclass
class Sequence:
    id: int
    client: str
    priority: int
    deadline: float
    turn: int
    prompt: int
    target: int
    max_tokens: int
    state: str = "queued"
    has_row: bool = False
    started: int = 0
    overtaken: int = 0
    yielded: int = 0
    charged: int = 0
    kv_bytes: int = 0
    length: int = 0
    generated: int = 0
    last_step: int = 0
    cached: int = 0
    cached_in: int = 0
    parent: int = -1
    ended_in: int = 0
    stops: tuple[int, ...] = ()
    acceptance: Acceptance = field(default_factory=Acceptance)
    offered: tuple[int, int, int] = (0, 0, -1)  # tokens, source, after how many plans

    @property
    def chunk_end(self):
        return min((stop for stop in self.stops if stop > self.length), default=self.target)


@dataclass
class Step:
    rows: int = 0
    context: int = 0
    chunk: int = 0
    chunk_context: float = 0.0
    area: float = 0.0
    whole: tuple[int, ...] = ()
    holds: bool = False
    predicted_ms: float = 0.0
    verified: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # drafts, their source, KV before them
    depth: int = 0
    choice: Choice = field(default_factory=Choice)


@dataclass
class Fit:
    """``lmx/_cost.pxd`` again, operation by operation, so that the same floats come out."""

    shape: tuple[float, float, float]
    scale: float = 1.0
    weight: list[float] = field(default_factory=lambda: [1.0] * 3)
    gram: list[list[float]] = field(default_factory=lambda: [[0.0] * 3 for _ in range(3)])
    moment: list[float] = field(default_factory=lambda: [0.0] * 3)
    seen: bool = False
    surprises: int = 0

    def predict(self, x):
        w, s = self.weight, self.shape
        return self.scale * (w[0] * s[0] * x[0] + w[1] * s[1] * x[1] + w[2] * s[2] * x[2])

    def observe(self, x, measured_ms):
        predicted_ms = self.predict(x)
        ratio = min(max(measured_ms, 1e-3), 1e9) / predicted_ms
        surprise = (ratio > 2.0) - (ratio < 0.5)
        if not self.seen and measured_ms <= 0.0:
            return
        self.surprises = self.surprises + surprise if surprise * self.surprises > 0 else surprise
        if not self.seen or abs(self.surprises) == 3:
            self.scale *= ratio
            predicted_ms *= ratio
            ratio = 1.0
            self.surprises = 0
        ratio = min(max(ratio, 0.5), 2.0)
        self.seen = True
        u = [self.scale * self.shape[i] * x[i] / predicted_ms for i in range(3)]
        for i in range(3):
            for j in range(3):
                self.gram[i][j] = 0.97 * self.gram[i][j] + u[i] * u[j]
            self.moment[i] = 0.97 * self.moment[i] + u[i] * ratio
        self.solve()

    def solve(self):
        free = [True] * 3
        while True:
            m = [[self.gram[i][j] if free[i] and free[j] else 0.0 for j in range(3)] for i in range(3)]
            for i in range(3):
                m[i][i] += 0.01
                m[i].append(self.moment[i] + 0.01 if free[i] else 0.0)
            for k in range(3):
                for i in range(k + 1, 3):
                    factor = m[i][k] / m[k][k]
                    for j in range(k, 4):
                        m[i][j] -= factor * m[k][j]
            for i in (2, 1, 0):
                for j in range(i + 1, 3):
                    m[i][3] -= m[i][j] * self.weight[j]
                self.weight[i] = m[i][3] / m[i][i]
            lowest = self.weight.index(min(self.weight))
            if self.weight[lowest] >= 0.0:
                return
            free[lowest] = False


class ReferenceScheduler:
    def __init__(
        self,
        *,
        max_rows,
        kv_budget_bytes,
        kv_bytes_per_token,
        kv_bytes_per_sequence=0,
        kv_quantum_tokens=256,
        max_chunk_tokens=512,
        max_wave_tokens=2048,
        max_chunk_area=0,
        itl_target_ms=250.0,
        max_step_ms=4000.0,
        max_depth=0,
    ):
        self.max_depth = _whole("max_depth", max_depth, 0, MAX_DEPTH)
        self.max_rows = _whole("max_rows", max_rows, 1)
        self.kv_budget_bytes = _whole("kv_budget_bytes", kv_budget_bytes, 1)
        self.kv_bytes_per_sequence = _whole("kv_bytes_per_sequence", kv_bytes_per_sequence, 0)
        self.quantum_tokens = _whole("kv_quantum_tokens", kv_quantum_tokens, 1)
        self.quantum_bytes = kv_quantum_tokens * _whole("kv_bytes_per_token", kv_bytes_per_token, 0)
        self.max_chunk_tokens = _whole("max_chunk_tokens", max_chunk_tokens, TILE)
        self.max_wave_tokens = _whole("max_wave_tokens", max_wave_tokens, 1)
        self.max_chunk_area = _whole("max_chunk_area", max_chunk_area, 0) or math.inf
        for name, limit_ms in (("itl_target_ms", itl_target_ms), ("max_step_ms", max_step_ms)):
            if not (math.isfinite(limit_ms) and limit_ms > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {limit_ms!r}")
        self.itl_target_ms = itl_target_ms
        self.max_step_ms = max_step_ms
        self.sequences = {}
        self.served = {}
        self.floor = 0
        self.arrivals = self.starts = 0
        self.plans = self.planned = self.committed = self.preemptions = 0
        self.uncommitted = {}
        self.elapsed_ms = {}
        self.held = []  # the last steps, if rows waited for them
        self.kv_short = self.followed = False
        self.earned = FIRST_EARNED
        self.answer_tokens, self.answer_spread = ANSWER_TOKENS, 0.0
        self.decode_fit = Fit((50.0, 3.0, 0.002))
        self.prefill_fit = Fit((50.0, 2.0, 0.0005))
        self.depths = Depths()

    @property
    def capacity_tokens(self):
        room_bytes = self.kv_budget_bytes - self.kv_bytes_per_sequence
        if room_bytes < 0:
            return 0
        return room_bytes // self.quantum_bytes * self.quantum_tokens if self.quantum_bytes else NO_LIMIT

    def resize(self, kv_budget_bytes):
        self.kv_budget_bytes = _whole("kv_budget_bytes", kv_budget_bytes, 1)
        self.followed = False
        queued = self.in_state("queued", "waiting")
        return tuple(sorted(s.id for s in queued if not s.generated and s.target + 1 > self.capacity_tokens))

    # --- what the compiled one keeps as sums and lists ---

    def in_state(self, *states):
        return [s for s in self.sequences.values() if s.state in states]

    def running(self):
        return sorted(self.in_state("prefilling", "decoding"), key=lambda s: s.started)

    def used_bytes(self):
        return sum(s.kv_bytes for s in self.sequences.values())

    def rows_used(self):
        return sum(s.has_row for s in self.sequences.values())

    def kv_bytes_for(self, tokens):
        return self.kv_bytes_per_sequence + math.ceil(tokens / self.quantum_tokens) * self.quantum_bytes

    def admission_bytes(self, s):
        return self.kv_bytes_for(s.target + (s.max_tokens - s.generated > 1))

    def fits(self, s):
        return self.wanted_bytes(s, alone=not self.running()) <= self.room_bytes()

    def room_bytes(self):
        growth = sum(self.expected_bytes(row, row.kv_bytes) - row.kv_bytes for row in self.running())
        return self.kv_budget_bytes - self.used_bytes() - growth

    def wanted_bytes(self, s, alone):
        asked = self.admission_bytes(s)
        return min(asked, self.kv_budget_bytes) if alone else self.expected_bytes(s, asked)

    def expected_bytes(self, s, held_bytes):
        answer = math.ceil(math.ceil(self.answer_tokens + self.answer_spread) / self.quantum_tokens)
        most = self.kv_bytes_for(s.prompt + s.max_tokens - 1)
        return min(
            most, max(self.kv_bytes_for(s.prompt) + answer * self.quantum_bytes, held_bytes + self.quantum_bytes)
        )

    def order(self, s):
        return -s.priority, self.served[s.client], s.turn

    # --- the policy ---

    def plan(self, now):
        _time("now", now)
        if self.planned - self.committed > 1:
            raise RuntimeError(f"steps {self.committed + 1} and {self.planned} are both uncommitted: commit one first")
        if self.open_drafts():
            raise RuntimeError(f"step {self.planned} verifies drafts and is uncommitted: commit it first")
        plan, step = Plan(), Step()
        self.plans += 1
        late = sorted(s.id for s in self.sequences.values() if s.state != "ended" and s.deadline <= now)
        for seq in late:
            self.cancel(seq)
        plan.expired = tuple(late)
        self.follow()
        self.followed = False
        if self.make_room(plan):
            admit = not plan.preempted
            if admit:
                self.give_way(plan)
                admit = not plan.preempted or self.committed == self.planned
            s = self.next_prompt(admit)
            if s and self.stale(s):
                self.start_with(s, 0)
            step.holds = s is not None and self.holds(s)
            if not step.holds:
                self.verify(step, s)
                self.decode(plan, step)
            if s is not None:
                self.prefill(plan, step, s)
        if step.rows or step.chunk:
            self.planned += 1
            if step.holds:
                step.predicted_ms = self.cost_ms(step, 0, 0)
                self.held.append(self.planned)
            else:
                self.held = []
            plan.step = self.planned
            self.uncommitted[plan.step] = step
        return plan

    def make_room(self, plan):
        while True:
            growing = [s for s in self.in_state("decoding") if self.kv_bytes_for(s.length + 1) > s.kv_bytes]
            if self.used_bytes() + len(growing) * self.quantum_bytes <= self.kv_budget_bytes:
                return True
            if any(s.kv_bytes for s in self.in_state("ended")):
                return False
            first_started = min(self.running(), key=lambda s: (-s.priority, s.started))
            others = [s for s in self.running() if s is not first_started]
            if not others:
                return True
            self.preempt(plan, min(others, key=lambda s: (s.priority, s.length, -s.started)))

    def follow(self):
        if self.followed:
            return
        self.followed = True
        going = []
        for s in self.in_state("waiting"):
            parent = self.sequences.get(s.parent)
            if parent is None or self.has(parent, s.cached):
                going.append((s, s.cached if parent else 0, s.parent))
            elif not self.leads(parent, s):
                going.append((s, 0, -1))
        for s, cached, parent in going:
            s.state = "queued"
            self.start_with(s, cached, parent)

    def has(self, s, tokens):
        return s.has_row and s.length >= tokens

    def leads(self, parent, s):
        if parent.state == "ended":
            return False
        if parent.state == "queued" and self.has_place(s) and not self.has_place(parent):
            return False
        if parent.priority != s.priority or parent.client == s.client:
            return (-parent.priority, parent.turn) < (-s.priority, s.turn)
        rivals = [o for o in self.in_state("prefilling", "queued") if o is not s and o.priority >= s.priority]
        left = {other.id: other.target - (other.charged, other.length)[other.has_row] for other in rivals}
        computed = 0
        if parent.state == "prefilling":
            computed = parent.length - parent.cached
            before = -computed
        else:
            its = [other for other in rivals if other.client == parent.client and other is not parent]
            its = [o for o in its if o.has_row or parent.state == "waiting" or o.turn < parent.turn]
            before = sum(left[other.id] for other in its)
        lag = self.served[parent.client] + before - self.served[s.client]
        others = sum(left.values()) - left.get(parent.id, 0)
        clients = {other.client for other in self.sequences.values() if other.state != "ended"} | {s.client}
        return lag <= 0 or lag * len(clients) <= s.cached or others <= computed

    def start_with(self, s, tokens, parent=-1):
        s.length, s.cached, s.cached_in, s.parent = tokens, tokens, self.plans, parent

    def stale(self, s):
        """What a store had before an earlier plan."""
        return s.state == "queued" and s.length > 0 and s.parent == -1 and s.cached_in < self.plans - 1

    def children(self, s):
        return [other for other in self.in_state("waiting", "queued") if other.parent == s.id]

    def abandon(self, s):
        for child in self.children(s):
            if self.has(s, child.cached):
                continue
            if child.state == "queued":
                self.start_with(child, 0)
            elif s.state == "ended":
                child.parent = -1

    def preempt(self, plan, victim):
        if victim.state == "decoding":
            victim.target = victim.length + 1
        victim.charged = max(victim.charged, victim.target if victim.state == "decoding" else victim.length)
        victim.state, victim.has_row, victim.kv_bytes = "queued", False, 0
        self.start_with(victim, 0)
        self.abandon(victim)
        self.preemptions += 1
        plan.preempted += (victim.id,)

    def give_way(self, plan):
        running = self.running()
        rows_full = self.rows_used() == self.max_rows
        if self.rows_used() > len(running) or not (rows_full or self.kv_short):
            return
        s = min(self.in_state("queued"), key=self.order, default=None)
        if s is None or self.has_place(s):
            return
        lower = [row for row in running if row.priority < s.priority]
        if lower:
            room = self.room_bytes() + sum(self.expected_bytes(row, row.kv_bytes) for row in lower)
            if self.wanted_bytes(s, alone=len(lower) == len(running)) <= room:
                while not self.has_place(s):
                    self.preempt(plan, min(self.running(), key=lambda s: (s.priority, s.length, -s.started)))
            return
        rows = [row for row in running if self.owes(row, s, running)]
        if rows:
            victim = min(rows, key=lambda s: (s.priority, s.length, -s.started))
            self.earned -= 16 * victim.length
            victim.yielded += 1
            self.preempt(plan, victim)

    def has_place(self, s):
        return self.rows_used() < self.max_rows and self.fits(s)

    def owes(self, row, s, running):
        its = sum(r.client == row.client for r in running)
        others = sum(r.client == s.client for r in running)
        room = self.room_bytes() + self.expected_bytes(row, row.kv_bytes)
        return (
            row.priority == s.priority
            and row.yielded < MAX_YIELDED
            and 16 * row.length <= self.earned
            and (its > others + 1 or (others == 0 and self.rows_used() == self.max_rows))
            and self.served[row.client] - self.served[s.client]
            > max(FAR_BEHIND if its > others + 1 else MUCH_BEHIND, row.length // 2)
            and self.wanted_bytes(s, alone=len(running) == 1) <= room
        )

    def verify(self, step, joining):
        """Which drafts: at the chosen depth, or at the largest for which there is KV."""
        if self.planned > self.committed:
            return
        rows = [s for s in self.running() if s.state == "decoding"]
        step.choice = self.choose(rows, self.plans - 1, joining is None)
        room = self.kv_budget_bytes - self.used_bytes()
        if joining is not None and joining.state == "queued":
            room -= self.admission_bytes(joining)
        for depth in range(step.choice.depth, 0, -1):
            drafts = {s.id: self.drafts(s, depth, step.choice.asked, self.plans - 1) for s in rows}
            growth = [max(0, self.kv_bytes_for(s.length + 1 + drafts[s.id]) - s.kv_bytes) for s in rows]
            if sum(growth) <= room:
                step.verified = {s.id: (drafts[s.id], s.offered[1], 0) for s in rows if drafts[s.id]}
                break
        step.depth = max((drafts for drafts, _, _ in step.verified.values()), default=0)
        if step.depth < step.choice.depth:
            step.choice.probe = False
        if not step.depth:
            step.choice.asked = 0

    def drafts(self, s, depth, asked, plans):
        tokens, source, offered_in = s.offered
        if offered_in != plans or source > asked:
            return 0
        return min(tokens, depth, s.max_tokens - s.generated - 1)

    def choose(self, rows, plans, probes):
        offers = [Offer(s.acceptance, s.offered[1], self.drafts(s, self.max_depth, 1, plans)) for s in rows]
        offers = [offer for offer in offers if offer.most > 0]
        if not offers or not self.decode_fit.seen:
            return Choice(gain=0.0)
        return self.depths.choose(len(rows), offers, probes)

    def decode(self, plan, step):
        rows = [s for s in self.running() if s.state == "decoding"]
        plan.decode = tuple(s.id for s in rows)
        plan.depth = step.depth
        if step.depth:
            plan.drafts = tuple(step.verified.get(s.id, (0,))[0] for s in rows)
        for s in rows:
            s.length += 1
            s.kv_bytes = max(s.kv_bytes, self.kv_bytes_for(s.length))
            if s.id in step.verified:
                drafts, source, _ = step.verified[s.id]
                step.verified[s.id] = drafts, source, s.kv_bytes
                s.kv_bytes = max(s.kv_bytes, self.kv_bytes_for(s.length + drafts))
            step.rows += 1
            step.context += s.length
            self.generate(s)

    def prefill(self, plan, step, s):
        limit_ms = self.limit_ms(step)
        self.take(plan, step, s, s.target - s.length if step.holds else self.chunk_tokens(step, s))
        if s.length < s.target or not self.prefill_fit.seen or plan.preempted:
            return
        while len(plan.prefills) < MAX_WAVE and (following := self.next_of_wave(step, s.priority, limit_ms)):
            self.take(plan, step, following, following.target - following.length)

    def next_of_wave(self, step, priority, limit_ms):
        """The next in order, if it is of this priority and fits to its end."""
        states = ("queued", "prefilling") if self.rows_used() < self.max_rows else ("prefilling",)
        if any(s.priority > priority for s in self.in_state("queued")):
            return None
        s = min(self.in_state(*states), key=self.order, default=None)
        if s is None:
            return None
        left = s.target - s.length
        fits = (
            s.priority == priority
            and (s.state == "prefilling" or self.fits(s))
            and left <= self.max_chunk_tokens
            and s.chunk_end == s.target
            and not self.stale(s)
            and step.chunk + left <= self.max_wave_tokens
            and self.cost_ms(step, s.length, left) <= limit_ms
            and self.area(step, s, left) <= self.max_chunk_area
        )
        return s if fits else None

    def holds(self, s):
        rows = self.in_state("decoding")
        if not self.prefill_fit.seen or not rows or s.cached or s.target - s.length > self.max_chunk_tokens:
            return False
        if s.chunk_end < s.target:
            return False
        if any(row.generated > 1 or row.priority > s.priority for row in rows):
            return False
        step = Step(holds=True)
        return (
            self.cost_ms(step, s.length, s.target - s.length) <= self.limit_ms(step)
            and self.area(step, s, s.target - s.length) <= self.max_chunk_area
        )

    def limit_ms(self, step):
        """How long the step's prompts may take together; beside or before rows, these with it."""
        if step.rows:
            return min(self.max_step_ms, self.itl_target_ms)
        limit_ms = min(self.max_step_ms, WAVE_TARGETS * self.itl_target_ms)
        if step.holds:
            running = self.running()
            decode_ms = self.decode_ms(Step(rows=len(running), context=sum(s.length for s in running)))
            limit_ms -= max(decode_ms, self.itl_target_ms)
            limit_ms -= sum(
                self.uncommitted[k].predicted_ms if k in self.uncommitted else self.elapsed_ms[k] for k in self.held
            )
        return limit_ms

    def take(self, plan, step, s, tokens):
        if s.state == "queued":
            self.starts += 1
            s.state, s.has_row, s.started, s.kv_bytes = "prefilling", True, self.starts, self.admission_bytes(s)
            if s.length:
                plan.joins += (Join(s.id, s.length, s.parent),)
            s.parent = -1
        plan.prefills += (Prefill(s.id, s.length, tokens, s.length + tokens == s.target),)
        step.chunk += tokens
        step.chunk_context += tokens * (s.length + tokens / 2.0)
        if tokens == s.target:
            step.whole += (tokens,)
        else:
            step.area += tokens * (s.length + tokens)
        s.length += tokens
        s.last_step = self.planned + 1
        fresh = sum(position >= s.charged for position in range(s.length - tokens, s.length))
        self.served[s.client] += fresh
        self.earned = min(self.earned + EARNED_PREFILLED * fresh, MAX_EARNED)
        if s.length == s.target:
            s.state = "decoding"
            self.generate(s)

    def next_prompt(self, admit):
        prefilling = sorted(self.in_state("prefilling"), key=self.order)
        best = prefilling[0] if prefilling else None
        self.kv_short = False
        if not admit or self.rows_used() == self.max_rows:
            return best
        waits = None
        first_queued = min(self.in_state("queued"), key=self.order, default=None)
        self.kv_short = first_queued is not None and not self.fits(first_queued)
        for s in sorted(self.in_state("queued"), key=self.order):
            if best and self.order(best) < self.order(s):
                return best
            if self.fits(s):
                if waits and waits.overtaken >= MAX_OVERTAKEN:
                    return best
                if waits:
                    waits.overtaken += 1
                return s
            waits = waits or s
        return best

    def chunk_tokens(self, step, s):
        left = s.chunk_end - s.length
        most, limit_ms = self.max_chunk_tokens, self.max_step_ms
        if step.rows:
            limit_ms = min(limit_ms, self.itl_target_ms)
            if not self.prefill_fit.seen:
                most = min(most, FIRST_CHUNK)
        if left <= TILE:
            return left
        tokens = min(left, most) // TILE * TILE
        while tokens > TILE and (
            self.cost_ms(step, s.length, tokens) > limit_ms or self.area(step, s, tokens) > self.max_chunk_area
        ):
            tokens -= TILE
        slack_ms = TAIL_SLACK * max(limit_ms, self.cost_ms(step, s.length, tokens))
        whole_left = (
            left - tokens < TILE
            and left <= most
            and self.area(step, s, left) <= self.max_chunk_area
            and self.cost_ms(step, s.length, left) <= slack_ms
        )
        return left if whole_left else tokens

    def generate(self, s):
        s.generated += 1
        s.last_step = self.planned + 1
        self.served[s.client] += 1
        self.earned = min(self.earned + EARNED_GENERATED, MAX_EARNED)
        if s.generated == s.max_tokens:
            self.end(s)

    def end(self, s):
        s.state, s.parent, s.ended_in = "ended", -1, self.plans
        self.followed = False
        self.abandon(s)
        if s.generated:
            self.answer_spread += (abs(s.generated - self.answer_tokens) - self.answer_spread) * ANSWER_SHARE
            self.answer_tokens += (s.generated - self.answer_tokens) * ANSWER_SHARE
        if not any(other.state != "ended" for other in self.sequences.values()):
            self.floor = self.served[s.client]

    # --- cost ---

    def area(self, step, s, tokens):
        whole = step.whole + (tokens,) * (tokens == s.target)
        padded = float(len(whole)) * max(whole, default=0) * max(whole, default=0)
        return step.area + padded + (0.0 if tokens == s.target else float(tokens * (s.length + tokens)))

    def decode_ms(self, step):
        if not step.rows:
            return 0.0
        cost_ms = self.decode_fit.predict((1.0, step.rows, step.context))
        if step.depth:
            cost_ms *= self.depths.expected_ratio(step.choice.asked, step.rows, step.depth)
        return cost_ms

    def cost_ms(self, step, start, tokens):
        cost_ms = self.decode_ms(step)
        if step.chunk + tokens:
            context = step.chunk_context + tokens * (start + tokens / 2.0)
            cost_ms += self.prefill_fit.predict((1.0, step.chunk + tokens, context))
        return cost_ms

    def learn(self, step, elapsed_ms):
        first = not (self.decode_fit.seen or self.prefill_fit.seen)
        if step.chunk:
            x = (1.0, step.chunk, step.chunk_context)
            decode_ms = self.decode_ms(step)
            if elapsed_ms >= decode_ms:
                self.prefill_fit.observe(x, elapsed_ms - decode_ms)
            elif not step.depth:
                share = decode_ms / (decode_ms + self.prefill_fit.predict(x))
                self.decode_fit.observe((1.0, step.rows, step.context), elapsed_ms * share)
        else:
            x = (1.0, step.rows, step.context)
            if not step.depth:
                self.decode_fit.observe(x, elapsed_ms)
            if self.max_depth and self.decode_fit.seen:
                ratio = min(max(elapsed_ms, 1e-3), 1e9) / self.decode_fit.predict(x)
                choice = step.choice
                self.decode_fit.scale *= self.depths.learn_cell(
                    choice.asked, step.rows, step.depth, ratio, choice.probe
                )
        if first:
            self.decode_fit.scale = self.prefill_fit.scale = self.decode_fit.scale * self.prefill_fit.scale

    def predict_ms(self, decode_rows, decode_context, chunks=(), depth=0):
        step = Step(_whole("decode_rows", decode_rows, 0), _whole("decode_context", decode_context, 0))
        step.depth = _whole("depth", depth, 0, MAX_DEPTH)
        for start, tokens in chunks:
            step.chunk += _whole("chunk tokens", tokens, 0)
            step.chunk_context += tokens * (_whole("chunk start", start, 0) + tokens / 2.0)
        return self.cost_ms(step, 0, 0)

    # --- the public bookkeeping ---

    def submit(
        self,
        seq,
        prompt_tokens,
        max_tokens,
        *,
        client="",
        priority=0,
        deadline=math.inf,
        cached_tokens=0,
        parent=-1,
        stops=(),
    ):
        _whole("seq", seq, 0)
        _whole("prompt_tokens", prompt_tokens, 1)
        _whole("max_tokens", max_tokens, 1)
        _whole("priority", priority, -(2**31))
        if _whole("cached_tokens", cached_tokens, 0) >= prompt_tokens:
            raise ValueError(f"cached_tokens must leave one of {prompt_tokens} prompt tokens, got {cached_tokens}")
        if len(stops) > MAX_STOPS or any(a >= b for a, b in pairwise((0, *stops, prompt_tokens))):
            raise ValueError(f"stops must be at most {MAX_STOPS} and ascend inside the prompt, got {stops!r}")
        if not deadline >= 0:
            raise ValueError(f"deadline must be a time of at least 0 (infinity: none), got {deadline!r}")
        if seq in self.sequences:
            raise ValueError(f"seq {seq} is known already: an id is free again after release()")
        if prompt_tokens + 1 > self.capacity_tokens:
            needed_bytes = self.kv_bytes_for(prompt_tokens + 1)
            raise NeverFits(f"a prompt of {prompt_tokens} tokens", needed_bytes, self.kv_budget_bytes)
        live_clients = {s.client for s in self.sequences.values() if s.state != "ended"}
        if client not in live_clients:
            self.floor = min((self.served[name] for name in live_clients), default=self.floor)
            self.served[client] = max(self.served.get(client, 0), self.floor)
        self.arrivals += 1
        max_tokens = min(max_tokens, self.capacity_tokens - prompt_tokens + 1)
        source = self.sequences.get(parent)
        there = parent == -1 or bool(source and self.has(source, cached_tokens))
        s = Sequence(
            seq,
            client,
            priority,
            deadline,
            self.turn(prompt_tokens - cached_tokens * there, client, priority),
            prompt_tokens,
            target=prompt_tokens,
            max_tokens=max_tokens,
            cached=cached_tokens,
            stops=stops,
        )
        self.sequences[seq] = s
        self.followed = False
        if source and cached_tokens and source.target >= cached_tokens and (there or self.leads(source, s)):
            s.state, s.parent = "waiting", parent
        else:
            self.start_with(s, cached_tokens if parent == -1 else 0)
        return max_tokens

    def upcoming(self, most):
        _whole("most", most, 0)
        self.follow()
        first = min(self.in_state("queued"), key=self.order, default=None)
        if first is None or most == 0:
            return ()
        room, alone = self.room_bytes(), not self.running()
        fitting = [s for s in self.in_state("queued") if self.wanted_bytes(s, alone) <= room]
        highest = max((s.priority for s in fitting), default=0)
        fitting = [s for s in fitting if s.priority == highest]
        ahead = dict(self.served)
        line = []
        for s in sorted(fitting, key=lambda s: s.turn):
            line.append((ahead[s.client], s.turn, s.id))
            ahead[s.client] += max(0, s.target - max(s.charged, s.length)) + 1
        ids = [seq for _, _, seq in sorted(line)][: min(most, self.max_rows - self.rows_used())]
        return tuple(([] if ids[:1] == [first.id] else [first.id]) + ids)[:most]

    def recache(self, seq, tokens, parent=-1):
        s, source = self.sequences.get(seq), self.sequences.get(parent)
        if s is None or s.state != "queued":
            return False
        if _whole("tokens", tokens, 0) >= s.target:
            raise ValueError(f"tokens must leave one of {s.target} to compute, got {tokens}")
        there = parent == -1 or bool(source and self.has(source, tokens))
        self.start_with(s, tokens * there, parent if there and tokens else -1)
        return there

    def turn(self, prompt_tokens, client, priority):
        turn = self.arrivals * (MAX_OVERTAKEN + 1) + MAX_OVERTAKEN
        if prompt_tokens > self.max_chunk_tokens:
            return turn
        waiting = self.in_state("queued", "prefilling")
        waiting = [s for s in waiting if s.client == client and s.priority == priority]
        stops = [
            s.turn for s in waiting if s.target - s.length <= self.max_chunk_tokens or s.overtaken >= MAX_OVERTAKEN
        ]
        passed = [s for s in waiting if s.turn > max(stops, default=-1)]
        if passed:
            first = min(passed, key=lambda s: s.turn)
            turn = first.turn - MAX_OVERTAKEN + first.overtaken
        for s in passed:
            s.overtaken += 1
        return turn

    def cancel(self, seq):
        if seq not in self.sequences or self.sequences[seq].state == "ended":
            return False
        self.end(self.sequences[seq])
        return True

    def offer(self, seq, tokens, source=0):
        offered = _whole("tokens", tokens, 0), _whole("source", source, 0, 1), self.plans
        if seq in self.sequences and self.sequences[seq].state == "decoding":
            self.sequences[seq].offered = offered

    def foresaw(self, seq, tokens, right, source=0):
        _whole("source", source, 0, 1)
        _whole("right", right, 0, _whole("tokens", tokens, 0))
        if seq in self.sequences and tokens:
            known, wrong = min(right, MAX_DEPTH), right < min(tokens, MAX_DEPTH)
            self.depths.learn_acceptance(self.sequences[seq].acceptance, source, known, wrong)

    def expected_depth(self):
        if self.open_drafts():
            return 0
        rows = [s for s in self.running() if s.state == "decoding"]
        return self.choose(rows, self.plans, True).depth

    def open_drafts(self):
        """The drafts of the uncommitted step."""
        return next((step.verified for step in self.uncommitted.values() if step.verified), {})

    def settle(self, verified, finished, accepted):
        """How many drafts were right; they count as done now."""
        total = 0
        for seq, (drafts, source, kv_bytes) in verified.items():
            s, right = self.sequences[seq], accepted.get(seq, 0)
            if s.state != "decoding":
                continue
            self.depths.learn_acceptance(s.acceptance, source, right, right < drafts and seq not in finished)
            s.length += right
            s.generated += right
            s.kv_bytes = max(kv_bytes, self.kv_bytes_for(s.length))
            self.served[s.client] += right
            self.earned = min(self.earned + EARNED_GENERATED * right, MAX_EARNED)
            total += right
            if s.generated == s.max_tokens:
                self.end(s)
        return total

    def commit(self, step, elapsed_ms, finished=(), learn=True, accepted=None):
        accepted = accepted or {}
        _time("elapsed_ms", elapsed_ms)
        if step != self.committed + 1 or self.committed == self.planned:
            raise ValueError(f"step {step} cannot be committed: {self.committed} of {self.planned} planned steps are")
        for seq in finished:
            if seq not in self.sequences:
                raise ValueError(f"seq {seq!r} cannot have finished in step {step}: it is not known")
        for seq, right in accepted.items():
            _whole("accepted", right, 0, self.open_drafts().get(seq, (0,))[0])
        self.committed = step
        committed = self.uncommitted.pop(step)
        self.elapsed_ms[step] = elapsed_ms
        if committed.rows and self.max_depth:
            self.depths.earn()
            right = self.settle(committed.verified, finished, accepted)
            if learn and committed.choice.probe and not committed.chunk:
                plain_ms = self.decode_fit.predict((1.0, committed.rows, committed.context))
                rows, choice = committed.rows, committed.choice
                lost = elapsed_ms / (plain_ms * self.depths.plain_ratio(bucket_of(rows)))
                lost -= (rows + right) / (rows * choice.gain)
                self.depths.pay(choice.asked, rows, committed.depth, lost)
        if learn:
            self.learn(committed, elapsed_ms)
        for seq in finished:
            self.cancel(seq)

    def releasable(self):
        return tuple(
            s.id
            for s in self.in_state("ended")
            if s.last_step <= self.committed and not (self.children(s) and s.ended_in == self.plans)
        )

    def release(self, seq):
        if seq not in self.releasable():
            raise ValueError(f"seq {seq!r} cannot be released: it is not one of releasable()")
        s = self.sequences.pop(seq)
        s.has_row = self.followed = False
        self.abandon(s)
        return s.kv_bytes

    def next_deadline(self):
        return min((s.deadline for s in self.sequences.values() if s.state != "ended"), default=math.inf)

    def statistics(self):
        return SchedulerStatistics(
            queued=len(self.in_state("queued", "waiting")),
            prefilling=len(self.in_state("prefilling")),
            decoding=len(self.in_state("decoding")),
            ending=len(self.in_state("ended")),
            kv_used_bytes=self.used_bytes(),
            kv_budget_bytes=self.kv_budget_bytes,
            preemptions=self.preemptions,
            steps=self.planned,
        )


def _whole(name, value, low, high=math.inf):
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
    return value


def _time(name, value):
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
