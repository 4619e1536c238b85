"""A job's record, and the table of them in the state database. Nothing here blocks but ``Table``, and nothing works.

Called by ``lmx.serving.jobs``.
"""

import dataclasses
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmx.hub.state import State

logger = logging.getLogger("lmx")

Kind = Literal["download", "convert"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
_COLUMNS = "id, kind, key, wanted, state, progress, error, created, started, ended"
_PROGRESS = ("model", "message", "chosen", "done_bytes", "total_bytes", "path")


@dataclass(frozen=True, slots=True)
class Job:
    id: str
    kind: Kind
    model: str
    """As it was asked for; of a download the repository, once that is chosen."""
    state: JobState
    message: str
    """What it is doing, or how it ended."""
    chosen: dict[str, Any] | None
    """Of a download: repo, revision (the commit), files, total_bytes, format, quantization, why. Of a conversion: bits,
    group_size, mode, dtype, name."""
    done_bytes: int
    total_bytes: int
    """0: not known yet."""
    bytes_per_s: float
    """0 where nothing moves."""
    eta_s: float | None
    error: str
    path: str
    """The model's folder, once it is done."""
    created: float
    started: float | None
    ended: float | None

    @property
    def is_over(self) -> bool:
        return self.ended is not None

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Row:
    """What is kept of a job."""

    job: Job
    key: str
    """The same for jobs that want the same."""
    wanted: dict[str, Any]
    """The child's request."""

    def columns(self) -> tuple[Any, ...]:
        job = self.job
        progress = json.dumps({name: getattr(job, name) for name in _PROGRESS})
        wanted = json.dumps(self.wanted)
        return job.id, job.kind, self.key, wanted, job.state, progress, job.error, job.created, job.started, job.ended

    @classmethod
    def of(cls, columns: Sequence[Any]) -> "Row":
        """Raises ValueError or TypeError for what this lmx cannot read."""
        id, kind, key, wanted, state, progress, error, created, started, ended = columns
        job = Job(
            id=id,
            kind=kind,
            state=state,
            bytes_per_s=0.0,
            eta_s=None,
            error=error,
            created=created,
            started=started,
            ended=ended,
            **json.loads(progress),
        )
        return cls(job, key, json.loads(wanted))


class Table:
    """Blocks; raises sqlite3.Error."""

    def __init__(self, state: State) -> None:
        self._state = state

    def load(self) -> list[Row]:
        """In the order in which they were asked for. What cannot be read is left out, with a line in the log."""
        with self._state.connection() as db:
            found = db.execute(f"SELECT {_COLUMNS} FROM jobs ORDER BY rowid").fetchall()
        rows = []
        for columns in found:
            try:
                rows.append(Row.of(columns))
            except (ValueError, TypeError) as error:
                logger.warning("job %s in the state database cannot be read: %s", columns[0], error)
        return rows

    def save(self, rows: Iterable[Row], dropped: Iterable[str]) -> None:
        with self._state.connection() as db:
            db.executemany(
                f"INSERT INTO jobs ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "wanted = excluded.wanted, state = excluded.state, progress = excluded.progress, "
                "error = excluded.error, started = excluded.started, ended = excluded.ended",
                [row.columns() for row in rows],
            )
            db.executemany("DELETE FROM jobs WHERE id = ?", [(id,) for id in dropped])
