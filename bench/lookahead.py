"""Lookahead forced on against off, on this device: what it may cost at most where it gains nothing (a CPU).

Each round starts two fresh engines, because the first prompt is one of the things measured.
"""

import contextlib
import os
import random
import statistics
import time
from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

from bench.models import folder, with_openblas
from bench.result import Result, Row, median_ratio
from tests.engine_client import GREEDY, EngineClient, engine

MODELS = ("llama-8x512", "llama-4x128")
TARGET = 1.1
BURSTS = 5


def run(quick: bool) -> Result:
    rounds, prompt_tokens = (3, 1000) if quick else (5, 3000)
    model = MODELS[quick]
    measured: dict[str, dict[str, list[float]]] = {"on": {}, "off": {}}
    with patch.dict(os.environ, with_openblas()):
        for index in range(rounds):
            order = sorted(measured, reverse=bool(index % 2))
            with contextlib.ExitStack() as stack:
                clients = [
                    stack.enter_context(engine(folder(model), lookahead=lookahead, max_rows=8)) for lookahead in order
                ]
                # Each thing on both, one right after the other: the speed of a shared machine drifts.
                for figures in zip(*(_measures(client, prompt_tokens, index) for client in clients), strict=True):
                    for lookahead, (name, value) in zip(order, figures, strict=True):
                        measured[lookahead].setdefault(name, []).append(value)
    rows: list[Row] = []
    for name, on in measured["on"].items():
        off = measured["off"][name]
        ratio = median_ratio(on, off)
        rows.append(
            {
                "measure": name,
                "on ms": statistics.median(on),
                "off ms": statistics.median(off),
                "ratio": ratio,
                "target": TARGET,
                "ok": ratio <= TARGET,
            }
        )
    return Result(f"{model}, lookahead on against off", rows, {"prompt_tokens": prompt_tokens, "rounds": rounds})


def _measures(client: EngineClient, prompt_tokens: int, seed: int) -> Iterator[tuple[str, float]]:
    draw = random.Random(seed)
    prompt = partial(_prompt, draw, client.ready.vocab_size if client.ready else 0)
    yield "TTFT, first prompt", _ttft_ms(client, prompt(prompt_tokens))
    client.run([prompt(10) for _ in range(8)], 10)
    for _ in range(BURSTS):
        first_ms, done_ms = _burst(client, [prompt(10) for _ in range(8)])
        yield "burst of 8 × 10 tokens", done_ms
        yield "TTFT, all of a burst", first_ms
    yield "TTFT, second prompt", _ttft_ms(client, prompt(prompt_tokens))
    running = client.submit(prompt(10), 4000)
    client.wait(lambda: len(client.answers[running].tokens) > 10)
    beside_ms = _ttft_ms(client, prompt(prompt_tokens // 4))
    client.cancel(running)
    client.wait_freed(running)
    yield "TTFT, prompt beside a stream", beside_ms


def _prompt(draw: random.Random, vocabulary: int, tokens: int) -> list[int]:
    return [draw.randrange(5, vocabulary) for _ in range(tokens)]


def _ttft_ms(client: EngineClient, prompt: list[int]) -> float:
    started = time.perf_counter()
    seq = client.submit(prompt, 4)
    client.wait(lambda: bool(client.answers[seq].tokens))
    ttft_ms = (time.perf_counter() - started) * 1e3
    client.wait_freed(seq)
    return ttft_ms


def _burst(client: EngineClient, prompts: list[list[int]]) -> tuple[float, float]:
    """Milliseconds until all have their first token, and until all are done."""
    started = time.perf_counter()
    seqs = client.submit_together([(prompt, 10, GREEDY) for prompt in prompts])
    client.wait(lambda: all(client.answers[seq].tokens for seq in seqs))
    first_s = time.perf_counter() - started
    client.wait_freed(*seqs)
    return first_s * 1e3, (time.perf_counter() - started) * 1e3
