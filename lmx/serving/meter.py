"""Measures one engine as its messages pass: Prometheus histograms and counters, and the recent windows of
``/admin/status``.

Called for every row of every step by ``lmx.serving.ledger``, so each method is a few appends.
"""

from collections import deque

from lmx import protocol
from lmx.serving.lease import Lease
from lmx.serving.metrics import Metrics
from lmx.serving.windows import Rate


class Meter:
    """The figures of the engine of ``model``. ``now`` is on Trio's clock, in seconds."""

    def __init__(self, model: str, metrics: Metrics) -> None:
        self.ttft_ms: deque[float] = deque(maxlen=1000)
        self.itl_ms: deque[float] = deque(maxlen=10_000)
        self.generated = Rate()
        self.computed = Rate()
        self.starts = Rate()
        self._model = model
        self._cancellations = metrics.cancellations
        self._restarts = metrics.engine_restarts
        self._recycles = metrics.engine_recycles
        self._ttft, self._itl = metrics.ttft.labels(model), metrics.itl.labels(model)
        self._step, self._cancel_free = metrics.step.labels(model), metrics.cancel_free.labels(model)
        self._prompt_tokens = metrics.prompt_tokens.labels(model)
        self._cached_tokens = metrics.cached_tokens.labels(model)
        self._generated_tokens = metrics.generated_tokens.labels(model)
        self._drafts = metrics.draft_tokens, metrics.accepted_drafts

    def step(self, elapsed_ms: float) -> None:
        self._step.observe(elapsed_ms / 1000)

    def tokens(self, lease: Lease, tokens: int, now: float) -> None:
        """``lease`` gets ``tokens`` more; called before its times are moved on."""
        self.generated.add(now, tokens)
        self._generated_tokens.inc(tokens)
        if lease.first_token_at is None:
            self._cached_tokens.inc(lease.cached_tokens)
            self.started(lease, now)
        else:
            gap_s = (now - lease.last_token_at) / tokens
            self._itl.observe(gap_s)
            self.itl_ms.append(gap_s * 1000)

    def drafts(self, row: protocol.Tokens) -> None:
        for counter, tokens in zip(self._drafts, (row.drafted, row.accepted), strict=True):
            counter.labels(self._model, row.source).inc(tokens)

    def started(self, lease: Lease, now: float) -> None:
        """The first of what ``lease`` waits for has come."""
        self.starts.add(now)
        self._ttft.observe(now - lease.taken_at)
        self.ttft_ms.append((now - lease.taken_at) * 1000)

    def freed(self, message: protocol.Freed, now: float) -> None:
        self.computed.add(now, message.prompt_tokens_computed)
        self._prompt_tokens.inc(message.prompt_tokens_computed)

    def cancelled(self, reason: str) -> None:
        self._cancellations.labels(self._model, reason).inc()

    def cancel_freed(self, seconds: float) -> None:
        self._cancel_free.observe(seconds)

    def recycled(self, reason: str) -> None:
        self._recycles.labels(self._model, reason).inc()

    def died(self, cause: str) -> None:
        self._restarts.labels(self._model, cause).inc()
