"""The same streams as ``lmx.bench.client`` opens, from an asyncio client (httpx): its requests leave as its event loop
gets to them, some 5 to 10 ms apart, as those of bots do."""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from socket import socket
from typing import Any

import httpx

from lmx.bench.client import BenchError, Request, Stream


class AsyncioClient:
    """Has the ``run`` of ``lmx.bench.client.Client``."""

    def __init__(self, url: str, model: str) -> None:
        self._url = f"{url}/v1/completions"
        self._fields: dict[str, Any] = {
            "model": model,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def run(self, requests: Sequence[Request], concurrency: int) -> list[Stream]:
        """All requests, ``concurrency`` at a time: the next one starts when one has ended. Raises BenchError."""
        return asyncio.run(self._run(iter(requests), concurrency))

    async def _run(self, waiting: Iterator[Request], concurrency: int) -> list[Stream]:
        streams: list[Stream] = []

        async def one_after_the_other() -> None:
            for request in waiting:
                streams.append(await self._stream(client, request))

        # A connection for each request: llama-server now and then closes one that httpx is about to use again.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=600.0, limits=limits) as client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(one_after_the_other())
        return streams

    async def _stream(self, client: httpx.AsyncClient, request: Request) -> Stream:
        with socket() as unused:
            stream = Stream(unused, request, time.perf_counter())
        body = self._fields | {"prompt": request.prompt, "max_tokens": request.max_tokens}
        async with client.stream("POST", self._url, json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise BenchError(f"the server answered {response.status_code}: {await response.aread()!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if any(choice.get("text") for choice in event.get("choices", ())):
                    stream.event_times.append(time.perf_counter())
                if usage := event.get("usage"):
                    stream.prompt_tokens, stream.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        return stream
