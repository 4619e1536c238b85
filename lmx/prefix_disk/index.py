"""The index of one model's node files: which there are, whose children they are, how often and when they were used.

SQLite in WAL mode, so that several processes may read and write it; each holds it for moments only. It is a help, not
the truth: files say themselves what they are, so whatever is wrong here costs a hit at most, and a broken index is put
aside and made anew from the files. The disk tier's thread and ``folders`` call it; every call may wait for the disk.
"""

import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lmx.prefix_disk.block_file import KEY_BYTES, VERSION, Head

NAME = "index.sqlite3"
BUSY_S = 10.0
SHARED_S = 7 * 86400.0
"""Each doubling of the number of users keeps a node as long as if it had been used so much later: what many share goes
last, and still goes some day."""
_MOST = 2**32
"""Of users, and of seconds since 1970: what is beyond was not written by us."""
_APPLICATION = 0x6C6D7870
_SCHEMA = f"""
CREATE TABLE nodes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL UNIQUE, parent BLOB NOT NULL, root BLOB NOT NULL,
    start INTEGER NOT NULL, window INTEGER NOT NULL, checkpoint INTEGER NOT NULL, bytes INTEGER NOT NULL,
    uses INTEGER NOT NULL, used REAL NOT NULL, rank REAL NOT NULL, ids BLOB NOT NULL
) STRICT;
CREATE INDEX by_parent ON nodes (parent);
CREATE INDEX by_rank ON nodes (rank, bytes);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
INSERT INTO facts VALUES ('deletions', '0');
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {VERSION};
"""
_COLUMNS = "id, key, parent, root, start, ids, window, checkpoint, bytes, uses, used"


class IndexBroken(sqlite3.DatabaseError):
    """It is damaged, or something else than an index of this version."""


@dataclass(slots=True)
class Entry:
    """What the index knows of a node."""

    head: Head
    uses: int
    """How many used it: clients or conversations, as far as they are told apart."""
    used: float
    """When it was used last, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Summary:
    """All nodes of one model."""

    model: str
    """Which it is, for people; "" where nobody has said."""
    nodes: int
    bytes: int
    tokens: int
    checkpoints: int
    shared: int
    """Nodes that more than one client used."""
    used: float
    """When one was used last; 0 where there is none."""


def broken(error: sqlite3.Error) -> bool:
    """Whether the index itself is at fault, and not the disk or another process."""
    return isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)


class Index:
    """An open index, for the thread that opened it."""

    def __init__(self, folder: Path) -> None:
        """Open the index of a model's folder, or make it. Raises IndexBroken or sqlite3.Error."""
        self._db = sqlite3.connect(folder / NAME, timeout=BUSY_S, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            # A power cut may take the last moments; the files tell what they were.
            self._db.execute("PRAGMA synchronous = NORMAL")
            if self._number("PRAGMA application_id") == 0 and self._number("SELECT count(*) FROM sqlite_schema") == 0:
                self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT")
            _check(self._db)
        except BaseException:
            self._db.close()
            raise
        self._last_id = 0
        self._deletions = self._count_deletions()

    def close(self) -> None:
        self._db.close()

    @property
    def model(self) -> str:
        return _fact(self._db, "model")

    @model.setter
    def model(self, model: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES ('model', ?)", (model,))

    def fresh(self) -> list[Entry]:
        """The nodes that this call is the first to tell of: at first all, later those that anybody has put since.
        Raises IndexBroken."""
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM nodes WHERE id > ? ORDER BY id", (self._last_id,)).fetchall()
        entries = []
        for number, key, parent, root, start, ids, window, checkpoint, nbytes, uses, used in rows:
            keys_are_right = all(len(k) == KEY_BYTES for k in (key, parent, root))
            if not keys_are_right or len(ids) % 4 or not 0 <= uses < _MOST or not 0 <= used < _MOST:
                raise IndexBroken("a row is damaged")
            entries.append(
                Entry(Head(key, parent, root, start, ids, bool(window), bool(checkpoint), nbytes), uses, used)
            )
            self._last_id = number
        return entries

    def deleted(self) -> set[bytes] | None:
        """The keys that are left, when somebody else has deleted some since the last call; None: nobody has."""
        deletions = self._count_deletions()
        if deletions == self._deletions:
            return None
        self._deletions = deletions
        return self.keys()

    def keys(self) -> set[bytes]:
        return {key for (key,) in self._db.execute("SELECT key FROM nodes")}

    def put(self, entries: Iterable[Entry]) -> None:
        """Add nodes whose files are in their places, or replace what is known of them."""
        with self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO nodes (key, parent, root, start, window, checkpoint, bytes, uses, used, rank, "
                "ids) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (
                        head.key,
                        head.parent,
                        head.root,
                        head.start,
                        head.window,
                        head.checkpoint,
                        head.nbytes,
                        entry.uses,
                        entry.used,
                        _rank(entry),
                        head.ids,
                    )
                    for entry in entries
                    for head in (entry.head,)
                ),
            )

    def use(self, entries: Iterable[Entry]) -> None:
        """These were used, by so many, if not by more."""
        with self._transaction():
            self._db.executemany(
                "UPDATE nodes SET uses = max(uses, ?), used = max(used, ?), rank = max(rank, ?) WHERE key = ?",
                ((entry.uses, entry.used, _rank(entry), entry.head.key) for entry in entries),
            )

    def delete(self, keys: Iterable[bytes], unlink: Callable[[bytes], None]) -> None:
        """Of each key first the file: a row without one is found out, a file without a row takes space unseen."""
        with self._transaction():
            for key in keys:
                unlink(key)
                self._db.execute("DELETE FROM nodes WHERE key = ?", (key,))
            self._count_deletion()

    def shrink(self, budget_bytes: int, unlink: Callable[[bytes], None]) -> list[bytes]:
        """Delete nodes until the others take at most so many bytes: childless ones, those of the lowest rank first.
        The keys of what was deleted."""
        gone: list[bytes] = []
        if self.nbytes <= budget_bytes:
            return gone
        with self._transaction():
            over = self.nbytes - budget_bytes
            while over > 0:
                leaf = self._db.execute(
                    "SELECT key, bytes FROM nodes AS leaf WHERE NOT EXISTS (SELECT 1 FROM nodes WHERE parent = "
                    "leaf.key) ORDER BY rank LIMIT 1"
                ).fetchone()
                if leaf is None:
                    raise IndexBroken("its nodes are each other's parents")
                key, nbytes = leaf
                unlink(key)
                self._db.execute("DELETE FROM nodes WHERE key = ?", (key,))
                gone.append(key)
                over -= nbytes
            if gone:
                self._count_deletion()
        return gone

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return self._number("SELECT coalesce(sum(bytes), 0) FROM nodes")

    def _number(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0])

    def _count_deletions(self) -> int:
        counted = _fact(self._db, "deletions")
        if not counted.isdecimal():
            raise IndexBroken("a fact is damaged")
        return int(counted)

    def _count_deletion(self) -> None:
        before = self._count_deletions()
        if self._deletions == before:  # otherwise somebody else's are still to be looked at
            self._deletions = before + 1
        self._db.execute("UPDATE facts SET value = ? WHERE name = 'deletions'", (str(before + 1),))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def summary(folder: Path) -> Summary:
    """Of a model's folder, by its index, which is only read. Raises sqlite3.Error."""
    uri = f"{(folder / NAME).absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, timeout=BUSY_S, uri=True)) as db:
        _check(db, whole=False)
        nodes, nbytes, tokens, checkpoints, shared, used = db.execute(
            "SELECT count(*), coalesce(sum(bytes), 0), coalesce(sum(length(ids)) / 4, 0), "
            "coalesce(sum(checkpoint), 0), coalesce(sum(uses > 1), 0), coalesce(max(used), 0.0) FROM nodes"
        ).fetchone()
        if not 0 <= used < _MOST:
            raise IndexBroken("a row is damaged")
        return Summary(_fact(db, "model"), nodes, nbytes, tokens, checkpoints, shared, used)


def put_aside(folder: Path) -> None:
    """Make room for a new index; the last one that was put aside is kept for whoever wants to know. Raises OSError."""
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.replace(folder / f"{NAME}{suffix}", folder / f"{NAME}.broken{suffix}")


def _check(db: sqlite3.Connection, *, whole: bool = True) -> None:
    if db.execute("PRAGMA application_id").fetchone() != (_APPLICATION,):
        raise IndexBroken("it is something else")
    if db.execute("PRAGMA user_version").fetchone() != (VERSION,):
        raise IndexBroken("it is of another version")
    if whole and (found := db.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
        raise IndexBroken(str(found and found[0]))


def _fact(db: sqlite3.Connection, name: str) -> str:
    row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return str(row[0]) if row else ""


def _rank(entry: Entry) -> float:
    return entry.used + SHARED_S * math.log2(max(entry.uses, 1))
