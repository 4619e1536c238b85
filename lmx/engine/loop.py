"""The step loop: messages in, one plan, one launch, its outcome out; again (DESIGN §1, §3).

It joins the scheduler (which decides) to a back end (which computes) and speaks the protocol; it knows no HTTP and no
text. ``run_plain`` is the loop as one would explain it. ``run_overlapped`` is the same with one step of lookahead: the
next step is made, and where starting it does not block also started, while the last one still runs, so that the device
never waits for Python. To keep a cancellation within one step, that happens as late as the running step's predicted end
allows: what is cancelled before is not in it. A step that verifies drafts has no successor beside it: which tokens come
next is known when it is read. Change nothing here without ``python -m tests.sim`` before and after.

One thread; every exception ends the process, and the server's supervisor takes it from there. So no request may cause
one: what could is refused by ``_submit``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lmx._sched import Join, NeverFits, Scheduler
from lmx.engine.backend import BLOCKS_ALL_SHARE, BLOCKS_SHARE, Backend, Chunk, Draw, Launch, Scores, Sequence
from lmx.engine.budget import QUANTUM_TOKENS
from lmx.engine.grammar import Constraint, Grammars
from lmx.engine.link import Link
from lmx.engine.prefix.store import NOTHING, Fetching, PrefixStore, Source
from lmx.engine.requests import Refused, check_answer, check_sampling, read_answer, read_prompt
from lmx.engine.speculation import Drafting, Speculation
from lmx.footprint import open_files, resident_bytes, threads
from lmx.protocol import (
    Canary,
    Cancel,
    Failed,
    Freed,
    Load,
    Message,
    PrefixStats,
    PromptLogprobs,
    Running,
    Shutdown,
    Started,
    Stats,
    Step,
    Submit,
    Tokens,
    Trim,
)

_INFINITY = float("inf")
# Sequences wait and none can run: look again this much later, if no message comes before.
_STALLED_S = 0.02
# Prompts that wait at the same moment start in one step, but requests made at the same moment arrive one after the
# other: from a client that costs little eight within 5 ms, from asyncio clients 5 to 10 ms apart. An idle engine that
# gets work waits until nothing came for so long, in all no longer than those of eight clients need, and at most this
# share of what the work will take that it has.
_GATHER_S = 0.015
_GATHER_MOST_S = 0.08
_GATHER_SHARE = 0.1
# How far into a step, by its prediction, the next one is launched, at most: a step slept through is a step in which the
# device idles, tokens are late, and nothing is measured. So the hold stays this far from the earliest end lately seen,
# and comes back in small steps after a prediction was wrong.
_HOLD_MARGIN = 0.25
_HOLD_STEP = 0.05
_NO_HOLD = -2 * _HOLD_STEP  # and none before the third good prediction in a row
# A prediction this many times off is about to change (``_cost.pxd`` says the same of a surprise): no hold by it.
_HOLD_SURPRISE = 2.0
# Grammars are being compiled, or files read: their requests' deadlines are looked at this often.
_WAITING_S = 0.05
# What was read from the disk is put into memory for so long at a time, and steps go on between.
_ARRIVING_S = 0.01
# A step was still running when it was asked for, if reading it took longer than this.
_BLOCKED_S = 0.001


@dataclass(slots=True)
class _Running:
    """A step that is launched, or about to be."""

    step: int
    launch: Launch
    chunks: list[Chunk]
    started: tuple[Started, ...]
    predicted_s: float
    decode: list[Sequence]
    """Those that get their next token in it."""
    started_at: float = 0.0
    returned_at: float = 0.0
    """``Launch.start`` was called, and came back."""
    held: bool = False
    """The loop slept while it ran."""
    depth: int = 0
    """Most drafts that were planned for one of them."""
    drafted: dict[int, int] = field(default_factory=dict)
    """Drafts of those that have some."""
    drafting_s: float = 0.0
    """Until its start: what the device waited for, where other steps hide that."""


@dataclass(slots=True)
class _Waiting:
    """A request that the scheduler does not know yet: its grammar is being compiled, then what the disk has of its
    first tokens is read."""

    submit: Submit
    prompt: list[int]
    answer: list[int]
    """What it has of that already."""
    since: float
    deadline: float
    sequence: Sequence | None = None
    """Once its grammar is there."""
    fetching: Fetching | None = None


class StepLoop:
    def __init__(
        self,
        link: Link,
        backend: Backend,
        options: Load,
        clock: Callable[[], float] = time.monotonic,
        grammars: Grammars | None = None,
        prefixes: PrefixStore | None = None,
        drafts: Drafting | None = None,
    ) -> None:
        """``grammars``: other than those of the model's own words; ``prefixes``: None where nothing is kept;
        ``drafts``: None where none are verified."""
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
            max_chunk_area=facts.max_chunk_area,
            itl_target_ms=options.itl_target_ms,
            max_depth=facts.max_depth if drafts else 0,
        )
        self._speculation = Speculation(facts, self._scheduler, drafts) if drafts and facts.max_depth else None
        self._sequences: dict[int, Sequence] = {}
        self._grammars = grammars or Grammars(options.words, facts.vocab_size, facts.eos_ids, wake=link.wake)
        self._compile_s = options.grammar_compile_s
        self._waiting: dict[int, _Waiting] = {}
        self._prefixes = prefixes
        self._rows: dict[int, Sequence] = {}
        """Those that have a row."""
        self._sources: dict[int, Source] = {}
        """Of sequences that may join in the next plan: where their first tokens are."""
        self._members: tuple[int, ...] = ()
        self._step = 0
        self._last_done = 0.0
        """When the device finished the last step whose end was seen."""
        self._holds = [_NO_HOLD, _NO_HOLD]
        """How much of the predicted time of a step, without and with chunks, the next launch is held back."""
        self._host_s = 0.0
        """How long it takes to plan and make a step; smoothed."""
        self._stats_at = 0.0
        self._stopping = False
        self.save_s = Shutdown().save_s
        """How long saving prefixes may take at the end."""
        self._stalled = False
        self._blocks = facts.launch_share > BLOCKS_SHARE
        self._forced = options.lookahead == "on"
        self._plain = not self._forced and (options.lookahead == "off" or facts.launch_share > BLOCKS_ALL_SHARE)

    def run(self) -> None:
        """Until ``Shutdown``. Raises ServerGone, and whatever the device raises."""
        (self.run_plain if self._plain else self.run_overlapped)()

    def run_plain(self) -> None:
        """One step after the other."""
        while not self._stopping:
            self._receive(None)
            running = self._prepare()
            if running:
                self._start(running)
                running.launch.draw()
                self._complete(running)
                self._publish(running)
            self._release()
            self._report()

    def run_overlapped(self) -> None:
        """The same steps, the next one made, and where that does not block started, before the last one is read.

        Only beside a step in which rows get their next token. One that only prefills is read first: its successor would
        come a few milliseconds of Python sooner, after hundreds, and what is cancelled or comes meanwhile would be too
        late for it. Nor beside one that verifies drafts, nor where its successor most likely would.
        """
        start_first = self._forced or not self._blocks
        running: _Running | None = None
        while not self._stopping:
            if running and self._to_read_first(running):
                self._complete(running)
                self._publish(running)
                self._release()
                running = None
            self._receive(running)
            following = self._prepare(beside=running)
            if following and start_first:
                self._start(following)
            if running:
                self._complete(running, beside=following)
            if following and start_first:
                following.launch.draw()
            self._release()
            if following and not start_first:
                self._start(following)
                following.launch.draw()
            if running:
                self._publish(running)  # not before: a copy waits behind what the device was given, and would be timed
            running = following
            self._report(idle=running is None and not self._sequences)

    def _to_read_first(self, running: _Running) -> bool:
        """Before its successor is planned."""
        if not running.decode or running.depth:
            return True
        return self._speculation is not None and self._speculation.expected(running.decode)

    # --- messages -------------------------------------------------------------------------------------

    def _receive(self, running: _Running | None) -> None:
        """Take messages: until work is there, or while the running step needs no successor yet."""
        if running is None:
            idle = not self._sequences
            wait_s = _WAITING_S if self._waiting else None
            if self._prefixes and self._prefixes.unsaved:
                wait_s = 0.0
            self._handle_all(wait_s if idle else _STALLED_S if self._stalled else 0.0)
            if idle:
                self._gather()
            return
        started = max(running.started_at, self._last_done)
        hold = max(self._holds[bool(running.chunks)], 0.0)
        launch_at = started + hold * running.predicted_s - 2 * self._host_s
        while True:
            remaining = launch_at - self._clock()
            running.held |= remaining > 0
            self._handle_all(max(remaining, 0.0))
            if remaining <= 0 or self._stopping:
                return

    def _gather(self) -> None:
        """Wait a moment for what comes together with the first request, or until the rows are full."""
        since = latest = self._clock()
        while 0 < len(self._sequences) < self._backend.facts.max_rows:
            prompts = [(0, len(sequence.tokens)) for sequence in self._sequences.values()]
            work_s = self._scheduler.predict_ms(0, 0, prompts) / 1e3
            until = min(latest + _GATHER_S, since + min(_GATHER_MOST_S, _GATHER_SHARE * work_s))
            remaining = until - self._clock()
            if remaining <= 0:
                return
            self._handle_all(remaining)
            if len(self._sequences) > len(prompts):
                latest = self._clock()

    def _handle_all(self, timeout_s: float | None) -> None:
        for message in self._link.receive(timeout_s):
            self._handle(message)
        for waiting in list(self._waiting.values()):
            self._advance(waiting)
        self._release()

    def _handle(self, message: Message) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Cancel(seq=seq):
                if seq in self._sequences:
                    self._sequences[seq].ended = True
                    self._scheduler.cancel(seq)
                elif waiting := self._waiting.get(seq):
                    self._give_up(waiting)
                    self._link.send(Freed(seq, 0))
            case Canary():
                self._backend.canary()
                self._send_stats()
            case Trim(kv_budget_bytes=budget_bytes):
                self._trim(budget_bytes)
            case Shutdown(save_s=save_s):
                self._stopping, self.save_s = True, save_s
            case _:
                raise ValueError(f"the server sent {type(message).__name__}, which an engine only sends")

    def _trim(self, budget_bytes: int) -> None:
        if self._prefixes:
            self._prefixes.limit(budget_bytes, self._scheduler.statistics().kv_used_bytes)
        self._backend.limit_kv(budget_bytes)  # last, since it gives back what was dropped
        for seq in self._scheduler.resize(self._backend.facts.kv_budget_bytes):
            sequence = self._sequences[seq]
            sequence.ended = True
            self._scheduler.cancel(seq)
            text = (
                f"a prompt of {sequence.prompt_tokens} tokens does not fit the {budget_bytes} bytes of KV that this "
                "model was left with, since another one needed memory: shorten the prompt, or unload a model"
            )
            self._link.send(Failed(seq, "never_fits", text))
        self._send_stats()

    def _submit(self, message: Submit) -> None:
        """Queue a request, or fail it alone: nothing in it may raise later, in a step that is everybody's."""
        if message.seq in self._sequences or message.seq in self._waiting:
            raise ValueError(f"the server sent sequence {message.seq} again, which is not freed yet")
        facts, now = self._backend.facts, self._clock()
        try:
            prompt, answer = read_prompt(message, facts), read_answer(message, facts)
            check_sampling(message.sampling, facts)
            check_answer(message, facts)
        except Refused as error:
            self._refuse(message.seq, error)
            return
        deadline = _INFINITY if message.deadline_s is None else now + message.deadline_s
        waiting = self._waiting[message.seq] = _Waiting(message, prompt, answer, now, deadline)
        self._advance(waiting)

    def _advance(self, waiting: _Waiting) -> None:
        """On to the scheduler, if nothing is to be waited for any more."""
        now, submit = self._clock(), waiting.submit
        try:
            if waiting.sequence is None:
                constraint = self._grammars.compile(submit.grammar) if submit.grammar else None
                if submit.grammar and constraint is None and now - waiting.since > self._compile_s:
                    raise Refused("grammar_too_complex", f"it was not compiled within {self._compile_s:g} s")
                if constraint is not None or not submit.grammar:
                    self._ask_disk(waiting, constraint)
            fetching, arrived = waiting.fetching, True
            if fetching is not None and self._prefixes:
                arrived = self._prefixes.arrived(fetching, _ARRIVING_S)
                self._prefixes.make_room(self._scheduler.statistics().kv_used_bytes)
            if waiting.sequence is not None and arrived:
                del self._waiting[submit.seq]
                self._enter(waiting.sequence, waiting)
            elif now >= waiting.deadline:
                raise Refused("timeout", "the deadline passed")
        except Refused as error:
            self._give_up(waiting)
            self._refuse(submit.seq, error)

    def _give_up(self, waiting: _Waiting) -> None:
        self._waiting.pop(waiting.submit.seq, None)
        if self._prefixes and waiting.sequence is not None:
            self._prefixes.leave(waiting.sequence)
            if waiting.fetching is not None:
                self._prefixes.give_up(waiting.fetching)
                self._prefixes.make_room(self._scheduler.statistics().kv_used_bytes)

    def _ask_disk(self, waiting: _Waiting, constraint: Constraint | None) -> None:
        submit, prompt, answer = waiting.submit, waiting.prompt, waiting.answer
        for token in answer:
            if constraint is not None and not constraint.advance(token):
                raise constraint.refusal
        sequence = Sequence(
            submit.seq,
            prompt + answer,
            len(prompt),
            submit.max_tokens,
            submit.sampling,
            submit.ignore_eos,
            submit.request_id,
            submit.stop_ids,
            submit.min_tokens,
            constraint,
            submit.prompt_logprobs if not answer else -1,
            salt=submit.salt if self._prefixes else None,
            session=submit.session,
        )
        waiting.sequence = sequence
        if self._prefixes:
            self._prefixes.enter(sequence)
            waiting.fetching = self._prefixes.fetch(sequence)

    def _enter(self, sequence: Sequence, waiting: _Waiting) -> None:
        """Queue a request with the scheduler, or fail it alone."""
        submit, prompt_tokens, drawn = waiting.submit, len(waiting.prompt), len(waiting.answer)
        parent, shared = self._parent(sequence, submit.parent)
        try:
            sequence.max_tokens = drawn + self._scheduler.submit(
                submit.seq,
                prompt_tokens + drawn,
                min(submit.max_tokens, self._backend.facts.context_length - prompt_tokens) - drawn,
                client=submit.client,
                priority=submit.priority,
                deadline=waiting.deadline,
                cached_tokens=shared,
                parent=parent,
                stops=sequence.stops,
            )
        except ValueError as error:
            self._give_up(waiting)
            self._refuse(submit.seq, error)
            return
        self._sequences[submit.seq] = sequence
        if self._speculation:
            self._speculation.enter(sequence, submit)

    def _parent(self, sequence: Sequence, asked: int) -> tuple[int, int]:
        """Whose KV it takes over when that is computed, and how many tokens; (-1, 0): nobody's, or who has it now is
        found when it joins."""
        parent = self._sequences.get(asked)
        prompt = sequence.tokens
        if (
            parent is not None
            and self._backend.facts.forks
            and sequence.prompt_logprobs < 0  # they come from the prefill itself
            and parent.tokens[: len(prompt)] == prompt
        ):
            sequence.parent = asked
            return asked, len(prompt) - 1
        if self._prefixes is None:
            return -1, 0
        have = self._prefixes.find(sequence, self._rows.values()).tokens
        # What can be had at once is told before the plan that uses it: ``_join`` needs to know where it is.
        return self._prefixes.leader(sequence, self._sequences.values(), have)

    def _refuse(self, seq: int, error: ValueError) -> None:
        code = "never_fits" if isinstance(error, NeverFits) else "invalid_request"
        self._link.send(Failed(seq, error.code if isinstance(error, Refused) else code, str(error)))
        self._link.send(Freed(seq, 0))

    # --- steps ----------------------------------------------------------------------------------------

    def _prepare(self, *, beside: _Running | None = None) -> _Running | None:
        """``beside``: the step that is not read yet."""
        live = [sequence for sequence in self._rows.values() if not sequence.ended]
        if self._speculation and beside is None:
            self._speculation.catch_up(live)
        now = self._clock()
        if self._prefixes:
            free = self._backend.facts.max_rows - len(self._rows)
            # Where none is free, the first may be given another's.
            self._find_sources(self._prefixes, self._backend.facts.max_rows if free else 1)
        if self._speculation and beside is None:
            self._speculation.offer(live)
        plan = self._scheduler.plan(now)
        for seq in plan.expired:
            self._sequences[seq].ended = True
            self._link.send(Failed(seq, "timeout", "the deadline passed"))
        for seq in plan.preempted:
            self._leave_row(self._sequences[seq])
        self._stalled = plan.step == 0
        if self._stalled:
            return None
        decode = [self._sequences[seq] for seq in plan.decode]
        chunks = [Chunk(self._sequences[p.seq], p.start, p.tokens, p.last) for p in plan.prefills]
        started = self._join(chunks, plan.joins)
        members = (*plan.decode, *(p.seq for p in plan.prefills))
        if members != self._members:
            self._members = members
            self._link.send(Running(members))
        predicted_ms = self._scheduler.predict_ms(
            len(decode),
            sum(len(sequence.tokens) for sequence in decode),
            [(chunk.start, chunk.tokens) for chunk in chunks],
            plan.depth,
        )
        drafts, drafted, drafting_s = self._draft(decode, plan.drafts)
        launch = self._backend.launch(decode, chunks, drafts)
        made_s = self._clock() - now
        self._host_s += 0.2 * (made_s - drafting_s - self._host_s)
        if plan.depth and not self._plain:
            drafting_s = made_s
        return _Running(
            plan.step,
            launch,
            chunks,
            started,
            predicted_ms / 1e3,
            decode,
            depth=plan.depth,
            drafted=drafted,
            drafting_s=drafting_s,
        )

    def _draft(self, decode: list[Sequence], counts: tuple[int, ...]) -> tuple[list[list[int]], dict[int, int], float]:
        """The drafts of a step, how many each of those has that have some, and how long that took."""
        if self._speculation is None or not counts:
            return [], {}, 0.0
        since = self._clock()
        drafts = self._speculation.take(decode, counts)
        drafted = {sequence.seq: len(own) for sequence, own in zip(decode, drafts, strict=True) if own}
        return drafts, drafted, self._clock() - since

    def _find_sources(self, prefixes: PrefixStore, most: int) -> None:
        """Tell the scheduler what those who may join in the next plan, so many of them, need not compute."""
        self._sources.clear()
        claimed: set[int] = set()
        for seq in self._scheduler.upcoming(most):
            sequence = self._sequences[seq]
            family = self._rows.get(sequence.parent)
            if family is not None and len(sequence.tokens) == sequence.prompt_tokens <= family.kv_tokens + 1:
                source = Source(sequence.prompt_tokens - 1, row=sequence.parent)
            else:
                source = prefixes.find(sequence, self._rows.values(), claimed)
            told = self._scheduler.recache(seq, source.tokens, source.row)
            if not told and source.row >= 0:
                source = prefixes.find(sequence, (), claimed)
                told = self._scheduler.recache(seq, source.tokens)
            if told:
                self._sources[seq] = source
                claimed.add(source.parked)

    def _join(self, chunks: list[Chunk], joins: tuple[Join, ...]) -> tuple[Started, ...]:
        """Rows for those whose first chunk this is."""
        found = {join.seq: join for join in joins}
        joining = [chunk.sequence for chunk in chunks if chunk.start == 0 or chunk.sequence.seq in found]
        if joining and self._prefixes:
            self._prefixes.make_room(self._scheduler.statistics().kv_used_bytes, self._sources.values())

        def order(sequence: Sequence) -> int:
            """Who resumes a left row first: others may take it for their own."""
            return self._sources.get(sequence.seq, NOTHING).parked < 0

        for sequence in sorted(joining, key=order):
            join = found.get(sequence.seq)
            if join is None:
                self._backend.start(sequence)
                sequence.kv_tokens = 0
            elif join.parent >= 0 or self._prefixes is None:
                self._backend.fork(sequence, self._sequences[join.parent], join.cached_tokens)
                if self._prefixes:
                    self._prefixes.row_hit_tokens += join.cached_tokens
            else:
                self._prefixes.restore(sequence, self._sources[sequence.seq])
            if join:
                sequence.kv_tokens = join.cached_tokens
            if sequence.cached_tokens < 0:
                sequence.cached_tokens = sequence.kv_tokens
            self._rows[sequence.seq] = sequence
        sources = [self._sources.get(sequence.seq, NOTHING) for sequence in joining]
        return tuple(
            Started(sequence.seq, sequence.cached_tokens, source.broke_at, source.why)
            for sequence, source in zip(joining, sources, strict=True)
        )

    def _leave_row(self, sequence: Sequence) -> None:
        """Keep what it computed, and give its row back."""
        if self._rows.pop(sequence.seq, None) and self._prefixes:
            self._prefixes.publish(sequence, end=True)
        self._backend.free(sequence)
        sequence.kv_tokens = 0

    def _start(self, running: _Running) -> None:
        # Before the call: where the device does not run apart from Python, it lasts as long as the step.
        running.started_at = self._clock()
        running.launch.start()
        running.returned_at = self._clock()

    def _complete(self, running: _Running, *, beside: _Running | None = None) -> None:
        """Read a step and tell its outcome; ``beside``: its successor, made or started before."""
        asked_at = self._clock()
        draws = running.launch.wait()
        elapsed_s, learn = self._measure(running, asked_at, alone=beside is None and not running.held)
        elapsed_ms = elapsed_s * 1e3
        self._step = running.step
        rows: list[Tokens] = []
        finished: list[int] = []
        accepted: dict[int, int] = {}
        for draw in draws:
            sequence = draw.sequence
            if sequence.ended:
                continue
            if draw.bad:
                sequence.ended = True
                if self._prefixes:
                    self._prefixes.distrust(sequence)
                finished.append(sequence.seq)
                self._link.send(
                    Failed(sequence.seq, "non_finite", "the model gave logits that are not finite for this request")
                )
                continue
            got = self._take(draw, finished)
            if got:
                rows.append(self._look_back(sequence, got, running.drafted, accepted))
        for scores in running.launch.scores():
            self._tell_scores(scores)
        for chunk in running.chunks:
            chunk.sequence.computed_tokens += chunk.tokens
            chunk.sequence.kv_tokens = chunk.start + chunk.tokens
        prefills = tuple((chunk.sequence.seq, chunk.start + chunk.tokens) for chunk in running.chunks)
        self._scheduler.commit(running.step, elapsed_ms, finished, learn, accepted)
        self._link.send(Step(running.step, elapsed_ms, tuple(rows), running.started, prefills))

    def _take(self, draw: Draw, finished: list[int]) -> Tokens | None:
        """What a row drew, up to where its answer ends; None: it failed."""
        sequence, taken = draw.sequence, 0
        constraint, finish = sequence.constraint, None
        for token in draw.tokens:
            sequence.tokens.append(token)
            taken += 1
            if self._ends(sequence, token):
                finish = "stop"
                finished.append(sequence.seq)
            elif constraint and not constraint.advance(token):
                error = constraint.refusal
                self._grammars.forget(constraint.grammar)
                sequence.ended = True
                finished.append(sequence.seq)
                self._link.send(Failed(sequence.seq, error.code, str(error)))
                return None
            elif constraint and constraint.complete:
                finish = "complete"
                finished.append(sequence.seq)
            elif sequence.generated_tokens >= sequence.max_tokens:
                finish = "length"
            if finish:
                break
        sequence.kv_tokens = len(sequence.tokens) - 1
        sequence.ended = finish is not None
        return Tokens(sequence.seq, draw.tokens[:taken], finish, draw.logprobs[:taken])

    def _look_back(self, sequence: Sequence, got: Tokens, drafted: dict[int, int], accepted: dict[int, int]) -> Tokens:
        """What became of the row's drafts, or would have become of such as nobody verified."""
        if self._speculation is None:
            return got
        count = drafted.get(got.seq, 0)
        if not count:
            self._speculation.look_back(sequence)
            return got
        accepted[got.seq] = len(got.tokens) - 1
        source = self._speculation.told(sequence, count, accepted[got.seq])
        return replace(got, drafted=count, source=source)

    def _publish(self, running: _Running) -> None:
        """Keep what a step that was read has added to the rows that go on."""
        if self._prefixes:
            for sequence in (*running.decode, *(chunk.sequence for chunk in running.chunks)):
                if sequence.seq in self._rows:
                    self._prefixes.publish(sequence)
            self._prefixes.make_room(self._scheduler.statistics().kv_used_bytes)

    def _tell_scores(self, scores: Scores) -> None:
        """Each once: after a preemption the prompt is prefilled again."""
        sequence = scores.sequence
        known = max(sequence.scored_tokens + 1 - scores.start, 0)
        logprobs = scores.logprobs[known:]
        if logprobs and sequence.seq in self._sequences:
            sequence.scored_tokens += len(logprobs)
            self._link.send(PromptLogprobs(sequence.seq, logprobs))

    def _ends(self, sequence: Sequence, token: int) -> bool:
        """Whether the token ends the answer. Elsewhere than at its end a grammar may ask for such a token."""
        if sequence.constraint:
            return (token in self._eos or token in sequence.stop_ids) and sequence.constraint.accepting
        return token in sequence.stop_ids or (token in self._eos and not sequence.ignore_eos)

    def _measure(self, running: _Running, asked_at: float, *, alone: bool) -> tuple[float, bool]:
        """What a step that was just read took, from done to done, and whether that says what such a step costs.

        ``alone``: nothing but its start came between the last step and asking for it.
        """
        now = self._clock()
        begun = max(running.started_at, self._last_done)
        late = not alone and now - asked_at <= _BLOCKED_S
        """It had ended before it was asked for: while the next one was held back, or made, or started."""
        # Where starting blocks, it came back near the step's end; what came after was the successor.
        done = running.returned_at if late and self._forced and self._blocks else now
        elapsed_s = max(done - begun, 0.0) + running.drafting_s
        self._last_done = done
        if late:
            self._holds[bool(running.chunks)] = _NO_HOLD
        elif not alone:
            self._trust(running, elapsed_s)
        # Of a step that was slept through nothing is known but that it took no longer.
        return elapsed_s, not (late and running.held)

    def _trust(self, running: _Running, elapsed_s: float) -> None:
        """Hold the next launch for longer, if the prediction was good."""
        kind = bool(running.chunks)
        ratio = elapsed_s / max(running.predicted_s, 1e-6)
        good = 1 / _HOLD_SURPRISE < ratio < _HOLD_SURPRISE
        hold = min(self._holds[kind] + _HOLD_STEP, ratio - _HOLD_MARGIN, 1 - _HOLD_MARGIN)
        self._holds[kind] = hold if good else _NO_HOLD

    def _release(self) -> None:
        """Free what has ended and is in no step that still runs."""
        releasable = self._scheduler.releasable()
        for seq in releasable:
            self._stalled = False
            sequence = self._sequences.pop(seq)
            self._leave_row(sequence)
            if self._speculation:
                self._speculation.leave(sequence)
            if self._prefixes:
                self._prefixes.leave(sequence)
            kv_bytes = self._scheduler.release(seq)
            self._link.send(Freed(seq, kv_bytes, sequence.computed_tokens, sequence.generated_tokens))
        if releasable and self._prefixes:  # what they left may be more than fits; perhaps no step comes for long
            self._prefixes.make_room(self._scheduler.statistics().kv_used_bytes)

    # --- figures --------------------------------------------------------------------------------------

    def _report(self, idle: bool | None = None) -> None:
        """Stats once an interval while steps run, and once more when the last sequence is gone."""
        now = self._clock()
        if idle is None:
            idle = not self._sequences
        if self._prefixes:
            self._prefixes.save()
        idle = idle and not (self._prefixes and self._prefixes.unsaved)  # then again in a moment
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
                queued=account.queued + len(self._waiting),
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
                traces=memory.traces,
                handles=memory.handles,
                most_handles=memory.most_handles,
                open_files=open_files(),
                threads=threads(),
                prefix=self._prefixes.statistics() if self._prefixes else PrefixStats(),
            )
        )
