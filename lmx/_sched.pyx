"""The token scheduler: which sequences decode and which prompts prefill in each engine step (DESIGN §3).

Pure decisions in C structs: no MLX, no I/O, no clock (the time is an argument), no randomness; the same calls give the
same plans. The engine's step loop is its only caller, from one thread. ``_sched.pyi`` is the contract,
``tests/sched_reference.py`` the same policy in plain Python. Read ``plan()`` and what stands below it for the
policy; the use of the cost model (``_cost.pxd``) follows, then the public bookkeeping, then the C plumbing.
"""

from libc.math cimport INFINITY, isfinite
from libc.stdlib cimport free
from libc.string cimport memset

cimport cython

from lmx._cost cimport Fit, Step, chunk_context, decode_features, observe, predict, prefill_features, start_fit

from dataclasses import dataclass

cdef enum:
    TILE = 32  # matrix kernels cost whole tiles of 32 rows
    FIRST_CHUNK = 128  # largest chunk beside decoding rows before anything was measured
    MAX_OVERTAKEN = 8  # smaller sequences that may be admitted before one that waits for KV
    WAVE_TARGETS = 8  # a wave may take this many times itl_target_ms; see _wave()
    MAX_WAVE = 64  # prompts; bounds what it costs to find them

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


@dataclass(frozen=True, slots=True)
class Prefill:
    seq: int
    start: int
    tokens: int
    last: bool


cdef class Plan:
    cdef readonly long long step
    cdef readonly tuple decode
    cdef readonly tuple prefills
    cdef readonly tuple preempted
    cdef readonly tuple expired


@cython.final  # so that its methods call each other directly
cdef class Scheduler:
    cdef Seq *seqs
    cdef int capacity
    cdef Slots queue, running, ending  # queue: by arrival; running: PREFILLING and DECODING, oldest admission first
    cdef Slots line  # what _line_up() found
    cdef dict slot_of
    cdef list free_slots
    cdef Client *clients
    cdef int client_capacity
    cdef dict client_of
    cdef list free_clients
    cdef int active_clients
    cdef long long floor  # smallest `served` of the active clients; never falls
    cdef long long arrivals
    cdef int max_rows, rows_used
    cdef long long kv_budget_bytes, kv_used_bytes, kv_ending_bytes, quantum_bytes, kv_bytes_per_sequence
    cdef long long quantum_tokens, capacity_tokens
    cdef long long max_chunk_tokens, max_wave_tokens
    cdef double itl_target_ms, max_step_ms
    cdef double due  # no live sequence has an earlier deadline
    cdef Fit decode_fit, prefill_fit
    cdef Step uncommitted[2]
    cdef long long planned, committed, preemptions
    cdef Plan last_plan
    cdef tuple decoding
    cdef bint decoding_changed

    # --- the policy ---------------------------------------------------------------------------------------------------

    def plan(self, double now):
        _check_time("now", now)
        if self.planned - self.committed > 1:
            raise RuntimeError(f"steps {self.committed + 1} and {self.planned} are both uncommitted: commit one first")
        cdef Plan plan = self.last_plan
        cdef Step *step = &self.uncommitted[(self.planned + 1) & 1]
        plan.step = 0
        plan.decode = plan.prefills = plan.preempted = plan.expired = ()
        step.rows = step.context = step.chunk = 0
        step.chunk_context = 0.0
        if now >= self.due:
            plan.expired = self._expire(now)
        if self._make_room(plan):
            self._decode(plan, step)
            self._prefill(plan, step)
        if step.rows or step.chunk:
            self.planned += 1
            plan.step = self.planned
        c_assert(0 <= self.kv_ending_bytes <= self.kv_used_bytes <= self.kv_budget_bytes)
        c_assert(self.running.size <= self.rows_used <= self.max_rows)
        return plan

    cdef tuple _expire(self, double now):
        """Cancel what is past its deadline."""
        slots = [i for i in range(self.capacity) if self.seqs[i].state != ENDED and self.seqs[i].deadline <= now]
        late = sorted([self.seqs[i].id for i in slots])
        for seq in late:
            self.cancel(seq)
        self.due = self.next_deadline()
        return tuple(late)

    cdef bint _make_room(self, Plan plan):
        """See that every decoding row can take one more token. False: not before ended sequences are released.

        The victim is the last in (priority, start) order and may be the growing row itself, so the first in that order
        always goes on; alone it fits, because submit() limits max_tokens to the budget.
        """
        cdef int i, victim
        cdef Seq *seq
        cdef long long growth
        while True:
            growth = 0
            victim = -1
            for i in range(self.running.size):
                seq = &self.seqs[self.running.items[i]]
                if seq.state == DECODING and self._kv_bytes(seq.length + 1) > seq.kv_bytes:
                    growth += self.quantum_bytes
                if victim < 0 or seq.priority <= self.seqs[victim].priority:
                    victim = self.running.items[i]
            if self.kv_used_bytes + growth <= self.kv_budget_bytes:
                return True
            if self.kv_ending_bytes:
                return False  # a wait of a step is cheaper than a prompt computed again
            self._preempt(victim)
            plan.preempted += (self.seqs[victim].id,)

    cdef void _decode(self, Plan plan, Step *step):
        """One token for every decoding row."""
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
                if self._kv_bytes(seq.length) > seq.kv_bytes:
                    seq.kv_bytes += self.quantum_bytes
                    self.kv_used_bytes += self.quantum_bytes
                step.rows += 1
                step.context += seq.length
                self._generate(slot)
            if seq.state != ENDED:
                i += 1

    cdef void _prefill(self, Plan plan, Step *step):
        """One chunk of the prompt that is first in order, if any can go on or be admitted; a wave if nobody decodes."""
        # A step that preempts admits nobody: memory is short, and the victim's newest token may still be in flight.
        cdef bint admit = not plan.preempted
        cdef int slot = self._next_prompt(admit and self.rows_used < self.max_rows)
        if slot < 0:
            return
        cdef Seq *seq = &self.seqs[slot]
        self._take(plan, step, slot, self._chunk_tokens(step, seq))
        if admit and step.rows == 0 and seq.length == seq.target:
            self._wave(plan, step, seq.priority)

    cdef void _wave(self, Plan plan, Step *step, int priority):
        """Queued prompts beside one that ends in this step, while nobody decodes: the next in order, each one whole.

        Requests that come at the same moment then start together. One after the other, each would decode nearly alone
        beside the next one's chunk, and eight prompts of 85 tokens took 1.3 to 1.5 times as long as in one pass
        (SmolLM2 and a llama of 8 × 512 on a CPU). It ends at the first that does not fit, so nobody is overtaken; a
        lower priority does not make a higher one wait. Who comes or is cancelled meanwhile waits for the step's end,
        hence the time limit.
        """
        if not self.prefill_fit.seen:
            return
        cdef double limit_ms = min(self.max_step_ms, WAVE_TARGETS * self.itl_target_ms)
        cdef int i, slot, begun
        cdef Seq *seq
        self._line_up(priority)
        for i in range(self.line.size):
            slot = self.line.items[i]
            seq = &self.seqs[slot]
            begun = self._first_begun()
            if (
                seq.target > self.max_chunk_tokens
                or step.chunk + seq.target > self.max_wave_tokens
                or self.kv_used_bytes + seq.kv_bytes > self.kv_budget_bytes
                or self._predict_ms(step, 0, seq.target) > limit_ms
                or (begun >= 0 and self._first(begun, slot) == begun)
            ):
                return
            self._take(plan, step, slot, seq.target)

    cdef void _line_up(self, int priority) noexcept:
        """Into ``line``: the queued of this priority that are next in order, as many as may join the step's first.

        One pass finds them all: whoever is taken counts as served before the client's next one is compared with
        others, so each one's place is its client's counter and the tokens of the client's earlier ones (the start tags
        of Goyal et al., "Start-time Fair Queuing", 1996).
        """
        cdef int i, j, slot, most = min(self.max_rows - self.rows_used, MAX_WAVE - 1)
        cdef Seq *seq
        cdef Client *client
        self.line.size = 0
        if most == 0:
            return
        for i in range(self.client_capacity):
            self.clients[i].ahead = 0
        for i in range(self.queue.size):
            slot = self.queue.items[i]
            seq = &self.seqs[slot]
            if seq.priority < priority:
                continue
            if seq.priority > priority:  # it waits for KV
                self.line.size = 0
                return
            client = &self.clients[seq.client]
            seq.place = client.served + client.ahead
            client.ahead += seq.target + 1
            j = self.line.size
            if j < most:
                self.line.size += 1
            elif seq.place < self.seqs[self.line.items[j - 1]].place:
                j -= 1
            else:
                continue
            while j > 0 and seq.place < self.seqs[self.line.items[j - 1]].place:
                self.line.items[j] = self.line.items[j - 1]
                j -= 1
            self.line.items[j] = slot

    cdef void _take(self, Plan plan, Step *step, int slot, long long tokens):
        """Prefill so many tokens of this prompt in the step; the prompt's last ones give its next token too."""
        cdef Seq *seq = &self.seqs[slot]
        if seq.state == QUEUED:
            self._admit(slot)
        plan.prefills += (Prefill(seq.id, seq.length, tokens, seq.length + tokens == seq.target),)
        step.chunk += tokens
        step.chunk_context += chunk_context(seq.length, tokens)
        seq.length += tokens
        seq.last_step = self.planned + 1
        self.clients[seq.client].served += tokens
        if seq.length == seq.target:
            seq.state = DECODING
            self.decoding_changed = True
            self._generate(slot)

    cdef int _first_begun(self) noexcept:
        """The first in order of those that prefill already; or -1."""
        cdef int i, best = -1
        for i in range(self.running.size):
            if self.seqs[self.running.items[i]].state == PREFILLING:
                best = self._first(best, self.running.items[i])
        return best

    cdef int _next_prompt(self, bint admit) noexcept:
        """The first in order of those that prefill already and, if ``admit``, of the queued ones whose KV fits; or -1.

        The first queued one that does not fit may be overtaken MAX_OVERTAKEN times. Then nobody behind it is admitted.
        """
        cdef int i, best = self._first_begun(), fits = -1, waits = -1
        cdef long long free_bytes = self.kv_budget_bytes - self.kv_used_bytes
        if admit:
            for i in range(self.queue.size):
                if self.seqs[self.queue.items[i]].kv_bytes <= free_bytes:
                    fits = self._first(fits, self.queue.items[i])
                else:
                    waits = self._first(waits, self.queue.items[i])
        if fits < 0 or self._first(best, fits) == best:
            return best
        if waits >= 0 and self._first(fits, waits) == waits:
            if self.seqs[waits].overtaken >= MAX_OVERTAKEN:
                return best
            self.seqs[waits].overtaken += 1
        return fits

    cdef int _first(self, int a, int b) noexcept:
        """The order: priority, then the least-served client, then arrival. ``a`` may be -1."""
        if a < 0:
            return b
        cdef Seq *x = &self.seqs[a]
        cdef Seq *y = &self.seqs[b]
        if x.priority != y.priority:
            return a if x.priority > y.priority else b
        cdef long long x_served = self.clients[x.client].served
        cdef long long y_served = self.clients[y.client].served
        if x_served != y_served:
            return a if x_served < y_served else b
        return a if x.arrival <= y.arrival else b

    cdef long long _chunk_tokens(self, Step *step, Seq *seq) noexcept:
        """The largest chunk whose step stays within the time limit: whole tiles, or all that is left."""
        cdef long long left = seq.target - seq.length
        if left <= TILE:
            return left
        cdef long long most = self.max_chunk_tokens
        cdef double limit_ms = self.max_step_ms
        if step.rows:
            limit_ms = min(limit_ms, self.itl_target_ms)
            if not self.prefill_fit.seen:
                most = min(most, FIRST_CHUNK)
        cdef long long tokens = min(left, most) // TILE * TILE
        while tokens > TILE and self._predict_ms(step, seq.length, tokens) > limit_ms:
            tokens -= TILE
        if (
            left - tokens < TILE
            and left <= most
            and self._predict_ms(step, seq.length, left)
            <= TAIL_SLACK * max(limit_ms, self._predict_ms(step, seq.length, tokens))
        ):
            return left
        return tokens

    cdef void _admit(self, int slot) noexcept:
        cdef Seq *seq = &self.seqs[slot]
        remove_slot(&self.queue, slot)
        append_slot(&self.running, slot)
        seq.state = PREFILLING
        self.rows_used += 1
        self.kv_used_bytes += seq.kv_bytes

    cdef void _preempt(self, int slot) noexcept:
        """Back into the queue without its KV; it prefills its prompt and its answer so far again."""
        cdef Seq *seq = &self.seqs[slot]
        remove_slot(&self.running, slot)
        self.rows_used -= 1
        self.kv_used_bytes -= seq.kv_bytes
        self.decoding_changed |= seq.state == DECODING
        seq.target = max(seq.target, seq.length + (seq.state == DECODING))  # the newest token is not in the KV yet
        self._enqueue(slot)
        self.preemptions += 1

    cdef void _enqueue(self, int slot) noexcept:
        cdef Seq *seq = &self.seqs[slot]
        seq.state = QUEUED
        seq.length = 0
        # Room for one decode step too, if there will be one; else it would be preempted as soon as it is admitted.
        seq.kv_bytes = self._kv_bytes(seq.target + (seq.max_tokens - seq.generated > 1))
        cdef int i = self.queue.size
        append_slot(&self.queue, slot)
        while i > 0 and self.seqs[self.queue.items[i - 1]].arrival > seq.arrival:  # it was preempted
            self.queue.items[i] = self.queue.items[i - 1]
            i -= 1
        self.queue.items[i] = slot

    cdef void _generate(self, int slot):
        """The step being planned samples a token for this sequence; the last one ends it."""
        cdef Seq *seq = &self.seqs[slot]
        seq.generated += 1
        seq.last_step = self.planned + 1
        self.clients[seq.client].served += 1
        if seq.generated == seq.max_tokens:
            self._end(slot)

    cdef void _end(self, int slot):
        """Finished or cancelled: in no later plan. Its row and KV stay, because a planned step may still use them."""
        cdef Seq *seq = &self.seqs[slot]
        cdef Client *client = &self.clients[seq.client]
        if seq.state == QUEUED:
            remove_slot(&self.queue, slot)
            seq.kv_bytes = 0
        else:
            remove_slot(&self.running, slot)
            self.decoding_changed |= seq.state == DECODING
        self.kv_ending_bytes += seq.kv_bytes
        seq.state = ENDED
        append_slot(&self.ending, slot)
        client.live -= 1
        if client.live == 0:
            self.active_clients -= 1
            if self.active_clients == 0:
                self.floor = client.served

    # --- cost ---------------------------------------------------------------------------------------------------------

    cdef double _decode_ms(self, Step *step) noexcept:
        cdef double x[3]
        if step.rows == 0:
            return 0.0
        decode_features(x, step)
        return predict(&self.decode_fit, x)

    cdef double _predict_ms(self, Step *step, long long start, long long tokens) noexcept:
        """The step's cost with ``tokens`` more of a prompt, from position ``start`` on."""
        cdef double x[3]
        cdef double cost_ms = self._decode_ms(step)
        if step.chunk + tokens:
            prefill_features(x, step.chunk + tokens, step.chunk_context + chunk_context(start, tokens))
            cost_ms += predict(&self.prefill_fit, x)
        return cost_ms

    cdef void _learn(self, Step *step, double elapsed_ms) noexcept:
        """A step without a chunk teaches the decode cost; one with chunks, what they added to it."""
        cdef double x[3]
        cdef bint first = not (self.decode_fit.seen or self.prefill_fit.seen)
        if not step.chunk:
            decode_features(x, step)
            observe(&self.decode_fit, x, elapsed_ms)
        else:
            prefill_features(x, step.chunk, step.chunk_context)
            observe(&self.prefill_fit, x, elapsed_ms - self._decode_ms(step))
        if first:  # both are costs of the same machine
            self.decode_fit.scale = self.prefill_fit.scale = self.decode_fit.scale * self.prefill_fit.scale

    def predict_ms(self, decode_rows, decode_context, chunks=()):
        cdef Step step
        cdef long long start, tokens
        step.rows = _whole("decode_rows", decode_rows, 0)
        step.context = _whole("decode_context", decode_context, 0)
        step.chunk = 0
        step.chunk_context = 0.0
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
        double itl_target_ms=250.0,
        double max_step_ms=4000.0,
    ):
        self.max_rows = _whole("max_rows", max_rows, 1)
        self.kv_budget_bytes = _whole("kv_budget_bytes", kv_budget_bytes, 1, 2**61)
        self.kv_bytes_per_sequence = _whole("kv_bytes_per_sequence", kv_bytes_per_sequence, 0, 2**61)
        self.quantum_tokens = _whole("kv_quantum_tokens", kv_quantum_tokens, 1, 2**20)
        self.quantum_bytes = self.quantum_tokens * _whole("kv_bytes_per_token", kv_bytes_per_token, 1)
        self.max_chunk_tokens = _whole("max_chunk_tokens", max_chunk_tokens, TILE)
        self.max_wave_tokens = _whole("max_wave_tokens", max_wave_tokens, 1)
        for name, limit_ms in (("itl_target_ms", itl_target_ms), ("max_step_ms", max_step_ms)):
            if not (isfinite(limit_ms) and limit_ms > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {limit_ms!r}")
        self.itl_target_ms = itl_target_ms
        self.max_step_ms = max_step_ms
        self.capacity_tokens = (
            max(0, self.kv_budget_bytes - self.kv_bytes_per_sequence) // self.quantum_bytes * self.quantum_tokens
        )
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

    def submit(self, seq, prompt_tokens, max_tokens, *, str client not None="", priority=0, double deadline=INFINITY):
        cdef long long id_ = _whole("seq", seq, 0, 2**62)
        cdef long long prompt = _whole("prompt_tokens", prompt_tokens, 1)
        cdef long long limit = _whole("max_tokens", max_tokens, 1, 2**62)
        cdef int rank = _whole("priority", priority, -(2**31))
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
        memset(s, 0, sizeof(Seq))
        self.arrivals += 1
        s.arrival = self.arrivals
        s.id = id_
        s.priority = rank
        s.deadline = deadline
        s.target = prompt
        s.max_tokens = min(limit, self.capacity_tokens - prompt + 1)  # the last token is never put into the KV
        s.client = self._activate(client)
        self.due = min(self.due, deadline)
        self._enqueue(slot)
        return s.max_tokens

    def cancel(self, seq):
        slot = self.slot_of.get(seq, -1)
        if slot < 0 or self.seqs[<int>slot].state == ENDED:
            return False
        self._end(slot)
        return True

    def commit(self, step, double elapsed_ms, finished=(), bint learn=True):
        _check_time("elapsed_ms", elapsed_ms)
        if step != self.committed + 1 or self.committed == self.planned:
            raise ValueError(f"step {step} cannot be committed: {self.committed} of {self.planned} planned steps are")
        for seq in finished:
            if seq not in self.slot_of:
                raise ValueError(f"seq {seq!r} cannot have finished in step {step}: it is not known")
        self.committed += 1
        if learn:
            self._learn(&self.uncommitted[self.committed & 1], elapsed_ms)
        for seq in finished:
            self.cancel(seq)

    def releasable(self):
        if self.ending.size == 0:
            return ()
        slots = [self.ending.items[i] for i in range(self.ending.size)]
        return tuple([self.seqs[slot].id for slot in slots if self.seqs[slot].last_step <= self.committed])

    def release(self, seq):
        cdef int slot = self.slot_of.get(seq, -1)
        if slot < 0 or self.seqs[slot].state != ENDED or self.seqs[slot].last_step > self.committed:
            raise ValueError(f"seq {seq!r} cannot be released: it is not one of releasable()")
        cdef long long freed_bytes = self.seqs[slot].kv_bytes
        remove_slot(&self.ending, slot)
        self.kv_used_bytes -= freed_bytes
        self.kv_ending_bytes -= freed_bytes
        self.rows_used -= freed_bytes > 0
        del self.slot_of[seq]
        self.free_slots.append(slot)
        return freed_bytes

    def next_deadline(self):
        cdef int i
        cdef double earliest = INFINITY
        for i in range(self.capacity):
            if self.seqs[i].state != ENDED:
                earliest = min(earliest, self.seqs[i].deadline)
        return earliest

    def statistics(self):
        decoding = sum([self.seqs[self.running.items[i]].state == DECODING for i in range(self.running.size)])
        return SchedulerStatistics(
            queued=self.queue.size,
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
        quanta = (tokens + self.quantum_tokens - 1) // self.quantum_tokens
        return self.kv_bytes_per_sequence + quanta * self.quantum_bytes

    cdef int _activate(self, str name):
        """Count one more live sequence of the client. One that was idle starts no lower than the active ones."""
        cdef int i, index
        cdef long long lowest = 2**62
        if name not in self.client_of:
            if not self.free_clients:
                self._grow_clients()
            index = self.free_clients.pop()
            memset(&self.clients[index], 0, sizeof(Client))
            self.client_of[name] = index
        index = self.client_of[name]
        cdef Client *client = &self.clients[index]
        if client.live == 0:
            for i in range(self.client_capacity):
                if self.clients[i].live:
                    lowest = min(lowest, self.clients[i].served)
            if self.active_clients:
                self.floor = lowest
            client.served = max(client.served, self.floor)
            self.active_clients += 1
        client.live += 1
        return index

    cdef int _grow_clients(self) except -1:
        """Forget idle clients that would come back at the floor anyway; if that is not much, double the table."""
        for name, index in list(self.client_of.items()):
            if self.clients[<int>index].live == 0 and self.clients[<int>index].served <= self.floor:
                self.free_clients.append(self.client_of.pop(name))
        if len(self.free_clients) <= self.client_capacity // 2:
            size = max(16, 2 * self.client_capacity)
            self.clients = <Client *>resized(self.clients, size * sizeof(Client))
            memset(&self.clients[self.client_capacity], 0, (size - self.client_capacity) * sizeof(Client))
            self.free_clients.extend(range(size - 1, self.client_capacity - 1, -1))
            self.client_capacity = size
        return 0

    cdef int _grow(self) except -1:
        cdef int i, size = max(64, 2 * self.capacity)
        self.seqs = <Seq *>resized(self.seqs, size * sizeof(Seq))
        self.queue.items = <int *>resized(self.queue.items, size * sizeof(int))
        self.running.items = <int *>resized(self.running.items, size * sizeof(int))
        self.ending.items = <int *>resized(self.ending.items, size * sizeof(int))
        self.line.items = <int *>resized(self.line.items, size * sizeof(int))
        for i in range(self.capacity, size):
            self.seqs[i].state = ENDED
        self.free_slots.extend(range(size - 1, self.capacity - 1, -1))
        self.capacity = size
        return 0

    def __dealloc__(self):
        free(self.seqs)
        free(self.clients)
        free(self.queue.items)
        free(self.running.items)
        free(self.ending.items)
        free(self.line.items)


cdef long long _whole(name, value, low, high=2**31 - 1) except? -1:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return value


cdef int _check_time(name, double value) except -1:
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return 0
