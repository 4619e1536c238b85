"""What lmx remembers beyond a restart, in one sqlite3 file: what is on the disk, jobs, benchmarks, last uses.

Each table has an owner, whose SQL stands in its own module; here are the file and its migrations. Threads and processes
may share it: every transaction is short, and waits for the others. What cannot be used is never in the way: a damaged
file is put aside and begun anew, and where none can be written (or a later lmx has one) all is kept in memory.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

BUSY_S = 10.0
"""How long a transaction waits for another process's."""

# Each list makes one version of the next lower one; never change one that was released.
_MIGRATIONS = (
    (
        "CREATE TABLE files (path TEXT PRIMARY KEY, mtime_ns INTEGER, size INTEGER, facts TEXT) STRICT",
        """CREATE TABLE jobs (id TEXT PRIMARY KEY, kind TEXT, key TEXT, wanted TEXT, state TEXT, progress TEXT,
           error TEXT, created REAL, started REAL, ended REAL) STRICT""",
        "CREATE TABLE benches (model TEXT, at REAL, result TEXT) STRICT",
        "CREATE INDEX benches_of ON benches (model, at)",
        "CREATE TABLE uses (model TEXT PRIMARY KEY, last_used REAL) STRICT",
        "CREATE TABLE fingerprints (model TEXT, at REAL, result TEXT) STRICT",
        "CREATE INDEX fingerprints_of ON fingerprints (model, at)",
        "CREATE TABLE measured (model TEXT, settings TEXT, result TEXT, PRIMARY KEY (model, settings)) STRICT",
    ),
)

logger = logging.getLogger("lmx")


class State:
    """Blocking: the server calls it from threads. ``path`` None: in memory."""

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        self._database = self._open(path) if path is not None else _in_memory()

    def _open(self, path: Path) -> sqlite3.Connection:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return _connect(path)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                aside = path.with_name(f"{path.name}.broken-{time.time_ns()}")
                logger.error("%s is damaged (%s): it is put aside as %s, and begun anew", path, error, aside.name)
                for suffix in ("", "-wal", "-shm"):
                    part = path.with_name(path.name + suffix)
                    if part.exists():
                        part.rename(aside.with_name(aside.name + suffix))
                return _connect(path)
        except (OSError, sqlite3.Error, _TooNew) as error:
            logger.warning("%s cannot be used (%s): what lmx remembers is lost when it ends", path, error)
            return _in_memory()

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """A transaction: committed when the block ends, rolled back when it raises."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.rollback()
                raise
            self._database.commit()

    def note_uses(self, uses: Mapping[str, float]) -> None:
        """Unix times at which models were last used."""
        with self.connection() as database:
            database.executemany("INSERT OR REPLACE INTO uses VALUES (?, ?)", uses.items())

    def last_uses(self) -> dict[str, float]:
        """Of every model that was ever used."""
        with self.connection() as database:
            return dict(database.execute("SELECT model, last_used FROM uses"))

    def close(self) -> None:
        """No use after it."""
        with self._lock:
            self._database.close()


class _TooNew(Exception):
    """A later lmx made it."""


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        _migrate(database)
    except BaseException:
        database.close()
        raise
    return database


def _in_memory() -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    _migrate(database)
    return database


def _migrate(database: sqlite3.Connection) -> None:
    database.execute("BEGIN IMMEDIATE")  # another process may be at it: whoever is second finds it done
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise _TooNew(f"it is of version {version}, and this lmx knows {len(_MIGRATIONS)}")
        for statements in _MIGRATIONS[version:]:
            for statement in statements:
                database.execute(statement)
        database.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
    except BaseException:
        database.rollback()
        raise
    database.commit()
