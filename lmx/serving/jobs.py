"""What takes long and nobody waits for: downloads and conversions, each done by a child process, one record for each.

A job is in the state database from the moment it was asked for, so it outlives the server: what was queued or running
when the server went is taken up at the next start, a download where it stopped. The same wanted twice is one job. The
event loop never waits for the database or a child. Called by the admin face and the command line (through it); a
finished job calls ``finished``, so that the library looks again.
"""

import dataclasses
import hashlib
import logging
import secrets
import shutil
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from lmx.config import HubSettings
from lmx.errors import InvalidRequest, ModelNotFound
from lmx.hub import quantize
from lmx.hub.download.names import read_name
from lmx.hub.download.request import Chosen, staging_folder, staging_root
from lmx.hub.download.request import Request as DownloadRequest
from lmx.hub.state import State
from lmx.serving.job_table import Job, JobState, Kind, Row, Table
from lmx.serving.worker import signal_name, work

__all__ = ["ConvertWanted", "DownloadWanted", "Job", "JobNotFound", "Jobs"]

logger = logging.getLogger("lmx")

KEPT = 100
"""Jobs that ended."""
CONVERSIONS = 1
"""At once: each reads and writes gigabytes, and computes."""
WATCH_S = 0.25
RATE_S = 10.0
"""The window over which the rate is taken."""
MOST_DEATHS = 3
"""Of a child that a signal ends, without a byte between, before its job fails."""
STAGING_DAYS = 7
"""What a failed download has fetched is kept for the next try, so long."""


class JobNotFound(ModelNotFound):
    code = "job_not_found"


@dataclass(frozen=True, slots=True)
class DownloadWanted:
    model: str
    """See ``lmx.hub.download.names``."""
    revision: str = ""
    quantization: str = ""
    allow_patterns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ConvertWanted:
    model: str
    """The id of an entry of the library."""
    path: str
    """Its folder."""
    bits: int | None = None
    group_size: int | None = None
    mode: str | None = None
    dtype: str | None = None
    name: str | None = None


class _Rate:
    """Bytes a second over the last seconds, by a clock that never jumps."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, came_bytes: int) -> float:
        now = trio.current_time()
        self._seen.append((now, came_bytes))
        while len(self._seen) > 2 and self._seen[0][0] < now - RATE_S:
            self._seen.popleft()
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return max(0.0, (after - before) / (last - first)) if last > first else 0.0


@dataclass(slots=True, eq=False)
class _Task:
    """A job and what only this server knows of it."""

    job: Job
    key: str
    wanted: dict[str, Any]
    """The child's request."""
    changed: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def staging(self) -> Path | None:
        if self.job.kind == "convert":
            return quantize.Request(**self.wanted).staging
        chosen = self.wanted["chosen"]
        if chosen is None:
            return None
        return staging_folder(Path(self.wanted["models_path"]), Chosen.from_json(chosen).key)


class Jobs:
    """``settings``: asked each time, since they may change. ``finished`` is called with each job that is done."""

    def __init__(
        self, settings: Callable[[], HubSettings], state: State, finished: Callable[[Job], None] = lambda job: None
    ) -> None:
        self._settings = settings
        self._table = Table(state)
        self._finished = finished
        self._tasks: dict[str, _Task] = {}
        """In the order in which they were asked for."""
        self._wake = trio.Event()
        self._unsaved: dict[str, _Task] = {}
        self._dropped: list[str] = []
        self._save = trio.Event()
        self._saved = trio.Event()
        self._saved.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take up what the last server left, then work until cancelled. Cancelled: all children have ended, and their
        jobs are in the database as running, for the next server."""
        try:
            kept = await trio.to_thread.run_sync(self._table.load)
        except sqlite3.Error as error:
            logger.warning("the jobs in the state database cannot be read: %s", error)
            kept = []
        asked_meanwhile, self._tasks = self._tasks, {}
        for row in kept:
            task = self._tasks[row.job.id] = _Task(row.job, row.key, row.wanted)
            if task.job.is_over:
                task.over.set()
            elif task.job.state == "running":
                self._change(task, state="queued", message="taken up again after the server's restart")
        self._tasks |= asked_meanwhile
        used = {task.staging for task in self._tasks.values() if not task.job.is_over}
        await trio.to_thread.run_sync(_sweep, staging_root(self._settings().models_path), used)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_saving)
                task_status.started()
                while True:
                    for task in self._due():
                        self._change(task, state="running", started=time.time(), message="starting")
                        nursery.start_soon(self._work, task)
                    self._wake = trio.Event()
                    await self._wake.wait()
        finally:
            with trio.CancelScope(shield=True):
                await self._save_now()

    def download(self, wanted: DownloadWanted) -> Job:
        """The job for it, perhaps one that is under way already. Raises InvalidRequest for what is no name."""
        name = read_name(wanted.model, revision=wanted.revision, quantization=wanted.quantization)
        patterns = tuple(sorted(set(wanted.allow_patterns)))
        if any(not pattern or "\0" in pattern or len(pattern) > 500 for pattern in patterns):
            raise InvalidRequest("allow_patterns: each is a pattern such as '*.json'.", param="allow_patterns")
        settings = self._settings()
        request = DownloadRequest(
            model=name.repository,
            revision=name.revision,
            quantization=name.quantization,
            allow_patterns=patterns,
            quantizations=tuple(settings.quantizations),
            models_path=str(settings.models_path.absolute()),
            low_disk_bytes=settings.low_disk_bytes,
        )
        key = [name.repository, name.revision, name.quantization.upper(), *patterns]
        return self._add("download", wanted.model.strip(), key, request.as_json(), None)

    def convert(self, wanted: ConvertWanted) -> Job:
        """As ``download``. Raises InvalidRequest for options that do not go together."""
        options = quantize.check(
            wanted.model,
            bits=wanted.bits,
            group_size=wanted.group_size,
            mode=wanted.mode,
            dtype=wanted.dtype,
            name=wanted.name,
        )
        settings = self._settings()
        request = quantize.Request(
            model=wanted.model,
            source=wanted.path,
            models_path=str(settings.models_path.absolute()),
            low_disk_bytes=settings.low_disk_bytes,
            **options,
        )
        key = [wanted.path, *map(str, options.values())]
        return self._add("convert", wanted.model, key, request.as_json(), options)

    def get(self, id: str) -> Job:
        """Raises JobNotFound."""
        return self._need(id).job

    def list(self) -> Sequence[Job]:
        """The newest first."""
        return [task.job for task in reversed(self._tasks.values())]

    async def cancel(self, id: str) -> Job:
        """End it, and remove what it has fetched or made; a job that is over stays as it is. Raises JobNotFound.

        Cancelled: the job is cancelled all the same.
        """
        task = self._need(id)
        if task.job.state == "queued":
            self._end(task, "cancelled", "cancelled before it began")
            await self._discard(task)
        elif task.job.state == "running":
            task.scope.cancel()
            await task.over.wait()
        return task.job

    async def watch(self, id: str) -> AsyncIterator[Job]:
        """The job as it is, then each change, at most four a second, until it is over. Raises JobNotFound."""
        task = self._need(id)
        while True:
            changed, job = task.changed, task.job
            yield job
            if job.is_over:
                return
            await changed.wait()
            with trio.move_on_after(WATCH_S):
                await task.over.wait()

    async def saved(self) -> None:
        """Until all that is known of jobs now is in the database: before somebody is told that a job was taken."""
        await self._saved.wait()

    def _need(self, id: str) -> _Task:
        try:
            return self._tasks[id]
        except KeyError:
            raise JobNotFound(f"There is no job {id[:100]!r}; GET /admin/jobs lists them.", param="id") from None

    def _add(
        self, kind: Kind, model: str, key: Sequence[str], wanted: dict[str, Any], chosen: dict[str, Any] | None
    ) -> Job:
        digest = hashlib.sha256("\0".join([kind, *key]).encode()).hexdigest()
        for task in self._tasks.values():
            if task.key == digest and not task.job.is_over and not task.scope.cancel_called:
                return task.job
        job = Job(
            id=f"{kind}-{secrets.token_hex(6)}",
            kind=kind,
            model=model,
            state="queued",
            message="waiting for its turn",
            chosen=chosen,
            done_bytes=0,
            total_bytes=0,
            bytes_per_s=0.0,
            eta_s=None,
            error="",
            path="",
            created=time.time(),
            started=None,
            ended=None,
        )
        task = self._tasks[job.id] = _Task(job, digest, wanted)
        self._mark_unsaved(task)
        self._wake.set()
        return job

    def _due(self) -> Sequence[_Task]:
        """What may begin now, in order."""
        places = {"download": self._settings().downloads, "convert": CONVERSIONS}
        due = []
        for task in self._tasks.values():
            if task.job.state == "running":
                places[task.job.kind] -= 1
        for task in self._tasks.values():
            if task.job.state == "queued" and places[task.job.kind] > 0:
                places[task.job.kind] -= 1
                due.append(task)
        return due

    async def _work(self, task: _Task) -> None:
        with task.scope:
            try:
                await self._work_until_over(task)
            except OSError as error:
                self._fail(task, f"The process for it cannot be started: {error}.")
            except Exception as error:  # of this job alone
                logger.exception("job %s", task.job.id)
                self._fail(task, f"lmx failed: {error!r}. The log has more.")
        if task.scope.cancelled_caught:
            await self._discard(task)
            self._end(task, "cancelled", "cancelled; what it had is removed")
        elif task.job.state == "failed" and task.job.kind == "convert":
            await self._discard(task)
        self._wake.set()

    async def _work_until_over(self, task: _Task) -> None:
        module = "lmx.hub.download.fetch" if task.job.kind == "download" else "lmx.hub.quantize"
        deaths = came_before = 0
        while True:
            child = _Child(self, task)
            status, tail = await work(module, {**task.wanted, "promised_bytes": self._promised(task)}, child.line)
            if child.done is not None:
                self._change(task, path=child.done, done_bytes=task.job.total_bytes or task.job.done_bytes)
                self._end(task, "done", f"in {child.done}")
                try:
                    self._finished(task.job)
                except Exception:
                    logger.exception("after job %s", task.job.id)
                return
            if child.error is not None:
                self._fail(task, child.error["message"])
                return
            if child.came_bytes > came_before:
                deaths = 0
            deaths += 1
            if status >= 0 or deaths >= MOST_DEATHS:
                how = f"with status {status}" if status >= 0 else f"by {signal_name(status)}, {deaths} times"
                self._fail(task, f"Its process ended {how}: {tail or 'it said nothing'}")
                return
            logger.warning(
                "the process of job %s was ended by %s; it is started again", task.job.id, signal_name(status)
            )

    def _promised(self, task: _Task) -> int:
        """What the other jobs will still write, as far as that is known."""
        others = (other.job for other in self._tasks.values() if other is not task and other.job.state == "running")
        return sum(max(0, job.total_bytes - job.done_bytes) for job in others)

    def _fail(self, task: _Task, error: str) -> None:
        logger.warning("job %s (%s) failed: %s", task.job.id, task.job.model, error)
        self._end(task, "failed", "failed", error)

    def _end(self, task: _Task, state: JobState, message: str, error: str = "") -> None:
        self._change(task, state=state, message=message, error=error, ended=time.time(), bytes_per_s=0.0, eta_s=None)
        task.over.set()
        ended = [other for other in self._tasks.values() if other.job.is_over]
        for other in ended[:-KEPT]:
            del self._tasks[other.job.id]
            self._unsaved.pop(other.job.id, None)
            self._dropped.append(other.job.id)

    def _change(self, task: _Task, **changes: Any) -> None:
        lasting = any(name in changes for name in ("state", "chosen", "path"))
        task.job = dataclasses.replace(task.job, **changes)
        changed, task.changed = task.changed, trio.Event()
        changed.set()
        if lasting:
            self._mark_unsaved(task)

    async def _discard(self, task: _Task) -> None:
        """Remove a job's staging folder, unless another job works in it."""
        staging = task.staging
        others = (other for other in self._tasks.values() if other is not task and not other.job.is_over)
        if staging is None or any(other.staging == staging for other in others):
            return
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: shutil.rmtree(staging, ignore_errors=True))

    def _mark_unsaved(self, task: _Task) -> None:
        self._unsaved[task.job.id] = task
        if self._saved.is_set():
            self._saved = trio.Event()
        self._save.set()

    async def _keep_saving(self) -> None:
        while True:
            await self._save.wait()
            self._save = trio.Event()
            await self._save_now()

    async def _save_now(self) -> None:
        saved = self._saved
        rows = [Row(task.job, task.key, dict(task.wanted)) for task in self._unsaved.values()]
        dropped, self._dropped, self._unsaved = self._dropped, [], {}
        try:
            await trio.to_thread.run_sync(self._table.save, rows, dropped)
        except sqlite3.Error as error:
            logger.warning("jobs cannot be kept in the state database: %s", error)
        if not self._unsaved:
            saved.set()


class _Child:
    """Makes the job's record of what its child says."""

    def __init__(self, jobs: Jobs, task: _Task) -> None:
        self._jobs = jobs
        self._task = task
        self._rate = _Rate()
        self.came_bytes = 0
        self.done: str | None = None
        self.error: dict[str, Any] | None = None

    def line(self, line: dict[str, Any]) -> None:
        if "chosen" in line:
            self._task.wanted["chosen"] = line["chosen"]
            shown = {
                **line["chosen"],
                "files": [{"path": f["path"], "size": f["size"]} for f in line["chosen"]["files"]],
            }
            self._jobs._change(self._task, chosen=shown, model=shown["repo"], total_bytes=shown["total_bytes"])
        elif "done" in line:
            self.done = line["done"]
        elif "error" in line:
            self.error = line["error"]
        else:
            self.came_bytes = line["came_bytes"]
            rate = self._rate.add(self.came_bytes)
            left = line["total_bytes"] - line["done_bytes"]
            self._jobs._change(
                self._task,
                message=line["message"],
                done_bytes=line["done_bytes"],
                total_bytes=line["total_bytes"] or self._task.job.total_bytes,
                bytes_per_s=round(rate, 1),
                eta_s=round(left / rate, 1) if rate and left > 0 else None,
            )


def _sweep(root: Path, used: Collection[Path | None]) -> None:
    """Remove what no job will take up any more."""
    with suppress(OSError):
        for folder in root.iterdir():
            newest = max((path.lstat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)
            if folder not in used and newest < time.time() - STAGING_DAYS * 86_400:
                shutil.rmtree(folder, ignore_errors=True)
