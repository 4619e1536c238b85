"""Models that come and go: what a request, an operator, a clock and a shortage of memory do to each of them.

The manager itself, with engine processes (the null engine: no weights), words and files that are real.
"""

import os
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx.errors import InsufficientMemory, LmxError, ModelLoadingFailed, ModelNotFound, ModelOverloaded
from lmx.hub.inventory import EMBEDDED_ID
from lmx.serving.models import Served
from lmx.serving.models.options import LoadOptions
from tests.api_server import write_model
from tests.models_soak import Act, acts, live
from tests.models_zoo import (
    ENDLESS,
    NAMES,
    answering,
    ask,
    engines,
    in_trio,
    limit_for,
    managing,
    pid_of,
    state,
)

SOAK = int(os.environ.get("LMX_SOAK_MODELS", "90"))
EXAMPLES = max(SOAK // 9, 1)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for name in NAMES:
        write_model(folder / name)
    return folder


@in_trio
async def test_a_request_loads_the_model_that_it_names(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path) as models:
        await state(models, "ant", "ready")
        await models.looked.wait()
        assert [entry.id for entry in models.available()] == ["bee", "cat", "dog", EMBEDDED_ID]
        assert len(await ask(models, "bee")) == 3
        assert [served.id for served in models.listing()] == ["ant", "bee"]
        status = models.status("BEE")
        assert status is not None
        assert (status.state, status.leases, status.kept, status.ttl_s) == ("ready", 0, False, 3600.0)
        assert status.settings["ttl_s"] == (3600.0, "default")


@in_trio
async def test_fifty_first_requests_are_one_load(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path) as models:
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(ask, models, "bee")
        assert len(engines()) == 2
        assert (await models.take("bee")).slot.leases == 1


@in_trio
async def test_a_model_goes_when_nobody_has_used_it(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path, model={"jit_ttl_s": 0.05}, models={"cat": {"ttl_s": 0.0}}) as models:
        await ask(models, "bee")
        await ask(models, "cat")
        await state(models, "bee", "gone")
        assert models.states().keys() == {"ant", "cat"}
        assert len(engines()) == 2
        assert len(await ask(models, "bee")) == 3


@in_trio
async def test_the_clock_runs_from_the_last_release(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path, model={"jit_ttl_s": 0.01}) as models, trio.open_nursery() as nursery:
        async with answering(models, "bee", nursery):
            status = models.status("bee")
            assert status is not None
            assert status.expires_in_s is None
        await state(models, "bee", "gone")


@in_trio
async def test_a_load_that_nobody_waits_for_ends(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with managing(zoo, tmp_path) as models, trio.open_nursery() as nursery:
        await state(models, "ant", "ready")
        monkeypatch.setenv("LMX_NULL_LOAD", "hang")
        scopes = [trio.CancelScope() for _ in range(3)]

        async def wait(scope: trio.CancelScope) -> None:
            with scope:
                await ask(models, "bee")

        for scope in scopes:
            nursery.start_soon(wait, scope)
        await state(models, "bee", "loading")
        for scope in scopes[:2]:
            scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert models.states()["bee"] == "loading"
        scopes[2].cancel()
        await state(models, "bee", "gone")
        assert len(engines()) == 1
        monkeypatch.delenv("LMX_NULL_LOAD")
        assert len(await ask(models, "bee")) == 3


@in_trio
async def test_a_model_that_fails_to_load_hurts_nobody(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with managing(zoo, tmp_path) as models:
        await state(models, "ant", "ready")
        monkeypatch.setenv("LMX_NULL_LOAD", "model_invalid")
        with pytest.raises(ModelLoadingFailed, match="told to fail"):
            await ask(models, "bee")
        with pytest.raises(ModelLoadingFailed, match="told to fail"):
            await models.load("cat", LoadOptions())
        assert len(await ask(models, "ant")) == 3
        assert models.status("cat") is None


@in_trio
async def test_what_is_not_there_is_told(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path) as models:
        for name in ("cow", "../ant", "ant\0", "x" * 5000, str(zoo / "cow")):
            with pytest.raises((ModelNotFound, LmxError)) as refused:
                await models.take(name)
            assert refused.value.status == 404, name
        with pytest.raises(ModelNotFound, match="not loaded"):
            await models.unload("bee")


@in_trio
async def test_without_jit_only_what_is_loaded_answers(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path, model={"jit": False}) as models:
        with pytest.raises(ModelNotFound):
            await models.take("bee")
        assert models.available() == []
        loaded = await models.load("bee", LoadOptions(context_length=512, pin=True))
        assert (loaded.state, loaded.pinned, loaded.kept) == ("ready", True, True)
        assert loaded.settings["context_length"] == (512, "request")
        assert len(await ask(models, "bee")) == 3


@in_trio
async def test_unloading_lets_requests_end_and_the_next_one_loads_again(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path) as models, trio.open_nursery() as nursery:
        async with answering(models, "bee", nursery):
            (first,) = [child for child in engines() if child.pid == pid_of(models, "bee")]
            nursery.start_soon(models.unload, "bee", 1e6)
            await state(models, "bee", "draining")
            nursery.start_soon(ask, models, "bee")  # gets a model of its own, when this one is gone
            await state(models, "bee", "reading", "waiting")
        await state(models, "bee", "ready")
        assert not first.is_running()
        unloaded = await models.unload("bee")
        assert unloaded.id == "bee"
        assert "bee" not in models.states()


@in_trio
async def test_who_does_not_end_in_time_is_ended(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path) as models:
        errors: list[LmxError] = []
        begun = trio.Event()

        async def endless() -> None:
            try:
                async with models.use("bee") as served, served.engine.generate(ENDLESS) as stream:
                    while True:
                        await stream.receive()
                        begun.set()
            except ModelOverloaded as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(endless)
            await begun.wait()
            await models.unload("bee", 0.0)
        assert "unloaded by hand" in errors[0].message


@in_trio
async def test_a_load_with_other_settings_is_a_new_load(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path, models={"bee": {"context_length": 1024}}) as models:
        first = await models.load("bee", LoadOptions())
        pid = pid_of(models, "bee")
        same = await models.load("bee", LoadOptions(ttl_s=60.0))
        assert pid_of(models, "bee") == pid
        assert same.settings["ttl_s"] == (60.0, "request")
        assert first.settings["context_length"] == (1024, "model")
        other = await models.load("bee", LoadOptions(context_length=256))
        assert pid_of(models, "bee") != pid
        assert other.settings["context_length"] == (256, "request")
        assert other.settings["ttl_s"] == (60.0, "request")  # a reload keeps them


@in_trio
async def test_unloading_ends_a_load(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with managing(zoo, tmp_path) as models, trio.open_nursery() as nursery:
        await state(models, "ant", "ready")
        monkeypatch.setenv("LMX_NULL_LOAD", "hang")
        errors: list[LmxError] = []

        async def load() -> None:
            try:
                await models.load("bee", LoadOptions())
            except LmxError as error:
                errors.append(error)

        nursery.start_soon(load)
        await state(models, "bee", "loading")
        await models.unload("bee")
        await trio.testing.wait_all_tasks_blocked()
        assert [type(error) for error in errors] == [ModelOverloaded]


@in_trio
async def test_idle_models_make_room_least_recently_used_first(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path, memory={"limit_bytes": limit_for(zoo, 2)}) as models:
        await state(models, "ant", "ready")
        for name in ("bee", "ant", "cat"):
            await ask(models, name)
        assert models.states().keys() == {"ant", "cat"}
        await models.load("ant", LoadOptions(pin=True))
        await ask(models, "bee")
        await ask(models, "dog")
        assert models.states().keys() == {"ant", "dog"}
        assert len(engines()) == 2


@in_trio
async def test_what_can_never_fit_is_refused_before_anything_is_touched(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path, memory={"limit_bytes": limit_for(zoo, 1)}) as models:
        await models.load("ant", LoadOptions(pin=True))
        with pytest.raises(InsufficientMemory, match=r"needs .*budget.*pinned: ant"):
            await ask(models, "bee")
        assert models.states()["ant"] == "ready"
        assert len(engines()) == 1


@in_trio
async def test_a_working_model_is_waited_for(zoo: Path, tmp_path: Path) -> None:
    memory = {"limit_bytes": limit_for(zoo, 1)}
    async with managing(zoo, tmp_path, memory=memory) as models, trio.open_nursery() as nursery:
        async with answering(models, "ant", nursery):
            nursery.start_soon(ask, models, "bee")
            await state(models, "bee", "waiting")
            assert models.states()["ant"] == "ready"
        await state(models, "bee", "ready")
        assert len(engines()) == 1


@in_trio
async def test_a_working_model_can_be_what_refuses(zoo: Path, tmp_path: Path) -> None:
    memory = {"limit_bytes": limit_for(zoo, 1), "policy": "refuse"}
    async with managing(zoo, tmp_path, memory=memory) as models, trio.open_nursery() as nursery:
        async with answering(models, "ant", nursery):
            with pytest.raises(InsufficientMemory, match=r"when ant is idle"):
                await ask(models, "bee")
        assert len(await ask(models, "bee")) == 3


@in_trio
async def test_a_working_model_can_be_made_to_go(zoo: Path, tmp_path: Path) -> None:
    memory = {"limit_bytes": limit_for(zoo, 1), "policy": "preempt", "drain_s": 0.0}
    async with managing(zoo, tmp_path, memory=memory) as models:
        ended: list[str] = []
        begun = trio.Event()

        async def endless() -> None:
            try:
                async with models.use("ant") as served, served.engine.generate(ENDLESS) as stream:
                    while True:
                        await stream.receive()
                        begun.set()
            except ModelOverloaded as error:
                ended.append(error.message)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(endless)
            await begun.wait()
            assert len(await ask(models, "bee")) == 3
        assert "its memory is needed for bee" in ended[0]


@in_trio
async def test_two_that_do_not_fit_together_take_turns(zoo: Path, tmp_path: Path) -> None:
    """Everybody is answered, and nobody is thrown out under a request."""
    memory = {"limit_bytes": limit_for(zoo, 1), "wait_s": 1e3}
    async with managing(zoo, tmp_path, memory=memory) as models:
        answers: list[int] = []

        async def bot(name: str) -> None:
            for _ in range(3):
                answers.append(len(await ask(models, name)))

        async with trio.open_nursery() as nursery:
            for name in ("bee", "cat") * 3:
                nursery.start_soon(bot, name)
        assert answers == [3] * 18


@in_trio
async def test_a_crash_is_one_models_own(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path) as models:
        await ask(models, "bee")
        (engine,) = [child for child in engines() if child.pid == pid_of(models, "bee")]
        engine.kill()
        await state(models, "bee", "restarting")
        assert len(await ask(models, "ant")) == 3
        assert len(await ask(models, "bee")) == 3


@in_trio
async def test_a_model_whose_folder_vanishes_goes_on_until_it_is_unloaded(tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    folder.mkdir()
    for name in ("ant", "bee"):
        write_model(folder / name)
    async with managing(folder, tmp_path / "data") as models:
        await ask(models, "bee")
        os.rename(folder / "bee", tmp_path / "away")
        await trio.to_thread.run_sync(models.library.scan)
        assert len(await ask(models, "bee")) == 3
        await models.unload("bee")
        with pytest.raises(ModelNotFound):
            await models.take("bee")


@pytest.mark.parametrize("policy", ["wait", "preempt", "refuse"])
def test_random_lives_leave_nothing_behind(zoo: Path, tmp_path: Path, policy: str) -> None:
    told = trio.run(partial(live, zoo, tmp_path, list(acts(1, SOAK // 3)), policy=policy))
    assert sum(told.values()) == SOAK // 3


ACTS = st.builds(
    Act,
    st.sampled_from(["ask", "ask", "give up", "load", "unload", "kill", "settle"]),
    st.sampled_from(NAMES[:3]),
    st.sampled_from([1, 8, 200]),
)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ACTS, max_size=12), st.sampled_from(["wait", "preempt", "refuse"]))
def test_any_life_leaves_nothing_behind(zoo: Path, wanted: list[Act], policy: str) -> None:
    trio.run(partial(live, zoo, zoo / "data", wanted, policy=policy))


@in_trio
async def test_a_request_may_say_how_long_its_model_stays(zoo: Path, tmp_path: Path) -> None:
    async with managing(zoo, tmp_path) as models:
        for ttl_s in (5.0, 0.05):
            (await models.take("bee", Served, ttl_s)).release()  # nobody waits: the load is given up
            lease = await models.take("bee", Served, ttl_s)
            await state(models, "bee", "ready")
            status = models.status("bee")
            assert status is not None
            assert status.settings["ttl_s"] == (ttl_s, "request")
            lease.release()
        await state(models, "bee", "gone")
