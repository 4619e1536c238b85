"""The scheduler's data as C sees it; ``_sched.pyx`` decides over it."""

from libc.stdlib cimport realloc
from libc.string cimport memmove

cdef extern from "<assert.h>" nogil:
    void c_assert "assert" (bint)  # live in the debug build only

cdef enum:
    MAX_OVERTAKEN = 8  # that go before one out of turn: smaller ones while it waits for KV, its client's shorter ones
    MAX_STOPS = 16

cdef enum State:
    QUEUED
    PREFILLING
    DECODING
    ENDED  # by cancel, commit or its last planned token; holds its row and KV until release()
    WAITING  # for its parent's prefill of what they share

cdef struct Seq:  # what a search of the queue reads comes first: 10,000 of them are searched in each step
    int priority
    int client
    long long turn  # by arrival, MAX_OVERTAKEN + 1 apart; kept through preemption
    long long asked_bytes  # of KV: what its admission takes
    long long prompt_bytes  # for its prompt alone
    long long most_bytes  # when it ends at max_tokens
    long long target  # tokens to prefill: the prompt, and after a preemption the answer so far
    long long charged  # as many of them its client was charged for already, before a preemption
    long long length  # tokens in its KV once the planned steps have run; of a queued one, those it starts with
    long long place  # in line_up(): what its client will have been served when its turn comes
    double deadline
    State state
    bint has_row
    int overtaken  # out of turn
    int yielded  # times it gave its row to a client that was behind
    long long held_bytes  # KV in whole quanta; none while queued
    long long generated
    long long max_tokens
    long long last_step  # last planned step that it is in
    long long cached  # tokens that it starts with, or did; while it waits, those of its parent that it wants
    int parent  # whose KV it takes over when it starts; -1: nobody's
    int children  # that have not started
    long long since  # the plan() in or after which it ended; of a queued one, in or after which it got its `cached`
    long long id

cdef struct Stops:  # where a sequence's chunks must end, ascending
    int count
    int at[MAX_STOPS]

cdef struct Slots:  # sequences in one condition
    int *items
    int size


cdef inline void append_slot(Slots *slots, int slot) noexcept:
    slots.items[slots.size] = slot
    slots.size += 1


cdef inline void remove_slot(Slots *slots, int slot) noexcept:
    cdef int i = 0
    while slots.items[i] != slot:
        i += 1
        c_assert(i < slots.size)
    slots.size -= 1
    memmove(&slots.items[i], &slots.items[i + 1], (slots.size - i) * sizeof(int))


cdef inline void *resized(void *memory, size_t size_bytes) except NULL:
    memory = realloc(memory, size_bytes)
    if memory == NULL:
        raise MemoryError(f"no {size_bytes} bytes for the scheduler's tables")
    return memory
