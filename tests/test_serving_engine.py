"""The supervisor of an engine process, against the null engine: leases end with their KV free on every path, and every
way an engine can fail is noticed, told to its requests, and repaired."""

import functools
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

import lmx.serving.engine
from lmx.config import EngineSettings
from lmx.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDied,
    InvalidRequest,
    ModelLoadingFailed,
    ModelOverloaded,
    QueueFull,
    RequestCrashesEngine,
    SequenceFailed,
)
from lmx.protocol import Load, Sampling
from lmx.serving.engine import Engine, GenerateRequest, TokenStream
from lmx.serving.failures import classify
from lmx.serving.metrics import Metrics
from tests.server import NULL_ENGINE, ROOT

CRASH, HANG, FAIL, KEEP = 7, 8, 9, 10
FOREVER = 1_000_000


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children()}


def in_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test; afterwards no child process may be left."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        async def main() -> None:
            with trio.fail_after(30):
                await test(**fixtures)

        others = children()  # servers of the whole session
        trio.run(main)
        assert children() == others

    return run


class Setup:
    """A running engine, its metrics, and the environment of its next process."""

    def __init__(self, null: dict[str, Any], settings: dict[str, Any], load: dict[str, Any]) -> None:
        self.metrics = Metrics()
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        faults = {"crash_token": CRASH, "hang_token": HANG, "fail_token": FAIL, "keep_token": KEEP}
        self.environment |= {f"LMX_NULL_{key.upper()}": str(value) for key, value in (faults | null).items()}
        options = {"command": NULL_ENGINE, "restart_backoff_s": 0.01, **settings}
        loading = Load("/nowhere", stats_interval_s=0.0, **load)
        self.engine = Engine("null", loading, lambda: EngineSettings(**options), self.metrics, self.environment)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"model": "null", **labels}) or 0.0

    async def idle(self) -> None:
        """Until the engine's own account says that it holds nothing; the server's must agree."""
        await until(
            lambda: self.own is not None and self.own.kv_used_bytes == self.own.queued == self.own.decoding == 0
        )
        record = self.engine.statistics()
        assert (record.live_leases, record.waiting, record.live_sequences, record.kv_sequence_bytes) == (0, 0, 0, 0)

    @property
    def own(self) -> Any:
        return self.engine.statistics().engine


@asynccontextmanager
async def running(
    null: dict[str, Any] | None = None, *, state: str = "ready", load: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Setup]:
    setup = Setup(null or {}, settings, load or {})
    async with trio.open_nursery() as nursery:
        await nursery.start(setup.engine.run)
        await setup.engine.wait_state(state)
        yield setup
        nursery.cancel_scope.cancel()
    assert setup.engine.state == "stopped"
    assert setup.engine.statistics().live_sequences == 0


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await trio.lowlevel.checkpoint()


def ask(*prompt: int, max_tokens: int = FOREVER, **options: Any) -> GenerateRequest:
    return GenerateRequest(prompt or (1, 2, 3), max_tokens, Sampling(seed=1), **options)


async def read(stream: TokenStream) -> tuple[list[int], str | None]:
    tokens: list[int] = []
    finish = None
    async for chunk in stream:
        tokens += chunk.tokens
        finish = chunk.finish
    return tokens, finish


async def answer(engine: Engine, request: GenerateRequest) -> tuple[list[int], str | None]:
    async with engine.generate(request) as stream:
        return await read(stream)


@asynccontextmanager
async def background(engine: Engine, request: GenerateRequest) -> AsyncIterator[list[BaseException]]:
    """A request in a task of its own; what it raises is collected."""
    errors: list[BaseException] = []

    async def work() -> None:
        try:
            await answer(engine, request)
        except Exception as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        yield errors
        nursery.cancel_scope.cancel()


# --- leases ---------------------------------------------------------------------------------------


@in_trio
async def test_an_answer_arrives_whole_and_in_order() -> None:
    async with running({"first_token": 100}) as setup:
        assert await answer(setup.engine, ask(max_tokens=500)) == (list(range(100, 600)), "length")
        await setup.idle()
        assert setup.metric("lmx_generated_tokens_total") == 500
        assert setup.metric("lmx_prompt_tokens_total") == 3
        assert setup.metric("lmx_time_to_first_token_seconds_count") == 1
        assert setup.metric("lmx_inter_token_seconds_count") == 499
        assert setup.metric("lmx_cancel_free_seconds_count") == 0
        assert b"lmx_live_leases" in setup.metrics.render()


@in_trio
async def test_many_answers_at_once_are_each_whole() -> None:
    async with running() as setup, trio.open_nursery() as nursery:

        async def one(length: int) -> None:
            assert await answer(setup.engine, ask(max_tokens=length)) == (list(range(length)), "length")

        for length in range(1, 60):
            nursery.start_soon(one, length)
    await trio.lowlevel.checkpoint()


@in_trio
async def test_logprobs_come_with_their_tokens() -> None:
    async with running() as setup:
        request = GenerateRequest((1,), 20, Sampling(seed=1, logprobs=2))
        async with setup.engine.generate(request) as stream:
            async for chunk in stream:
                assert [len(logprobs.top) for logprobs in chunk.logprobs] == [2] * len(chunk.tokens)


@in_trio
async def test_receive_after_the_finish_is_the_end_and_cancelled_takes_nothing() -> None:
    async with running() as setup, setup.engine.generate(ask(max_tokens=5)) as stream:
        await until(lambda: setup.engine.statistics().live_sequences == 0)
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.receive()
        assert scope.cancelled_caught
        assert (await stream.receive()).tokens == (0, 1, 2, 3, 4)
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()


class Mishap(Exception):
    pass


async def _mishap(engine: Engine) -> None:
    async with engine.generate(ask()) as stream:
        await stream.receive()
        raise Mishap


@in_trio
async def test_leaving_frees_however_it_is_left() -> None:
    async with running({"step_ms": 1}) as setup:
        engine = setup.engine
        async with engine.generate(ask()) as stream:
            await stream.receive()
            assert engine.statistics().live_sequences == 1
        assert engine.statistics().live_sequences == 0
        with pytest.raises(Mishap):
            await _mishap(engine)
        assert engine.statistics().live_sequences == 0
        with trio.CancelScope() as scope:
            async with engine.generate(ask()) as stream:
                await stream.receive()
                scope.cancel()
                await trio.sleep_forever()
        assert engine.statistics().live_sequences == 0
        await setup.idle()
        reasons = ("stopped", "error", "cancelled")
        assert [setup.metric("lmx_cancellations_total", reason=reason) for reason in reasons] == [1, 1, 1]
        assert setup.metric("lmx_cancel_free_seconds_count") == 3


async def _queued(setup: Setup) -> None:
    await until(lambda: setup.own.queued == 1)


async def _in_prefill(setup: Setup) -> None:
    await until(lambda: setup.own.prefilling == 1)


async def _submitted(setup: Setup) -> None:
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("reached", [_queued, _in_prefill, _submitted])
@in_trio
async def test_a_request_cancelled_before_its_first_token_is_free(reached: Callable[[Setup], Awaitable[None]]) -> None:
    rows = 1 if reached is _queued else 2
    async with running({"step_ms": 1}, load={"max_rows": rows}) as setup, background(setup.engine, ask()) as errors:
        await until(lambda: setup.own is not None and setup.own.decoding == 1)
        with trio.CancelScope() as scope:
            async with setup.engine.generate(ask(*range(11, 500_000))):
                await reached(setup)
                assert setup.engine.statistics().waiting == 1
                scope.cancel()
                await trio.sleep_forever()
        record = setup.engine.statistics()
        assert (record.live_leases, record.live_sequences, record.waiting) == (1, 1, 0)
        assert errors == []


@in_trio
async def test_a_request_cancelled_at_its_end_is_free() -> None:
    """Whether the engine or the reader ends it first."""
    async with running() as setup:
        for length in range(1, 40):
            with trio.CancelScope() as scope:
                async with setup.engine.generate(ask(max_tokens=length)) as stream:
                    await stream.receive()
                    scope.cancel()
                    await trio.sleep_forever()
            assert setup.engine.statistics().live_sequences == 0
        await setup.idle()


@in_trio
async def test_a_lease_is_taken_before_the_load_and_can_be_left_during_it(tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    async with running({"load": f"wait:{loaded}"}, state="loading") as setup:
        with trio.CancelScope() as scope:
            async with setup.engine.generate(ask()) as stream:
                record = setup.engine.statistics()
                assert (record.live_leases, record.live_sequences) == (1, 0)
                scope.cancel()
                await stream.receive()
        assert setup.engine.statistics().live_leases == 0
        async with setup.engine.generate(ask(max_tokens=3)) as stream:
            loaded.touch()
            assert await read(stream) == ([0, 1, 2], "length")


@in_trio
async def test_a_storm_of_cancellations_leaves_nothing() -> None:
    chance = random.Random(8)
    async with running(load={"max_rows": 4}) as setup:

        async def one(prompt: range, chunks: int, scope: trio.CancelScope) -> None:
            with scope:
                async with setup.engine.generate(ask(*prompt, max_tokens=2000)) as stream:
                    for _ in range(chunks):
                        await stream.receive()
                    scope.cancel()
                    await stream.receive()

        async with trio.open_nursery() as nursery:
            for _ in range(200):
                scope = trio.CancelScope(deadline=trio.current_time() + chance.random() / 5)
                nursery.start_soon(one, range(11, chance.randrange(12, 5000)), chance.randrange(3), scope)
        await setup.idle()


# --- limits ---------------------------------------------------------------------------------------


@in_trio
async def test_the_queue_is_bounded() -> None:
    async with running({"load": "hang"}, state="loading", max_queue=2) as setup:
        async with setup.engine.generate(ask()), setup.engine.generate(ask()):
            with pytest.raises(QueueFull, match="2 requests wait") as caught:
                async with setup.engine.generate(ask()):
                    pass
            assert caught.value.retry_after_s == 1.0
            assert setup.engine.statistics().live_leases == 2
        async with setup.engine.generate(ask()):
            assert setup.engine.statistics().live_leases == 1


@in_trio
async def test_a_reader_that_does_not_read_is_cancelled() -> None:
    async with running(max_unread_tokens=100) as setup:
        async with setup.engine.generate(ask()) as stream:
            await until(lambda: setup.engine.statistics().live_sequences == 0)
            with pytest.raises(SequenceFailed, match="101 tokens were not read"):
                await stream.receive()
        await setup.idle()
        assert setup.metric("lmx_cancellations_total", reason="slow_reader") == 1


@in_trio
async def test_a_deadline_counts_while_loading_and_in_the_engine(tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    async with running({"load": f"wait:{loaded}", "step_ms": 1}, state="loading") as setup:
        with pytest.raises(DeadlineExceeded):
            await answer(setup.engine, ask(deadline_s=0.01))
        loaded.touch()
        with pytest.raises(DeadlineExceeded):
            await answer(setup.engine, ask(deadline_s=0.3))
        await setup.idle()


@in_trio
async def test_the_context_bounds_prompt_and_answer() -> None:
    async with running(load={"context_length": 20}) as setup:
        assert await answer(setup.engine, ask(*range(11, 26))) == ([0, 1, 2, 3, 4], "length")
        with pytest.raises(ContextLengthExceeded, match=r"20 tokens.*20 tokens"):
            await answer(setup.engine, ask(*range(11, 31)))
        await setup.idle()


# --- failures -------------------------------------------------------------------------------------


@in_trio
async def test_one_sequence_fails_alone() -> None:
    async with running({"step_ms": 1}) as setup, background(setup.engine, ask()) as errors:
        await until(lambda: setup.own is not None and setup.own.decoding == 1)
        with pytest.raises(SequenceFailed, match="non_finite"):
            await answer(setup.engine, ask(FAIL))
        assert setup.engine.statistics().live_sequences == 1
        assert (errors, setup.engine.restarts) == ([], 0)


@in_trio
async def test_what_only_the_engine_can_check_is_the_clients_fault() -> None:
    async with running({"fail_code": "invalid_request"}) as setup:
        with pytest.raises(InvalidRequest, match="null engine: told to fail this sequence"):
            await answer(setup.engine, ask(FAIL))
        await setup.idle()
        assert setup.engine.restarts == 0


@in_trio
async def test_death_fails_answers_that_had_begun_at_once_and_the_others_are_served() -> None:
    async with running({"step_ms": 1}, load={"max_rows": 1}) as setup, background(setup.engine, ask()) as errors:
        await until(lambda: setup.own is not None and setup.own.decoding == 1)
        async with setup.engine.generate(ask(max_tokens=3)) as queued:
            await until(lambda: setup.own.queued == 1)
            pid = setup.engine.statistics().pid
            os.kill(pid, signal.SIGKILL)
            await until(lambda: bool(errors))
            assert await read(queued) == ([0, 1, 2], "length")
        assert isinstance(errors[0], EngineDied)
        assert "killed from outside" in errors[0].message
        assert "SIGKILL" in errors[0].message
        assert await answer(setup.engine, ask(max_tokens=3)) == ([0, 1, 2], "length")
        record = setup.engine.statistics()
        assert record.restarts == 1
        assert record.pid != pid
        assert setup.metric("lmx_engine_restarts_total", cause="killed") == 1
        await setup.idle()


@in_trio
async def test_a_stopped_engine_is_found_hung_and_replaced() -> None:
    async with running({"step_ms": 1}, hang_timeout_s=0.3) as setup:
        async with setup.engine.generate(ask()) as stream:
            await stream.receive()
            os.kill(setup.engine.statistics().pid, signal.SIGSTOP)
            with pytest.raises(EngineDied, match=r"hung.*no step for 0\.3 s"):
                await read(stream)
        assert await answer(setup.engine, ask(max_tokens=1)) == ([0], "length")


@in_trio
async def test_an_idle_engine_is_not_hung() -> None:
    async with running(hang_timeout_s=0.01) as setup:
        with trio.move_on_after(0.1):
            await setup.engine.wait_state("restarting")
        assert await answer(setup.engine, ask(max_tokens=1)) == ([0], "length")
        assert setup.engine.restarts == 0


@in_trio
async def test_a_sequence_that_is_never_freed_costs_the_engine_its_life() -> None:
    async with running({"step_ms": 1}, free_timeout_s=0.2) as setup:
        with trio.CancelScope() as scope:
            async with setup.engine.generate(ask(KEEP)) as stream:
                await stream.receive()
                scope.cancel()
                await stream.receive()
        assert setup.engine.statistics().live_leases == 0
        await setup.engine.wait_state("ready")
        assert setup.engine.restarts == 1
        assert "did not free" in str(setup.engine.statistics().last_failure)


@in_trio
async def test_the_request_that_ran_at_a_crash_is_tried_once_more_and_alone(tmp_path: Path) -> None:
    words = "[METAL] Command buffer execution failed: Insufficient Memory"
    null = {"step_ms": 20, "crash_flag": tmp_path / "crashed", "crash_text": words}
    async with running(null) as setup, trio.open_nursery() as nursery:
        engine = setup.engine
        async with background(engine, ask()) as errors:
            await until(lambda: setup.own is not None and setup.own.decoding == 1)
            suspect = ask(CRASH, *range(11, 3000), max_tokens=2)
            answers: list[object] = []

            async def try_suspect() -> None:
                answers.append(await answer(engine, suspect))

            nursery.start_soon(try_suspect)
            await until(lambda: bool(errors))
            assert isinstance(errors[0], EngineDied)
            assert "ran out of memory" in str(errors[0])
            assert words in str(errors[0])
            async with engine.generate(ask(max_tokens=1)) as other:
                await until(lambda: setup.own is not None and setup.own.prefilling == 1)
                record = engine.statistics()
                assert (record.live_leases, record.live_sequences) == (2, 1)
                assert await read(other) == ([0], "length")
        await until(lambda: bool(answers))
        assert answers == [([0, 1], "length")]
        await setup.idle()


@in_trio
async def test_a_request_that_crashes_twice_is_refused_and_the_others_live() -> None:
    async with running() as setup:
        with pytest.raises(RequestCrashesEngine, match=r"more than once.*SIGABRT"):
            await answer(setup.engine, ask(CRASH))
        assert await answer(setup.engine, ask(max_tokens=1)) == ([0], "length")
        assert setup.engine.restarts == 2


@in_trio
async def test_a_request_that_hangs_twice_is_refused() -> None:
    async with running(hang_timeout_s=0.2) as setup:
        with pytest.raises(RequestCrashesEngine, match=r"more than once.*hung"):
            await answer(setup.engine, ask(HANG))


@in_trio
async def test_a_suspect_whose_client_left_is_not_tried_again(tmp_path: Path) -> None:
    async with running({"crash_flag": tmp_path / "crashed"}, restart_backoff_s=60, restart_backoff_max_s=60) as setup:
        with trio.CancelScope() as scope:
            async with setup.engine.generate(ask(CRASH)) as stream:
                await setup.engine.wait_state("restarting")
                assert setup.engine.statistics().live_leases == 1
                scope.cancel()
                await stream.receive()
        assert setup.engine.statistics().live_leases == 0


# --- loading, back-off, breaker -------------------------------------------------------------------


@in_trio
async def test_an_invalid_model_is_not_retried_until_the_cooldown_is_over() -> None:
    async with running({"load": "model_invalid"}, state="failed", restart_cooldown_s=1000) as setup:
        with pytest.raises(ModelLoadingFailed, match="told to fail with model_invalid") as caught:
            await answer(setup.engine, ask())
        assert 900 < (caught.value.retry_after_s or 0) <= 1000
        assert setup.engine.restarts == 0


@in_trio
async def test_a_request_after_the_cooldown_tries_once_more() -> None:
    async with running({"load": "model_invalid"}, state="failed", restart_cooldown_s=0) as setup:
        with pytest.raises(ModelLoadingFailed):
            await answer(setup.engine, ask())
        assert setup.engine.restarts == 1
        del setup.environment["LMX_NULL_LOAD"]
        assert await answer(setup.engine, ask(max_tokens=1)) == ([0], "length")
        assert setup.engine.state == "ready"


@in_trio
async def test_an_engine_that_keeps_dying_opens_the_breaker_and_fails_who_waits() -> None:
    async with running({"load": "exit"}, state="loading", max_restarts=2, restart_cooldown_s=1000) as setup:
        with pytest.raises(ModelLoadingFailed, match="exit code 3; null engine: told to exit"):
            await answer(setup.engine, ask())
        assert setup.engine.state == "failed"
        assert setup.metric("lmx_engine_restarts_total", cause="bug") == 3


@in_trio
async def test_a_load_that_takes_too_long_is_ended() -> None:
    async with running({"load": "hang"}, state="failed", load_timeout_s=0.2, max_restarts=0) as setup:
        assert "did not load within 0.2 s" in str(setup.engine.statistics().last_failure)


@in_trio
async def test_a_command_that_does_not_exist_is_a_failed_load() -> None:
    async with running(state="failed", command=["/nowhere/engine"], max_restarts=0) as setup:
        with pytest.raises(ModelLoadingFailed, match="cannot start /nowhere/engine: No such file"):
            await answer(setup.engine, ask())


# --- the end --------------------------------------------------------------------------------------


@in_trio
async def test_stopping_ends_what_runs_with_a_clear_error() -> None:
    async with trio.open_nursery() as outside:
        errors: list[Exception] = []

        async def one(engine: Engine) -> None:
            with pytest.raises(ModelOverloaded, match="was stopped: the server shuts down") as caught:
                await answer(engine, ask())
            errors.append(caught.value)

        async with running({"step_ms": 1}) as setup:
            outside.start_soon(one, setup.engine)
            await until(lambda: setup.own is not None and setup.own.decoding == 1)
        await until(lambda: bool(errors))
        with pytest.raises(ModelOverloaded, match="was stopped"):
            await answer(setup.engine, ask())


@in_trio
async def test_every_request_can_be_ended_with_one_error() -> None:
    async with running({"step_ms": 1}) as setup, background(setup.engine, ask()) as errors:
        await until(lambda: setup.own is not None and setup.own.decoding == 1)
        setup.engine.fail_all(ModelOverloaded("closing time"))
        await until(lambda: bool(errors))
        assert str(errors[0]) == "closing time"
        await setup.idle()
        assert setup.metric("lmx_cancellations_total", reason="shutdown") == 1


@pytest.mark.parametrize("null", [{"load": "hang"}, {}])
@in_trio
async def test_a_server_cancelled_while_the_engine_starts_leaves_no_process(null: dict[str, Any]) -> None:
    """At any moment of the start: each round is cancelled some scheduling passes later."""
    others = children()
    for passes in range(12):
        setup = Setup(null, {}, {})
        async with trio.open_nursery() as nursery:
            await nursery.start(setup.engine.run)
            for _ in range(passes * 3):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert children() == others


@in_trio
async def test_a_stopped_process_is_killed_at_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmx.serving.engine, "STOP_GRACE_S", 0.1)
    async with running() as setup:
        os.kill(setup.engine.statistics().pid, signal.SIGSTOP)


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returncode", "line", "cause"),
    [
        (-signal.SIGABRT, "libc++abi: [metal::malloc] Resource limit (499000) exceeded.", "buffer_handles"),
        (-signal.SIGABRT, "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)", "out_of_memory"),
        (-signal.SIGABRT, "GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)", "gpu_timeout"),
        (1, "MemoryError", "out_of_memory"),
        (1, "RuntimeError: [cuda] out of memory", "out_of_memory"),
        (1, "KeyError: 'layers'", "bug"),
        (0, "", "bug"),
        (-signal.SIGSEGV, "Segmentation fault", "bug"),
        (-signal.SIGKILL, "", "killed"),
    ],
)
def test_the_cause_of_a_death_is_named(returncode: int, line: str, cause: str) -> None:
    failure = classify(returncode, ["starting", line], loading=False)
    assert failure.cause == cause
    assert line in str(failure)


def test_an_abort_is_told_by_what_was_said_before_the_fault_handler() -> None:
    lines = [
        "starting",
        "ggml.c:77: GGML_ASSERT(a) failed",
        "Fatal Python error: Aborted",
        "",
        "Thread 0x1:",
        "  File x",
    ]
    assert "GGML_ASSERT(a) failed" in str(classify(-signal.SIGABRT, lines, loading=True))
