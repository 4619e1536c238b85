"""A request that ends its engine is found out and refused, however often it is sent again, and costs nobody else the
model."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import trio

from lmx.errors import EngineDied, RequestCrashesEngine
from lmx.protocol import Sampling
from lmx.serving.lease import GenerateRequest
from lmx.serving.suspects import MEMORY_S, Suspects, content_key
from tests.api_server import Server, answer_text, with_server, write_model
from tests.test_serving_engine import CRASH, HANG, answer, ask, background, in_trio, running, until

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


# --- through the API: the engine may die twice, and max_restarts is 1 -----------------------------------


@pytest.mark.parametrize("crash_after", [-1, 0, 3])
def test_an_sdks_retries_of_a_poisonous_request_end_with_422(
    crash_after: int, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @with_server(LMX_NULL_CRASH_TOKEN=CRASH, LMX_NULL_CRASH_AFTER=crash_after, max_restarts=1, restart_backoff_s=0.01)
    async def test(server: Server) -> None:
        def ask_sdk() -> None:
            with (
                openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as sdk,
                pytest.raises(openai.APIError) as told,
            ):
                sdk.completions.create(model="tiny", prompt=[CRASH, 20], max_tokens=9)
            assert isinstance(told.value, openai.UnprocessableEntityError)
            assert told.value.code == "request_crashes_engine"

        await trio.to_thread.run_sync(ask_sdk)
        await trio.to_thread.run_sync(ask_sdk)  # and every later time at once
        response = await server.http.post(COMPLETIONS, json={"prompt": [20], "max_tokens": 2})
        assert response.json()["choices"][0]["text"] == answer_text(2)
        for stream in (False, True):  # another seed, a stream: the same request
            body = {"prompt": [CRASH, 20], "max_tokens": 9, "seed": 5, "user": "x", "stream": stream}
            response = await server.http.post(COMPLETIONS, json=body)
            assert response.status_code == 422
            assert response.json()["error"]["code"] == "request_crashes_engine"
        assert server.engine.restarts == 2
        await server.free()

    test(model_folder, monkeypatch)


@with_server(LMX_NULL_CRASH_TOKEN=CRASH, restart_backoff_s=0.01)
async def test_a_stream_that_ends_its_engine_is_told_so(server: Server) -> None:
    response = await server.http.post(COMPLETIONS, json={"prompt": [CRASH], "stream": True, "n": 3})
    *_, last = response.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_crashes_engine"
    assert server.engine.restarts <= 2  # three choices are one request


@with_server(LMX_NULL_CRASH_TOKEN=CRASH, LMX_NULL_STEP_MS=5, restart_backoff_s=0.01, max_restarts=1)
async def test_those_beside_it_are_served_and_different_poisons_do_not_open_the_breaker(server: Server) -> None:
    statuses: dict[int, int] = {}

    async def send(number: int, prompt: list[int]) -> None:
        response = await server.http.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 3})
        statuses[number] = response.status_code

    for poison in range(3):
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(send, number, [30 + number] * 2000)
            nursery.start_soon(send, 99, [CRASH, 20 + poison])
        assert statuses.pop(99) == 422
        # Whoever had not begun is answered; whoever had is told to try again.
        assert set(statuses.values()) <= {200, 503}
    assert await server.engine.wait_state("ready", "failed") == "ready"
    await send(0, [30] * 2000)
    assert statuses[0] == 200
    await server.free()


# --- the engine's supervisor ---------------------------------------------------------------------------


@in_trio
async def test_a_client_that_leaves_a_hanging_request_and_sends_it_again_is_known() -> None:
    async with running(free_timeout_s=0.2, hang_timeout_s=100) as setup:
        for _ in range(2):
            with trio.CancelScope() as scope:
                async with setup.engine.generate(ask(HANG)) as stream:
                    await until(lambda: bool(setup.engine._ledger._in_forward))
                    scope.cancel()
                    await stream.receive()
            await setup.engine.wait_state("ready")
        with pytest.raises(RequestCrashesEngine):
            await answer(setup.engine, ask(HANG))
        assert await answer(setup.engine, ask(max_tokens=1)) == ([0], "length")


@in_trio
async def test_a_suspect_of_a_crash_in_decoding_comes_again_alone(tmp_path: Path) -> None:
    null = {"step_ms": 2, "crash_after": 5, "crash_flag": tmp_path / "crashed"}
    async with running(null) as setup:
        engine = setup.engine
        innocent = ask(21, max_tokens=400)
        async with background(engine, innocent) as errors:
            await until(lambda: setup.own is not None and setup.own.decoding == 1)
            with pytest.raises(EngineDied):
                await answer(engine, ask(CRASH, max_tokens=10))
            await until(lambda: bool(errors))
        async with engine.generate(ask(CRASH, max_tokens=10)) as again, engine.generate(ask(22, max_tokens=1)) as other:
            first = await again.receive()  # the other one waits behind it
            assert engine.statistics().waiting == 1
            tokens = len(first.tokens)
            async for chunk in again:
                tokens += len(chunk.tokens)
            assert tokens == 10
            assert (await other.receive()).finish == "length"
        assert (await answer(engine, innocent))[1] == "length"
        await setup.idle()


@in_trio
async def test_many_deaths_without_a_cause_open_the_breaker() -> None:
    async with running({"step_ms": 1}, max_restarts=2, restart_cooldown_s=1000) as setup:
        for number in range(3):  # each its own victim
            async with background(setup.engine, ask(20 + number)) as errors:
                await until(lambda: setup.engine.statistics().live_sequences == 1)
                setup.engine._process.kill("a test")  # type: ignore[union-attr]
                await setup.engine.wait_state("restarting", "failed")
            del errors
            if number < 2:
                await setup.engine.wait_state("ready")
        await setup.engine.wait_state("failed")


# --- the judgement, pure -------------------------------------------------------------------------------


def request(number: int, **options: Any) -> GenerateRequest:
    return GenerateRequest((number,), 10, Sampling(seed=number, **options))


A, B, C = (request(number) for number in (1, 2, 3))


def accuse(
    suspects: Suspects, *running: tuple[GenerateRequest, int], now: float = 0.0, **options: bool
) -> bytes | None:
    return suspects.accuse(running, now, **({"killed": False, "probe": False} | options))


def test_content_is_all_but_the_seed_and_the_asker() -> None:
    same = GenerateRequest((1,), 10, Sampling(seed=7), client="x", priority=3, deadline_s=1.0)
    assert content_key(same) == content_key(A)
    for other in (request(1, temperature=0.5), request(1, logit_bias={1: 2.0}), GenerateRequest((1,), 11, A.sampling)):
        assert content_key(other) != content_key(A)


def test_the_only_one_at_two_deaths_is_guilty_and_clears_the_others() -> None:
    suspects = Suspects()
    assert accuse(suspects, (A, 0), (B, 7)) is None
    assert (suspects.tokens_alone(A, 1), suspects.tokens_alone(B, 1), suspects.tokens_alone(C, 1)) == (1, 8, 0)
    assert accuse(suspects, (A, 0), probe=True) == content_key(A)
    suspects.refuse(content_key(A), "because", 0.0, killed=False)
    assert suspects.refusal(A, 1) == "because"
    assert suspects.tokens_alone(B, 1) == 0
    assert suspects.refusal(A, MEMORY_S + 1) == ""


def test_who_passes_its_point_is_cleared() -> None:
    suspects = Suspects()
    accuse(suspects, (A, 3))
    suspects.clear(A)
    assert suspects.tokens_alone(A, 1) == 0
    assert accuse(suspects, (A, 3)) is None


def test_in_company_it_takes_many_deaths() -> None:
    suspects = Suspects()
    assert accuse(suspects, (A, 5), (B, 5)) is None
    assert accuse(suspects, (A, 5), (B, 5)) is None
    assert accuse(suspects, (A, 5), (B, 5)) is None  # no telling which
    assert accuse(suspects, (A, 5), (C, 5)) == content_key(A)


def test_a_kill_from_outside_proves_nothing_of_who_decoded() -> None:
    suspects = Suspects()
    for _ in range(5):
        assert accuse(suspects, (A, 5), killed=True) is None
    assert suspects.tokens_alone(A, 1) == 0
    assert accuse(suspects, (A, 0), killed=True) is None
    assert accuse(suspects, (A, 0), killed=True) is None  # not alone by our doing
    assert accuse(suspects, (A, 0), killed=True, probe=True) == content_key(A)
