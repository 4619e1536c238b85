"""The token scheduler: which sequences decode and which prompts prefill in each engine step (DESIGN §3).

Pure decisions in C structs: no MLX, no I/O, no clock (the time is an argument), no randomness; the same calls give the
same plans. The engine's step loop is its only caller, from one thread. ``_sched.pyi`` is the contract,
``tests/sched_reference.py`` the same policy in plain Python. Read ``plan()`` and what stands below it for the
policy; "who is next" stands in ``_order.pxd``, how many drafts a step verifies in ``_depth.pxd``; the use of the cost
model (``_cost.pxd``) follows, then the public bookkeeping, then the C plumbing.

**Planned counts as done.** A step changes lengths, counters and states while it is planned, before it has run: so the
next one can be planned at once, and nothing has to be settled when it is committed but its cost and who ended in it.
Of a step that verifies drafts only the token that each row gets for sure counts so; commit() settles the others, and
no step is planned before.

    state        row, KV   it becomes      by
    WAITING      no        QUEUED          _follow: its parent is past what they share, or is not waited for any more
    QUEUED       no        PREFILLING      _admit: its first chunk is planned
    PREFILLING   yes       DECODING        _take: its last chunk is planned (which draws its first token too)
    DECODING     yes       ENDED           _generate: its last token is planned; _settle: it was among the drafts
    PREFILLING, DECODING   QUEUED          _preempt: its row and KV are free at once; it prefills again
    any          as it was ENDED           _end, by cancel() and commit(finished), or a deadline in plan()
    ENDED        as it was (forgotten)     release(), when no uncommitted step has it any more
"""

from libc.math cimport INFINITY, ceil, isfinite
from libc.stdlib cimport free
from libc.string cimport memset

cimport cython

from lmx._cost cimport Fit, Step, add_area, chunk_context, decode_features, observe, predict, prefill_features, start_fit
from lmx._depth cimport (
    MAX_DEPTH,
    SOURCES,
    Choice,
    Depths,
    Drafting,
    Offers,
    add_offer,
    bucket_of,
    choose,
    earn,
    expected_ratio,
    learn_acceptance,
    learn_cell,
    pay,
    plain_ratio,
    start_depths,
)
from lmx._order cimport Client, Clients, activate, first, first_begun, idle, into_line, line_up, place, turn_of

from dataclasses import dataclass
from typing import NamedTuple

cdef enum:
    TILE = 32  # matrix kernels cost whole tiles of 32 rows
    FIRST_CHUNK = 128  # largest chunk beside decoding rows before anything was measured
    FAR_BEHIND = 512  # tokens that a client may be behind one with more rows, before it gets one of these
    MUCH_BEHIND = 2048  # with no row, behind one that has one
    MAX_YIELDED = 2  # at most so often the same sequence gives its row
    # What is computed again for that is earned before: this much, in 16ths of a token, for each token prefilled or
    # generated (which takes some 5 times as long); so much at the start, and never more than that.
    EARNED_PREFILLED = 1
    EARNED_GENERATED = 4
    FIRST_EARNED = 4 * 1024 * 16
    MAX_EARNED = 32 * 1024 * 16
    WAVE_TARGETS = 8  # a wave may take this many times itl_target_ms; see _wave()
    MAX_WAVE = 64  # prompts; bounds what it costs to find them

cdef long long NO_LIMIT = 2**62
cdef long long NO_PRIORITY = 2**62
cdef double ANSWER_TOKENS = 256.0  # how long an answer is, before one was seen
cdef double ANSWER_SHARE = 1.0 / 16.0  # of the last answer in what is expected of the next
cdef double TAIL_SLACK = 1.1  # a prompt's last tokens may stretch the step by this much to save a pass of their own


class NeverFits(ValueError):
    def __init__(self, message, needed_bytes=0, budget_bytes=0):
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    queued: int
    prefilling: int
    decoding: int
    ending: int
    kv_used_bytes: int
    kv_budget_bytes: int
    preemptions: int
    steps: int


class Join(NamedTuple):
    seq: int
    cached_tokens: int
    parent: int


@dataclass(frozen=True, slots=True)
class Prefill:
    seq: int
    start: int
    tokens: int
    last: bool


cdef class Plan:
    cdef readonly long long step
    cdef readonly tuple decode
    cdef readonly int depth
    cdef readonly tuple drafts
    cdef readonly tuple joins
    cdef readonly tuple prefills
    cdef readonly tuple preempted
    cdef readonly tuple expired


@cython.final  # so that its methods call each other directly
cdef class Scheduler:
    cdef Seq *seqs
    cdef Stops *stops
    cdef Drafting *drafting
    cdef int capacity
    cdef Slots queue, running, ending  # queue: by turn; running: PREFILLING and DECODING, oldest admission first
    cdef Slots waiting  # in order of arrival
    cdef Slots line  # what line_up() found
    cdef Slots verifying  # the rows of the uncommitted step that have drafts
    cdef bint followed  # _follow() was called, and nothing has changed since but by recache()
    cdef long long placed, backlog  # in _leads(): for which priority _place() was called, and what it found
    cdef dict slot_of
    cdef list free_slots
    cdef Clients clients
    cdef dict client_of
    cdef list free_clients
    cdef long long arrivals
    cdef int max_rows, rows_used
    cdef long long kv_budget_bytes, kv_used_bytes, kv_ending_bytes, quantum_bytes, kv_bytes_per_sequence
    cdef long long kv_most_bytes  # the budget has been that large
    cdef long long quantum_tokens, capacity_tokens
    cdef long long max_chunk_tokens, max_wave_tokens
    cdef double max_chunk_area
    cdef double itl_target_ms, max_step_ms
    cdef double answer_tokens, answer_spread  # smoothed: how long answers become, and how far they are from that
    cdef long long answer_bytes  # to be left free for an answer
    cdef bint kv_short  # the first in order that waits had a row in the last plan, and no KV
    cdef long long earned  # 16ths of tokens that may be computed again so that clients get their share
    cdef double held_ms  # how long rows wait for prompts to start with them, in committed steps
    cdef double due  # no live sequence has an earlier deadline
    cdef Fit decode_fit, prefill_fit
    cdef int max_depth
    cdef int offers  # since the last plan
    cdef Depths depths
    cdef Step uncommitted[2]
    cdef long long plans, planned, committed, preemptions
    cdef Plan last_plan
    cdef tuple decoding
    cdef bint decoding_changed

    # --- the policy ---------------------------------------------------------------------------------------------------

    def plan(self, double now):
        _check_time("now", now)
        if self.planned - self.committed > 1:
            raise RuntimeError(f"steps {self.committed + 1} and {self.planned} are both uncommitted: commit one first")
        if self.verifying.size:
            raise RuntimeError(f"step {self.planned} verifies drafts and is uncommitted: commit it first")
        cdef Plan plan = self.last_plan
        cdef Step *step = &self.uncommitted[(self.planned + 1) & 1]
        plan.step = plan.depth = 0
        plan.drafts = plan.decode = plan.joins = plan.prefills = plan.preempted = plan.expired = ()
        memset(step, 0, sizeof(Step))
        self.plans += 1
        if now >= self.due:
            plan.expired = self._expire(now)
        if self.waiting.size and not self.followed:
            self._follow()
        self.followed = False
        cdef int slot
        cdef bint admit
        if self._make_room(plan):
            # A step that preempts for want of memory admits nobody.
            admit = not plan.preempted and self._give_way(plan)
            slot = self._next_prompt(admit)
            if slot >= 0 and self._stale(&self.seqs[slot]):
                self._start_with(&self.seqs[slot], 0)
            if slot >= 0 and self._holds(slot):
                step.holds = True
            else:
                if self.offers:
                    self._verify(plan, step, slot)
                self._decode(plan, step)
            if slot >= 0:
                self._prefill(plan, step, slot)
        self.offers = 0
        if step.rows or step.chunk:
            if not step.holds:
                self.held_ms = 0.0
                self.uncommitted[self.planned & 1].holds = False
            self.planned += 1
            plan.step = self.planned
        c_assert(0 <= self.kv_ending_bytes <= self.kv_used_bytes <= self.kv_most_bytes)
        c_assert(self.running.size <= self.rows_used <= self.max_rows)
        return plan

    cdef tuple _expire(self, double now):
        """Cancel what is past its deadline."""
        cdef int i
        cdef Seq *seq
        cdef list late = []
        self.due = INFINITY
        for i in range(self._live_count()):
            seq = &self.seqs[self._live(i)]
            if seq.deadline <= now:
                late.append(seq.id)
            else:
                self.due = min(self.due, seq.deadline)
        late.sort()
        for id_ in late:
            self.cancel(id_)
        return tuple(late)

    cdef void _follow(self) noexcept:
        """Queue those whose parent is past what they share, in an earlier plan; and with nothing cached those who have
        no parent any more, or might lose by waiting for it.

        Not in the parent's own step: what they take over is there only when that has run.
        """
        cdef int i, slot
        cdef Seq *seq
        self.followed = True
        self.placed = NO_PRIORITY
        for i in range(self.waiting.size):
            seq = &self.seqs[self.waiting.items[i]]
            if seq.parent >= 0 and not self._has(&self.seqs[seq.parent], seq.cached):
                if not self._leads(&self.seqs[seq.parent], seq):
                    self._leave_parent(seq)
        i = 0
        while i < self.waiting.size:
            slot = self.waiting.items[i]
            seq = &self.seqs[slot]
            if seq.parent >= 0 and not self._has(&self.seqs[seq.parent], seq.cached):
                i += 1
                continue
            remove_slot(&self.waiting, slot)
            self._enqueue(slot)
            self._start_with(seq, seq.cached if seq.parent >= 0 else 0)

    cdef inline bint _has(self, Seq *seq, long long tokens) noexcept:
        """Whether the KV of its first ``tokens`` is there, once the planned steps have run."""
        return seq.has_row and seq.length >= tokens

    cdef bint _leads(self, Seq *parent, Seq *seq) noexcept:
        """Whether ``seq`` cannot lose by waiting until this one has prefilled what they share.

        Surely not if the parent is before it in order. If another client's parent comes ``lag`` tokens later, each of
        the others may be served so many until then: less than is saved, or all that they have is less than the parent
        has computed of it.
        """
        cdef long long room_bytes, lag, computed = 0, others
        cdef Client *ahead = &self.clients.items[parent.client]
        if parent.state == ENDED:
            return False
        if parent.state == QUEUED and self.rows_used < self.max_rows:
            room_bytes = self._room_bytes()
            if not self._fits(parent, room_bytes) and self._fits(seq, room_bytes):
                return False
        if parent.priority != seq.priority:
            return parent.priority > seq.priority
        if parent.client == seq.client:
            return parent.turn < seq.turn
        if self.placed != seq.priority:
            self._place(seq.priority)
        lag, others = ahead.served + ahead.ahead, self.backlog
        if parent.state == QUEUED:
            lag = parent.place
            others -= parent.target - parent.charged
        elif parent.state == PREFILLING:
            computed = parent.length - parent.cached
            lag = ahead.served - computed
            others -= parent.target - parent.length
        lag -= self.clients.items[seq.client].served
        return lag <= 0 or lag * self.clients.active <= seq.cached or others <= computed

    cdef void _place(self, int priority) noexcept:
        """Where those stand that may go before one of this priority, in tokens served; what all of them will take."""
        self.placed = priority
        self.backlog = place(self.seqs, &self.clients, &self.queue, &self.running, priority)

    cdef void _abandon(self, int parent) noexcept:
        """Those who cannot take over its KV any more start from nothing; but who waits for it still does, if it was
        only preempted."""
        cdef int i
        cdef Seq *seq
        cdef bint ended = self.seqs[parent].state == ENDED
        for i in range(self.queue.size):
            seq = &self.seqs[self.queue.items[i]]
            if seq.parent == parent and not self._has(&self.seqs[parent], seq.cached):
                self._leave_parent(seq)
                self._start_with(seq, 0)
        for i in range(self.waiting.size):
            seq = &self.seqs[self.waiting.items[i]]
            if seq.parent == parent and ended and not self._has(&self.seqs[parent], seq.cached):
                self._leave_parent(seq)

    cdef inline void _start_with(self, Seq *seq, long long tokens) noexcept:
        """So much of what a queued one is to prefill is computed already."""
        seq.length = seq.cached = tokens
        seq.since = self.plans

    cdef inline bint _stale(self, Seq *seq) noexcept:
        """Whether its tokens from a store were told before the last plan: they may be gone."""
        return seq.state == QUEUED and seq.length > 0 and seq.parent < 0 and seq.since < self.plans - 1

    cdef bint _make_room(self, Plan plan):
        """See that every decoding row can take one more token. False: not before ended sequences are released.

        The victim is of the lowest priority, and there the one that is soonest computed again; but never the first
        started of the highest, which so always goes on. Alone it fits, because submit() limits max_tokens to the
        budget; or may have more, if resize() has lowered that since.
        """
        cdef int i, slot, first_started, victim
        cdef Seq *seq
        cdef long long growth
        while True:
            growth = 0
            first_started = victim = -1
            for i in range(self.running.size):
                slot = self.running.items[i]
                seq = &self.seqs[slot]
                if seq.state == DECODING and self._kv_bytes(seq.length + 1) > seq.held_bytes:
                    growth += self.quantum_bytes
                if first_started < 0 or seq.priority > self.seqs[first_started].priority:
                    first_started = slot
            if self.kv_used_bytes + growth <= self.kv_budget_bytes:
                return True
            if self.kv_ending_bytes:
                return False  # a wait of a step is cheaper than a prompt computed again
            for i in range(self.running.size):
                slot = self.running.items[i]
                if slot != first_started and (victim < 0 or self._yields_before(slot, victim)):
                    victim = slot
            if victim < 0:
                return True  # submitted when the budget was larger
            self._preempt(plan, victim)

    cdef bint _yields_before(self, int a, int b) noexcept:
        """Of two running ones, ``b`` started first."""
        if self.seqs[a].priority != self.seqs[b].priority:
            return self.seqs[a].priority < self.seqs[b].priority
        return self.seqs[a].length <= self.seqs[b].length

    cdef bint _give_way(self, Plan plan):
        """Where rows or KV are full, running ones give theirs to the first in order that waits.

        Lower priorities give what a higher one needs, at once. A client far behind gets one row at a time, of a client
        that has more: as far as what is computed again stays a small part of all. Whoever gives its row keeps its
        turn. False: the newest tokens of those that gave theirs may be in flight, so nobody is admitted yet.
        """
        # What has ended gives its row and KV back in a step or two.
        if self.rows_used > self.running.size or (self.rows_used < self.max_rows and not self.kv_short):
            return True
        cdef int i, slot, lower = 0, victim = -1, waiter = -1
        for i in range(self.queue.size):
            waiter = self._first(waiter, self.queue.items[i])
        if waiter < 0 or self._has_place(waiter):
            return True
        cdef Seq *seq = &self.seqs[waiter]
        cdef long long room_bytes = self._room_bytes()
        for i in range(self.running.size):
            slot = self.running.items[i]
            if self.seqs[slot].priority < seq.priority:
                lower += 1
                room_bytes += self._expected_bytes(&self.seqs[slot], self.seqs[slot].held_bytes)
        if lower:
            if self._wanted_bytes(seq, alone=lower == self.running.size) <= room_bytes:
                while not self._has_place(waiter):
                    self._preempt(plan, self._lowest())
        else:
            self._count_rows(seq.client)
            for i in range(self.running.size):
                slot = self.running.items[i]
                if self._owes(slot, waiter, room_bytes) and (victim < 0 or self._yields_before(slot, victim)):
                    victim = slot
            if victim >= 0:
                self.earned -= 16 * self.seqs[victim].length
                self.seqs[victim].yielded += 1
                self._preempt(plan, victim)
        return not plan.preempted or self.committed == self.planned

    cdef bint _has_place(self, int slot) noexcept:
        return self.rows_used < self.max_rows and self._fits(&self.seqs[slot], self._room_bytes())

    cdef int _lowest(self) noexcept:
        cdef int i, victim = self.running.items[0]
        for i in range(1, self.running.size):
            if self._yields_before(self.running.items[i], victim):
                victim = self.running.items[i]
        return victim

    cdef bint _owes(self, int slot, int waiter, long long room_bytes) noexcept:
        """Whether this one's client is so far ahead of the waiting one's that its row, and what it holds, may go there;
        the farther, the more there is to compute again."""
        cdef Seq *row = &self.seqs[slot]
        cdef Seq *seq = &self.seqs[waiter]
        cdef Client *ahead = &self.clients.items[row.client]
        cdef Client *behind = &self.clients.items[seq.client]
        return (
            row.priority == seq.priority
            and row.yielded < MAX_YIELDED
            and 16 * row.length <= self.earned
            and (ahead.rows > behind.rows + 1 or (behind.rows == 0 and self.rows_used == self.max_rows))
            and ahead.served - behind.served
            > max(FAR_BEHIND if ahead.rows > behind.rows + 1 else MUCH_BEHIND, row.length // 2)
            and self._wanted_bytes(seq, alone=self.running.size == 1)
            <= room_bytes + self._expected_bytes(row, row.held_bytes)
        )

    cdef void _count_rows(self, int client) noexcept:
        cdef int i
        self.clients.items[client].rows = 0
        for i in range(self.running.size):
            self.clients.items[self.seqs[self.running.items[i]].client].rows = 0
        for i in range(self.running.size):
            self.clients.items[self.seqs[self.running.items[i]].client].rows += 1

    cdef void _verify(self, Plan plan, Step *step, int joining):
        """Drafts for the decoding rows, and KV for them: what can be had beside that of the rows' next tokens, and of
        the prompt that joins.

        Only where nothing is in flight: what is offered follows the newest token.
        """
        cdef int i, depth
        cdef long long room_bytes
        cdef Seq *seq
        cdef Drafting *draft
        if self.committed < self.planned:
            return
        cdef Choice choice = self._choose(self.plans - 1, joining < 0)
        room_bytes = self.kv_budget_bytes - self.kv_used_bytes
        if joining >= 0 and self.seqs[joining].state == QUEUED:
            room_bytes -= self.seqs[joining].asked_bytes
        depth = choice.depth
        while depth > 0 and self._growth_bytes(depth, choice.asked) > room_bytes:
            depth -= 1
        step.gain = choice.gain
        step.probe = choice.probe and depth == choice.depth
        step.asked = choice.asked if depth else 0
        drafts = []
        for i in range(self.running.size if depth else 0):
            seq = &self.seqs[self.running.items[i]]
            if seq.state == DECODING:
                draft = &self.drafting[self.running.items[i]]
                draft.verifies = self._drafts(self.running.items[i], depth, choice.asked, self.plans - 1)
                draft.verified_source = draft.source
                step.depth = max(step.depth, draft.verifies)
                drafts.append(draft.verifies)
                if draft.verifies:
                    append_slot(&self.verifying, self.running.items[i])
        plan.depth = step.depth
        plan.drafts = tuple(drafts)

    cdef inline int _drafts(self, int slot, int depth, int asked, long long plans) noexcept:
        """How many of a decoding one's drafts a step of this depth verifies; ``plans``: before the offer."""
        cdef Drafting *draft = &self.drafting[slot]
        cdef Seq *seq = &self.seqs[slot]
        if draft.offered_in != plans or draft.source > asked:
            return 0
        return <int>min(min(draft.offered, depth), seq.max_tokens - seq.generated - 1)

    cdef long long _growth_bytes(self, int depth, int asked) noexcept:
        """The KV that the decoding rows take in a step of this depth."""
        cdef int i, slot
        cdef long long growth = 0
        for i in range(self.running.size):
            slot = self.running.items[i]
            if self.seqs[slot].state == DECODING:
                growth += max(
                    0,
                    self._kv_bytes(self.seqs[slot].length + 1 + self._drafts(slot, depth, asked, self.plans - 1))
                    - self.seqs[slot].held_bytes,
                )
        return growth

    cdef Choice _choose(self, long long plans, bint probes) noexcept:
        cdef Offers offers
        cdef Choice choice
        cdef int i, slot, most
        memset(&offers, 0, sizeof(Offers))
        memset(&choice, 0, sizeof(Choice))
        if not self.decode_fit.seen:
            return choice
        for i in range(self.running.size):
            slot = self.running.items[i]
            if self.seqs[slot].state == DECODING:
                offers.rows += 1
                most = self._drafts(slot, self.max_depth, SOURCES, plans)
                if most > 0:
                    add_offer(&self.depths, &offers, &self.drafting[slot], most)
        if offers.most[SOURCES - 1]:
            choice = choose(&self.depths, &offers, probes)
        return choice

    cdef void _decode(self, Plan plan, Step *step):
        """One token for every decoding row, and room for its drafts."""
        cdef int i, slot
        cdef Seq *seq
        if self.decoding_changed:
            slots = [self.running.items[i] for i in range(self.running.size)]
            self.decoding = tuple([self.seqs[slot].id for slot in slots if self.seqs[slot].state == DECODING])
            self.decoding_changed = False
        plan.decode = self.decoding
        i = 0
        while i < self.running.size:
            slot = self.running.items[i]
            seq = &self.seqs[slot]
            if seq.state == DECODING:
                seq.length += 1
                if self._kv_bytes(seq.length) > seq.held_bytes:
                    seq.held_bytes += self.quantum_bytes
                    self.kv_used_bytes += self.quantum_bytes
                if step.depth:
                    self._hold_spare(slot)
                step.rows += 1
                step.context += seq.length
                self._generate(slot)
            if seq.state != ENDED:
                i += 1

    cdef inline void _hold_spare(self, int slot) noexcept:
        cdef Seq *seq = &self.seqs[slot]
        cdef Drafting *draft = &self.drafting[slot]
        draft.spare_bytes = max(0, self._kv_bytes(seq.length + draft.verifies) - seq.held_bytes)
        seq.held_bytes += draft.spare_bytes
        self.kv_used_bytes += draft.spare_bytes

    cdef void _prefill(self, Plan plan, Step *step, int slot):
        """A chunk of this prompt; if it ends the prompt, the next ones in order with it, as far as time allows."""
        cdef Seq *seq = &self.seqs[slot]
        cdef double limit_ms = self._limit_ms(step)
        self._take(plan, step, slot, seq.target - seq.length if step.holds else self._chunk_tokens(step, seq))
        if seq.length == seq.target and self.prefill_fit.seen and not plan.preempted:
            self._wave(plan, step, seq.priority, limit_ms)
        if step.holds:
            step.predicted_ms = self._predict_ms(step, 0, 0)

    cdef void _wave(self, Plan plan, Step *step, int priority, double limit_ms):
        """Beside one that ends in this step, the next in order, each one to its end.

        One after the other, each would decode nearly alone beside the next one's chunk, and eight prompts of 85 tokens
        took 1.3 to 1.5 times as long as in one pass (SmolLM2 and a llama of 8 × 512 on a CPU). It ends at the first
        that does not fit, so nobody is overtaken; a lower priority does not make a higher one wait. Who comes or is
        cancelled meanwhile waits for the step's end, hence the time limit.
        """
        cdef int slot, begun, next_in_line = -1
        cdef long long left
        cdef Seq *seq
        while step.chunks < MAX_WAVE:
            if next_in_line < 0:
                if not self._line_up(priority):
                    return  # the higher one waits for KV
                next_in_line = 0
            slot = self.line.items[next_in_line] if next_in_line < self.line.size else -1
            begun = first_begun(self.seqs, &self.clients, &self.running)
            if begun >= 0 and (slot < 0 or self._first(begun, slot) == begun):
                slot = begun
                next_in_line = -1  # it moves its client's others back
            else:
                next_in_line += 1
            if slot < 0:
                return
            seq = &self.seqs[slot]
            left = seq.target - seq.length
            if (
                seq.priority < priority
                or left > self.max_chunk_tokens
                or self._chunk_end(seq) < seq.target
                or self._stale(seq)
                or step.chunk + left > self.max_wave_tokens
                or not (seq.state == PREFILLING or self._fits(seq, self._room_bytes()))
                or self._predict_ms(step, seq.length, left) > limit_ms
                or self._area(step, seq.length, left, True) > self.max_chunk_area
            ):
                return
            self._take(plan, step, slot, left)

    cdef bint _holds(self, int slot) noexcept:
        """Whether rows that were only just started wait for this prompt, so that it starts with them.

        Requests that were made together come one after the other, and a wave that has begun takes in who came until
        then. Its rows have shown one token; that they show the next one a wave later costs them less than all of them
        lose beside the others' chunks. Rows that have gone on never wait, nor does anybody for a lower priority; nor for
        a prompt whose first tokens are there: what is left reads those, and a pass with others saves it little.
        """
        cdef int i, rows = 0
        cdef Seq *seq = &self.seqs[slot]
        cdef Seq *row
        cdef Step next_step
        if not self.prefill_fit.seen or seq.cached or seq.target - seq.length > self.max_chunk_tokens:
            return False
        if self._chunk_end(seq) < seq.target:
            return False
        for i in range(self.running.size):
            row = &self.seqs[self.running.items[i]]
            if row.state == DECODING:
                if row.generated > 1 or row.priority > seq.priority:
                    return False
                rows += 1
        memset(&next_step, 0, sizeof(Step))
        next_step.holds = True
        return (
            rows > 0
            and self._predict_ms(&next_step, seq.length, seq.target - seq.length) <= self._limit_ms(&next_step)
            and self._area(&next_step, seq.length, seq.target - seq.length, True) <= self.max_chunk_area
        )

    cdef double _held_ms(self) noexcept:
        """How long rows that could decode have waited already, what is planned included."""
        cdef Step *last = &self.uncommitted[self.planned & 1]
        return self.held_ms + (last.predicted_ms if last.holds and self.committed < self.planned else 0.0)

    cdef double _limit_ms(self, Step *step) noexcept:
        """How long a step's prompts may take; beside or before rows, these with it."""
        cdef Step rows
        cdef int i
        if step.rows:
            return min(self.max_step_ms, self.itl_target_ms)
        cdef double limit_ms = min(self.max_step_ms, WAVE_TARGETS * self.itl_target_ms)
        if step.holds:
            memset(&rows, 0, sizeof(Step))
            for i in range(self.running.size):
                rows.rows += 1
                rows.context += self.seqs[self.running.items[i]].length
            limit_ms -= max(self._decode_ms(&rows), self.itl_target_ms)  # the rows' next step, with a chunk in it
            limit_ms -= self._held_ms()
        return limit_ms

    cdef void _take(self, Plan plan, Step *step, int slot, long long tokens):
        """Prefill so many tokens of this prompt in the step; the prompt's last ones give its next token too."""
        cdef Seq *seq = &self.seqs[slot]
        if seq.state == QUEUED:
            if seq.length:
                plan.joins += (Join(seq.id, seq.length, self.seqs[seq.parent].id if seq.parent >= 0 else -1),)
            self._admit(slot)
        plan.prefills += (Prefill(seq.id, seq.length, tokens, seq.length + tokens == seq.target),)
        step.chunk += tokens
        step.chunk_context += chunk_context(seq.length, tokens)
        step.chunks += 1
        add_area(step, seq.length, tokens, seq.length + tokens == seq.target)
        seq.length += tokens
        seq.last_step = self.planned + 1
        # What is computed again was charged before.
        tokens = max(0, seq.length - max(seq.length - tokens, seq.charged))
        self.clients.items[seq.client].served += tokens
        self.earned = min(self.earned + EARNED_PREFILLED * tokens, MAX_EARNED)
        if seq.length == seq.target:
            seq.state = DECODING
            self.decoding_changed = True
            self._generate(slot)

    cdef int _next_prompt(self, bint admit) noexcept:
        """The first in order of those that prefill already and, if ``admit``, of the queued ones whose KV fits; or -1.

        The first queued one that does not fit may be overtaken MAX_OVERTAKEN times. Then nobody behind it is admitted.
        """
        cdef int i, best = first_begun(self.seqs, &self.clients, &self.running), fits = -1, waits = -1
        cdef long long room_bytes = self._room_bytes()
        self.kv_short = False
        if admit and self.rows_used < self.max_rows:
            for i in range(self.queue.size):
                if self._fits(&self.seqs[self.queue.items[i]], room_bytes):
                    fits = self._first(fits, self.queue.items[i])
                else:
                    waits = self._first(waits, self.queue.items[i])
            self.kv_short = waits >= 0 and (fits < 0 or self._first(fits, waits) == waits)
        if fits < 0 or self._first(best, fits) == best:
            return best
        if self.kv_short:
            if self.seqs[waits].overtaken >= MAX_OVERTAKEN:
                return best
            self.seqs[waits].overtaken += 1
        return fits

    cdef long long _room_bytes(self) noexcept:
        """The KV that is free, less what the running ones will still grow.

        Without that a prompt that just fits is soon preempted, or preempts others, and is computed again.
        """
        cdef int i
        cdef Seq *seq
        cdef long long room_bytes = self.kv_budget_bytes - self.kv_used_bytes
        for i in range(self.running.size):
            seq = &self.seqs[self.running.items[i]]
            room_bytes -= self._expected_bytes(seq, seq.held_bytes) - seq.held_bytes
        return room_bytes

    cdef inline long long _asked_bytes(self, Seq *seq) noexcept:
        """What its admission takes: room for one decode step too, if there will be one; else it would be preempted as
        soon as it is admitted."""
        return self._kv_bytes(seq.target + (seq.max_tokens - seq.generated > 1))

    cdef inline bint _fits(self, Seq *seq, long long room_bytes) noexcept:
        return self._wanted_bytes(seq, alone=self.running.size == 0) <= room_bytes

    cdef inline long long _wanted_bytes(self, Seq *seq, bint alone) noexcept:
        """What must be free to admit a queued one; beside others, with an answer as they usually are. What resize()
        made too large for the budget gets all of it, and more."""
        return min(seq.asked_bytes, self.kv_budget_bytes) if alone else self._expected_bytes(seq, seq.asked_bytes)

    cdef inline long long _expected_bytes(self, Seq *seq, long long held_bytes) noexcept:
        """What a sequence will hold in the end: with an answer as they usually are, or more, if it is longer already."""
        return min(seq.most_bytes, max(seq.prompt_bytes + self.answer_bytes, held_bytes + self.quantum_bytes))

    cdef void _admit(self, int slot) noexcept:
        cdef Seq *seq = &self.seqs[slot]
        remove_slot(&self.queue, slot)
        append_slot(&self.running, slot)
        seq.state = PREFILLING
        seq.has_row = True
        self.rows_used += 1
        seq.held_bytes = seq.asked_bytes
        self.kv_used_bytes += seq.held_bytes
        self._leave_parent(seq)

    cdef inline void _leave_parent(self, Seq *seq) noexcept:
        if seq.parent >= 0:
            self.seqs[seq.parent].children -= 1
            seq.parent = -1

    cdef void _preempt(self, Plan plan, int slot):
        """Back into the queue without its KV; it prefills its prompt and its answer so far again."""
        cdef Seq *seq = &self.seqs[slot]
        remove_slot(&self.running, slot)
        seq.has_row = False
        self.rows_used -= 1
        self.kv_used_bytes -= seq.held_bytes
        seq.held_bytes = 0
        self.decoding_changed |= seq.state == DECODING
        seq.target = max(seq.target, seq.length + (seq.state == DECODING))  # the newest token is not in the KV yet
        seq.charged = max(seq.charged, seq.target if seq.state == DECODING else seq.length)
        seq.asked_bytes = self._asked_bytes(seq)
        self._enqueue(slot)
        self._start_with(seq, 0)
        if seq.children:
            self._abandon(slot)
        self.preemptions += 1
        plan.preempted += (seq.id,)

    cdef void _enqueue(self, int slot) noexcept:
        cdef Seq *seq = &self.seqs[slot]
        seq.state = QUEUED
        cdef int i = self.queue.size
        append_slot(&self.queue, slot)
        while i > 0 and self.seqs[self.queue.items[i - 1]].turn > seq.turn:  # it was preempted, or passes others
            self.queue.items[i] = self.queue.items[i - 1]
            i -= 1
        self.queue.items[i] = slot

    cdef void _generate(self, int slot):
        """The step being planned samples a token for this sequence; the last one ends it."""
        cdef Seq *seq = &self.seqs[slot]
        seq.generated += 1
        seq.last_step = self.planned + 1
        self.clients.items[seq.client].served += 1
        self.earned = min(self.earned + EARNED_GENERATED, MAX_EARNED)
        if seq.generated == seq.max_tokens:
            self._end(slot)

    cdef void _end(self, int slot):
        """Finished or cancelled: in no later plan. Its row and KV stay, because a planned step may still use them."""
        cdef Seq *seq = &self.seqs[slot]
        if seq.state == QUEUED:
            remove_slot(&self.queue, slot)
        elif seq.state == WAITING:
            remove_slot(&self.waiting, slot)
        else:
            remove_slot(&self.running, slot)
            self.decoding_changed |= seq.state == DECODING
        if seq.generated:
            self._learn_answer(seq.generated)
        self.kv_ending_bytes += seq.held_bytes
        seq.state = ENDED
        self.followed = False
        seq.since = self.plans
        self._leave_parent(seq)
        if seq.children:
            self._abandon(slot)
        append_slot(&self.ending, slot)
        idle(&self.clients, seq.client)

    cdef void _learn_answer(self, double tokens) noexcept:
        self.answer_spread += (abs(tokens - self.answer_tokens) - self.answer_spread) * ANSWER_SHARE
        self.answer_tokens += (tokens - self.answer_tokens) * ANSWER_SHARE
        self.answer_bytes = self._quanta_bytes(<long long>ceil(self.answer_tokens + self.answer_spread))

    cdef bint _line_up(self, int priority) noexcept:
        cdef int most = min(self.max_rows - self.rows_used, MAX_WAVE - 1)
        return line_up(self.seqs, &self.clients, &self.queue, &self.line, priority, most)

    cdef inline int _live(self, int i) noexcept:
        """The i-th of those that have not ended."""
        if i < self.queue.size:
            return self.queue.items[i]
        i -= self.queue.size
        return self.running.items[i] if i < self.running.size else self.waiting.items[i - self.running.size]

    cdef inline int _live_count(self) noexcept:
        return self.queue.size + self.running.size + self.waiting.size

    cdef inline int _first(self, int a, int b) noexcept:
        return first(self.seqs, &self.clients, a, b)

    # --- cost ---------------------------------------------------------------------------------------------------------

    cdef long long _chunk_tokens(self, Step *step, Seq *seq) noexcept:
        """The largest chunk whose step stays within the time limit: whole tiles, or all that is left to where it must
        end."""
        cdef long long left = self._chunk_end(seq) - seq.length
        cdef bint last = seq.length + left == seq.target
        if left <= TILE:
            return left
        cdef long long most = self.max_chunk_tokens
        cdef double limit_ms = self.max_step_ms
        if step.rows:
            limit_ms = min(limit_ms, self.itl_target_ms)
            if not self.prefill_fit.seen:
                most = min(most, FIRST_CHUNK)
        cdef long long tokens = min(left, most) // TILE * TILE
        while tokens > TILE and (
            self._predict_ms(step, seq.length, tokens) > limit_ms
            or self._area(step, seq.length, tokens, last and tokens == left) > self.max_chunk_area
        ):
            tokens -= TILE
        if (
            left - tokens < TILE
            and left <= most
            and self._area(step, seq.length, left, last) <= self.max_chunk_area
            and self._predict_ms(step, seq.length, left)
            <= TAIL_SLACK * max(limit_ms, self._predict_ms(step, seq.length, tokens))
        ):
            return left
        return tokens

    cdef inline long long _chunk_end(self, Seq *seq) noexcept:
        """Where its next chunk must end at the latest."""
        cdef int i
        cdef Stops *stops = &self.stops[seq - self.seqs]
        for i in range(stops.count):
            if stops.at[i] > seq.length:
                return stops.at[i]
        return seq.target

    cdef double _area(self, Step *step, long long start, long long tokens, bint last) noexcept:
        """Tokens times context of the step's prefill, with this chunk: what its attention may need memory for."""
        cdef Step with_it = step[0]
        add_area(&with_it, start, tokens, last)
        return with_it.area + <double>with_it.whole * with_it.longest * with_it.longest

    cdef double _decode_ms(self, Step *step) noexcept:
        cdef double x[3]
        if step.rows == 0:
            return 0.0
        decode_features(x, step)
        cdef double cost_ms = predict(&self.decode_fit, x)
        if step.depth:
            cost_ms *= expected_ratio(&self.depths, step.asked, step.rows, step.depth)
        return cost_ms

    cdef double _predict_ms(self, Step *step, long long start, long long tokens) noexcept:
        """The step's cost with ``tokens`` more of a prompt, from position ``start`` on."""
        cdef double x[3]
        cdef double cost_ms = self._decode_ms(step)
        if step.chunk + tokens:
            prefill_features(x, step.chunk + tokens, step.chunk_context + chunk_context(start, tokens))
            cost_ms += predict(&self.prefill_fit, x)
        return cost_ms

    cdef void _learn(self, Step *step, double elapsed_ms) noexcept:
        """A step without a chunk teaches the decode cost; one with chunks, what they added to it. With drafts: what they
        make of the decode cost, which stays what it was, unless the machine's speed has changed."""
        cdef double x[3]
        cdef double decode_ms, share
        cdef bint first = not (self.decode_fit.seen or self.prefill_fit.seen)
        if not step.chunk:
            decode_features(x, step)
            if not step.depth:
                observe(&self.decode_fit, x, elapsed_ms)
            if self.max_depth and self.decode_fit.seen:
                elapsed_ms = min(max(elapsed_ms, 1e-3), 1e9) / predict(&self.decode_fit, x)
                self.decode_fit.scale *= learn_cell(
                    &self.depths, step.asked, step.rows, step.depth, elapsed_ms, step.probe
                )
        else:
            prefill_features(x, step.chunk, step.chunk_context)
            decode_ms = self._decode_ms(step)
            if elapsed_ms >= decode_ms:
                observe(&self.prefill_fit, x, elapsed_ms - decode_ms)
            elif not step.depth:
                # Then decoding is what was predicted too long (cold first steps), not the chunk that cost nothing.
                share = decode_ms / (decode_ms + predict(&self.prefill_fit, x))
                decode_features(x, step)
                observe(&self.decode_fit, x, elapsed_ms * share)
        if first:  # both are costs of the same machine
            self.decode_fit.scale = self.prefill_fit.scale = self.decode_fit.scale * self.prefill_fit.scale

    def predict_ms(self, decode_rows, decode_context, chunks=(), depth=0):
        cdef Step step
        cdef long long start, tokens
        memset(&step, 0, sizeof(Step))
        step.rows = _whole("decode_rows", decode_rows, 0)
        step.context = _whole("decode_context", decode_context, 0)
        step.depth = _whole("depth", depth, 0, MAX_DEPTH)
        for chunk in chunks:
            start, tokens = _whole("chunk start", chunk[0], 0), _whole("chunk tokens", chunk[1], 0)
            step.chunk += tokens
            step.chunk_context += chunk_context(start, tokens)
        return self._predict_ms(&step, 0, 0)

    # --- the public bookkeeping ---------------------------------------------------------------------------------------

    def __cinit__(
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
        double itl_target_ms=250.0,
        double max_step_ms=4000.0,
        max_depth=0,
    ):
        self.max_depth = _whole("max_depth", max_depth, 0, MAX_DEPTH)
        self.max_rows = _whole("max_rows", max_rows, 1)
        self.kv_budget_bytes = _whole("kv_budget_bytes", kv_budget_bytes, 1, 2**61)
        self.kv_bytes_per_sequence = _whole("kv_bytes_per_sequence", kv_bytes_per_sequence, 0, 2**61)
        self.quantum_tokens = _whole("kv_quantum_tokens", kv_quantum_tokens, 1, 2**20)
        self.quantum_bytes = self.quantum_tokens * _whole("kv_bytes_per_token", kv_bytes_per_token, 0)
        self.max_chunk_tokens = _whole("max_chunk_tokens", max_chunk_tokens, TILE)
        self.max_wave_tokens = _whole("max_wave_tokens", max_wave_tokens, 1)
        self.max_chunk_area = _whole("max_chunk_area", max_chunk_area, 0, 2**61) or INFINITY
        for name, limit_ms in (("itl_target_ms", itl_target_ms), ("max_step_ms", max_step_ms)):
            if not (isfinite(limit_ms) and limit_ms > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {limit_ms!r}")
        self.itl_target_ms = itl_target_ms
        self.max_step_ms = max_step_ms
        self._set_budget(self.kv_budget_bytes)
        self.earned = FIRST_EARNED
        self.answer_tokens = ANSWER_TOKENS
        self.answer_bytes = self._quanta_bytes(<long long>ANSWER_TOKENS)
        self.due = INFINITY
        self.slot_of = {}
        self.free_slots = []
        self.client_of = {}
        self.free_clients = []
        self.decoding = ()
        self.last_plan = Plan.__new__(Plan)
        # The shape of the costs, measured with SmolLM2-135M on a CPU; the first measurement sets their scale.
        start_fit(&self.decode_fit, 50.0, 3.0, 0.002)
        start_fit(&self.prefill_fit, 50.0, 2.0, 0.0005)
        start_depths(&self.depths)

    cdef void _set_budget(self, long long budget_bytes) noexcept:
        self.kv_budget_bytes = budget_bytes
        self.kv_most_bytes = max(self.kv_most_bytes, budget_bytes)
        if self.kv_bytes_per_sequence > budget_bytes:
            self.capacity_tokens = 0
        elif self.quantum_bytes == 0:
            self.capacity_tokens = NO_LIMIT
        else:
            self.capacity_tokens = (
                (budget_bytes - self.kv_bytes_per_sequence) // self.quantum_bytes * self.quantum_tokens
            )

    def resize(self, kv_budget_bytes):
        self._set_budget(_whole("kv_budget_bytes", kv_budget_bytes, 1, 2**61))
        self.followed = False
        cdef int i, slot
        ids = []
        for i in range(self.queue.size + self.waiting.size):
            slot = self.queue.items[i] if i < self.queue.size else self.waiting.items[i - self.queue.size]
            if self.seqs[slot].generated == 0 and self.seqs[slot].target + 1 > self.capacity_tokens:
                ids.append(self.seqs[slot].id)
        return tuple(sorted(ids))

    def submit(
        self,
        seq,
        prompt_tokens,
        max_tokens,
        *,
        str client not None="",
        priority=0,
        double deadline=INFINITY,
        cached_tokens=0,
        parent=-1,
        stops=(),
    ):
        cdef long long id_ = _whole("seq", seq, 0, 2**62)
        cdef long long prompt = _whole("prompt_tokens", prompt_tokens, 1)
        cdef long long limit = _whole("max_tokens", max_tokens, 1, 2**62)
        cdef int rank = _whole("priority", priority, -(2**31))
        cdef long long cached = _whole("cached_tokens", cached_tokens, 0)
        cdef int parent_slot = self.slot_of.get(parent, -1)
        if cached >= prompt:
            raise ValueError(f"cached_tokens must leave one of {prompt} prompt tokens to compute, got {cached}")
        if len(stops) > MAX_STOPS:
            raise ValueError(f"there may be at most {MAX_STOPS} stops, got {len(stops)}")
        cdef long long after = 0
        for stop in stops:
            after = _whole("each of stops, which ascend,", stop, after + 1, prompt - 1)
        if not deadline >= 0:
            raise ValueError(f"deadline must be a time of at least 0 (infinity: none), got {deadline!r}")
        if seq in self.slot_of:
            raise ValueError(f"seq {seq} is known already: an id is free again after release()")
        if prompt + 1 > self.capacity_tokens:
            raise NeverFits(
                f"a prompt of {prompt} tokens needs {self._kv_bytes(prompt + 1)} bytes of KV and the whole budget is "
                f"{self.kv_budget_bytes}, enough for {max(0, self.capacity_tokens - 1)} tokens: "
                "shorten the prompt or raise the budget",
                self._kv_bytes(prompt + 1),
                self.kv_budget_bytes,
            )
        if not self.free_slots:
            self._grow()
        cdef int slot = self.free_slots.pop()
        cdef Seq *s = &self.seqs[slot]
        self.slot_of[seq] = slot
        self.followed = False
        memset(s, 0, sizeof(Seq))
        memset(&self.drafting[slot], 0, sizeof(Drafting))
        self.arrivals += 1
        s.id = id_
        s.priority = rank
        s.deadline = deadline
        s.target = prompt
        s.max_tokens = min(limit, self.capacity_tokens - prompt + 1)  # the last token is never put into the KV
        s.prompt_bytes = self._kv_bytes(prompt)
        s.most_bytes = self._kv_bytes(prompt + s.max_tokens - 1)
        s.asked_bytes = self._asked_bytes(s)
        self.stops[slot].count = len(stops)
        for i, stop in enumerate(stops):
            self.stops[slot].at[<int>i] = stop
        s.cached = cached
        s.parent = -1
        cdef bint has = parent_slot >= 0 and self._has(&self.seqs[parent_slot], cached)
        s.length = cached if parent == -1 or has else 0
        s.client = activate(&self.clients, self.client_of, self.free_clients, client)
        s.turn = turn_of(self.seqs, &self.queue, &self.running, s, self.arrivals, self.max_chunk_tokens)
        self.due = min(self.due, deadline)
        if cached and parent_slot >= 0 and (has or self._will_have(&self.seqs[parent_slot], s)):
            s.length = 0
            s.parent = parent_slot
            self.seqs[parent_slot].children += 1
            s.state = WAITING
            append_slot(&self.waiting, slot)
        else:
            self._enqueue(slot)
            self._start_with(s, cached if parent == -1 else 0)
        return s.max_tokens

    cdef bint _will_have(self, Seq *parent, Seq *seq) noexcept:
        self.placed = NO_PRIORITY
        return parent.target >= seq.cached and self._leads(parent, seq)

    def upcoming(self, most):
        cdef int i, slot, count = _whole("most", most, 0), first_of_all = -1, fits = -1
        cdef long long room_bytes
        cdef Seq *seq
        if self.waiting.size and not self.followed:
            self._follow()
        if self.queue.size == 0 or count == 0:
            return ()
        room_bytes = self._room_bytes()
        for i in range(self.queue.size):
            slot = self.queue.items[i]
            first_of_all = self._first(first_of_all, slot)
            if (fits < 0 or self.seqs[slot].priority > self.seqs[fits].priority) and self._fits(
                &self.seqs[slot], room_bytes
            ):
                fits = slot
        self.line.size = 0
        count = min(count, self.max_rows - self.rows_used)
        for i in range(self.clients.capacity):
            self.clients.items[i].ahead = 0
        for i in range(self.queue.size if fits >= 0 and count > 0 else 0):
            slot = self.queue.items[i]
            seq = &self.seqs[slot]
            if seq.priority == self.seqs[fits].priority and self._fits(seq, room_bytes):
                into_line(self.seqs, &self.clients, &self.line, slot, count)
        ids = [self.seqs[self.line.items[i]].id for i in range(self.line.size)]
        if self.line.size == 0 or self.line.items[0] != first_of_all:
            ids = [self.seqs[first_of_all].id, *ids][:most]
        return tuple(ids)

    def recache(self, seq, tokens, parent=-1):
        cdef int slot = self.slot_of.get(seq, -1), parent_slot = self.slot_of.get(parent, -1)
        if slot < 0 or self.seqs[slot].state != QUEUED:
            return False
        cdef Seq *s = &self.seqs[slot]
        cdef long long cached = _whole("tokens", tokens, 0, s.target - 1)
        cdef bint there = parent == -1 or (parent_slot >= 0 and self._has(&self.seqs[parent_slot], cached))
        self._leave_parent(s)
        self._start_with(s, cached if there else 0)
        if parent != -1 and s.cached:
            s.parent = parent_slot
            self.seqs[parent_slot].children += 1
        return there

    def cancel(self, seq):
        slot = self.slot_of.get(seq, -1)
        if slot < 0 or self.seqs[<int>slot].state == ENDED:
            return False
        self._end(slot)
        return True

    def offer(self, seq, tokens, source=0):
        cdef int slot = self.slot_of.get(seq, -1), offered = _drafts_of("tokens", tokens), kind = _source(source)
        if slot >= 0 and self.seqs[slot].state == DECODING and self.max_depth:
            self.drafting[slot].offered = offered
            self.drafting[slot].source = kind
            self.drafting[slot].offered_in = self.plans
            self.offers += 1

    def foresaw(self, seq, tokens, right, source=0):
        cdef int slot = self.slot_of.get(seq, -1), drafts = _drafts_of("tokens", tokens), kind = _source(source)
        cdef int accepted = _whole("right", right, 0, tokens)
        if slot >= 0 and drafts:
            accepted = min(accepted, MAX_DEPTH)
            learn_acceptance(&self.depths, &self.drafting[slot], kind, accepted, accepted < drafts)

    def expected_depth(self):
        if self.offers == 0 or self.verifying.size:
            return 0
        return self._choose(self.plans, True).depth

    def commit(self, step, double elapsed_ms, finished=(), bint learn=True, accepted=None):
        _check_time("elapsed_ms", elapsed_ms)
        if step != self.committed + 1 or self.committed == self.planned:
            raise ValueError(f"step {step} cannot be committed: {self.committed} of {self.planned} planned steps are")
        for seq in finished:
            if seq not in self.slot_of:
                raise ValueError(f"seq {seq!r} cannot have finished in step {step}: it is not known")
        for seq in accepted or ():
            slot = self.slot_of.get(seq, -1)
            most = self.drafting[<int>slot].verifies if slot >= 0 and self.verifying.size else 0
            _whole(f"accepted of seq {seq}", accepted[seq], 0, most)
        self.committed += 1
        cdef Step *outcome = &self.uncommitted[self.committed & 1]
        if outcome.holds:
            self.held_ms += elapsed_ms
        if outcome.rows and self.max_depth:
            earn(&self.depths)
            right = self._settle(finished, accepted or {})
            if learn and outcome.probe and not outcome.chunk:
                self._pay(outcome, elapsed_ms, right)
        if learn:
            self._learn(outcome, elapsed_ms)
        for seq in finished:
            self.cancel(seq)

    cdef int _settle(self, finished, accepted) except -1:
        """The drafts of the committed step that were right count as done now; the KV that was held for the others is
        given back. Returned is how many were right. Of who ended meanwhile nothing is known."""
        cdef int i, slot, right, total = 0
        cdef Seq *seq
        cdef Drafting *draft
        cdef long long unused_bytes
        for i in range(self.verifying.size):
            slot = self.verifying.items[i]
            seq = &self.seqs[slot]
            draft = &self.drafting[slot]
            right = accepted.get(seq.id, 0) if seq.state == DECODING else 0
            if seq.state == DECODING:
                # What comes after an answer's end is neither right nor wrong.
                learn_acceptance(
                    &self.depths, draft, draft.verified_source, right, right < draft.verifies and seq.id not in finished
                )
                seq.length += right
                seq.generated += right
                self.clients.items[seq.client].served += right
                self.earned = min(self.earned + EARNED_GENERATED * right, MAX_EARNED)
                unused_bytes = min(draft.spare_bytes, max(0, seq.held_bytes - self._kv_bytes(seq.length)))
                seq.held_bytes -= unused_bytes
                self.kv_used_bytes -= unused_bytes
                if seq.generated == seq.max_tokens:
                    self._end(slot)
            draft.verifies = 0
            draft.spare_bytes = 0
            total += right
        self.verifying.size = 0
        return total

    cdef void _pay(self, Step *step, double elapsed_ms, int right) noexcept:
        """What a probe has lost: its time by what the best that was known takes for as many tokens."""
        cdef double x[3]
        decode_features(x, step)
        elapsed_ms /= predict(&self.decode_fit, x) * plain_ratio(&self.depths, bucket_of(step.rows))
        elapsed_ms -= (step.rows + right) / (step.rows * step.gain)
        pay(&self.depths, step.asked, step.rows, step.depth, elapsed_ms)

    def releasable(self):
        if self.ending.size == 0:
            return ()
        slots = [self.ending.items[i] for i in range(self.ending.size)]
        return tuple([self.seqs[slot].id for slot in slots if self._releasable(&self.seqs[slot])])

    cdef inline bint _releasable(self, Seq *seq) noexcept:
        """In no uncommitted step, and those who take over its KV have had a plan to start in."""
        return seq.last_step <= self.committed and not (seq.children and seq.since == self.plans)

    def release(self, seq):
        cdef int slot = self.slot_of.get(seq, -1)
        if slot < 0 or self.seqs[slot].state != ENDED or not self._releasable(&self.seqs[slot]):
            raise ValueError(f"seq {seq!r} cannot be released: it is not one of releasable()")
        cdef long long freed_bytes = self.seqs[slot].held_bytes
        self.rows_used -= self.seqs[slot].has_row
        self.seqs[slot].has_row = False
        self.followed = False
        if self.seqs[slot].children:
            self._abandon(slot)
        remove_slot(&self.ending, slot)
        self.kv_used_bytes -= freed_bytes
        self.kv_ending_bytes -= freed_bytes
        del self.slot_of[seq]
        self.free_slots.append(slot)
        return freed_bytes

    def next_deadline(self):
        cdef int i
        cdef double earliest = INFINITY
        for i in range(self._live_count()):
            earliest = min(earliest, self.seqs[self._live(i)].deadline)
        return earliest

    def statistics(self):
        decoding = sum([self.seqs[self.running.items[i]].state == DECODING for i in range(self.running.size)])
        return SchedulerStatistics(
            queued=self.queue.size + self.waiting.size,
            prefilling=self.running.size - decoding,
            decoding=decoding,
            ending=self.ending.size,
            kv_used_bytes=self.kv_used_bytes,
            kv_budget_bytes=self.kv_budget_bytes,
            preemptions=self.preemptions,
            steps=self.planned,
        )

    # --- plumbing -----------------------------------------------------------------------------------------------------

    cdef inline long long _kv_bytes(self, long long tokens) noexcept:
        return self.kv_bytes_per_sequence + self._quanta_bytes(tokens)

    cdef inline long long _quanta_bytes(self, long long tokens) noexcept:
        return (tokens + self.quantum_tokens - 1) // self.quantum_tokens * self.quantum_bytes

    cdef int _grow(self) except -1:
        cdef int i, size = max(64, 2 * self.capacity)
        self.seqs = <Seq *>resized(self.seqs, size * sizeof(Seq))
        self.stops = <Stops *>resized(self.stops, size * sizeof(Stops))
        self.drafting = <Drafting *>resized(self.drafting, size * sizeof(Drafting))
        self.verifying.items = <int *>resized(self.verifying.items, size * sizeof(int))
        self.queue.items = <int *>resized(self.queue.items, size * sizeof(int))
        self.running.items = <int *>resized(self.running.items, size * sizeof(int))
        self.ending.items = <int *>resized(self.ending.items, size * sizeof(int))
        self.waiting.items = <int *>resized(self.waiting.items, size * sizeof(int))
        self.line.items = <int *>resized(self.line.items, size * sizeof(int))
        for i in range(self.capacity, size):
            self.seqs[i].state = ENDED
        self.free_slots.extend(range(size - 1, self.capacity - 1, -1))
        self.capacity = size
        return 0

    def __dealloc__(self):
        free(self.seqs)
        free(self.stops)
        free(self.drafting)
        free(self.verifying.items)
        free(self.clients.items)
        free(self.queue.items)
        free(self.running.items)
        free(self.ending.items)
        free(self.waiting.items)
        free(self.line.items)


cdef long long _whole(name, value, low, high=2**31 - 1) except? -1:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return value


cdef int _drafts_of(name, value) except -1:
    return <int>min(_whole(name, value, 0), MAX_DEPTH)


cdef int _source(value) except -1:
    return <int>_whole("source", value, 0, SOURCES - 1)


cdef int _check_time(name, double value) except -1:
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return 0
