"""How many drafts a step verifies: a table of what such steps cost, and how many drafts turn out right. Inline
functions for ``_sched.pyx``, which asks ``choose`` before a step and tells ``learn_*`` after it. No memory of its own.

*Costs* are a table and no line, because they have cliffs (Metal's fused attention ends at 8 tokens a row): a cell for
rows (in buckets), depth, and whether a draft model was asked. Its ``ratio`` is measured by what ``_cost.pxd`` predicts
for the same rows without drafts, so that context and the machine's speed drop out; depth 0 has a cell too, so that what
that fit gets wrong drops out. *Acceptance* is, for each sequence and source, how often the draft at a position is right
where all before it were; a sequence of which nothing is known is like its source's others.

*Exploration* costs at most EARNED of the time in the long run: each step earns it, and what a probe loses by what was
known to be best is paid with it. A cell is worth a probe if it would win at the lowest cost that it may have: never for
text whose drafts are wrong. Unmeasured cells are used without a probe only where others bound their cost.
"""

from libc.string cimport memset

cdef extern from *:
    """
    static const double OWN_KEPT = 0.9;        /* of what is known of a sequence's drafts, at each new one */
    static const double SOURCE_KEPT = 0.98;
    static const double PRIOR_DRAFTS = 2.0;    /* weight of the average, in drafts */
    static const double RATIO_SHARE = 0.125;   /* of a new measurement in a cell */
    static const double LATE_SHARE = 0.5;      /* and in one that was due for a probe */
    static const double CHANGED = 2.0;         /* a measurement this many times off is clipped, as in _cost.pxd */
    enum { CHANGES = 3 };                      /* so many in a row: the machine's speed has changed */
    static const double WORTH = 1.02;          /* times what plain steps give: below that nothing is verified */
    static const double PROMISE = 1.1;         /* times what the best known gives, at the lowest cost: worth a probe */
    static const double LOWEST = 0.6;          /* what was measured long ago may have fallen to so much of it */
    static const double EARNED = 0.01;         /* plain steps that may be lost to probes, by each step */
    static const double MOST_CREDIT = 6.0;     /* plain steps; at the start too */
    static const double MOST_DEBT = 8.0;
    static const double FIRST_LOSS = 2.0;      /* plain steps: a cell's first measurement costs no more, as it is paid */
    static const double GUESS = 0.25;          /* what a draft adds to a step of which nothing is known, in plain ones */
    """
    const double OWN_KEPT, SOURCE_KEPT, PRIOR_DRAFTS, RATIO_SHARE, LATE_SHARE, CHANGED, WORTH, PROMISE, LOWEST
    const double EARNED, MOST_CREDIT, MOST_DEBT, FIRST_LOSS, GUESS
    const int CHANGES

cdef enum:
    MAX_DEPTH = 15
    SOURCES = 2  # 0: costs nothing; 1: the draft model
    GROUPS = 5  # of positions in a draft: 1, 2, 3-4, 5-8, 9-15
    BUCKETS = 13  # of rows: 1, 2, 3, 4, -6, -8, -12, -16, -24, -32, -48, -64, more
    FIRST_TOP = 3  # depth at which a bucket's probes begin; then at most double and one more
    FIRST_WAIT = 256  # steps after which a cell is probed again; then twice as many
    MAX_WAIT = 16384
    UNHEARD = 512  # steps without word of a source's acceptance, after which it is asked

cdef struct Acceptance:  # with forgetting
    double right[SOURCES][GROUPS]
    double tried[SOURCES][GROUPS]

cdef struct Drafting:  # a sequence's
    Acceptance acceptance
    long long offered_in  # after so many plans
    int offered
    int source
    int verifies  # drafts in the uncommitted step
    int verified_source
    long long spare_bytes  # of KV, held for these

cdef struct Cell:
    double ratio
    int seen  # measurements, as far as 2: the first may be a kernel's compilation
    int wait
    long long due  # no probe before that many steps

cdef struct Depths:
    Cell cells[SOURCES][BUCKETS][MAX_DEPTH + 1]  # by whether the draft model was asked; depth 0: cells[0] alone
    Acceptance average
    long long heard[SOURCES]  # the step after which its acceptance was last seen
    long long steps  # committed ones with decoding rows
    double credit
    int changes  # measurements in a row that were far too slow (above 0) or far too fast (below 0)

cdef struct Offers:  # of all rows together
    int rows
    int most[SOURCES]  # drafts of a row: of sources that cost nothing; of all
    double right[SOURCES][MAX_DEPTH + 1]  # at each position, how many are expected to be right with all before them
    bint asks[SOURCES]  # a row has drafts of this source

cdef struct Choice:
    int depth
    int asked
    bint probe
    double gain  # tokens by those of plain steps in the same time, of the best that is known


cdef inline void start_depths(Depths *depths) noexcept:
    memset(depths, 0, sizeof(Depths))
    depths.credit = MOST_CREDIT


# --- acceptance -------------------------------------------------------------------------------------------------------


cdef inline int group_of(int position) noexcept:
    return 0 if position == 1 else 1 if position == 2 else 2 if position <= 4 else 3 if position <= 8 else 4


cdef inline void learn_drafts(Acceptance *acceptance, int source, int right, bint wrong, double kept) noexcept:
    """So many were right, and the one after them was ``wrong``, or is not known.

    What is known of positions behind a wrong one fades as well, or a text that is no copy any more would look like one
    at its first chance hit.
    """
    cdef int position, group
    for position in range(1, right + wrong + 1):
        group = group_of(position)
        acceptance.right[source][group] = kept * acceptance.right[source][group] + (position <= right)
        acceptance.tried[source][group] = kept * acceptance.tried[source][group] + 1.0
    for group in range(group_of(right + 1) + 1 if wrong else GROUPS, GROUPS):
        acceptance.right[source][group] *= kept
        acceptance.tried[source][group] *= kept


cdef inline void learn_acceptance(Depths *depths, Drafting *draft, int source, int right, bint wrong) noexcept:
    learn_drafts(&draft.acceptance, source, right, wrong, OWN_KEPT)
    learn_drafts(&depths.average, source, right, wrong, SOURCE_KEPT)
    depths.heard[source] = depths.steps


cdef inline double share(Acceptance *acceptance, int source, int group, double prior, double kept) noexcept:
    """The prior is forgotten as drafts are: after n of them ``tried`` is (1 - kept ** n) / (1 - kept)."""
    cdef double weight = PRIOR_DRAFTS * (1.0 - acceptance.tried[source][group] * (1.0 - kept))
    return (acceptance.right[source][group] + weight * prior) / (acceptance.tried[source][group] + weight)


cdef inline void expect(Depths *depths, Drafting *draft, double *right) noexcept:
    """For each position the probability that its draft and all before it are right.

    A sequence that is better at one position than its source's others is taken to be so at the next, too; what no
    sequence has shown of a position is taken to be as at the one before.
    """
    cdef double usual = 0.5, own = 0.5, before, all_right = 1.0
    cdef int position, group = -1
    for position in range(1, MAX_DEPTH + 1):
        if group_of(position) > group:
            group += 1
            before = usual
            usual = share(&depths.average, draft.source, group, usual, SOURCE_KEPT)
            own = share(&draft.acceptance, draft.source, group, min(max(usual + (own - before), 0.0), 1.0), OWN_KEPT)
        all_right *= own
        right[position] = all_right


# --- costs ------------------------------------------------------------------------------------------------------------


cdef inline int most_rows(int bucket) noexcept:
    """The largest number of rows in it: 1, 2, 3, 4, 6, 8, 12, ..."""
    if bucket < 3:
        return bucket + 1
    return (2 if bucket % 2 else 3) << (bucket - 1) // 2


cdef inline int bucket_of(int rows) noexcept:
    cdef int bucket = 0
    while bucket < BUCKETS - 1 and rows > most_rows(bucket):
        bucket += 1
    return bucket


cdef inline double plain_ratio(Depths *depths, int bucket) noexcept:
    cdef Cell *cell = &depths.cells[0][bucket][0]
    return cell.ratio if cell.seen else 1.0


cdef inline double known_ratio(Depths *depths, int asked, int bucket, int depth) noexcept:
    """What is measured, or at least bounded: by more drafts, by more rows, or by fewer rows if the drafts' cost grows
    with the rows. 0: not known."""
    cdef double plain = plain_ratio(depths, bucket), more
    cdef int i
    if depth == 0:
        return plain
    for i in range(depth, MAX_DEPTH + 1):
        if depths.cells[asked][bucket][i].seen:
            return depths.cells[asked][bucket][i].ratio
    for i in range(bucket + 1, BUCKETS):
        if depths.cells[asked][i][depth].seen:
            return plain * depths.cells[asked][i][depth].ratio / plain_ratio(depths, i)
    for i in range(bucket - 1, -1, -1):
        if depths.cells[asked][i][depth].seen:
            more = max(depths.cells[asked][i][depth].ratio / plain_ratio(depths, i) - 1.0, 0.0)
            return plain * (1.0 + more * most_rows(bucket) / most_rows(i))
    return 0.0


cdef inline double expected_ratio(Depths *depths, int asked, int rows, int depth) noexcept:
    cdef int bucket = bucket_of(rows)
    cdef double ratio = known_ratio(depths, asked, bucket, depth)
    return ratio if ratio > 0.0 else plain_ratio(depths, bucket) * (1.0 + GUESS * depth)


cdef inline double learn_cell(Depths *depths, int asked, int rows, int depth, double ratio, bint probe) noexcept:
    """What a step took by its prediction as a plain one. Returned is by how much the machine's speed has changed: 1,
    or what the fit is to be scaled by."""
    cdef Cell *cell = &depths.cells[asked][bucket_of(rows)][depth]
    cdef double speed = 1.0
    cdef int change
    if cell.seen == 0:
        cell.ratio = ratio
        cell.wait = FIRST_WAIT
    elif cell.seen == 1:
        cell.ratio = min(cell.ratio, ratio)
    else:
        change = (ratio > CHANGED * cell.ratio) - (ratio * CHANGED < cell.ratio)
        if depth:
            depths.changes = depths.changes + change if change * depths.changes > 0 else change
            if abs(depths.changes) == CHANGES:
                depths.changes = 0
                speed = ratio / cell.ratio
                ratio = cell.ratio
        ratio = min(max(ratio, cell.ratio / CHANGED), cell.ratio * CHANGED)
        cell.ratio += (LATE_SHARE if depths.steps >= cell.due else RATIO_SHARE) * (ratio - cell.ratio)
        cell.wait = min(2 * cell.wait, MAX_WAIT) if probe and depth else FIRST_WAIT
    cell.seen = min(cell.seen + 1, 2)
    cell.due = depths.steps + cell.wait
    return speed


cdef inline void pay(Depths *depths, int asked, int rows, int depth, double lost) noexcept:
    """A probe took so many plain steps more than the best that was known would have for as many tokens. What only the
    first such step takes, to compile something, it would have taken some time anyhow."""
    if depths.cells[asked][bucket_of(rows)][depth].seen == 0:
        lost = min(lost, FIRST_LOSS)
    depths.credit = max(depths.credit - max(lost, 0.0), -MOST_DEBT)


cdef inline void earn(Depths *depths) noexcept:
    depths.steps += 1
    depths.credit = min(depths.credit + EARNED, MOST_CREDIT)


# --- the choice -------------------------------------------------------------------------------------------------------


cdef inline void add_offer(Depths *depths, Offers *offers, Drafting *draft, int most) noexcept:
    """Of a decoding row."""
    cdef double right[MAX_DEPTH + 1]
    cdef int position, asked
    expect(depths, draft, right)
    offers.asks[draft.source] = True
    for asked in range(draft.source, SOURCES):
        offers.most[asked] = max(offers.most[asked], most)
        for position in range(1, most + 1):
            offers.right[asked][position] += right[position]


cdef inline bint is_listed(int depth) noexcept:
    """Depths that are compared; the others are used where rows have no more."""
    return depth <= 5 or depth == 7 or depth == 11 or depth == 15


cdef inline Choice choose(Depths *depths, Offers *offers, bint probes) noexcept:
    """The depth with the most tokens in the time, or one to be measured."""
    cdef Choice choice
    cdef int bucket = bucket_of(offers.rows), asked, depth
    cdef double plain = plain_ratio(depths, bucket), ratio, gain, tokens
    choice.depth, choice.asked, choice.probe, choice.gain = 0, 0, False, WORTH
    for asked in range(SOURCES):
        tokens = offers.rows
        for depth in range(1, (offers.most[asked] if asked == 0 or offers.asks[asked] else 0) + 1):
            tokens += offers.right[asked][depth]
            ratio = known_ratio(depths, asked, bucket, depth)
            if ratio > 0.0 and (is_listed(depth) or depth == offers.most[asked]):
                gain = tokens * plain / (offers.rows * ratio)
                if gain > choice.gain:
                    choice.depth, choice.asked, choice.gain = depth, asked, gain
    if choice.depth == 0:
        choice.gain = 1.0
    if probes and depths.credit > 0.0:
        find_probe(depths, offers, &choice, bucket, plain)
    return choice


cdef inline void find_probe(Depths *depths, Offers *offers, Choice *choice, int bucket, double plain) noexcept:
    """A cell that would win at the lowest cost it may have: that of fewer drafts, or not much less than it had. Of
    several the one that promises most at a likely cost. But first what the gain is reckoned by: a plain step."""
    cdef Cell *cell
    cdef int asked, depth, top
    cdef double least, lowest, likely, tokens, found = 0.0, best = PROMISE * choice.gain
    for asked in range(SOURCES):
        if offers.asks[asked] and depths.steps - depths.heard[asked] >= UNHEARD:
            choice.depth, choice.asked, choice.probe = min(offers.most[asked], FIRST_TOP), asked, True
            return
    cell = &depths.cells[0][bucket][0]
    if choice.depth and (cell.seen < 2 or depths.steps >= cell.due):
        choice.depth, choice.asked, choice.probe = 0, 0, True
        return
    for asked in range(SOURCES):
        if not offers.asks[asked]:
            continue
        top = MAX_DEPTH
        while top > 0 and depths.cells[asked][bucket][top].seen == 0:
            top -= 1
        tokens = offers.rows
        lowest = likely = plain
        for depth in range(1, min(offers.most[asked], max(FIRST_TOP, 2 * top + 1)) + 1):
            tokens += offers.right[asked][depth]
            likely += GUESS * plain
            cell = &depths.cells[asked][bucket][depth]
            if cell.seen == 2:
                likely = cell.ratio
            if is_listed(depth) and (cell.seen < 2 or depths.steps >= cell.due):
                least = max(lowest, LOWEST * cell.ratio) if cell.seen == 2 else lowest
                if tokens * plain / (offers.rows * least) > best and tokens / likely > found:
                    found = tokens / likely
                    choice.depth, choice.asked, choice.probe = depth, asked, True
            if cell.seen:
                lowest = max(lowest, cell.ratio)
                likely = max(likely, lowest)
