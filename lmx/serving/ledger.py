"""The account of one model's leases against its engine: who waits, who is submitted, what came for whom, what is free
again.

It turns protocol messages into changes of leases and decides which waiting lease is submitted when, the retry after a
crash included (DESIGN §1). It does no I/O and never awaits: ``lmx.serving.engine`` gives it the messages and a way to
send.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import trio

from lmx import protocol
from lmx.config import EngineSettings
from lmx.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDied,
    GrammarTooComplex,
    InvalidRequest,
    LmxError,
    ModelOverloaded,
    QueueFull,
    RequestCrashesEngine,
    SequenceFailed,
    input_too_long,
)
from lmx.serving.failures import Failure
from lmx.serving.lease import AnyRequest, EmbedRequest, Lease
from lmx.serving.meter import Meter
from lmx.serving.suspects import Suspects

RETRY_AFTER_MAX_S = 60.0
PROBE_PATIENCE_S = 5.0
"""How long a suspect may wait for an idle engine, and everybody behind it; then it runs beside what runs."""
PROBE_S = 30.0
"""How long a suspect may decode alone; a prefill may take its time."""

Send = Callable[[protocol.Message], None]

logger = logging.getLogger("lmx.engine")


class Ledger:
    """Every live lease is in ``leases``, and in exactly one of: probes, parked, submitted, or over and not yet given
    back.

    ``on_success`` is called when a request got its first token: the engine is of use.
    """

    def __init__(
        self, name: str, settings: Callable[[], EngineSettings], meter: Meter, on_success: Callable[[], None]
    ) -> None:
        self.leases: dict[int, Lease] = {}
        self.submitted: dict[int, Lease] = {}
        """The engine knows them and has not freed them."""
        self.waiting = 0
        """Leases without a first token."""
        self.stats: protocol.Stats | None = None
        self.kv_sequence_bytes = 0
        self.working = trio.Event()
        """Set while the engine owes something; replaced when it owes nothing."""
        self.rested = trio.Event()
        """The other way round."""
        self.idle_since = 0.0
        """When the last lease was given back; infinity: there are some."""
        self.progress_at = 0.0
        """When the step counter moved last, or the engine began to owe something."""
        self.longest_step_s = 0.0
        self._name = name
        self._settings = settings
        self._meter = meter
        self._on_success = on_success
        self._numbers = count(1)
        self._parked: dict[int, Lease] = {}
        self._probes: dict[int, Lease] = {}
        """An engine died over them: each goes once more, alone, before the parked ones."""
        self._probe: Lease | None = None
        """The one that runs alone now."""
        self._probe_until = 0.0
        self._suspects = Suspects()
        self._attached_at = 0.0
        self.blamed = False
        """The last death was proven to be a request's doing."""
        self._in_forward: frozenset[int] = frozenset()
        self._canary_due = False
        self._held = False
        """The engine is about to be replaced."""
        self._send: Send | None = None
        self._context_length = 0

    # --- leases ----------------------------------------------------------------------------------

    def take(self, request: AnyRequest) -> Lease:
        """A new lease, submitted as soon as there is an engine to take it. Raises QueueFull, or RequestCrashesEngine
        for what has ended engines before."""
        now = trio.current_time()
        if refusal := self._suspects.refusal(request, now):
            raise RequestCrashesEngine(refusal)
        if self.waiting >= self._settings().max_queue:
            raise QueueFull(
                f"{self.waiting} requests wait for the model {self._name!r} already ([engine] max_queue is "
                f"{self._settings().max_queue}). Try again later.",
                retry_after_s=self._retry_after_s(now),
            )
        lease = Lease(next(self._numbers), request, now)
        lease.alone_tokens = self._suspects.tokens_alone(request, now)
        self.leases[lease.seq] = lease
        (self._probes if lease.alone_tokens else self._parked)[lease.seq] = lease
        self.waiting += 1
        self.idle_since = math.inf
        self._pump()
        return lease

    def _retry_after_s(self, now: float) -> float:
        """A place comes free whenever a request gets its first token."""
        starts_per_s = self._meter.starts.per_second(now, 60)
        return min(RETRY_AFTER_MAX_S, max(1.0, 1 / starts_per_s)) if starts_per_s else 1.0

    def close(self, lease: Lease) -> bool:
        """The reader leaves. True if that, and not the engine, ends the sequence: the engine is told to cancel it."""
        cancels = lease.cancel_reason is not None or not lease.over
        lease.closed = True
        self._parked.pop(lease.seq, None)
        self._probes.pop(lease.seq, None)
        if lease.submitted and cancels:
            self._cancel(lease)
        return cancels

    def give_back(self, lease: Lease) -> None:
        """The lease's sequence is free: the end of the account."""
        del self.leases[lease.seq]
        if not self.leases:
            self.idle_since = trio.current_time()
        if lease.first_token_at is None:
            self.waiting -= 1
        self._pump()

    def _cancel(self, lease: Lease) -> None:
        if self._send is not None:
            self._send(protocol.Cancel(lease.seq))

    # --- the engine comes and goes -----------------------------------------------------------------

    def attach(self, send: Send, ready: protocol.Ready) -> None:
        """An engine is ready: what waits is submitted. A first canary brings the figures of the engine at rest."""
        self._send = send
        self._attached_at = trio.current_time()
        self._context_length = ready.context_length
        self.longest_step_s = 0.0
        self._send_canary(send)
        self._pump()

    def hold(self) -> None:
        """The engine is about to be replaced: it gets nobody any more, and what has not begun comes back."""
        self._held = True
        self._withdraw(lease for lease in self.submitted.values() if not lease.forwarded)

    def withdraw_all(self) -> None:
        """What still runs comes back as well, as soon as the engine has freed it, with the tokens that it has."""
        self._withdraw(self.submitted.values())

    def _withdraw(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            if not (lease.over or lease.withdrawn):
                lease.withdrawn = True
                self._cancel(lease)

    def hand_over(self) -> None:
        """The engine is gone because a fresh one takes its place: nobody is suspected, and everybody goes on there."""
        for lease in self.submitted.values():  # it did not free them in time
            self._come_back(lease)
        self._detached()

    def _come_back(self, lease: Lease) -> None:
        """The engine does not hold it any more: it waits for the next one, unless it is over."""
        lease.submitted = False
        if lease.over:
            lease.freed.set()
            return
        lease.withdrawn = lease.forwarded = False
        if not lease.answer:
            self._begin_again(lease)
        (self._probes if lease.drawn_tokens < lease.alone_tokens else self._parked)[lease.seq] = lease

    def detach(self, failure: Failure) -> None:
        """The engine is gone, and with it every sequence. Those with an answer begun fail; the others wait for the next
        engine, and those who may have been the cause run alone there. ``blamed`` tells whether one was proven to be.
        What was taken back before goes on."""
        self._send = None
        running = self._running()
        guilty = None if failure.cause == "shutdown" else self._accuse(running, failure)
        self.blamed = guilty is not None
        if running and failure.cause != "shutdown":
            ids = ", ".join(lease.request.request_id for lease in running)
            logger.warning("%s: its engine died while it ran %s", self._name, ids)
        now = trio.current_time()
        for lease in self.submitted.values():
            lease.submitted = False
            refusal = self._suspects.refusal(lease.request, now)
            if failure.cause == "shutdown":
                lease.fail(ModelOverloaded(f"The model {self._name!r} was stopped: {failure}."))
            elif refusal:
                lease.fail(RequestCrashesEngine(refusal))
            elif lease.withdrawn or self._begin_again(lease):
                self._come_back(lease)
                continue
            else:
                text = f"The engine of {self._name!r} ended under this request: {failure}. It is restarted."
                lease.fail(EngineDied(text))
            lease.freed.set()
        self._detached()

    def _detached(self) -> None:
        """No engine knows anybody; who waits is sorted for the next one."""
        self._send, self._held = None, False
        self.submitted.clear()
        self._park([*self._probes.values(), *self._parked.values()])
        self.stats, self.kv_sequence_bytes = None, 0
        self._probe, self._in_forward, self._canary_due = None, frozenset(), False
        self._note_work()

    def _begin_again(self, lease: Lease) -> bool:
        begun = lease.first_token_at is not None
        can = lease.begin_again()
        self.waiting += can and begun
        return can

    def _running(self) -> list[Lease]:
        """Who may have been the cause of a death: the one that ran alone, else whose forward ran, else (the engine may
        have died over a message) everybody it knew."""
        if self._probe is not None and self._probing():
            return [self._probe]
        unfinished = [lease for lease in self.submitted.values() if lease.finish is None]
        return [lease for lease in unfinished if lease.seq in self._in_forward] or unfinished

    def _accuse(self, running: Sequence[Lease], failure: Failure) -> bytes | None:
        now, killed = trio.current_time(), failure.cause == "killed"
        requests = [(lease.request, lease.drawn_tokens) for lease in running]
        guilty = self._suspects.accuse(requests, now, killed=killed, probe=self._probing())
        if guilty is not None:
            why = (
                f"This request has ended the engine of {self._name!r} more than once, the last time as the only cause "
                f"there can be, and is refused; others are served. What happened: {failure}."
            )
            self._suspects.refuse(guilty, why, now, killed=killed)
            logger.error("%s: a request is refused from now on: it ended the engine twice (%s)", self._name, failure)
        return guilty

    def _park(self, waiting: Iterable[Lease]) -> None:
        """Sort those who wait for the next engine, in order of arrival, by what is known of them now."""
        now = trio.current_time()
        self._probes, self._parked = {}, {}
        for lease in sorted(waiting, key=lambda lease: lease.seq):
            if refusal := self._suspects.refusal(lease.request, now):
                lease.fail(RequestCrashesEngine(refusal))
                continue
            lease.alone_tokens = self._suspects.tokens_alone(lease.request, now)
            (self._probes if lease.alone_tokens else self._parked)[lease.seq] = lease

    def fail_all(self, error: LmxError) -> None:
        """Every request ends with ``error``; what ran is cancelled as its reader leaves."""
        for lease in self.leases.values():
            lease.fail(error, cancel_reason="shutdown")

    def fail_waiting(self, error: LmxError) -> None:
        """There will be no engine for those who wait."""
        for lease in (*self._probes.values(), *self._parked.values()):
            lease.fail(error)
        self._probes.clear()
        self._parked.clear()

    def _pump(self) -> None:
        """Submit what waits: probes one at a time, each alone until it is past its point; then everybody."""
        while self._send is not None and not self._held:
            if self._probing():
                return
            self._probe = None
            if self._probes and self.submitted and self._probes_hold_others():
                return  # alone means alone
            waiting = self._probes or self._parked
            if not waiting:
                return
            lease = waiting.pop(next(iter(waiting)))
            if self._submit(lease, self._send) and lease.alone_tokens:
                self._probe, self._probe_until = lease, trio.current_time() + PROBE_S

    def _probing(self) -> bool:
        """Whether a suspect runs that nobody may join yet."""
        probe = self._probe
        if probe is None or not probe.submitted or probe.drawn_tokens >= probe.alone_tokens:
            return False
        return trio.current_time() < self._probe_until or probe.drawn_tokens == 0

    def _probes_hold_others(self) -> bool:
        """Not for long: the answers that run may take minutes."""
        first = next(iter(self._probes.values()))
        return trio.current_time() - max(first.taken_at, self._attached_at) < PROBE_PATIENCE_S

    def _submit(self, lease: Lease, send: Send) -> bool:
        now = trio.current_time()
        if refusal := self._too_long(lease.request):
            lease.fail(refusal)
        elif lease.deadline <= now:
            lease.fail(DeadlineExceeded("The request's time was up before the model could take it."))
        elif lease.answer and len(lease.answer) >= self._most_tokens(lease.request):
            lease.finish = "length"  # this engine's context is shorter than that of the last one
            lease.wake.set()
        else:
            send(self._message(lease, None if lease.request.deadline_s is None else lease.deadline - now))
            if not lease.answer:
                lease.prompt_logprobs.clear()  # an engine that went may have told some
            lease.submitted = True
            self.submitted[lease.seq] = lease
            self._note_work()
        return lease.submitted

    def _too_long(self, request: AnyRequest) -> LmxError | None:
        if isinstance(request, EmbedRequest):
            index, tokens = max(enumerate(map(len, request.inputs)), key=lambda pair: pair[1])
            return input_too_long(index, tokens, self._context_length) if tokens > self._context_length else None
        if len(request.prompt) < self._context_length:
            return None
        return ContextLengthExceeded(
            f"This model's maximum context length is {self._context_length} tokens. However, your prompt "
            f"resulted in {len(request.prompt)} tokens. Please reduce its length."
        )

    def _message(self, lease: Lease, remaining_s: float | None) -> protocol.Submit | protocol.Embed:
        request = lease.request
        if isinstance(request, EmbedRequest):
            return protocol.Embed(
                lease.seq,
                b"".join(map(protocol.pack_tokens, request.inputs)),
                protocol.pack_tokens([len(tokens) for tokens in request.inputs]),
                request.client,
                request.priority,
                remaining_s,
                protocol.pack_tokens(request.seconds),
                request.request_id,
            )
        return protocol.Submit(
            lease.seq,
            protocol.pack_tokens(request.prompt),
            self._most_tokens(request),
            request.sampling,
            request.client,
            request.priority,
            remaining_s,
            request.ignore_eos,
            request.grammar,
            request.stop_ids,
            request.min_tokens,
            request.prompt_logprobs,
            request.request_id,
            request.parent,
            request.salt,
            request.session,
            request.speculation,
            protocol.pack_tokens(request.prediction),
            protocol.pack_tokens(lease.answer),
        )

    def _most_tokens(self, request: AnyRequest) -> int:
        """Of its answer."""
        assert not isinstance(request, EmbedRequest)
        return min(request.max_tokens, self._context_length - len(request.prompt))

    # --- messages ----------------------------------------------------------------------------------

    def handle(self, message: protocol.Message) -> None:
        """Any message of a running engine but Ready and a failed load."""
        match message:
            case protocol.Step():
                self._step(message)
            case protocol.Embedded():
                self._embedded(message)
            case protocol.PromptLogprobs(seq=seq, logprobs=logprobs):
                if seq in self.submitted:
                    self.submitted[seq].prompt_logprobs += logprobs
            case protocol.Running(seqs=seqs):
                self._in_forward = frozenset(seqs)
                for seq in seqs:
                    if seq in self.submitted:
                        self.submitted[seq].forwarded = True
            case protocol.Freed():
                self._freed(message)
            case protocol.Failed():
                self._failed(message)
            case protocol.Stats():
                self.stats = message
                self.kv_sequence_bytes = message.kv_used_bytes
                self._canary_due = False
                self._note_work()
            case _:
                raise ValueError(f"an engine does not send {type(message).__name__}")

    def _step(self, step: protocol.Step) -> None:
        now = trio.current_time()
        self.progress_at = now
        self.longest_step_s = max(self.longest_step_s, step.elapsed_ms / 1000)
        self._meter.step(step.elapsed_ms)
        for started in step.started:
            lease = self.submitted.get(started.seq)
            if lease is not None and not lease.answer:  # what goes on has told before
                lease.started = started
        for row in step.rows:
            lease = self.submitted.get(row.seq)
            if lease is None or not row.tokens:
                continue
            self._meter.tokens(lease, len(row.tokens), now)
            if row.drafted:
                self._meter.drafts(row)
            first = lease.first_token_at is None
            if first:
                lease.first_token_at = now
                self.waiting -= 1
                self._on_success()
            lease.last_token_at = now
            if lease.over:
                continue  # cancelled; the engine has not heard it yet
            lease.feed(row)
            if len(lease.tokens) > self._settings().max_unread_tokens and lease.finish is None:
                self._drop_slow_reader(lease)
            self._check_probe(lease)

    def _embedded(self, message: protocol.Embedded) -> None:
        lease, now = self.submitted.get(message.seq), trio.current_time()
        if lease is None:
            return
        if lease.first_token_at is None:
            self._meter.started(lease, now)
            lease.first_token_at = now
            self.waiting -= 1
            self._on_success()
        lease.last_token_at = now
        if not lease.over:
            lease.feed_vectors(message)
            self._check_probe(lease)

    def _check_probe(self, lease: Lease) -> None:
        if lease is self._probe and not self._probing():
            if lease.drawn_tokens >= lease.alone_tokens:
                self._suspects.clear(lease.request)
            self._pump()

    def _drop_slow_reader(self, lease: Lease) -> None:
        text = (
            f"{len(lease.tokens)} tokens were not read in time ([engine] max_unread_tokens); the request was cancelled."
        )
        lease.tokens.clear()
        lease.logprobs.clear()
        lease.fail(SequenceFailed(text), cancel_reason="slow_reader")
        self._cancel(lease)

    def _freed(self, message: protocol.Freed) -> None:
        self._meter.freed(message, trio.current_time())
        self.kv_sequence_bytes = max(0, self.kv_sequence_bytes - message.kv_bytes)
        lease = self.submitted.pop(message.seq, None)
        if lease is None:
            raise ValueError(f"the engine freed sequence {message.seq}, which it does not hold")
        lease.submitted = False
        if lease is self._probe and lease.finish is not None:
            self._suspects.clear(lease.request)
        if not lease.withdrawn:
            lease.fail(SequenceFailed("The engine gave this request up without a reason."))
        self._come_back(lease)
        self._note_work()
        self._pump()

    def _failed(self, message: protocol.Failed) -> None:
        lease = self.submitted.get(message.seq)
        if lease is None:
            raise ValueError(f"the engine failed sequence {message.seq}, which it does not hold")
        if message.code == "timeout":
            lease.fail(DeadlineExceeded("The request's time is up."))
        elif message.code == "never_fits":
            lease.fail(
                ContextLengthExceeded(f"This request can never fit into the model's KV memory: {message.message}.")
            )
        elif message.code == "invalid_token":
            param = "input" if isinstance(lease.request, EmbedRequest) else "prompt"
            lease.fail(InvalidRequest(message.message, param=param))
        elif message.code == "invalid_request":
            lease.fail(InvalidRequest(message.message))
        elif message.code in ("grammar_invalid", "grammar_too_complex"):
            kind = GrammarTooComplex if message.code == "grammar_too_complex" else InvalidRequest
            lease.fail(kind(f"The output cannot be constrained as asked: {message.message}."))
        else:
            logger.warning(
                "%s: request %s failed (%s): %s",
                self._name,
                lease.request.request_id,
                message.code,
                message.message,
            )
            lease.fail(SequenceFailed(f"The model could not answer this request ({message.code}): {message.message}."))
            if self._send is not None and not self._canary_due:
                self._send_canary(self._send)

    def _send_canary(self, send: Send) -> None:
        """Ask for a forward pass outside the batch; until it is answered the engine owes something."""
        self._canary_due = True
        send(protocol.Canary())
        self._note_work()

    def _note_work(self) -> None:
        owes = bool(self.submitted) or self._canary_due
        if owes and not self.working.is_set():
            self.progress_at = trio.current_time()
            self.working.set()
            self.rested = trio.Event()
        elif not owes:
            self.rested.set()
            if self.working.is_set():
                self.working = trio.Event()
