"""Who is next: priority, then the client that was served least, then its turn. Inline functions for ``_sched.pyx``.

The clients' counters are the virtual counters of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024):
each counts the tokens that its client's sequences prefilled and generated. A client that was idle comes back no lower
than the active ones, so idleness is no credit, and no debt is forgotten while others are behind it.
"""

from libc.string cimport memset

from lmx._sched cimport MAX_OVERTAKEN, PREFILLING, QUEUED, Seq, Slots, resized

cdef struct Client:
    long long served  # tokens prefilled and generated
    long long ahead  # in line_up(): what its earlier sequences will add
    int rows  # in Scheduler._give_way(): how many it has
    int live  # sequences that have not ended; none: the client is idle

cdef struct Clients:
    Client *items
    int capacity
    int active  # clients with live sequences
    long long floor  # smallest `served` of the active clients; never falls


cdef inline int first(Seq *seqs, Clients *clients, int a, int b) noexcept:
    """The one of two sequences that goes first. ``a`` may be -1."""
    if a < 0:
        return b
    cdef Seq *x = &seqs[a]
    cdef Seq *y = &seqs[b]
    if x.priority != y.priority:
        return a if x.priority > y.priority else b
    cdef long long x_served = clients.items[x.client].served
    cdef long long y_served = clients.items[y.client].served
    if x_served != y_served:
        return a if x_served < y_served else b
    return a if x.turn <= y.turn else b


cdef inline long long turn_of(
    Seq *seqs, Slots *queue, Slots *running, Seq *newcomer, long long arrival, long long short_tokens
) noexcept:
    """By arrival; but a short prompt (by what is left to prefill) goes before the long ones of its own client that wait
    or prefill, unless they were overtaken MAX_OVERTAKEN times already, or a short one waits behind them."""
    cdef long long barrier = -1, turn = arrival * (MAX_OVERTAKEN + 1) + MAX_OVERTAKEN  # room for those it lets pass
    cdef int i, slot
    cdef Seq *seq
    cdef Seq *passed = NULL
    if newcomer.target - newcomer.length > short_tokens:
        return turn
    for i in range(queue.size + running.size):
        seq = &seqs[queue.items[i] if i < queue.size else running.items[i - queue.size]]
        if waits_with(seq, newcomer) and (seq.target - seq.length <= short_tokens or seq.overtaken >= MAX_OVERTAKEN):
            barrier = max(barrier, seq.turn)
    for i in range(queue.size + running.size):
        seq = &seqs[queue.items[i] if i < queue.size else running.items[i - queue.size]]
        if waits_with(seq, newcomer) and seq.turn > barrier:
            if passed == NULL or seq.turn < passed.turn:
                passed = seq
                turn = seq.turn - MAX_OVERTAKEN + seq.overtaken
            seq.overtaken += 1
    return turn


cdef inline bint waits_with(Seq *seq, Seq *newcomer) noexcept:
    return seq.client == newcomer.client and seq.priority == newcomer.priority and seq.state <= PREFILLING


cdef inline int first_begun(Seq *seqs, Clients *clients, Slots *running) noexcept:
    """The first in order of those that prefill already; or -1."""
    cdef int i, best = -1
    for i in range(running.size):
        if seqs[running.items[i]].state == PREFILLING:
            best = first(seqs, clients, best, running.items[i])
    return best


cdef inline bint line_up(Seq *seqs, Clients *clients, Slots *queue, Slots *line, int priority, int most) noexcept:
    """Into ``line``: the first ``most`` in order of the queued of this priority. False: a higher one is queued.

    One pass finds them all: whoever is taken counts as served before the client's next one is compared with others, so
    each one's place is its client's counter and the tokens of the client's earlier ones (the start tags of Goyal et
    al., "Start-time Fair Queuing", 1996). ``queue`` is in order of turns, and so equal places stay in it.
    """
    cdef int i, slot
    cdef Seq *seq
    line.size = 0
    for i in range(clients.capacity):
        clients.items[i].ahead = 0
    for i in range(queue.size):
        slot = queue.items[i]
        seq = &seqs[slot]
        if seq.priority < priority:
            continue
        if seq.priority > priority:
            return False
        into_line(seqs, clients, line, slot, most)
    return True


cdef inline void into_line(Seq *seqs, Clients *clients, Slots *line, int slot, int most) noexcept:
    """The next one of ``queue``, at its place, if that is among the first ``most``."""
    cdef Seq *seq = &seqs[slot]
    cdef Client *client = &clients.items[seq.client]
    cdef int j = line.size
    seq.place = client.served + client.ahead
    client.ahead += max(0, seq.target - max(seq.charged, seq.length)) + 1
    if j < most:
        line.size += 1
    elif j > 0 and seq.place < seqs[line.items[j - 1]].place:
        j -= 1  # the last one gives up its place
    else:
        return
    while j > 0 and seq.place < seqs[line.items[j - 1]].place:
        line.items[j] = line.items[j - 1]
        j -= 1
    line.items[j] = slot


cdef inline long long place(Seq *seqs, Clients *clients, Slots *queue, Slots *running, int priority) noexcept:
    """The ``place`` of each queued one of at least this priority, if nothing of it were cached; and what these and
    those that prefill will take together. ``ahead`` becomes what its clients' all will."""
    cdef int i
    cdef long long left, backlog = 0
    cdef Seq *seq
    for i in range(clients.capacity):
        clients.items[i].ahead = 0
    for i in range(running.size + queue.size):
        seq = &seqs[running.items[i] if i < running.size else queue.items[i - running.size]]
        if seq.priority < priority or seq.state > PREFILLING:
            continue
        left = seq.target - (seq.charged if seq.state == QUEUED else seq.length)
        seq.place = clients.items[seq.client].served + clients.items[seq.client].ahead
        clients.items[seq.client].ahead += left
        backlog += left
    return backlog


cdef inline int activate(Clients *clients, dict client_of, list free_clients, str name) except -1:
    """Count one more live sequence of the client, whose index is returned. One that was idle starts no lower than the
    active ones."""
    cdef int i, index
    cdef long long lowest = 2**62
    if name not in client_of:
        if not free_clients:
            forget_or_grow(clients, client_of, free_clients)
        index = free_clients.pop()
        memset(&clients.items[index], 0, sizeof(Client))
        client_of[name] = index
    index = client_of[name]
    cdef Client *client = &clients.items[index]
    if client.live == 0:
        for i in range(clients.capacity):
            if clients.items[i].live:
                lowest = min(lowest, clients.items[i].served)
        if clients.active:
            clients.floor = lowest
        client.served = max(client.served, clients.floor)
        clients.active += 1
    client.live += 1
    return index


cdef inline void idle(Clients *clients, int index) noexcept:
    """One live sequence of the client less."""
    cdef Client *client = &clients.items[index]
    client.live -= 1
    if client.live == 0:
        clients.active -= 1
        if clients.active == 0:
            clients.floor = client.served


cdef inline int forget_or_grow(Clients *clients, dict client_of, list free_clients) except -1:
    """Forget idle clients that would come back at the floor anyway; if that is not much, double the table."""
    cdef int size, index
    for name, known in list(client_of.items()):
        index = known
        if clients.items[index].live == 0 and clients.items[index].served <= clients.floor:
            free_clients.append(client_of.pop(name))
    if len(free_clients) <= clients.capacity // 2:
        size = max(16, 2 * clients.capacity)
        clients.items = <Client *>resized(clients.items, size * sizeof(Client))
        memset(&clients.items[clients.capacity], 0, (size - clients.capacity) * sizeof(Client))
        free_clients.extend(range(size - 1, clients.capacity - 1, -1))
        clients.capacity = size
    return 0
