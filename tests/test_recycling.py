"""Engine processes that are replaced by fresh ones: no request is lost, no token is missing or there twice, and the
answers are those of an engine that stayed."""

import os
import signal
import sys
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

import lmx.serving.engine
from lmx.config import EngineSettings
from lmx.errors import DeadlineExceeded, EngineDied, ModelLoadingFailed
from lmx.protocol import Load, Logprobs, Pooling, Sampling
from lmx.serving.engine import EmbedRequest, Engine, GenerateRequest
from lmx.serving.lease import Lease
from lmx.serving.metrics import Metrics
from lmx.serving.recycling import QUIET_S, SETTLE_S, STAYS_S, Figures, Recycling
from tests.api_server import Server, with_server
from tests.backends import BACKENDS
from tests.models import build_gguf, train_tokenizer
from tests.server import ROOT
from tests.test_constrained import JSON
from tests.test_serving_engine import KEEP, Setup, answer, ask, background, in_trio, read, running, until

PATIENCE_S = 180  # bounds a failing test only
REQUESTS = 60
RECYCLES = 3


# --- real models: answers are the same -------------------------------------------------------------------


class Answer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] = []
        self.finish: str | None = None
        self.cached_tokens = 0


def requests() -> list[GenerateRequest]:
    """Sixty of six kinds; each kind ten times, with prompts and seeds of their own."""
    words = train_tokenizer().encode(Path(ROOT, "docs", "architecture.md").read_text(encoding="utf-8")).ids
    made = []
    for number in range(REQUESTS):
        prompt = words[17 * number : 17 * number + 8 + 5 * (number % 9)]
        sampled = Sampling(seed=number, temperature=1.0, top_p=0.95)
        base = GenerateRequest(prompt, 24 + number % 13, sampled, ignore_eos=True, request_id=f"r{number}")
        made.append(
            (
                replace(base, sampling=Sampling(seed=0, temperature=0.0)),
                base,
                replace(base, grammar=JSON, max_tokens=60, ignore_eos=False),
                replace(base, sampling=replace(sampled, repetition_penalty=1.3, frequency_penalty=0.7)),
                replace(base, sampling=replace(sampled, temperature=0.0, logprobs=3), prompt_logprobs=1),
                replace(base, min_tokens=20, stop_ids=tuple(range(3, 700)), ignore_eos=False),
            )[number % 6]
        )
    return made


async def collect(engine: Engine, request: GenerateRequest, answer: Answer) -> None:
    async with engine.generate(request) as stream:
        async for chunk in stream:
            answer.tokens += chunk.tokens
            answer.logprobs += chunk.logprobs
            answer.finish = chunk.finish
        answer.prompt_logprobs, answer.cached_tokens = stream.prompt_logprobs, stream.cached_tokens


async def collect_all(engine: Engine, wanted: list[GenerateRequest], recycles: int = 0) -> list[Answer]:
    """All at once; so many times in the midst of it the engine is replaced."""
    answers = [Answer() for _ in wanted]
    async with trio.open_nursery() as nursery:
        for request, answer in zip(wanted, answers, strict=True):
            nursery.start_soon(collect, engine, request, answer)
        for number in range(recycles):
            # So much of it is done, and somebody is in the middle of an answer.
            done = number * len(wanted) // (recycles + 1)
            while sum(answer.finish is not None for answer in answers) < done or not any(
                answer.tokens and answer.finish is None for answer in answers
            ):
                await trio.sleep(0.001)
            await engine.recycle()
    return answers


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_gguf(tmp_path_factory.mktemp("recycling") / "model.gguf")


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_those_of_an_engine_that_stayed(backend: str, gguf: Path, tmp_path: Path) -> None:
    words = gguf.with_suffix(".mlx")
    load = Load(
        str(gguf if backend == "llama" else words),
        backend=backend,
        context_length=1024,
        words=str(words),
        prefix_disk_bytes=1 << 28,
        prefix_dir=str(tmp_path),
    )
    metrics = Metrics()
    settings = EngineSettings(recycle_drain_s=0.0)
    engine = Engine("tiny", load, lambda: settings, metrics, {**os.environ, "PYTHONPATH": str(ROOT)})

    async def main() -> tuple[list[Answer], list[Answer]]:
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                await nursery.start(engine.run)
                before = await collect_all(engine, requests())
                pids = {engine.pid}
                after = await collect_all(engine, requests(), RECYCLES)
                pids.add(engine.pid)
                assert len(pids) == 2
                await until(lambda: engine.figures is not None and engine.figures.decoding == 0)
                record = engine.statistics()
                assert (record.live_leases, record.waiting, record.live_sequences) == (0, 0, 0)
                assert (record.recycles, record.restarts, record.last_failure) == (RECYCLES, 0, None)
                assert record.engine is not None
                assert record.engine.threads > 0
                assert record.engine.open_files > 0
                assert backend == "llama" or record.engine.handles > record.engine.live_arrays
                nursery.cancel_scope.cancel()
        return before, after

    before, after = trio.run(main)
    assert metrics.registry.get_sample_value("lmx_engine_recycles_total", {"model": "tiny", "reason": "asked"}) == 3
    for wanted, one, other in zip(requests(), before, after, strict=True):
        assert (other.tokens, other.finish) == (one.tokens, one.finish), wanted
        assert [logprobs.top_ids for logprobs in other.logprobs] == [logprobs.top_ids for logprobs in one.logprobs]
        assert [logprobs.drawn for logprobs in other.logprobs] == pytest.approx([l.drawn for l in one.logprobs], 1e-3)
        assert len(one.logprobs) == (len(one.tokens) if wanted.sampling.logprobs >= 0 else 0)
        assert len(other.prompt_logprobs) == len(one.prompt_logprobs)
        assert len(one.prompt_logprobs) == (len(wanted.prompt) - 1 if wanted.prompt_logprobs >= 0 else 0)
