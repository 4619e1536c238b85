"""The step loop: messages in, one plan, one launch, its outcome out; again (DESIGN §1, §3).

It joins the scheduler (which decides) to a back end (which computes) and speaks the protocol; it knows no HTTP and no
text. ``run_plain`` is the loop as one would explain it. ``run_overlapped`` is the same with one step of lookahead: the
next step is launched before the last one's tokens are read, so that the device never waits for Python. To keep a
cancellation within one step, the next launch happens as late as the running step's predicted end allows: what is
cancelled before is not in it.

One thread; every exception ends the process, and the server's supervisor takes it from there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from lmx._sched import NeverFits, Scheduler
from lmx.engine.backend import Backend, Chunk, Launch, Sequence
from lmx.engine.budget import QUANTUM_TOKENS
from lmx.engine.link import Link
from lmx.engine.memory import resident_bytes
from lmx.protocol import (
    Canary,
    Cancel,
    Failed,
    Freed,
    Load,
    Message,
    Running,
    Shutdown,
    Started,
    Stats,
    Step,
    Submit,
    Tokens,
    unpack_tokens,
)

_INFINITY = float("inf")
# Sequences wait and none can run: look again this much later, if no message comes before.
_STALLED_S = 0.02
# Prompts that wait at the same moment start in one step, but requests made at the same moment arrive one after the
# other: those of eight clients within 5 ms, no two more than 4.3 ms apart (measured on two idle cores). An idle engine
# that gets work waits so long for more, and at most this share of what its work will take.
_GATHER_S = 0.01
_GATHER_SHARE = 0.1
# How far into a step the next one is launched. Not at its very end: a step cannot be measured shorter than this wait,
# and a prediction that is too long must be able to come down.
_LAUNCH_SHARE = 0.75


@dataclass(slots=True)
class _Running:
    """A launched step."""

    step: int
    launch: Launch
    chunks: list[Chunk]
    started: tuple[Started, ...]
    launched_at: float
    predicted_s: float


class StepLoop:
    def __init__(
        self, link: Link, backend: Backend, options: Load, clock: Callable[[], float] = time.monotonic
    ) -> None:
        facts = backend.facts
        self._link = link
        self._backend = backend
        self._clock = clock
        self._stats_interval_s = options.stats_interval_s
        self._eos = frozenset(facts.eos_ids)
        self._scheduler = Scheduler(
            max_rows=facts.max_rows,
            kv_budget_bytes=facts.kv_budget_bytes,
            kv_bytes_per_token=facts.kv_bytes_per_token,
            kv_bytes_per_sequence=facts.kv_bytes_per_sequence,
            kv_quantum_tokens=QUANTUM_TOKENS,
            max_chunk_tokens=facts.max_chunk_tokens,
            itl_target_ms=options.itl_target_ms,
        )
        self._sequences: dict[int, Sequence] = {}
        self._members: tuple[int, ...] = ()
        self._step = 0
        self._last_done = 0.0
        self._host_s = 0.0
        """How long planning and launching a step takes, smoothed."""
        self._stats_at = 0.0
        self._stopping = False
        self._stalled = False

    def run_plain(self) -> None:
        """Until ``Shutdown``. Raises ServerGone, and whatever the device raises."""
        while not self._stopping:
            self._receive(None)
            running = self._launch()
            if running:
                self._complete(running)
            self._release()
            self._report()

    def run_overlapped(self) -> None:
        """The same steps, the next one launched before the last one is read."""
        running: _Running | None = None
        while not self._stopping:
            self._receive(running)
            following = self._launch()
            if running:
                self._complete(running)
            running = following
            self._release()
            self._report(idle=running is None and not self._sequences)

    # --- messages -------------------------------------------------------------------------------------

    def _receive(self, running: _Running | None) -> None:
        """Take messages: until work is there, or while the running step needs no successor yet."""
        if running is None:
            idle = not self._sequences
            self._handle_all(None if idle else _STALLED_S if self._stalled else 0.0)
            if idle:
                self._gather()
            return
        started = max(running.launched_at, self._last_done)
        launch_at = started + _LAUNCH_SHARE * running.predicted_s - 2 * self._host_s
        while True:
            remaining = launch_at - self._clock()
            self._handle_all(max(remaining, 0.0))
            if remaining <= 0 or self._stopping:
                return

    def _gather(self) -> None:
        """Wait for what comes together with the first request, until nothing came for a moment or the rows are full."""
        work_ms = self._scheduler.predict_ms(0, 0, [(0, len(sequence.tokens)) for sequence in self._sequences.values()])
        timeout_s = min(_GATHER_S, _GATHER_SHARE * work_ms / 1e3)
        seen = 0
        while seen < len(self._sequences) < self._backend.facts.max_rows:
            seen = len(self._sequences)
            self._handle_all(timeout_s)

    def _handle_all(self, timeout_s: float | None) -> None:
        for message in self._link.receive(timeout_s):
            self._handle(message)
        self._release()

    def _handle(self, message: Message) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Cancel(seq=seq):
                if seq in self._sequences:
                    self._sequences[seq].ended = True
                    self._scheduler.cancel(seq)
            case Canary():
                self._backend.canary()
                self._send_stats()
            case Shutdown():
                self._stopping = True
            case _:
                raise ValueError(f"the server sent {type(message).__name__}, which an engine only sends")

    def _submit(self, message: Submit) -> None:
        facts = self._backend.facts
        prompt = unpack_tokens(message.prompt)
        try:
            if not prompt or max(prompt) >= facts.vocab_size:
                raise ValueError(f"the prompt must hold token ids from 0 to {facts.vocab_size - 1}, at least one")
            room = facts.context_length - len(prompt)
            if room < 1:
                raise NeverFits(
                    f"the prompt's {len(prompt)} tokens leave no room in a context of {facts.context_length} tokens"
                )
            max_tokens = self._scheduler.submit(
                message.seq,
                len(prompt),
                min(message.max_tokens, room),
                client=message.client,
                priority=message.priority,
                deadline=_INFINITY if message.deadline_s is None else self._clock() + message.deadline_s,
            )
        except ValueError as error:
            code = "never_fits" if isinstance(error, NeverFits) else "invalid_token"
            self._link.send(Failed(message.seq, code, str(error)))
            self._link.send(Freed(message.seq, 0))
            return
        self._sequences[message.seq] = Sequence(
            message.seq, prompt, len(prompt), max_tokens, message.sampling, message.ignore_eos
        )

    # --- steps ----------------------------------------------------------------------------------------

    def _launch(self) -> _Running | None:
        now = self._clock()
        plan = self._scheduler.plan(now)
        for seq in plan.expired:
            self._sequences[seq].ended = True
            self._link.send(Failed(seq, "timeout", "the deadline passed"))
        for seq in plan.preempted:
            self._backend.free(self._sequences[seq])
        self._stalled = plan.step == 0
        if self._stalled:
            return None
        decode = [self._sequences[seq] for seq in plan.decode]
        chunks = [Chunk(self._sequences[p.seq], p.start, p.tokens, p.last) for p in plan.prefills]
        joining = [chunk.sequence for chunk in chunks if chunk.start == 0]
        for sequence in joining:
            self._backend.start(sequence)
        started = tuple(Started(sequence.seq, 0) for sequence in joining)
        members = (*plan.decode, *(p.seq for p in plan.prefills))
        if members != self._members:
            self._members = members
            self._link.send(Running(members))
        predicted_ms = self._scheduler.predict_ms(
            len(decode),
            sum(len(sequence.tokens) for sequence in decode),
            [(chunk.start, chunk.tokens) for chunk in chunks],
        )
        # Before the launch: where the device does not run apart from Python, the launch lasts as long as its step.
        launched_at = self._clock()
        launch = self._backend.launch(decode, chunks)
        self._host_s = 0.8 * self._host_s + 0.2 * (self._clock() - now)
        return _Running(plan.step, launch, chunks, started, launched_at, predicted_ms / 1e3)

    def _complete(self, running: _Running) -> None:
        draws = running.launch.wait()
        now = self._clock()
        elapsed_ms = (now - max(running.launched_at, self._last_done)) * 1e3
        self._last_done = now
        self._step = running.step
        rows: list[Tokens] = []
        finished: list[int] = []
        for draw in draws:
            sequence = draw.sequence
            if sequence.ended:
                continue
            if draw.bad:
                sequence.ended = True
                finished.append(sequence.seq)
                self._link.send(
                    Failed(sequence.seq, "non_finite", "the model gave logits that are not finite for this request")
                )
                continue
            sequence.tokens.append(draw.token)
            finish = None
            if draw.token in self._eos and not sequence.ignore_eos:
                finish = "stop"
                finished.append(sequence.seq)
            elif sequence.generated_tokens >= sequence.max_tokens:
                finish = "length"
            sequence.ended = finish is not None
            logprobs = (draw.logprobs,) if draw.logprobs else ()
            rows.append(Tokens(sequence.seq, (draw.token,), finish, logprobs))
        for chunk in running.chunks:
            chunk.sequence.computed_tokens += chunk.tokens
        prefills = tuple((chunk.sequence.seq, chunk.start + chunk.tokens) for chunk in running.chunks)
        self._scheduler.commit(running.step, elapsed_ms, finished)
        self._link.send(Step(running.step, elapsed_ms, tuple(rows), running.started, prefills))

    def _release(self) -> None:
        """Free what has ended and is in no step that still runs."""
        for seq in self._scheduler.releasable():
            sequence = self._sequences.pop(seq)
            self._backend.free(sequence)
            kv_bytes = self._scheduler.release(seq)
            self._link.send(Freed(seq, kv_bytes, sequence.computed_tokens, sequence.generated_tokens))

    # --- figures --------------------------------------------------------------------------------------

    def _report(self, idle: bool | None = None) -> None:
        """Stats once an interval while steps run, and once more when the last sequence is gone."""
        now = self._clock()
        if idle is None:
            idle = not self._sequences
        if idle:
            self._check_accounts()
        if idle or now >= self._stats_at:
            self._stats_at = now + self._stats_interval_s
            self._send_stats()

    def _check_accounts(self) -> None:
        """With no sequence left, no row and no byte may be held: a leak ends here, not in weeks."""
        rows, held = self._backend.memory().rows, self._scheduler.statistics().kv_used_bytes
        if rows or held:
            raise RuntimeError(f"a bug: no sequence is left, but {rows} rows and {held} bytes of KV are still held")

    def _send_stats(self) -> None:
        account, memory = self._scheduler.statistics(), self._backend.memory()
        self._link.send(
            Stats(
                step=self._step,
                queued=account.queued,
                prefilling=account.prefilling,
                decoding=account.decoding,
                ending=account.ending,
                kv_used_bytes=account.kv_used_bytes,
                kv_budget_bytes=account.kv_budget_bytes,
                arena_bytes=memory.arena_bytes,
                preemptions=account.preemptions,
                mlx_active_bytes=memory.active_bytes,
                mlx_peak_bytes=memory.peak_bytes,
                mlx_cache_bytes=memory.cache_bytes,
                rss_bytes=resident_bytes(),
                live_arrays=memory.live_arrays,
            )
        )
