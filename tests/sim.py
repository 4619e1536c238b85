"""A simulated device, and clients, around the real step loop and the real scheduler. No real time passes.

What it is for: every change of the loop, of the scheduler's step sizes or of its cost model is judged here first, on
devices that nobody here has. The parts that run are lmx's own (``StepLoop``, ``Scheduler``); simulated are the clock,
the socket and the device. A run is a pure function of its parameters: the same figures each time, in milliseconds of
real time a simulated second.

    sim = Simulation(Device(launch_share=0.86), max_rows=4)     # or loop="plain", "overlapped"; default: "auto"
    streams = [sim.request(prompt=50, answer=500) for _ in range(4)]
    long = sim.request(at_s=2.0, prompt=30_000, answer=10)
    sim.cancel(at_s=2.5, request=streams[0])
    report = sim.run()
    report.worst_gap_ms(streams[1:]), report.ttft_ms(long), report.late_ms.worst, report.idle_share

``python -m tests.sim`` prints all ``SCENARIOS`` (at the end of this file) on all ``DEVICES``, with ``--all`` by the
loops that "auto" would not choose too; ``tests/test_loop_sim.py`` holds them to their targets.

The model of a device (``Device``): a queue that runs launched steps one after the other, apart from Python. Making a
step's graph costs the host ``build_ms``; then the launch blocks until the device is at ``launch_share`` of *this* step
(0: it returns at once; 0.86: MLX on Metal with ten command buffers in flight and a step of seventy; 1: a CPU, where a
launch lasts as long as its step), which includes finishing the steps before. ``Launch.wait`` returns when the step is
done; with masked rows it draws when it is told to. Costs are linear (``Costs``), but for a cliff in the number of
drafts that a step verifies, with jitter from a seeded generator; first steps may be cold. ``Simulation(drafts=...)``
has a source of drafts (``SimDrafts``) of which a given share is right, which may change with time.

The socket (``SimLink``) has ``poll``'s resolution of a millisecond, and reading or sending costs a little. A receive
moves the clock to the next message or by its timeout: nothing but a message wakes the loop, as in life.

The backend holds the loop to the protocol's small print: sequences have a place before they run and none after
``free``; chunks continue where the last one ended; at most two launches are unread, read in order, and none beside one
with drafts; every sequence gets each position once.
"""

import heapq
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lmx.engine.backend import Chunk, Draw, Facts, MemoryFacts, Scores, Sequence, verified
from lmx.engine.loop import StepLoop
from lmx.engine.requests import Refused
from lmx.protocol import Cancel, Failed, Freed, Load, Message, Sampling, Shutdown, Stats, Step, Submit, pack_tokens

EOS = 2
BAD = 3
"""A prompt with this token gives logits that are not finite."""
VOCAB_SIZE = 1000
_END_OF_TIME_S = 10_000.0
_SEND_MS = 0.02
_POLL_MS = 1.0

LoopKind = Literal["auto", "overlapped", "plain"]


# --- the device -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Costs:
    """Device milliseconds. The defaults are like a 30B-A3B in 4 bits on an M3 Ultra: 21 ms for 8 rows, 19 s for 30,000
    tokens."""

    decode_pass: float = 9.0
    row: float = 1.5
    row_context: float = 1e-4
    """Per decoding row and token of its context."""
    prefill_pass: float = 25.0
    token: float = 0.41
    token_context: float = 1.4e-5
    """Per token of a chunk and token before it."""
    draft: float = 0.3
    """Per decoding row and draft of the row that has most."""
    cliff_depth: int = 8
    """From so many drafts of a row on, decoding takes ``cliff`` times as long."""
    cliff: float = 3.0

    def decode_ms(self, contexts: Seq[int], depth: int = 0) -> float:
        if not contexts:
            return 0.0
        rows_ms = (self.row + self.draft * depth) * len(contexts) + self.row_context * sum(contexts)
        return (self.decode_pass + rows_ms) * (self.cliff if depth >= self.cliff_depth else 1.0)

    def prefill_ms(self, chunks: Iterable[tuple[int, int]]) -> float:
        """``chunks``: (start, tokens)."""
        chunks = list(chunks)
        work = sum(n * self.token + n * (start + n / 2) * self.token_context for start, n in chunks)
        return self.prefill_pass + work if chunks else 0.0


@dataclass(frozen=True, slots=True)
class Device:
    costs: Costs = Costs()
    launch_share: float = 0.0
    """Of a step, until which its launch blocks."""
    build_ms: float = 4.5
    """Host time to make a step's graph (measured: 48 MoE layers in Python)."""
    read_ms: float = 0.05
    """Host time to read a finished step's tokens."""
    mask_ms: float = 0.1
    """Host time to make the mask of a row with a grammar."""
    draw_ms: float = 0.5
    """Of a step's time on the device: what comes after its masks, if a row has one."""
    jitter: float = 0.05
    """Steps last 1 ± this much of their cost, evenly spread."""
    cold_steps: int = 0
    """So many first steps last ``cold_ms`` longer: weights are paged in, kernels compiled."""
    cold_ms: float = 3000.0
    speeds: tuple[tuple[float, float], ...] = ()
    """From so many seconds on, steps take so many times their cost."""
    seed: int = 0


@dataclass(slots=True)
class Ran:
    """A launched step, as the device saw it. Seconds."""

    asked_s: float
    """The launch was called."""
    decode: tuple[int, ...]
    chunks: tuple[tuple[int, int, int], ...]
    """(seq, start, tokens)"""
    depth: int = 0
    """Most drafts of one of ``decode``."""
    start_s: float = 0.0
    done_s: float = 0.0
    busy_s: float = 0.0
    """Of the device between these two."""
    told_s: float = math.nan
    """Its Step was sent."""

    @property
    def seqs(self) -> set[int]:
        return {*self.decode, *(seq for seq, _, _ in self.chunks)}


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def pass_ms(self, ms: float) -> None:
        self.reach(self.now_s + ms / 1e3)

    def reach(self, moment_s: float) -> None:
        self.now_s = max(self.now_s, moment_s)
        assert self.now_s < _END_OF_TIME_S, "the simulation does not end"


@dataclass(slots=True)
class _Row:
    length: int = 0
    """Positions with KV."""
    drawn: int = 0


class SimBackend:
    """A ``backend.Backend`` whose steps take virtual time."""

    def __init__(self, clock: Clock, device: Device, facts: Facts, answers: dict[int, int | None]) -> None:
        self.facts = facts
        self.ran: list[Ran] = []
        self._clock = clock
        self._device = device
        self._random = random.Random(device.seed)
        self._answers = answers
        self._rows: dict[int, _Row] = {}
        self._unread: list[SimLaunch] = []
        self._free_s = 0.0
        """When the device has finished what was launched."""

    def start(self, sequence: Sequence) -> None:
        assert sequence.seq not in self._rows, "it has a row already"
        assert len(self._rows) < self.facts.max_rows, "more rows than there are"
        self._rows[sequence.seq] = _Row()

    def fork(self, sequence: Sequence, parent: Sequence, tokens: int) -> None:
        self.start(sequence)
        assert 0 < tokens <= min(self._rows[parent.seq].length, parent.prompt_tokens), "the parent has no such KV"
        self._rows[sequence.seq].length = tokens

    def free(self, sequence: Sequence) -> None:
        self._rows.pop(sequence.seq, None)

    def launch(self, decode: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[Seq[int]] = ()) -> "SimLaunch":
        depth = max(map(len, drafts), default=0)
        assert depth <= self.facts.max_depth
        assert not any(launch.step.depth for launch in self._unread), "beside a step that verifies drafts"
        assert not (depth and self._unread), "drafts follow a token that is not read yet"
        assert len(self._unread) < 2, "a third launch before the first was read"
        assert decode or chunks
        step = Ran(
            self._clock(),
            tuple(sequence.seq for sequence in decode),
            tuple((chunk.sequence.seq, chunk.start, chunk.tokens) for chunk in chunks),
            depth,
        )
        assert len(step.seqs) == len(decode) + len(chunks), "a sequence is in a step twice"
        if decode:
            self._clock.pass_ms(self._device.build_ms)
        draws = self._take(decode, chunks, drafts or [()] * len(decode))
        contexts = [self._rows[sequence.seq].length for sequence in decode]
        masked = [
            (draw.sequence, self._rows[draw.sequence.seq].drawn - len(draw.tokens) + 1)
            for draw in draws
            if draw.sequence.masked
        ]
        return SimLaunch(self, step, draws, contexts, masked)

    def _take(self, decode: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[Seq[int]]) -> list[Draw]:
        draws: list[Draw] = []
        for sequence, its in zip(decode, drafts, strict=True):
            row = self._rows[sequence.seq]
            row.length += 1
            draws.append(self._draw(sequence, row, its))
        for chunk in chunks:
            row = self._rows[chunk.sequence.seq]
            assert row.length == chunk.start, (row.length, chunk)
            row.length += chunk.tokens
            if chunk.last:
                assert row.length == len(chunk.sequence.tokens)
                row.drawn = chunk.sequence.generated_tokens  # after a preemption some are known
                draws.append(self._draw(chunk.sequence, row))
        return draws

    def _draw(self, sequence: Sequence, row: _Row, drafts: Seq[int] = ()) -> Draw:
        row.drawn += 1
        assert row.length == sequence.prompt_tokens + row.drawn - 1, "a position is missing"
        drawn = [token_of(sequence.seq, row.drawn + i, self._answers) for i in range(1 + len(drafts))]
        right = verified(drafts, drawn)
        row.length += right
        row.drawn += right
        return Draw(sequence, tuple(drawn[: 1 + right]), BAD in sequence.tokens[: sequence.prompt_tokens])

    def begin(self, launch: "SimLaunch") -> None:
        """As MLX's back end does it: decoding is given to the device before the chunks' graph is made."""
        device, step = self._device, launch.step
        slowness = next((times for from_s, times in reversed(device.speeds) if self._clock() >= from_s), 1.0)
        slowness *= 1 + device.jitter * self._random.uniform(-1, 1)
        extra_ms = device.cold_ms * (len(self.ran) < device.cold_steps)
        step.start_s = max(self._clock(), self._free_s)
        if launch.contexts:
            later_ms = device.draw_ms if launch.masked else 0.0
            self._run(step, device.costs.decode_ms(launch.contexts, step.depth) * slowness + extra_ms - later_ms)
        if step.chunks:
            self._clock.pass_ms(device.build_ms)
            if not launch.contexts:
                step.start_s = max(self._clock(), self._free_s)
            cost_ms = device.costs.prefill_ms((start, tokens) for _, start, tokens in step.chunks)
            self._run(step, cost_ms * slowness + extra_ms * (not launch.contexts))
        step.done_s = self._free_s
        self.ran.append(step)
        self._unread.append(launch)

    def _run(self, step: Ran, cost_ms: float) -> None:
        start_s = max(self._clock(), self._free_s)
        self._free_s = start_s + cost_ms / 1e3
        step.busy_s += cost_ms / 1e3
        if self._device.launch_share:
            self._clock.reach(start_s + self._device.launch_share * cost_ms / 1e3)

    def draw(self, launch: "SimLaunch") -> None:
        for sequence, drawn in launch.masked:
            assert sequence.ended or sequence.generated_tokens == drawn - 1, "its mask needs the token before"
            self._clock.pass_ms(self._device.mask_ms * (not sequence.ended))
        if launch.masked:
            step, draw_s = launch.step, self._device.draw_ms / 1e3
            self._free_s = max(self._clock(), self._free_s) + draw_s
            step.busy_s += draw_s
            step.done_s = self._free_s
            if self._device.launch_share:  # few operations behind many
                self._clock.reach(step.done_s - (1 - self._device.launch_share) * step.busy_s)

    def read(self, launch: "SimLaunch") -> None:
        assert self._unread.pop(0) is launch, "steps are read in their order"
        self._clock.reach(launch.step.done_s)
        self._clock.pass_ms(self._device.read_ms)

    def rewind(self, sequence: Sequence, tokens: int) -> int:
        raise NotImplementedError

    def export_kv(self, sequence: Sequence) -> bytes:
        raise NotImplementedError

    def import_kv(self, sequence: Sequence, data: bytes) -> int:
        raise NotImplementedError

    def canary(self) -> None:
        self._clock.pass_ms(self._device.costs.decode_pass)

    def memory(self) -> MemoryFacts:
        return MemoryFacts(len(self._rows), 0, 0, 0, 0, 0)


def token_of(seq: int, drawn: int, answers: Mapping[int, int | None]) -> int:
    """What the model says as the so-many-th token of an answer."""
    return EOS if drawn == answers.get(seq) else 5 + (seq + drawn) % 900


class SimDrafts:
    """A source that knows the answers, and of whose drafts a share is right: ``right(now_s)``. It costs nothing."""

    def __init__(self, clock: Clock, answers: Mapping[int, int | None], right: Callable[[float], float]) -> None:
        self._clock = clock
        self._answers = answers
        self._right = right
        self._random = random.Random(1)
        self.drafted = self.accepted = 0

    def enter(self, sequence: Sequence, submit: Submit) -> None:
        """It knows all of them."""

    def leave(self, sequence: Sequence) -> None:
        """And keeps nothing of them."""

    def offer(self, sequence: Sequence) -> tuple[int, int]:
        return 15, 0

    def take(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        return [
            [self._draft(sequence, sequence.generated_tokens + 1 + i) for i in range(count)]
            for sequence, count in zip(sequences, counts, strict=True)
        ]

    def _draft(self, sequence: Sequence, drawn: int) -> int:
        right = self._random.random() < self._right(self._clock())
        return token_of(sequence.seq, drawn, self._answers) if right else 4

    def told(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted

    def source_of(self, sequence: Sequence) -> str:
        return "lookup"


class SimLaunch:
    def __init__(
        self, backend: SimBackend, step: Ran, draws: list[Draw], contexts: list[int], masked: list[tuple[Sequence, int]]
    ) -> None:
        self.step = step
        self.contexts = contexts
        """Lengths of the decoding rows."""
        self.masked = masked
        """Those that draw and have a grammar; which of its answer's tokens that is."""
        self._backend = backend
        self._draws = draws

    def start(self) -> None:
        self._backend.begin(self)

    def draw(self) -> None:
        self._backend.draw(self)
        self.masked = []

    def scores(self) -> list[Scores]:
        return []

    def wait(self) -> list[Draw]:
        self.draw()
        self._backend.read(self)
        return self._draws


# --- the socket and the clients ---------------------------------------------------------------------------------------


class SimLink:
    """A ``Link`` whose messages come at set times. The loop is told to shut down when nothing more can come."""

    def __init__(self, clock: Clock, on_sent: Callable[[Message], None]) -> None:
        self._clock = clock
        self._on_sent = on_sent
        self._coming: list[tuple[float, int, Message | None]] = []
        """None: it is only woken."""
        self._count = itertools.count()

    def post(self, at_s: float, message: Message) -> None:
        heapq.heappush(self._coming, (at_s, next(self._count), message))

    def receive(self, timeout_s: float | None) -> Iterator[Message]:
        now = self._clock()
        if not self._coming and timeout_s is None:
            yield Shutdown()
            return
        if not self._due():
            until = math.inf if timeout_s is None else now + math.ceil(timeout_s * 1e3 / _POLL_MS) * _POLL_MS / 1e3
            self._clock.reach(min(until, self._coming[0][0] if self._coming else until))
        while self._due():
            message = heapq.heappop(self._coming)[2]
            if message:
                yield message

    def wake(self) -> None:
        """What compiles here is due at a time that is known."""

    def _due(self) -> bool:
        return bool(self._coming) and self._coming[0][0] <= self._clock()

    def wake_at(self, moment_s: float) -> None:
        heapq.heappush(self._coming, (moment_s, next(self._count), None))

    def send(self, message: Message) -> None:
        self._clock.pass_ms(_SEND_MS)
        self._on_sent(message)


class SimConstraint:
    """Anything may follow, until so many tokens have come."""

    accepting = True

    def __init__(self, most: int) -> None:
        self.tokens: list[int] = []
        self._most = most

    def advance(self, token: int) -> bool:
        self.tokens.append(token)
        return True

    @property
    def complete(self) -> bool:
        return len(self.tokens) >= self._most


class SimGrammars:
    """A grammar is "compile_ms tokens": how long it takes to compile, and after how many tokens an answer is complete;
    or "compile_ms bad"."""

    def __init__(self, clock: Clock, link: SimLink) -> None:
        self._clock = clock
        self._link = link
        self._done_s: dict[str, float] = {}

    def compile(self, grammar: str) -> SimConstraint | None:
        compile_ms, most = grammar.split()
        if grammar not in self._done_s:
            self._done_s[grammar] = self._clock() + float(compile_ms) / 1e3
            self._link.wake_at(self._done_s[grammar])
        if self._clock() < self._done_s[grammar]:
            return None
        if most == "bad":
            raise Refused("grammar_invalid", "simulated")
        return SimConstraint(int(most))

    def forget(self, grammar: str) -> None:
        """No simulated matcher fails."""


@dataclass(slots=True)
class Request:
    """One client's request and what came back, with the times."""

    seq: int
    asked_s: float
    prompt: int
    answer: int
    cancelled_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    finish: str | None = None
    failed: Failed | None = None
    freed_s: float | None = None
    on_done: Callable[[float], None] | None = None
    """Called with the time when it is freed: a client's next request."""


# --- a run ------------------------------------------------------------------------------------------------------------


class Simulation:
    def __init__(
        self,
        device: Device = Device(),
        *,
        loop: LoopKind = "auto",
        max_rows: int = 8,
        max_chunk_tokens: int = 2048,
        itl_target_ms: float = 250.0,
        kv_tokens: int = 500_000,
        drafts: Callable[[float], float] | None = None,
    ) -> None:
        """``drafts``: how many of a source's are right, by the time in seconds; None: there is no source."""
        self.device = device
        self.clock = Clock()
        self.requests: dict[int, Request] = {}
        self.messages: list[tuple[float, Message]] = []
        self.link = SimLink(self.clock, self._sent)
        self._answers: dict[int, int | None] = {}
        facts = Facts(
            architecture="simulated",
            context_length=200_000,
            vocab_size=VOCAB_SIZE,
            eos_ids=(EOS,),
            kv_bytes_per_token=1,
            kv_bytes_per_sequence=0,
            kv_budget_bytes=kv_tokens,
            max_rows=max_rows,
            max_chunk_tokens=max_chunk_tokens,
            launch_share=device.launch_share,
            weights_bytes=0,
            device="simulated",
            dtype="none",
            path="arena",
            path_reason="",
            probes={},
            forks=True,
            max_depth=15 if drafts else 0,
        )
        self.backend = SimBackend(self.clock, device, facts, self._answers)
        lookahead = {"auto": "auto", "overlapped": "on", "plain": "off"}[loop]
        options = Load("", itl_target_ms=itl_target_ms, lookahead=lookahead, stats_interval_s=math.inf)
        grammars = SimGrammars(self.clock, self.link)
        self.drafts = SimDrafts(self.clock, self._answers, drafts) if drafts else None
        self.loop = StepLoop(
            self.link,
            self.backend,  # type: ignore[arg-type]
            options,
            self.clock,
            grammars,  # type: ignore[arg-type]
            drafts=self.drafts,
        )
        self._told = 0

    def request(
        self,
        *,
        prompt: int,
        answer: int,
        at_s: float = 0.0,
        stop_after: int | None = None,
        bad: bool = False,
        on_done: Callable[[float], None] | None = None,
        submit: Mapping[str, Any] | None = None,
    ) -> Request:
        """``stop_after``: the model says EOS as that token of the answer. ``submit``: fields of the
        message that shall be others."""
        seq = len(self.requests) + 1
        request = Request(seq, at_s, prompt, answer, on_done=on_done)
        self.requests[seq] = request
        self._answers[seq] = stop_after
        tokens = pack_tokens([BAD if bad else 5] * prompt)
        self.link.post(at_s, replace(Submit(seq, tokens, answer, Sampling(seq)), **(submit or {})))
        return request

    def cancel(self, request: Request, at_s: float) -> None:
        request.cancelled_s = at_s
        self.link.post(at_s, Cancel(request.seq))

    def client(self, requests: int, *, prompt: int, answer: int, at_s: float = 0.0) -> None:
        """One who asks again as soon as its last request is answered."""

        def again(now_s: float) -> None:
            self.client(requests - 1, prompt=prompt, answer=answer, at_s=now_s)

        if requests:
            self.request(prompt=prompt, answer=answer, at_s=at_s, on_done=again)

    def run(self) -> "Report":
        self.loop.run()
        unfinished = [request.seq for request in self.requests.values() if request.freed_s is None]
        assert not unfinished, f"never freed: {unfinished}"
        return Report(self)

    def _sent(self, message: Message) -> None:
        now_s = self.clock()
        if not isinstance(message, Stats):
            self.messages.append((now_s, message))
        match message:
            case Step():
                self.backend.ran[self._told].told_s = now_s
                self._told += 1
                for row in message.rows:
                    request = self.requests[row.seq]
                    assert request.finish is None
                    assert request.freed_s is None
                    request.token_s += [now_s] * len(row.tokens)
                    request.finish = row.finish
            case Failed(seq=seq):
                self.requests[seq].failed = message
            case Freed(seq=seq):
                request = self.requests[seq]
                assert request.freed_s is None, "freed twice"
                request.freed_s = now_s
                if request.on_done:
                    request.on_done(now_s)


class Spread:
    """Figures of many: ``mean``, ``p99``, ``worst``."""

    def __init__(self, values: Iterable[float]) -> None:
        self.values = sorted(values)

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values) if self.values else 0.0

    @property
    def p99(self) -> float:
        return self.values[math.ceil(0.99 * len(self.values)) - 1] if self.values else 0.0

    @property
    def worst(self) -> float:
        return self.values[-1] if self.values else 0.0


class Report:
    """What a run showed. Give ``since_s`` to leave out a beginning."""

    def __init__(self, sim: Simulation, since_s: float = 0.0) -> None:
        self.sim = sim
        self.since_s = since_s
        self.steps = [step for step in sim.backend.ran if step.start_s >= since_s]
        self.requests = list(sim.requests.values())

    def since(self, moment_s: float) -> "Report":
        return Report(self.sim, moment_s)

    @property
    def seconds(self) -> float:
        return self.steps[-1].told_s - self.steps[0].asked_s

    @property
    def late_ms(self) -> Spread:
        """From the end of a step on the device to its Step message."""
        return Spread((step.told_s - step.done_s) * 1e3 for step in self.steps)

    @property
    def idle_share(self) -> float:
        """Of the time between the first step's start on the device and the last one's end."""
        busy = sum(step.busy_s for step in self.steps)
        return 1 - busy / (self.steps[-1].done_s - self.steps[0].start_s)

    def gaps_ms(self, requests: Request | Iterable[Request] | None = None) -> Spread:
        """Between one token and the next of the same stream, as the client sees it."""
        chosen = self.requests if requests is None else [requests] if isinstance(requests, Request) else requests
        pairs = (pair for request in chosen for pair in itertools.pairwise(request.token_s))
        return Spread((b - a) * 1e3 for a, b in pairs if a >= self.since_s)

    def worst_gap_ms(self, requests: Request | Iterable[Request] | None = None) -> float:
        return self.gaps_ms(requests).worst

    def ttft_ms(self, request: Request) -> float:
        return (request.token_s[0] - request.asked_s) * 1e3

    def device_ms(self, request: Request) -> float:
        """Device time of the steps between the request and its first token: what its TTFT cannot be below, while the
        others are served as they were."""
        first_s = request.token_s[0]
        mine = (step for step in self.steps if request.asked_s <= step.start_s and step.done_s <= first_s)
        return sum(step.busy_s for step in mine) * 1e3

    def learnt(self, rows: int, context: int, chunk: tuple[int, int] | None = None) -> float:
        """The scheduler's prediction of such a step by its true cost (``context``: of each row)."""
        chunks = [chunk] if chunk else []
        costs = self.sim.device.costs
        predicted_ms: float = self.sim.loop._scheduler.predict_ms(rows, rows * context, chunks)
        return predicted_ms / (costs.decode_ms([context] * rows) + costs.prefill_ms(chunks))


# --- scenarios --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    report: Report
    """From the moment that counts on."""
    streams: list[Request]
    """Those whose gaps count."""
    long: Request | None = None
    """Whose time to the first token counts."""

    @property
    def ttft_ratio(self) -> float:
        """Of the long prompt: by the device time that went into it and into those served meanwhile."""
        assert self.long is not None
        return self.report.ttft_ms(self.long) / Report(self.report.sim).device_ms(self.long)

    @property
    def tokens_per_s(self) -> float:
        """Of the streams together."""
        counted = sum(at_s >= self.report.since_s for request in self.streams for at_s in request.token_s)
        return counted / self.report.seconds

    @property
    def summary(self) -> dict[str, float | None]:
        report = self.report
        return {
            "s": round(report.seconds, 1),
            "tokens/s": round(self.tokens_per_s),
            "device idle %": round(100 * report.idle_share, 1) + 0.0,
            "told late ms, p99": round(report.late_ms.p99, 1),
            "worst ms": round(report.late_ms.worst, 1),
            "worst gap ms": round(report.worst_gap_ms(self.streams)),
            "long TTFT / device": round(self.ttft_ratio, 3) if self.long else None,
            "learnt decode": round(report.learnt(8, 300), 2),
            "learnt chunk": round(report.learnt(0, 0, (4096, 1024)), 2),
        }


def steady(device: Device = Device(), loop: LoopKind = "auto") -> Outcome:
    """Eight streams, once they all decode."""
    sim = Simulation(device, loop=loop)
    streams = [sim.request(prompt=60, answer=400) for _ in range(8)]
    return Outcome(sim.run().since(1.0), streams)


def long_alone(device: Device = Device(), loop: LoopKind = "auto") -> Outcome:
    """The first prompt ever is one of 30,000 tokens."""
    sim = Simulation(device, loop=loop)
    long = sim.request(prompt=30_000, answer=20)
    return Outcome(sim.run(), [long], long)


def long_beside(device: Device = Device(), loop: LoopKind = "auto") -> Outcome:
    """The first prompt of 30,000 tokens comes while seven others decode."""
    sim = Simulation(device, loop=loop)
    streams = [sim.request(prompt=60, answer=1500) for _ in range(7)]
    long = sim.request(at_s=3.0, prompt=30_000, answer=20)
    return Outcome(sim.run().since(2.0), streams, long)


def cold(device: Device = Device(), loop: LoopKind = "auto") -> Outcome:
    """The first four steps take three seconds more; counted is what follows."""
    sim = Simulation(replace(device, cold_steps=4), loop=loop)
    streams = [sim.request(prompt=60, answer=400) for _ in range(8)]
    return Outcome(sim.run().since(sim.backend.ran[3].done_s), streams)


def cold_then_long(device: Device = Device(), loop: LoopKind = "auto") -> Outcome:
    """After such a start, a prompt of 30,000 tokens beside seven streams."""
    sim = Simulation(replace(device, cold_steps=4), loop=loop)
    streams = [sim.request(prompt=60, answer=1500) for _ in range(7)]
    long = sim.request(at_s=25.0, prompt=30_000, answer=20)
    return Outcome(sim.run().since(24.0), streams, long)


def throttled(device: Device = Device(), loop: LoopKind = "auto") -> Outcome:
    """Eight streams on a device that gets three times as slow, and as fast as before again."""
    sim = Simulation(replace(device, speeds=((3.0, 3.0), (9.0, 1.0), (12.0, 3.0), (15.0, 1.0))), loop=loop)
    streams = [sim.request(prompt=60, answer=600) for _ in range(8)]
    return Outcome(sim.run().since(1.0), streams)


def full_rows(device: Device = Device(), loop: LoopKind = "auto", rows: int = 4) -> Outcome:
    """Forty short requests for four rows."""
    sim = Simulation(device, loop=loop, max_rows=rows)
    streams = [sim.request(prompt=10, answer=10) for _ in range(40)]
    return Outcome(sim.run(), streams)


def one_row(device: Device = Device(), loop: LoopKind = "auto") -> Outcome:
    """The same for one row."""
    return full_rows(device, loop, rows=1)


def bursts(device: Device = Device(), loop: LoopKind = "auto") -> Outcome:
    """Every two seconds eight requests of ten tokens, half a millisecond apart."""
    sim = Simulation(device, loop=loop)
    streams = [sim.request(at_s=2 * i + j / 2000, prompt=10, answer=10) for i in range(5) for j in range(8)]
    return Outcome(sim.run(), streams)


FREE_FORM = {"grammar": "0 1000000"}


def constrained(device: Device = Device(), loop: LoopKind = "auto", rows: int = 8) -> Outcome:
    """As ``steady``, with grammars in all rows."""
    sim = Simulation(device, loop=loop)
    streams = [sim.request(prompt=60, answer=400, submit=FREE_FORM if row < rows else None) for row in range(8)]
    return Outcome(sim.run().since(1.0), streams)


def slow_masks(device: Device = Device(), loop: LoopKind = "auto") -> Outcome:
    """Grammars of 2 ms a mask in four rows of eight."""
    return constrained(replace(device, mask_ms=2.0), loop, rows=4)


def drafted(
    device: Device = Device(), loop: LoopKind = "auto", right: Callable[[float], float] | None = lambda now_s: 0.9
) -> Outcome:
    """As ``steady``, with a source of drafts of which nine tenths, or so many by time, are right; None: no source."""
    sim = Simulation(device, loop=loop, drafts=right)
    streams = [sim.request(prompt=60, answer=1200) for _ in range(8)]
    return Outcome(sim.run().since(1.0), streams)


def prose(device: Device = Device(), loop: LoopKind = "auto") -> Outcome:
    """Of a source's drafts hardly one is right."""
    return drafted(device, loop, lambda now_s: 0.02)


def by_turns(device: Device = Device(), loop: LoopKind = "auto") -> Outcome:
    """A file is repeated for four seconds, then comes prose for four, and so on."""
    return drafted(device, loop, lambda now_s: 0.95 if now_s % 8 < 4 else 0.02)


Scenario = Callable[[Device, LoopKind], Outcome]
SCENARIOS: tuple[Scenario, ...] = (
    steady, long_alone, long_beside, cold, cold_then_long, throttled, full_rows, one_row, bursts,
    constrained, slow_masks, drafted, prose, by_turns,
)  # fmt: skip
DEVICES = {
    "apart": Device(),
    "blocks": Device(launch_share=0.86, build_ms=2.0),
    "blocks, slow host": Device(launch_share=0.86),
    "all blocks": Device(launch_share=1.0),
}


def main(everything: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    loops: tuple[LoopKind, ...] = ("auto", "overlapped", "plain") if everything else ("auto",)
    table = Table("scenario", "device", "loop", *bursts().summary, title="simulated; itl_target_ms 250")
    for scenario in SCENARIOS:
        for name, device in DEVICES.items():
            for loop in loops:
                values = scenario(device, loop).summary.values()
                table.add_row(scenario.__name__, name, loop, *("" if v is None else f"{v:g}" for v in values))
        table.add_section()
    Console(width=170).print(table)


if __name__ == "__main__":
    main("--all" in sys.argv)
