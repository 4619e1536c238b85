"""Engine processes that are replaced by fresh ones: no request is lost, no token is missing or there twice, and the
answers are those of an engine that stayed."""

import json
import os
import signal
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

import lmx.serving.engine
from lmx.config import EngineSettings
from lmx.engine.backend import Facts
from lmx.engine.requests import Refused, read_answer
from lmx.errors import Conflict, DeadlineExceeded, EngineDied, ModelLoadingFailed
from lmx.protocol import Embedded, Load, Logprobs, Pooling, Sampling, Submit, pack_tokens
from lmx.serving.engine import EmbedRequest, Engine, GenerateRequest, TokenStream
from lmx.serving.metrics import Metrics
from lmx.serving.recycling import QUIET_S, SETTLE_S, STAYS_S, Figures, Recycling
from tests.api_server import Server, answer_text, with_server, write_model
from tests.backends import BACKENDS
from tests.models import build_gguf, train_tokenizer
from tests.server import ROOT
from tests.test_constrained import JSON
from tests.test_serving_engine import KEEP, Setup, answer, ask, background, in_trio, read, running, until

PATIENCE_S = 180  # bounds a failing test only
REQUESTS = 60
RECYCLES = 2


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
            await until(
                lambda done=done: (
                    sum(answer.finish is not None for answer in answers) >= done
                    and any(answer.tokens and answer.finish is None for answer in answers)
                )
            )
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
                first, long = engine.pid, replace(requests()[0], prompt=[5 + n % 900 for n in range(700)], max_tokens=1)
                await collect_all(engine, [long])
                after = await collect_all(engine, requests(), RECYCLES)
                assert engine.pid != first
                [again] = await collect_all(engine, [long])
                assert again.cached_tokens >= 512  # its KV is on the disk
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
    assert (
        metrics.registry.get_sample_value("lmx_engine_recycles_total", {"model": "tiny", "reason": "asked"}) == RECYCLES
    )
    for wanted, one, other in zip(requests(), before, after, strict=True):
        assert (other.tokens, other.finish) == (one.tokens, one.finish), wanted
        assert [logprobs.top_ids for logprobs in other.logprobs] == [logprobs.top_ids for logprobs in one.logprobs]
        assert [logprobs.drawn for logprobs in other.logprobs] == pytest.approx(
            [logprobs.drawn for logprobs in one.logprobs], 1e-3
        )
        assert len(one.logprobs) == (len(one.tokens) if wanted.sampling.logprobs >= 0 else 0)
        assert len(other.prompt_logprobs) == len(one.prompt_logprobs)
        assert len(one.prompt_logprobs) == (len(wanted.prompt) - 1 if wanted.prompt_logprobs >= 0 else 0)


def test_vectors_are_made_anew(minilm: Path) -> None:
    load = Load(str(minilm), backend="mlx", context_length=256, embedding=Pooling("mean"))
    settings = EngineSettings(recycle_drain_s=0.0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    engine = Engine("minilm", load, lambda: settings, Metrics(), environment)
    inputs = [array("I", [101, *range(2000 + number, 2100 + number), 102]) for number in range(40)]

    async def embed() -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        async with engine.embed(EmbedRequest(inputs)) as stream:
            for piece in await stream.receive():
                found |= vectors(piece)
        return found

    async def main() -> None:
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                await nursery.start(engine.run)
                before = await embed()
                after: list[dict[int, bytes]] = []

                async def again() -> None:
                    after.append(await embed())

                async with trio.open_nursery() as both:
                    both.start_soon(again)
                    await until(lambda: any(lease.drawn_tokens for lease in engine._ledger.leases.values()))
                    await engine.recycle()
                    assert not after or engine.recycles == 1
                assert after[0].keys() == before.keys() == set(range(40))
                assert engine.statistics().live_leases == engine.statistics().waiting == 0
                nursery.cancel_scope.cancel()

    trio.run(main)


def vectors(piece: Embedded) -> dict[int, bytes]:
    numbers = array("I", piece.inputs)
    size = len(piece.vectors) // len(numbers)
    return {number: piece.vectors[at * size : (at + 1) * size] for at, number in enumerate(numbers)}


# --- the null engine: whatever happens meanwhile ---------------------------------------------------------


async def draining(setup: Setup) -> int:
    """Begin to replace the engine, whose requests go on: its process."""
    assert setup.engine.pid is not None
    setup.engine._asked.set()
    await setup.engine.wait_state("recycling")
    return setup.engine.pid


def tokens_of(setup: Setup) -> int:
    return max((lease.drawn_tokens for lease in setup.engine._ledger.leases.values()), default=0)


@in_trio
async def test_what_runs_may_finish_and_what_comes_meanwhile_waits() -> None:
    async with running({"step_ms": 2}, load={"max_rows": 1}) as setup:
        engine, results = setup.engine, {}

        async def work(name: str) -> None:
            results[name] = await answer(engine, ask(max_tokens=40))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, "running")
            await until(lambda: tokens_of(setup) > 0)
            nursery.start_soon(work, "queued")
            await until(lambda: engine.statistics().live_sequences == 2)
            pid = await draining(setup)
            nursery.start_soon(work, "new")
            await until(lambda: "running" in results)
            assert engine.pid == pid
            assert engine.statistics().live_leases == 2
        assert results == dict.fromkeys(("running", "queued", "new"), (list(range(40)), "length"))
        assert engine.pid != pid
        await setup.idle()


@in_trio
async def test_who_leaves_during_the_replacement_holds_nothing(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    async with running({"step_ms": 1}, recycle_drain_s=0.05) as setup:
        engine = setup.engine
        setup.environment["LMX_NULL_LOAD"] = f"wait:{loads}"
        async with background(engine, ask()) as stays, background(engine, ask()):
            await until(lambda: engine.statistics().live_sequences == 2 and tokens_of(setup) > 0)
            pid = await draining(setup)
        # Both are gone from an engine that drains; one more from between two engines.
        assert not stays
        async with background(engine, ask()) as third:
            await until(lambda: engine.pid not in (pid, None))
            assert engine.statistics().live_leases == 1
        assert not third
        assert engine.statistics().live_leases == engine.statistics().live_sequences == 0
        loads.touch()
        await engine.wait_state("ready")
        assert await answer(engine, ask(max_tokens=2)) == ([0, 1], "length")
        await setup.idle()


async def read_into(tokens: list[int], stream: TokenStream) -> None:
    async for chunk in stream:
        tokens += chunk.tokens


@in_trio
async def test_a_deadline_passes_between_two_engines(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    async with running({"step_ms": 1}, recycle_drain_s=0.0) as setup:
        setup.environment["LMX_NULL_LOAD"] = f"wait:{loads}"
        async with setup.engine.generate(ask(deadline_s=0.5)) as stream:
            read_tokens = [*(await stream.receive()).tokens]
            await draining(setup)
            with pytest.raises(DeadlineExceeded):
                await read_into(read_tokens, stream)
        assert read_tokens == list(range(len(read_tokens)))
        assert setup.engine.state == "recycling"
        loads.touch()
        await setup.engine.wait_state("ready")
        await setup.idle()


@in_trio
async def test_a_fresh_engine_that_does_not_start_is_an_engine_that_does_not_start() -> None:
    async with running({"step_ms": 1}, recycle_drain_s=0.0, max_restarts=1, restart_cooldown_s=1000) as setup:
        setup.environment["LMX_NULL_LOAD"] = "exit"
        async with setup.engine.generate(ask()) as stream:
            await stream.receive()
            with pytest.raises(ModelLoadingFailed):
                await setup.engine.recycle()
            assert setup.engine.state == "failed"
            with pytest.raises(ModelLoadingFailed):
                await read(stream)
        with pytest.raises(ModelLoadingFailed):
            await answer(setup.engine, ask())
        with pytest.raises(Conflict):
            await setup.engine.recycle()
        assert (setup.engine.recycles, setup.engine.restarts) == (1, 1)
        assert setup.engine.statistics().live_leases == 0


@in_trio
async def test_an_engine_that_dies_before_it_is_replaced_has_died() -> None:
    async with running({"step_ms": 2}, load={"max_rows": 1}) as setup:
        engine, queued = setup.engine, []

        async def wait() -> None:
            queued.append(await answer(engine, ask(21, max_tokens=3)))

        async with background(engine, ask(20)) as errors, trio.open_nursery() as nursery:
            await until(lambda: tokens_of(setup) > 0)
            nursery.start_soon(wait)
            await until(lambda: engine.statistics().live_sequences == 2)
            os.kill(await draining(setup), signal.SIGKILL)
            await until(lambda: bool(errors))
        assert isinstance(errors[0], EngineDied)
        assert queued == [([0, 1, 2], "length")]
        assert (engine.recycles, engine.restarts) == (0, 1)
        await setup.idle()


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_taken_back_goes_on_whatever_becomes_of_its_engine(killed: bool) -> None:
    """The old engine never frees it: in the end it is killed, by us or by somebody else."""

    @in_trio
    async def test() -> None:
        limits = {"recycle_drain_s": 0.0, "free_timeout_s": 100.0 if killed else 0.1}
        async with running({"step_ms": 2}, **limits) as setup:
            engine, results = setup.engine, []

            async def work() -> None:
                results.append(await answer(engine, ask(KEEP, max_tokens=60)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(work)
                await until(lambda: tokens_of(setup) > 0)
                setup.environment["LMX_NULL_KEEP_TOKEN"] = "-1"
                pid = await draining(setup)
                await until(lambda: any(lease.withdrawn for lease in engine._ledger.submitted.values()))
                if killed:
                    os.kill(pid, signal.SIGKILL)
            assert results == [(list(range(60)), "length")]
            assert (engine.recycles, engine.restarts) == ((0, 1) if killed else (1, 0))
            await setup.idle()

    test()


@in_trio
async def test_an_answer_that_the_fresh_engine_has_no_room_for_ends_by_its_length() -> None:
    async with running({"step_ms": 1}, recycle_drain_s=0.0) as setup:
        async with setup.engine.generate(ask()) as stream:
            first = list((await stream.receive()).tokens)
            await until(lambda: tokens_of(setup) > 20)
            setup.engine.trim(8 * 1024)
            await draining(setup)
            tokens, finish = await read(stream)
        assert finish == "length"
        assert first + tokens == list(range(len(first + tokens)))
        await setup.engine.wait_state("ready")
        await setup.idle()


@in_trio
async def test_an_engine_goes_by_itself_when_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmx.serving.recycling.QUIET_S", 0.0)
    monkeypatch.setattr(lmx.serving.engine, "LOOK_S", 0.01)
    async with running({"step_ms": 1}) as setup:
        pid, given = setup.engine.pid, setup.engine._settings()
        async with background(setup.engine, ask()):
            await until(lambda: tokens_of(setup) > 0)
            setup.engine._settings = lambda: given.model_copy(update={"recycle_hours": 1e-9})
            await until(lambda: setup.engine.statistics().recycle_due == "age")
            tokens = tokens_of(setup)
            await until(lambda: tokens_of(setup) > tokens + 50)
            assert setup.engine.pid == pid
        await setup.engine.wait_state("recycling")
        setup.engine._settings = lambda: given
        await setup.engine.wait_state("ready")
        assert setup.metric("lmx_engine_recycles_total", reason="age") >= 1


# --- through HTTP ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@with_server(LMX_NULL_STEP_MS=5, recycle_drain_s=0.0)
async def test_a_stream_pauses_and_goes_on(server: Server) -> None:
    """POST /admin/recycle, what /health says meanwhile, and the figures."""
    lines: list[str] = []
    body = {"prompt": [20], "max_tokens": 200, "stream": True, "stream_options": {"include_usage": True}}
    async with server.http.stream("POST", "/v1/completions", json=body) as response:
        stream = response.aiter_lines()
        while len(lines) < 10:
            lines.append(await anext(stream))
        early = await server.http.post("/admin/recycle", json={"wait": 0})
        assert early.status_code == 202
        told = early.json()["models"][0]
        assert (told["seconds"], told["error"]) == (None, None)
        await server.engine.wait_state("recycling")
        health = await server.http.get("/health?ready")
        assert (health.status_code, health.json()["models"]) == (503, {server.engine.name: "recycling"})
        assert server.engine.recycling_waits_for
        done = await server.http.post("/admin/recycle", json={"model": "mine"})  # the same one
        assert done.status_code == 200
        assert done.json()["models"][0]["pid"] == server.engine.pid
        lines += [line async for line in stream]
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == answer_text(200)
    assert chunks[-1]["usage"]["completion_tokens"] == 200
    await server.free()
    metrics = (await server.http.get("/metrics")).text
    assert f'lmx_engine_recycles_total{{model="{server.engine.name}",reason="asked"}} 1.0' in metrics
    for name in ("traces", "handles", "handles_limit", "open_files", "threads", "age_seconds", "growth_bytes"):
        assert f"lmx_engine_{name}{{" in metrics
    assert "lmx_model_difference_bytes{" in metrics
    assert (await server.http.post("/admin/recycle", json={"model": "nobody"})).status_code == 404
    assert (await server.http.post("/admin/recycle", json={"wait": -1})).status_code == 400


# --- when: pure --------------------------------------------------------------------------------------------

GB = 1024**3
OFF = EngineSettings(recycle_hours=0, recycle_growth_bytes=0, recycle_traces=0, recycle_handles=0)


def test_nothing_is_due_unless_a_setting_says_so() -> None:
    recycling = Recycling(0.0)
    recycling.look(Figures(100 * GB, 10**6, 498_999, 499_000), OFF, 1e6)
    assert recycling.reason is None
    assert not recycling.begins(OFF, 1e6, 0.0)


@pytest.mark.parametrize(
    ("settings", "figures", "reason"),
    [
        ({"recycle_hours": 1.0}, Figures(), "age"),
        ({"recycle_traces": 10}, Figures(traces=10), "traces"),
        ({"recycle_handles": 0.5}, Figures(handles=250_000, most_handles=499_000), "handles"),
        ({"recycle_handles": 0.5}, Figures(handles=250_000), None),  # there is no limit here
        ({"recycle_handles": 0.5}, Figures(handles=249_000, most_handles=499_000), None),
        ({"recycle_traces": 10}, Figures(traces=9), None),
        ({"recycle_hours": 1.1}, Figures(), None),
    ],
)
def test_each_limit_is_a_reason(settings: dict[str, Any], figures: Figures, reason: str | None) -> None:
    recycling = Recycling(0.0)
    recycling.look(figures, OFF.model_copy(update=settings), 3600.0)
    assert recycling.reason == reason


def test_growth_is_what_stays_beyond_what_the_process_settled_at() -> None:
    settings = OFF.model_copy(update={"recycle_growth_bytes": 2 * GB})
    recycling = Recycling(0.0)
    recycling.look(Figures(3 * GB), settings, SETTLE_S / 2)  # its own, from the start
    now = 2 * SETTLE_S
    recycling.look(Figures(3 * GB), settings, now)
    assert recycling.growth_bytes == 0
    recycling.look(Figures(6 * GB), settings, now)  # a peak that passes
    recycling.look(Figures(3 * GB), settings, now + STAYS_S)
    recycling.look(Figures(6 * GB), settings, now + STAYS_S + 1)
    assert (recycling.reason, recycling.growth_bytes) == (None, 3 * GB)
    recycling.look(Figures(6 * GB), settings, now + 2 * STAYS_S + 1)
    assert recycling.reason == "growth"
    recycling.look(Figures(4 * GB), settings, now + 2 * STAYS_S + 2)  # it went by itself
    assert recycling.reason is None


def test_less_memory_than_accounted_for_is_no_base_to_grow_from() -> None:
    settings = OFF.model_copy(update={"recycle_growth_bytes": GB})
    recycling = Recycling(0.0)
    recycling.look(Figures(-9 * GB), settings, 2 * SETTLE_S)  # weights that nobody has read yet
    recycling.look(Figures(0), settings, 3 * SETTLE_S)
    assert recycling.growth_bytes == 0


def test_a_quiet_moment_is_waited_for_but_not_for_ever() -> None:
    settings = OFF.model_copy(update={"recycle_hours": 1.0, "recycle_wait_s": 600.0})
    busy, now = float("inf"), 3600.0
    recycling = Recycling(0.0)
    recycling.look(Figures(), settings, now)
    assert not recycling.begins(settings, now, busy)
    assert not recycling.begins(settings, now, now - QUIET_S / 2)
    assert recycling.begins(settings, now, now - QUIET_S)
    assert not recycling.begins(settings, now + 599, busy)
    recycling.look(Figures(traces=1), settings, now + 599)  # still due since then
    assert recycling.begins(settings, now + 600, busy)


def test_who_asks_does_not_wait() -> None:
    recycling = Recycling(0.0)
    recycling.ask(1.0)
    recycling.look(Figures(), OFF, 2.0)
    assert recycling.reason == "asked"
    assert recycling.begins(OFF, 2.0, float("inf"))


def test_an_answer_begun_is_checked_as_a_prompt_is() -> None:
    facts = Facts("", 100, 50, (), 0, 0, 0, 1, 32, 0.0, 0, "", "", "", "", {})
    submit = Submit(1, pack_tokens([1]), 9, Sampling(0), answer=pack_tokens([3, 49]))
    assert read_answer(submit, facts) == [3, 49]
    for answer_bytes in (b"123", pack_tokens([3, 50])):
        with pytest.raises(Refused, match="answer"):
            read_answer(replace(submit, answer=answer_bytes), facts)
