"""What a step will cost: two linear models of milliseconds, fitted online. Inline functions for ``_sched.pyx``.

Decode: per step, per row, per token of context. Prefill: per pass over the weights, per token, per token times context,
the last two summed over the step's chunks. Recursive least squares on relative errors with exponential forgetting, in information form: one regulariser
then decides what the measurements leave open (only chunks of 64 tokens seen: how much is the pass, how much the
tokens?), namely the prior's shape, and it is never forgotten.
"""

from libc.string cimport memset

cdef extern from *:
    """
    static const double FORGETTING = 0.97;
    static const double PRIOR = 0.01;    /* weight of the prior, in measurements */
    static const double SURPRISE = 2.0;  /* a measurement this many times off is clipped: a page fault, a compilation */
    enum { SURPRISES = 3 };              /* so many in a row are no accident: the machine's speed has changed */
    """
    const double FORGETTING, PRIOR, SURPRISE
    const int SURPRISES

cdef struct Step:  # what an uncommitted step is made of, for the cost model
    int rows
    long long context  # summed over the rows
    long long chunk  # tokens of all chunks
    double chunk_context  # summed over the chunks' tokens
    double area  # tokens times context, summed over the chunks that go on or are not the last
    int chunks
    bint holds  # decoding rows wait for it
    double predicted_ms  # if it holds
    int depth  # most drafts of a row
    int asked  # 1: the draft model was, too
    bint probe  # it is planned to learn what it costs
    double gain  # of the best that was known: tokens by those of plain steps in the same time
    int whole  # prompts that are prefilled whole, in one pass: padded to the longest
    long long longest

cdef struct Fit:  # ms = scale * sum(weight[i] * shape[i] * feature[i])
    double shape[3]
    double scale
    double weight[3]  # at least 0; 1 is the prior
    double gram[3][3]  # normal equations of the relative errors, older steps forgotten
    double moment[3]
    bint seen
    int surprises  # measurements in a row that were far too slow (above 0) or far too fast (below 0)


cdef inline void start_fit(Fit *fit, double per_step, double per_item, double per_context) noexcept:
    memset(fit, 0, sizeof(Fit))
    fit.shape[0], fit.shape[1], fit.shape[2] = per_step, per_item, per_context
    fit.weight[0] = fit.weight[1] = fit.weight[2] = fit.scale = 1.0


cdef inline void decode_features(double *x, Step *step) noexcept:
    x[0], x[1], x[2] = 1.0, step.rows, step.context


cdef inline double chunk_context(double start, double tokens) noexcept:
    return tokens * (start + tokens / 2.0)


cdef inline void add_area(Step *step, long long start, long long tokens, bint last) noexcept:
    if start == 0 and last:
        step.whole += 1
        step.longest = max(step.longest, tokens)
    else:
        step.area += <double>tokens * (start + tokens)


cdef inline void prefill_features(double *x, double tokens, double context) noexcept:
    x[0], x[1], x[2] = 1.0, tokens, context


cdef inline double predict(Fit *fit, double *x) noexcept:
    cdef double *w = fit.weight
    return fit.scale * (w[0] * fit.shape[0] * x[0] + w[1] * fit.shape[1] * x[1] + w[2] * fit.shape[2] * x[2])


cdef inline void solve(Fit *fit) noexcept:
    """Weights from the normal equations; the most negative one is pinned to 0 and the others solved again."""
    cdef double m[3][4]
    cdef bint pinned[3]
    cdef double factor
    cdef int i, j, k, lowest
    pinned[0] = pinned[1] = pinned[2] = False
    while True:
        for i in range(3):
            for j in range(3):
                m[i][j] = 0.0 if pinned[i] or pinned[j] else fit.gram[i][j]
            m[i][i] += PRIOR
            m[i][3] = 0.0 if pinned[i] else fit.moment[i] + PRIOR
        for k in range(3):  # the matrix is positive definite: no pivoting
            for i in range(k + 1, 3):
                factor = m[i][k] / m[k][k]
                for j in range(k, 4):
                    m[i][j] -= factor * m[k][j]
        lowest = 0
        for i in range(2, -1, -1):
            for j in range(i + 1, 3):
                m[i][3] -= m[i][j] * fit.weight[j]
            fit.weight[i] = m[i][3] / m[i][i]
        for i in range(3):
            if fit.weight[i] < fit.weight[lowest]:
                lowest = i
        if fit.weight[lowest] >= 0.0:
            return
        pinned[lowest] = True


cdef inline void observe(Fit *fit, double *x, double measured_ms) noexcept:
    """Learn from one step. The first measurement, and a lasting change of speed, set the scale and leave the shape."""
    cdef double predicted_ms = predict(fit, x)
    cdef double ratio = min(max(measured_ms, 1e-3), 1e9) / predicted_ms
    cdef double u[3]
    cdef int i, j, surprise = (ratio > SURPRISE) - (ratio < 1.0 / SURPRISE)
    if fit.seen == 0 and measured_ms <= 0.0:
        return
    fit.surprises = fit.surprises + surprise if surprise * fit.surprises > 0 else surprise
    if fit.seen == 0 or abs(fit.surprises) == SURPRISES:
        fit.scale *= ratio
        predicted_ms *= ratio
        ratio = 1.0
        fit.surprises = 0
    ratio = min(max(ratio, 1.0 / SURPRISE), SURPRISE)
    fit.seen = True
    for i in range(3):
        u[i] = fit.scale * fit.shape[i] * x[i] / predicted_ms
    for i in range(3):
        for j in range(3):
            fit.gram[i][j] = FORGETTING * fit.gram[i][j] + u[i] * u[j]
        fit.moment[i] = FORGETTING * fit.moment[i] + u[i] * ratio
    solve(fit)
