"""The plain step loop around a scheduler on a virtual clock, with a device whose costs are given: no threads, no sleep,
the same figures each time. Tests and ``bench/sched_policy.py`` judge a policy with it."""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, pairwise
from random import Random
from typing import Any

GATHER_MS = 10.0


@dataclass
class Request:
    prompt_tokens: int
    max_tokens: int
    answer_tokens: int = 0
    """It ends by itself after so many; 0: at ``max_tokens``."""
    client: str = ""
    priority: int = 0


@dataclass
class Run:
    """One request and what became of it; times in ms."""

    request: Request
    came_at: float
    token_times: list[float] = field(default_factory=list)
    prefilled: int = 0
    """Positions prefilled, over all prefills."""

    @property
    def ttft_ms(self) -> float:
        return self.token_times[0] - self.came_at

    @property
    def worst_gap_ms(self) -> float:
        return max((b - a for a, b in pairwise(self.token_times)), default=0.0)

    @property
    def done(self) -> bool:
        return len(self.token_times) == (self.request.answer_tokens or self.request.max_tokens)


class Simulation:
    def __init__(self, scheduler: Any, cost_ms: Callable[[int, int, list[tuple[int, int]]], float]) -> None:
        """``cost_ms`` of a step: decoding rows, their context summed, the chunks' (start, tokens)."""
        self.scheduler = scheduler
        self.cost_ms = cost_ms
        self.now_ms = 0.0
        self.runs: dict[int, Run] = {}
        self.steps: list[tuple[float, Any, Any]] = []
        """When each began, who decoded and what was prefilled in it."""
        self._ids = count()
        self._coming: list[tuple[float, int, Request, Iterator[tuple[float, Request]]]] = []
        self._following: dict[int, Iterator[tuple[float, Request]]] = {}

    def arrive(self, at_ms: float, request: Request, following: Iterable[tuple[float, Request]] = ()) -> int:
        """``following``: of the same stream, each so many ms after the one before it has ended."""
        seq = next(self._ids)
        heapq.heappush(self._coming, (at_ms, seq, request, iter(following)))
        return seq

    def run(self, until_ms: float = math.inf) -> None:
        while self.now_ms < until_ms and (self._coming or self._following):
            if not self._following:
                self._gather()
            self._take_arrivals()
            self._step()

    def _gather(self) -> None:
        """As an idle loop does: what comes within a moment of the one before starts together."""
        self.now_ms = max(self.now_ms, self._coming[0][0])
        while self._coming and self._coming[0][0] <= self.now_ms + GATHER_MS:
            self.now_ms = max(self.now_ms, self._coming[0][0])
            self._take_arrivals()
        self.now_ms += GATHER_MS

    def _take_arrivals(self) -> None:
        while self._coming and self._coming[0][0] <= self.now_ms:
            at_ms, seq, request, following = heapq.heappop(self._coming)
            self.scheduler.submit(
                seq, request.prompt_tokens, request.max_tokens, client=request.client, priority=request.priority
            )
            self.runs[seq] = Run(request, at_ms)
            self._following[seq] = following

    def _step(self) -> None:
        plan = self.scheduler.plan(self.now_ms / 1e3)
        if not plan.step:
            assert self._coming, "sequences wait and nothing can run"
            self.now_ms = max(self.now_ms, self._coming[0][0])
            return
        context = sum(self._context(seq) for seq in plan.decode)
        chunks = [(chunk.start, chunk.tokens) for chunk in plan.prefills]
        elapsed_ms = self.cost_ms(len(plan.decode), context, chunks)
        self.steps.append((self.now_ms, plan.decode, plan.prefills))
        self.now_ms += elapsed_ms
        finished = []
        for chunk in plan.prefills:
            self.runs[chunk.seq].prefilled += chunk.tokens
        for seq in (*plan.decode, *(chunk.seq for chunk in plan.prefills if chunk.last)):
            run = self.runs[seq]
            run.token_times.append(self.now_ms)
            if run.done:
                finished.append(seq)
                self._follow(seq)
        self.scheduler.commit(plan.step, elapsed_ms, finished)
        for seq in self.scheduler.releasable():
            self.scheduler.release(seq)

    def _context(self, seq: int) -> int:
        return self.runs[seq].request.prompt_tokens + len(self.runs[seq].token_times)

    def _follow(self, seq: int) -> None:
        following = self._following.pop(seq)
        coming = next(following, None)
        if coming is not None:
            self.arrive(self.now_ms + coming[0], coming[1], following)


def cpu_ms(rows: int, context: int, chunks: list[tuple[int, int]]) -> float:
    """SmolLM2 in float32 on two cores: a pass costs 55 ms, a prompt token 2.1, a decoding row 3.5. Whole prompts share
    a pass, the others have one each."""
    decode_ms = 52.0 + 3.5 * rows + 0.004 * context if rows else 0.0
    passes = any(start == 0 for start, _ in chunks) + sum(start > 0 for start, _ in chunks)
    return decode_ms + 55.0 * passes + sum(2.1 * n + 0.0005 * n * (start + n / 2) for start, n in chunks)


def gpu_ms(rows: int, context: int, chunks: list[tuple[int, int]]) -> float:
    """A model of 30 billion parameters, 3 of them active, in 4 bits on a large GPU."""
    decode_ms = 9.0 + 1.5 * rows + 3e-5 * context if rows else 0.0
    return decode_ms + sum(12.0 + 0.5 * n + 6e-6 * n * (start + n / 2) for start, n in chunks)


def memory_tight(make_scheduler: Callable[..., Any], seed: int, minutes: float = 10.0) -> Simulation:
    """Six streams on that GPU with KV for 51,200 tokens: two of prompts of 40,000 tokens, four of chats that grow."""
    random = Random(seed)
    scheduler = make_scheduler(max_rows=16, kv_budget_bytes=51_200 * 100, kv_bytes_per_token=100, max_chunk_tokens=2048)
    simulation = Simulation(scheduler, gpu_ms)

    def request(stream: int) -> Request:
        if stream < 2:
            return Request(40_000, 2000, 235, client=str(stream))
        return Request(random.randint(500, 3000), 8000, random.randint(500, 3000), client=str(stream))

    def following(stream: int) -> Iterator[tuple[float, Request]]:
        while True:
            yield random.uniform(0.0, 2000.0), request(stream)

    for stream in range(6):
        simulation.arrive(random.uniform(0.0, 3000.0), request(stream), following(stream))
    simulation.run(until_ms=minutes * 60e3)
    return simulation


def recomputed_share(simulation: Simulation) -> float:
    """Of all that was prefilled, what was computed before."""
    prefilled = sum(run.prefilled for run in simulation.runs.values())
    return sum(max(0, run.prefilled - run.request.prompt_tokens) for run in simulation.runs.values()) / prefilled


def torn_wave(scheduler: Any, apart_ms: float) -> tuple[float, float]:
    """Eight streams of 85 and 64 tokens on that CPU, whose requests come so far apart: tokens a second and the worst
    gap in ms."""
    simulation = Simulation(scheduler, cpu_ms)
    simulation.arrive(0.0, Request(85, 2))
    simulation.run()
    simulation.runs.clear()
    start_ms = simulation.now_ms + 1000.0
    for stream in range(8):
        simulation.arrive(start_ms + stream * apart_ms, Request(85, 64))
    simulation.run()
    tokens = sum(len(run.token_times) for run in simulation.runs.values())
    return 1e3 * tokens / (simulation.now_ms - start_ms), max(run.worst_gap_ms for run in simulation.runs.values())
