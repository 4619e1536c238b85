"""A model that gives up memory for another one: at once what nobody needs, and no answer is lost."""

import sys
from pathlib import Path

import pytest

from lmx.hub.inventory import find
from lmx.protocol import Trim
from lmx.serving.models import Served
from lmx.serving.models.demand import demand
from lmx.serving.models.options import LoadOptions, options_of
from tests.engine_client import engine
from tests.models import build_gguf, build_model
from tests.models_zoo import ask, in_trio, live_of, managing, pid_of, state


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for name in ("ant", "bee"):
        build_model("llama", folder / name, num_hidden_layers=2, hidden_size=32)
    return folder


def prompt(tokens: int, first: int = 0) -> list[int]:
    return [3 + (first + 7 * i) % 900 for i in range(tokens)]


def test_an_engine_does_with_less(zoo: Path) -> None:
    with engine(zoo / "ant", max_rows=1) as client:
        assert client.ready is not None
        quantum = 256 * client.ready.kv_bytes_per_token
        (expected,) = client.run([prompt(1000)], 400)
        client.run([prompt(2000, first=i) for i in range(3)], 2)
        assert client.idle_stats().prefix.ram_bytes > 20 * quantum
        runs = client.submit(prompt(1000), 400)
        client.wait(lambda: len(client.answers[runs].tokens) > 3)
        small, large = client.submit(prompt(300), 8), client.submit(prompt(1300), 8)
        client.send(Trim(4 * quantum))
        client.wait_freed(large)
        failed = client.answers[large].failed
        assert failed is not None
        assert failed.code == "never_fits"
        assert "1300 tokens" in failed.message
        stats = client.idle_stats()
        assert stats.kv_budget_bytes == 4 * quantum
        assert stats.prefix.ram_bytes == 0  # what runs holds more than all of it
        client.wait_freed(runs, small)
        assert client.answers[runs].tokens == expected
        assert client.answers[small].finish == "length"
        late = client.submit(prompt(1300), 8)
        client.wait_freed(late)
        assert client.answers[late].failed is not None
        stats = client.idle_stats()
        assert (stats.arena_bytes, stats.kv_used_bytes) == (0, 0)
        assert 0 < stats.prefix.ram_bytes <= 4 * quantum
        client.send(Trim(20 * quantum))
        assert len(client.run([prompt(1300)], 8)[0]) == 8


def test_llama_cpp_keeps_its_buffer(tmp_path: Path) -> None:
    with engine(build_gguf(tmp_path / "model.gguf"), backend="llama", max_rows=2, context_length=1024) as client:
        assert client.ready is not None
        client.run([prompt(700), prompt(600, first=5)], 4)
        before = client.idle_stats()
        client.send(Trim(before.prefix.ram_bytes // 2))
        client.idle_stats()  # perhaps from before
        after = client.idle_stats()
        assert after.kv_budget_bytes == before.kv_budget_bytes
        assert 0 < after.prefix.ram_bytes <= before.prefix.ram_bytes // 2
        client.run([prompt(900)], 4)


@in_trio
async def test_a_second_model_gets_what_the_first_can_do_without(zoo: Path, tmp_path: Path) -> None:
    real = {"command": [sys.executable, "-P", "-m", "lmx.engine"], "openblas": "off"}
    settings = live_of(zoo, zoo).now
    options = options_of(settings, ["ant"], LoadOptions(), jit=True)
    need = demand(find(str(zoo / "ant"), settings.model.cache_path), options, settings, embeds=False)
    spare = need.kv_bytes(2**40) - need.kv_bytes(0)
    assert spare > 0
    limit = 2 * need.least_bytes + spare // 2
    async with managing(zoo, tmp_path, engine=real, memory={"limit_bytes": limit}) as models:
        await state(models, "ant", "ready")
        first, pid = await ask(models, "ant"), pid_of(models, "ant")
        ant = models.peek("ant", Served)
        assert ant is not None
        before = ant.engine.statistics().kv_budget_bytes
        assert before == need.kv_bytes(2**40)
        assert len(await ask(models, "bee")) == 3
        assert await ask(models, "ant") == first
        assert pid_of(models, "ant") == pid
        assert models.states() == {"ant": "ready", "bee": "ready"}
        told = ant.engine.statistics()
        assert told.engine is not None
        assert need.kv_bytes(0) <= told.kv_budget_bytes == told.engine.kv_budget_bytes < before
        assert models.memory.report().reserved_bytes <= limit
