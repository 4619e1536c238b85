"""What models really take, and what there is for them: measured processes, the machine's and containers' limits."""

import sys
from pathlib import Path

import psutil
import pytest

from lmx.config import MemorySettings
from lmx.footprint import footprint_bytes, resident_bytes
from lmx.serving import budget
from lmx.serving.gauges import ModelGauges
from lmx.serving.measure import look
from lmx.serving.memory import Memory
from tests.models import build_model
from tests.models_zoo import ask, in_trio, managing, pid_of, state

GB = 1024**3


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    build_model("llama", folder / "ant", num_hidden_layers=2, hidden_size=32)
    return folder


@in_trio
async def test_a_real_engine_is_measured(zoo: Path, tmp_path: Path) -> None:
    real = {"command": [sys.executable, "-P", "-m", "lmx.engine"], "openblas": "off"}
    async with managing(zoo, tmp_path, engine=real) as models:
        await state(models, "ant", "ready")
        await ask(models, "ant")
        await look(models.memory, models.measured)
        (held,) = models.memory.report().models
        pid = pid_of(models, "ant")
        assert pid is not None
        assert held.pid == pid
        rss = psutil.Process(pid).memory_info().rss
        assert rss / 20 < held.measured_bytes <= 1.05 * rss  # libraries are shared with whatever engines run besides
        assert 0 < held.active_bytes < held.owned_bytes < 3 * rss
        status = models.status("ant")
        assert status is not None
        assert (status.measured_bytes, status.owned_bytes) == (held.measured_bytes, held.owned_bytes)
        gauges = {family.name: family.samples for family in ModelGauges(models).collect()}
        assert gauges["lmx_model_measured_bytes"][0].value == held.measured_bytes

        psutil.Process(pid).kill()
        await state(models, "ant", "restarting")
        await look(models.memory, models.measured)
        assert models.memory.held("ant").measured_bytes == 0
    assert models.memory.report().measured_bytes == 0


def test_a_process_that_is_gone_is_no_process() -> None:
    with pytest.raises(ProcessLookupError):
        footprint_bytes(2**22 + 1)
    assert resident_bytes() > 0


def group(folder: Path, files: dict[str, int | str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def test_a_containers_limit_is_the_machine(tmp_path: Path) -> None:
    """The group's own and those above it; what the kernel would drop first is free."""
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("0::/a/b\n")
    group(root / "a", {"memory.max": 8 * GB, "memory.current": 3 * GB, "memory.stat": f"anon 5\ninactive_file {GB}"})
    group(root / "a/b", {"memory.max": "max", "memory.current": GB, "memory.stat": "inactive_file 0"})
    assert list(budget.limits(groups, root)) == [(8 * GB, 2 * GB)]


def test_a_limit_of_the_old_kind(tmp_path: Path) -> None:
    """Also where the group's path is the host's, and its files are at the root."""
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("9:name=systemd:/\n4:cpu,memory:/docker/12\n1:cpuset:/docker/12\n")
    files = {"memory.usage_in_bytes": 2 * GB, "memory.stat": f"total_inactive_file {GB}"}
    group(root / "memory", {"memory.limit_in_bytes": 4 * GB, **files})
    assert list(budget.limits(groups, root)) == [(4 * GB, GB)]
    group(root / "memory", {"memory.limit_in_bytes": 2**63 - 4096})
    assert list(budget.limits(groups, root)) == []
    assert list(budget.limits(tmp_path / "none", root)) == []


def test_the_systems_part() -> None:
    asked: list[str] = []

    def unset(name: str) -> int:
        asked.append(name)
        return 0

    assert budget.model_bytes(100 * GB, "linux") == 90 * GB
    assert budget.model_bytes(512 * GB, "darwin", unset) == 384 * GB
    assert budget.model_bytes(48 * GB, "darwin", unset) == int(0.67 * 48 * GB)
    assert budget.model_bytes(512 * GB, "darwin", lambda name: 480 * 1024) == 480 * GB
    assert asked == ["iogpu.wired_limit_mb"] * 2


def test_this_machines_budget() -> None:
    memory = Memory.of_system(MemorySettings())
    assert 0 < memory.budget_bytes < memory.total() <= psutil.virtual_memory().total
    assert 0 < memory.available() < memory.total()
    assert Memory.of_system(MemorySettings(limit_bytes=5)).budget_bytes == 5
