"""What lmx remembers between its runs, in one SQLite file: jobs, benches, last uses, measured memory, files seen.

Here are the file, its tables and who may write when; each table's owner has its SQL in its own module. Any number of
processes and threads may use it: the server, ``lmx`` commands, tests. It is a help and never a reason not to run: a
damaged file is put aside and begun anew, one that cannot be written or that a newer lmx wrote stays as it is, and what
would be in it is kept in memory. Every call may wait for the disk, so the event loop calls from a thread.
"""

import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

logger = logging.getLogger("lmx")

FILE_NAME = "state.sqlite3"
_BUSY_S = 10.0
_APPLICATION = 0x6C6D7873
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # The library's: facts (JSON) of a model's files, believed while their stamp is the same. Paths are bytes.
        "CREATE TABLE files (path BLOB PRIMARY KEY, stamp BLOB NOT NULL, facts TEXT NOT NULL) STRICT, WITHOUT ROWID",
        # Times are Unix times. `key`: the same for jobs that want the same; `wanted`, `progress`: JSON.
        "CREATE TABLE jobs (id TEXT PRIMARY KEY, kind TEXT NOT NULL, key TEXT NOT NULL, wanted TEXT NOT NULL, "
        "state TEXT NOT NULL, progress TEXT NOT NULL, error TEXT NOT NULL, created REAL NOT NULL, started REAL, "
        "ended REAL) STRICT",
        "CREATE INDEX jobs_by_key ON jobs (key, state)",
        "CREATE TABLE benches (model TEXT NOT NULL, at REAL NOT NULL, result TEXT NOT NULL) STRICT",
        "CREATE INDEX benches_by_model ON benches (model, at)",
        "CREATE TABLE uses (model TEXT PRIMARY KEY, last_used REAL NOT NULL) STRICT",
        "CREATE TABLE fingerprints (model TEXT NOT NULL, at REAL NOT NULL, result TEXT NOT NULL) STRICT",
        "CREATE INDEX fingerprints_by_model ON fingerprints (model, at)",
        # `settings`: those of a load that its memory depends on, as text.
        "CREATE TABLE measured (model TEXT NOT NULL, settings TEXT NOT NULL, result TEXT NOT NULL, "
        "PRIMARY KEY (model, settings)) STRICT",
    ),
)
"""Statements from each version to the next. What was released is never edited; something new is a new step."""


class State:
    """An open state. ``path`` None: in memory only."""

    def __init__(self, path: Path | None) -> None:
        """Never raises for what is wrong with the file: ``persistent`` says how it came out, the log why."""
        self._path = path
        self._lock = threading.RLock()
        self._db = self._open()

    @property
    def persistent(self) -> bool:
        """Whether anything is left after this process."""
        return self._path is not None

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """A transaction, the only one of this process and the only one that writes in the file: be short, and do not
        nest. An exception takes back what was done in it. Raises sqlite3.Error where the disk does not answer or is
        full; a file that proves damaged is another, empty one for the next call."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                if _is_damage(error):
                    self._db.close()
                    self._db = self._open()
                raise

    def note_uses(self, uses: Mapping[str, float]) -> None:
        """Unix times at which models were last used."""
        with self.connection() as db:
            db.executemany("INSERT OR REPLACE INTO uses VALUES (?, ?)", uses.items())

    def last_uses(self) -> dict[str, float]:
        """Of every model that was ever used."""
        with self.connection() as db:
            return dict(db.execute("SELECT model, last_used FROM uses"))

    def close(self) -> None:
        """No use after it."""
        with self._lock:
            self._db.close()

    def _open(self) -> sqlite3.Connection:
        if self._path is None:
            return _in_memory()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _opening(self._path):
                try:
                    return _connect(self._path)
                except sqlite3.Error as error:
                    if not _is_damage(error):
                        raise
                    aside = _put_aside(self._path)
                    logger.warning("the state in %s was damaged (%s); it is kept as %s", self._path, error, aside.name)
                    return _connect(self._path)
        except (OSError, sqlite3.Error) as error:
            logger.warning("the state in %s cannot be used (%s): lmx keeps it in memory only", self._path, error)
        path, self._path = self._path, None
        return _copy(path)


def _connect(path: Path) -> sqlite3.Connection:
    """Open and migrate. Raises sqlite3.Error."""
    db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        if (found := db.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
            raise sqlite3.DatabaseError(" ".join(str(found).split()))
        _migrate(db)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a power cut may take the last moments, never the file
    except BaseException:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection) -> None:
    """All steps or none. Raises sqlite3.Error, also for a file that is no state or a newer lmx's."""
    db.execute("BEGIN IMMEDIATE")
    try:
        version = _pragma(db, "user_version")
        if _pragma(db, "application_id") != _APPLICATION:
            if version or db.execute("SELECT count(*) FROM sqlite_schema").fetchone() != (0,):
                raise sqlite3.DatabaseError("it is another program's")
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
        if version > len(_MIGRATIONS):
            raise sqlite3.NotSupportedError(f"a newer lmx wrote it, in version {version}")
        for statements in _MIGRATIONS[version:]:
            version += 1
            for statement in (*statements, f"PRAGMA user_version = {version}"):
                db.execute(statement)
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def _in_memory() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    _migrate(db)
    return db


def _copy(path: Path) -> sqlite3.Connection:
    """In memory, with what can be read of a file that cannot be written."""
    with suppress(OSError, sqlite3.Error):
        # "immutable": a reader too would write beside a file in WAL mode, which a read-only disk forbids.
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as source:
            if _pragma(source, "user_version") <= len(_MIGRATIONS):
                db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                try:
                    source.backup(db)
                    _migrate(db)
                    return db
                except BaseException:
                    db.close()
                    raise
    return _in_memory()


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is at fault, and not the disk, another process, or a caller's SQL."""
    return type(error) is sqlite3.DatabaseError


def _put_aside(path: Path) -> Path:
    """Make room for a new file; the log of what was not yet written into it goes along. Raises OSError."""
    aside = path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    return aside


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """One process at a time: SQLite waits for nobody while it changes to WAL, and one puts aside what another makes."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
