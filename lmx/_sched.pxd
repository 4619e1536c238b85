"""The scheduler's data as C sees it; ``_sched.pyx`` decides over it."""

from libc.stdlib cimport realloc
from libc.string cimport memmove

cdef extern from "<assert.h>" nogil:
    void c_assert "assert" (bint)  # live in the debug build only

cdef enum State:
    QUEUED
    PREFILLING
    DECODING
    ENDED  # by cancel, commit or its last planned token; holds its row and KV until release()

cdef struct Seq:
    long long held_bytes  # KV in whole quanta; none while queued
    long long asked_bytes  # what its admission takes
    long long arrival  # kept through preemption
    long long place  # in line_up(): what its client will have been served when its turn comes
    int priority
    int client
    State state
    bint has_row
    int overtaken
    long long target  # tokens to prefill: the prompt, and after a preemption the answer so far
    long long length  # tokens in its KV once the planned steps have run
    long long generated
    long long max_tokens
    long long last_step  # last planned step that it is in
    long long id
    double deadline

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
