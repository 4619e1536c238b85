"""From what streams saw to the figures people compare. Pure; called by ``lmx.bench`` over HTTP, and by
``lmx.serving.bench`` inside the server."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol


class Seen(Protocol):
    """A stream that has ended. Times are seconds of one clock."""

    @property
    def sent_at(self) -> float: ...
    @property
    def event_times(self) -> Sequence[float]:
        """When tokens came, one or several."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles (nearest rank) and the worst, in milliseconds."""

    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Figures:
    """One load: ``requests`` requests, ``concurrency`` at a time."""

    requests: int
    concurrency: int
    prompt_tokens: float
    """Of a request, on average, by the server's count."""
    completion_tokens: float
    cached_tokens: int
    """Of all requests; above 0 the prompt figures mean nothing."""
    wall_s: float
    prompt_tokens_per_s: float
    """All prompt tokens by the time in which some request waited for its first token."""
    generation_tokens_per_s: float
    """All generated tokens by the whole run."""
    decode_tokens_per_s: float | None
    """By the time in which ``concurrency`` streams were between their first and last token; None: they never were."""
    ttft_ms: Spread
    itl_ms: Spread | None
    """Between two events with text of one stream; None: no stream had two."""


def figures(streams: Sequence[Seen], concurrency: int) -> Figures:
    """Of finished streams, each with at least one event. Raises ValueError for one without."""
    for stream in streams:
        if not (stream.event_times and stream.completion_tokens):
            raise ValueError("a stream brought no text, or the server no usage: nothing can be measured")
    first_at = [stream.event_times[0] for stream in streams]
    started, ended = min(s.sent_at for s in streams), max(s.event_times[-1] for s in streams)
    waiting_s = _covered_s([(s.sent_at, s.event_times[0]) for s in streams])
    gaps_ms = [(b - a) * 1e3 for stream in streams for a, b in pairwise(stream.event_times)]
    prompt_tokens = sum(stream.prompt_tokens for stream in streams)
    completion_tokens = sum(stream.completion_tokens for stream in streams)
    return Figures(
        requests=len(streams),
        concurrency=concurrency,
        prompt_tokens=prompt_tokens / len(streams),
        completion_tokens=completion_tokens / len(streams),
        cached_tokens=sum(stream.cached_tokens for stream in streams),
        wall_s=ended - started,
        prompt_tokens_per_s=prompt_tokens / waiting_s,
        generation_tokens_per_s=completion_tokens / (ended - started),
        decode_tokens_per_s=decode_tokens_per_s(streams, concurrency),
        ttft_ms=spread([(at - s.sent_at) * 1e3 for at, s in zip(first_at, streams, strict=True)]),
        itl_ms=spread(gaps_ms) if gaps_ms else None,
    )


def decode_tokens_per_s(streams: Sequence[Seen], concurrency: int) -> float | None:
    """Tokens by seconds over the spans in which at least ``concurrency`` streams decode."""
    edges = sorted([(s.event_times[0], 1) for s in streams] + [(s.event_times[-1], -1) for s in streams])
    spans, running = [], 0
    for (at, change), (until, _) in pairwise(edges):
        running += change
        if running >= concurrency and until > at:
            spans.append((at, until))
    seconds = sum(until - at for at, until in spans)
    tokens = 0.0
    for stream in streams:
        # An event may carry several tokens, or a token no text: they are spread evenly over the events.
        share = (stream.completion_tokens - 1) / max(len(stream.event_times) - 1, 1)
        tokens += share * sum(at < time <= until for at, until in spans for time in stream.event_times[1:])
    return tokens / seconds if seconds else None


def spread(values: Sequence[float]) -> Spread:
    ranked = sorted(values)
    last = len(ranked) - 1
    return Spread(ranked[round(last * 0.5)], ranked[round(last * 0.95)], ranked[round(last * 0.99)], ranked[last])


def _covered_s(spans: list[tuple[float, float]]) -> float:
    """Length of the union of time spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
