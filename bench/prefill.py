"""Prompt tok/s by prompt length and chunk size, through the engine process alone: what ``[engine] max_chunk_tokens``
should be on this device. The baseline is the largest chunk."""

import contextlib
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

from bench.models import folder
from bench.result import Result, Row, alternate, median_ratio
from tests.engine_client import EngineClient, engine

MODEL = "smollm2"
CHUNKS = (64, 128, 256, 512, 1024, 2048)
PROMPTS = (85, 512, 2048)


def run(quick: bool) -> Result:
    chunks, lengths = ((128, 512, 2048), (85, 1024)) if quick else (CHUNKS, PROMPTS)
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        # All loaded at once: an idle engine costs memory, no time.
        clients = {
            chunk: stack.enter_context(engine(folder(MODEL), max_chunk_tokens=chunk, max_rows=1)) for chunk in chunks
        }
        for length in lengths:
            useful = [chunk for chunk in chunks if chunk == min(chunks) or chunk // 2 < length]
            speeds = dict(zip(useful, alternate(2 if quick else 3, *_measures(clients, useful, length)), strict=True))
            baseline = speeds[max(useful)]
            rows += [
                {
                    "prompt tokens": length,
                    "chunk": chunk,
                    "tok/s": statistics.median(speed),
                    "ratio": median_ratio(speed, baseline),
                }
                for chunk, speed in speeds.items()
            ]
    return Result(f"{MODEL}, prompt tok/s by chunk size (ratio: to one chunk)", rows)


def _measures(clients: dict[int, EngineClient], chunks: list[int], length: int) -> list[Callable[[], float]]:
    return [partial(_prompt_tokens_per_s, clients[chunk], length) for chunk in chunks]


def _prompt_tokens_per_s(client: EngineClient, length: int) -> float:
    vocabulary = client.ready.vocab_size if client.ready else 0
    prompt = [random.randrange(vocabulary) for _ in range(length)]
    started = time.perf_counter()
    client.run([prompt], max_tokens=1)
    return length / (time.perf_counter() - started)
