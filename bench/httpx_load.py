"""The load of an ordinary program: asyncio and httpx in one process, answers read as they are streamed. It takes its
share of the cores that it measures, as a bot on the same machine does."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class LoadFigures:
    tokens_per_s: float
    """All answers by the time from the first request to the last token."""
    worst_gap_ms: float
    """Between two events with text of one stream."""


def httpx_load(url: str, model: str, prompts: list[str], max_tokens: int, streams: int) -> LoadFigures:
    """Every prompt once, ``streams`` at a time. The answers go on to ``max_tokens``."""
    return asyncio.run(_load(url, model, prompts, max_tokens, streams))


async def _load(url: str, model: str, prompts: list[str], max_tokens: int, streams: int) -> LoadFigures:
    waiting = iter(prompts)
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits) as client:
        started = time.perf_counter()
        gaps = await asyncio.gather(*(_work(client, model, waiting, max_tokens) for _ in range(streams)))
        elapsed_s = time.perf_counter() - started
    return LoadFigures(len(prompts) * max_tokens / elapsed_s, max(gaps) * 1e3)


async def _work(client: httpx.AsyncClient, model: str, prompts: Iterator[str], max_tokens: int) -> float:
    """One stream after the other; the longest gap in seconds."""
    worst_s = 0.0
    for prompt in prompts:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        last, generated = None, 0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event: dict[str, Any] = json.loads(line[6:])
                if any(choice["text"] for choice in event["choices"]):
                    now = time.perf_counter()
                    worst_s = max(worst_s, now - (last or now))
                    last = now
                generated = (event.get("usage") or {}).get("completion_tokens", generated)
        assert generated == max_tokens, f"an answer of {generated} tokens"
    return worst_s
