"""The loop of an embedding engine: messages in, one plan, one batch of inputs, their vectors out; again.

The scheduler is the text engine's: an input is a prompt with a single token of answer and without KV, never cut into
chunks. So priority, fairness between clients, deadlines and the size of a step follow the same rules, and a step takes
what is next in order, not only what came together; a request's own inputs are submitted by their length, so that those
of a step are alike. What a request was cancelled for is in no later step.

One thread, no lookahead: a step's inputs owe nothing to the last one's. Every exception ends the process, so
``_submit`` refuses what could cause one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lmx._sched import Scheduler
from lmx.engine.embedding.backend import Embedder, Input
from lmx.engine.link import Link
from lmx.engine.requests import Refused
from lmx.footprint import open_files, resident_bytes, threads
from lmx.protocol import (
    Canary,
    Cancel,
    Embed,
    Embedded,
    Failed,
    Freed,
    Load,
    Message,
    Running,
    Shutdown,
    Started,
    Stats,
    Step,
)

_INFINITY = float("inf")
# Inputs of a step; the scheduler joins as many prompts.
_MAX_ROWS = 64
# No step is cut for its length: an input is computed whole.
_NO_LIMIT_MS = 1e9


@dataclass(slots=True)
class _Request:
    """One sequence of the protocol: the inputs of one request."""

    seq: int
    inputs: list[Input]
    left: set[int] = field(default_factory=set)
    """The scheduler's numbers of those that it still holds."""
    started: bool = False
    computed_tokens: int = 0
    ended: bool = False
    """Failed or cancelled: no vector of it is told any more."""


class EmbeddingLoop:
    def __init__(
        self, link: Link, embedder: Embedder, options: Load, clock: Callable[[], float] = time.monotonic
    ) -> None:
        facts = embedder.facts
        self._link = link
        self._embedder = embedder
        self._clock = clock
        self._stats_interval_s = options.stats_interval_s
        self._scheduler = Scheduler(
            max_rows=_MAX_ROWS,
            kv_budget_bytes=1,
            kv_bytes_per_token=0,
            max_chunk_tokens=max(facts.context_length, 1),
            max_wave_tokens=facts.step_tokens,
            itl_target_ms=options.itl_target_ms,
            max_step_ms=_NO_LIMIT_MS,
        )
        self._requests: dict[int, _Request] = {}
        self._owners: dict[int, tuple[_Request, int]] = {}
        """The request of each number of the scheduler's, and which of its inputs that is."""
        self._next_number = 0
        self._members: tuple[int, ...] = ()
        self._step = 0
        self._stats_at = 0.0
        self._stopping = False

    def run(self) -> None:
        """Until ``Shutdown``. Raises ServerGone, and whatever the device raises."""
        while not self._stopping:
            for message in self._link.receive(None if not self._requests else 0.0):
                self._handle(message)
            self._run_step()
            self._release()
            self._report()

    # --- messages -------------------------------------------------------------------------------------

    def _handle(self, message: Message) -> None:
        match message:
            case Embed():
                self._submit(message)
            case Cancel(seq=seq):
                if seq in self._requests:
                    self._end(self._requests[seq])
            case Canary():
                self._embedder.embed([Input(np.zeros(1, np.int32))])
                self._send_stats()
            case Shutdown():
                self._stopping = True
            case _:
                raise ValueError(f"the server sent {type(message).__name__}, which an embedding engine does not take")

    def _submit(self, message: Embed) -> None:
        """Queue a request, or fail it alone."""
        if message.seq in self._requests:
            raise ValueError(f"the server sent sequence {message.seq} again, which is not freed yet")
        try:
            inputs = self._read(message)
        except Refused as error:
            self._link.send(Failed(message.seq, error.code, str(error)))
            self._link.send(Freed(message.seq, 0))
            return
        request = self._requests[message.seq] = _Request(message.seq, inputs)
        deadline = _INFINITY if message.deadline_s is None else self._clock() + message.deadline_s
        for index in sorted(range(len(inputs)), key=lambda index: len(inputs[index].tokens)):
            number = self._next_number
            self._next_number += 1
            self._scheduler.submit(
                number,
                len(inputs[index].tokens),
                1,
                client=message.client,
                priority=message.priority,
                deadline=deadline,
            )
            request.left.add(number)
            self._owners[number] = request, index

    def _read(self, message: Embed) -> list[Input]:
        """Raises Refused."""
        facts = self._embedder.facts
        if len(message.tokens) % 4 or len(message.lengths) % 4 or len(message.pairs) % 4:
            raise Refused("invalid_token", "tokens and lengths are not made of 4-byte numbers")
        tokens = np.frombuffer(message.tokens, "<u4")
        lengths = np.frombuffer(message.lengths, "<u4")
        seconds = np.frombuffer(message.pairs, "<u4") if message.pairs else np.zeros(len(lengths), np.uint32)
        if not len(lengths) or int(lengths.sum(dtype=np.int64)) != len(tokens) or len(seconds) != len(lengths):
            raise Refused("invalid_token", f"{len(tokens)} tokens are not those of {len(lengths)} inputs")
        if not lengths.all():
            raise Refused("invalid_token", f"input {int(lengths.argmin())} has no tokens")
        if int(tokens.max()) >= facts.vocab_size:
            raise Refused(
                "invalid_token",
                f"the input holds token {int(tokens.max())}; this model's go from 0 to {facts.vocab_size - 1}",
            )
        if int(lengths.max()) > facts.context_length:
            raise Refused(
                "never_fits",
                f"input {int(lengths.argmax())} has {int(lengths.max())} tokens; this model takes "
                f"{facts.context_length}",
            )
        parts = np.split(tokens.astype(np.int32), np.cumsum(lengths)[:-1])
        return [Input(part, int(second)) for part, second in zip(parts, seconds, strict=True)]

    def _end(self, request: _Request) -> None:
        """Nothing more is computed for it."""
        request.ended = True
        for number in request.left:
            self._scheduler.cancel(number)

    # --- steps ----------------------------------------------------------------------------------------

    def _run_step(self) -> None:
        plan = self._scheduler.plan(self._clock())
        for number in plan.expired:
            request, _ = self._owners[number]
            if not request.ended:
                self._link.send(Failed(request.seq, "timeout", "the deadline passed"))
                self._end(request)
        if plan.step == 0:
            return
        work = [self._owners[prefill.seq] for prefill in plan.prefills]
        requests = list({request.seq: request for request, _ in work}.values())
        members = tuple(request.seq for request in requests)
        if members != self._members:
            self._members = members
            self._link.send(Running(members))
        begun = self._clock()
        vectors = self._embedder.embed([request.inputs[index] for request, index in work])
        elapsed_ms = (self._clock() - begun) * 1e3
        self._step = plan.step
        self._scheduler.commit(plan.step, elapsed_ms)
        started = tuple(Started(request.seq, 0) for request in requests if not request.started)
        for request in requests:
            request.started = True
        self._link.send(Step(plan.step, elapsed_ms, (), started))
        for request in requests:
            rows = [row for row, (owner, _) in enumerate(work) if owner is request]
            self._tell(request, [work[row][1] for row in rows], vectors[rows])

    def _tell(self, request: _Request, indices: Sequence[int], vectors: npt.NDArray[np.float32]) -> None:
        request.computed_tokens += sum(len(request.inputs[index].tokens) for index in indices)
        if request.ended:
            return
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            index = indices[int(finite.argmin())]
            self._link.send(Failed(request.seq, "non_finite", f"the model gave no finite vector for input {index}"))
            self._end(request)
            return
        self._link.send(
            Embedded(request.seq, np.array(indices, "<u4").tobytes(), vectors.astype("<f4", copy=False).tobytes())
        )

    def _release(self) -> None:
        for number in self._scheduler.releasable():
            self._scheduler.release(number)
            request, _ = self._owners.pop(number)
            request.left.discard(number)
            if not request.left:
                del self._requests[request.seq]
                self._link.send(Freed(request.seq, 0, request.computed_tokens))

    # --- figures --------------------------------------------------------------------------------------

    def _report(self) -> None:
        """Stats once an interval while steps run, and once more when the last request is gone."""
        now = self._clock()
        if not self._requests and self._owners:
            raise RuntimeError(f"a bug: no request is left, but {len(self._owners)} inputs are still held")
        if not self._requests or now >= self._stats_at:
            self._stats_at = now + self._stats_interval_s
            self._send_stats()

    def _send_stats(self) -> None:
        account, memory = self._scheduler.statistics(), self._embedder.memory()
        self._link.send(
            Stats(
                step=self._step,
                queued=account.queued,
                prefilling=account.prefilling,
                decoding=account.decoding,
                ending=account.ending,
                kv_used_bytes=0,
                kv_budget_bytes=0,
                arena_bytes=0,
                preemptions=0,
                mlx_active_bytes=memory.active_bytes,
                mlx_peak_bytes=memory.peak_bytes,
                mlx_cache_bytes=memory.cache_bytes,
                rss_bytes=resident_bytes(),
                live_arrays=memory.live_arrays,
                handles=memory.handles,
                most_handles=memory.most_handles,
                open_files=open_files(),
                threads=threads(),
            )
        )
