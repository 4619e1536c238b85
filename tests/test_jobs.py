"""Jobs over real children and the small Hub: they outlive the server and its death, are one when asked for twice, and
leave nothing when cancelled."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
import trio.testing

import lmx.serving.jobs
from lmx.config import HubSettings
from lmx.errors import InvalidRequest
from lmx.hub.folder import inspect_folder
from lmx.hub.state import State
from lmx.serving.jobs import ConvertWanted, DownloadWanted, Job, JobNotFound, Jobs
from tests.hub_server import Hub, hub_server
from tests.server import ROOT

LARGE = "model-00001-of-00002.safetensors"
MLX = {
    "config.json": b"{}",
    LARGE: random.Random(1).randbytes(300_000),
    "model-00002-of-00002.safetensors": random.Random(2).randbytes(100_000),
}
TOTAL = sum(map(len, MLX.values()))
HELD_AT = 160 * 1024
HELD = TOTAL - len(MLX[LARGE]) + HELD_AT
"""What has come when LARGE is held there."""
UNREAD = 64 * 1024
"""What the Hub may write to a connection before it sees that nobody reads."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        server.add("org/one", MLX, tags=("mlx",))
        server.add("org/two", MLX, tags=("mlx",))
        yield server


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "lmx.hub" in " ".join(child.cmdline())]


def in_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test; afterwards no child may be left."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        async def main() -> None:
            with trio.fail_after(60):
                await test(**fixtures)

        trio.run(main)
        assert children() == []

    return run


@asynccontextmanager
async def server(folder: Path, **settings: Any) -> AsyncIterator[Jobs]:
    """What ``lmx serve`` does with jobs, from its start to its end."""
    hub_settings = HubSettings(data_dir=str(folder), **{"low_disk_bytes": 0, **settings})
    state = State(folder / "state.sqlite3")
    done: list[Job] = []
    jobs = Jobs(lambda: hub_settings, state, done.append)
    async with trio.open_nursery() as nursery:
        await nursery.start(jobs.run)
        yield jobs
        nursery.cancel_scope.cancel()
    state.close()
    assert all(job.state == "done" for job in done)


async def over(jobs: Jobs, job: Job) -> Job:
    async for seen in jobs.watch(job.id):
        job = seen
    return job


async def until(jobs: Jobs, job: Job, found: Callable[[Job], bool]) -> None:
    async with aclosing(jobs.watch(job.id)) as changes:
        async for change in changes:
            if found(change):
                return
    raise AssertionError(jobs.get(job.id))


async def held(hub: Hub, path: str = LARGE) -> None:
    await trio.to_thread.run_sync(hub.until_held, path)


def whole(folder: Path) -> bool:
    return all((folder / name).read_bytes() == data for name, data in MLX.items())


@in_trio
async def test_a_download_from_its_start_to_its_end(hub: Hub, tmp_path: Path) -> None:
    hub.holds[LARGE] = 100_000
    async with server(tmp_path) as jobs:
        job = jobs.download(DownloadWanted("org/one"))
        assert (job.kind, job.model, job.state, job.chosen, job.ended) == ("download", "org/one", "queued", None, None)
        assert jobs.download(DownloadWanted("https://huggingface.co/org/one")) == job, "asked for twice"
        assert jobs.download(DownloadWanted("org/one", allow_patterns=("*.json",))).id != job.id
        seen: list[Job] = []
        await held(hub)
        async for change in jobs.watch(job.id):
            seen.append(change)
            if change.done_bytes > 100_000:
                hub.go_on()
        last = seen[-1]
        assert (last.state, last.done_bytes, last.total_bytes, last.error) == ("done", TOTAL, TOTAL, "")
        assert last.chosen is not None
        assert last.chosen["why"] == "MLX weights, 2 file(s)"
        assert {file["path"] for file in last.chosen["files"]} == set(MLX)
        assert last.path == str(tmp_path / "models" / "org" / "one")
        assert whole(Path(last.path))
        assert last.started is not None
        assert last.ended is not None
        assert last.created <= last.started <= last.ended
        running = [job for job in seen if job.message == "downloading"]
        assert running[0].bytes_per_s > 0
        assert running[0].eta_s is not None
        assert json.loads(json.dumps(last.as_json()))["id"] == job.id
        for other in jobs.list():
            await over(jobs, other)
        again = await over(jobs, jobs.download(DownloadWanted("org/one")))
        assert (again.id != job.id, again.state) == (True, "done"), "a new job, that had nothing to do"
    async with server(tmp_path) as jobs:
        assert jobs.list()[0].id == again.id
        assert jobs.get(job.id) == last


@in_trio
async def test_what_cannot_be_downloaded(hub: Hub, tmp_path: Path) -> None:
    async with server(tmp_path) as jobs:
        for wanted in (DownloadWanted("../x"), DownloadWanted("a/b", revision=".."), DownloadWanted("a/b", "", "\0")):
            with pytest.raises(InvalidRequest):
                jobs.download(wanted)
        assert jobs.list() == []
        with pytest.raises(JobNotFound, match="There is no job 'x'"):
            jobs.get("x")
        job = await over(jobs, jobs.download(DownloadWanted("org/none")))
        assert (job.state, job.error.split(",")[0]) == ("failed", "The Hub has no model org/none")
        assert await jobs.cancel(job.id) == job


@in_trio
async def test_the_next_server_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.holds[LARGE] = HELD_AT
    async with server(tmp_path, downloads=1) as jobs:
        first, second = jobs.download(DownloadWanted("org/one")), jobs.download(DownloadWanted("org/two"))
        await until(jobs, first, lambda job: job.done_bytes == HELD)
        assert (jobs.get(first.id).state, jobs.get(second.id).state) == ("running", "queued")
    assert children() == []
    hub.add("org/one", {"config.json": b"newer"}, tags=("mlx",))  # the commit that was chosen counts
    hub.repos["org/one"] = hub.repos["org/two"]  # (and is still served)
    hub.repos["org/one"].branches = ("main", chosen_commit(tmp_path, first.id))
    hub.go_on()
    async with server(tmp_path, downloads=1) as jobs:
        assert jobs.get(first.id).message in ("taken up again after the server's restart", "starting")
        done = [await over(jobs, job) for job in (first, second)]
        assert [(job.state, whole(Path(job.path))) for job in done] == [("done", True)] * 2
        assert done[0].started is not None
        assert done[1].started is not None
        assert done[0].started <= done[1].started
    assert hub.served[LARGE] < 2 * len(MLX[LARGE]) + UNREAD


def chosen_commit(folder: Path, id: str) -> str:
    """As it is kept in the database."""
    with State(folder / "state.sqlite3").connection() as db:
        wanted, state = db.execute("SELECT wanted, state FROM jobs WHERE id = ?", (id,)).fetchone()
    assert state == "running"
    return str(json.loads(wanted)["chosen"]["revision"])


SERVER = """
import sys, trio
from pathlib import Path
from lmx.config import HubSettings
from lmx.hub.state import State
from lmx.serving.jobs import DownloadWanted, Jobs
async def main():
    folder = Path(sys.argv[1])
    settings = HubSettings(data_dir=str(folder), low_disk_bytes=0)
    jobs = Jobs(lambda: settings, State(folder / "state.sqlite3"))
    async with trio.open_nursery() as nursery:
        await nursery.start(jobs.run)
        job = jobs.download(DownloadWanted("org/one"))
        await jobs.saved()
        print(job.id, flush=True)
        async for change in jobs.watch(job.id):
            if change.done_bytes >= int(sys.argv[2]):
                print("moving", flush=True)
trio.run(main)
"""


def start_server(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SERVER, str(folder), str(HELD)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@in_trio
async def test_a_killed_server(hub: Hub, tmp_path: Path) -> None:
    hub.holds[LARGE] = HELD_AT
    process = start_server(tmp_path)
    assert process.stdout is not None
    with process.stdout as lines:
        id = (await trio.to_thread.run_sync(lines.readline)).strip()
        assert await trio.to_thread.run_sync(lines.readline) == "moving\n"
        orphans = psutil.Process(process.pid).children()
        assert len(orphans) == 1
        process.send_signal(signal.SIGKILL)
        await trio.to_thread.run_sync(process.wait)
    await trio.to_thread.run_sync(psutil.wait_procs, orphans)
    assert not any(orphan.is_running() for orphan in orphans), "the child ended with its server"
    hub.go_on()
    async with server(tmp_path) as jobs:
        job = await over(jobs, jobs.get(id))
        assert (job.state, whole(Path(job.path))) == ("done", True)
    assert hub.served[LARGE] < len(MLX[LARGE]) + UNREAD


@in_trio
async def test_a_killed_child_is_started_again(hub: Hub, tmp_path: Path) -> None:
    hub.holds[LARGE] = HELD_AT
    async with server(tmp_path) as jobs:
        job = jobs.download(DownloadWanted("org/one"))
        await until(jobs, job, lambda job: job.done_bytes == HELD)
        hub.held.clear()
        children()[0].kill()
        await held(hub)  # by the next one, at the same place
        hub.go_on()
        job = await over(jobs, job)
        assert (job.state, whole(Path(job.path))) == ("done", True)
    assert hub.served[LARGE] < len(MLX[LARGE]) + UNREAD
    # One that is killed each time is given up.
    async with server(tmp_path, downloads=1) as jobs:
        hub.going = False
        hub.holds["config.json"] = 0
        job = jobs.download(DownloadWanted("org/two"))
        for _ in range(lmx.serving.jobs.MOST_DEATHS):
            await held(hub, "config.json")
            hub.held.clear()
            children()[0].kill()
        job = await over(jobs, job)
        assert (job.state, job.error) == ("failed", "Its process ended by SIGKILL, 3 times: it said nothing")


@in_trio
async def test_cancelled_jobs_leave_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.holds[LARGE] = HELD_AT
    async with server(tmp_path, downloads=2) as jobs:
        first = jobs.download(DownloadWanted("org/one"))
        await until(jobs, first, lambda job: job.done_bytes == HELD)
        second, third = jobs.download(DownloadWanted("org/two")), jobs.download(DownloadWanted("org/three"))
        await until(jobs, second, lambda job: job.chosen is not None)
        requests = [json.loads(child.cmdline()[-1]) for child in children()]
        promised = {request["model"]: request["promised_bytes"] for request in requests}
        assert promised == {"org/one": 0, "org/two": TOTAL - HELD}, "what others will still write"
        assert (await jobs.cancel(third.id)).message == "cancelled before it began"
        await jobs.cancel(second.id)
        staging = list((tmp_path / "models" / ".downloads").iterdir())
        assert len(staging) == 1
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(jobs.cancel, first.id)
        job = jobs.get(first.id)
        assert (job.state, job.message, job.bytes_per_s) == ("cancelled", "cancelled; what it had is removed", 0)
        assert children() == []
        assert not staging[0].exists()
        hub.go_on()
        assert (await over(jobs, jobs.download(DownloadWanted("org/one")))).state == "done"


@in_trio
async def test_a_conversion_starts_anew_with_the_next_server(tiny_model: Path, tmp_path: Path) -> None:
    async with server(tmp_path) as jobs:
        with pytest.raises(InvalidRequest, match="bits 9"):
            jobs.convert(ConvertWanted("maker/tiny", str(tiny_model), bits=9))
        job = jobs.convert(ConvertWanted("maker/tiny", str(tiny_model), group_size=32))
        assert jobs.convert(ConvertWanted("maker/tiny", str(tiny_model), bits=4, group_size=32)) == job
        await until(jobs, job, lambda job: job.state == "running")
    async with server(tmp_path) as jobs:
        job = await over(jobs, job)
        assert (job.state, job.kind, job.error) == ("done", "convert", "")
        assert job.path == str(tmp_path / "models" / "maker" / "tiny-4bit")
        assert inspect_folder(Path(job.path)).quantization == "4-bit"
        assert job.done_bytes == job.total_bytes > 0
        failed = await over(jobs, jobs.convert(ConvertWanted("maker/none", str(tmp_path / "none"))))
        assert (failed.state, "config.json does not exist" in failed.error) == ("failed", True)
    assert list((tmp_path / "models" / ".downloads").iterdir()) == []


@in_trio
async def test_old_jobs_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmx.serving.jobs, "KEPT", 3)
    settings = HubSettings(data_dir=str(tmp_path))
    state = State(tmp_path / "state.sqlite3")
    jobs = Jobs(lambda: settings, state)
    asked = [jobs.download(DownloadWanted(f"org/m{n}")) for n in range(6)]
    for job in asked:
        await jobs.cancel(job.id)
    async with trio.open_nursery() as nursery:
        await nursery.start(jobs.run)
        await jobs.saved()
        nursery.cancel_scope.cancel()
    assert [job.id for job in jobs.list()] == [job.id for job in asked[:2:-1]]
    state.close()
    # What nobody takes up any more goes, too.
    staging = tmp_path / "models" / ".downloads"
    for name, age_days in (("old", 8), ("young", 1)):
        (staging / name).mkdir(parents=True)
        os.utime(staging / name, (time.time() - age_days * 86_400,) * 2)
    async with server(tmp_path) as jobs:
        assert [job.id for job in jobs.list()] == [job.id for job in asked[:2:-1]]
        assert [path.name for path in staging.iterdir()] == ["young"]


def test_the_rate_is_of_the_last_seconds(autojump_rate: Callable[..., list[float]]) -> None:
    steady = autojump_rate([(0, 0), (1, 100), (2, 200), (3, 300)])
    assert steady == [0, 100, 100, 100]
    stalled = autojump_rate([(0, 0), (1, 1000), (5, 1000), (12, 1000)])
    assert stalled == [0, 1000, 200, 0]


@pytest.fixture
def autojump_rate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Rates of (second, bytes) by a clock that jumps; the time of day goes backwards meanwhile."""
    monkeypatch.setattr(time, "time", lambda: -1e9)

    def rates(seen: list[tuple[float, int]]) -> list[float]:
        async def main() -> list[float]:
            rate, found = lmx.serving.jobs._Rate(), []
            start = trio.current_time()
            for second, count in seen:
                await trio.sleep_until(start + second)
                found.append(rate.add(count))
            return found

        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    return rates
