"""lmx.hub.state: one file for several processes and threads, and what becomes of one that cannot be used."""

import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lmx.hub.state import FILE_NAME, State

TABLES = {"benches", "files", "fingerprints", "jobs", "measured", "uses"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / FILE_NAME


def tables(state: State) -> set[str]:
    with state.connection() as db:
        return {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}


def test_what_is_written_is_there_after_a_restart(path: Path) -> None:
    with closing(State(path)) as state:
        assert state.persistent
        assert tables(state) == TABLES
        state.note_uses({"a": 1.0})
    with closing(State(path)) as state:
        assert state.last_uses() == {"a": 1.0}


def test_in_memory() -> None:
    with closing(State(None)) as state:
        assert not state.persistent
        assert tables(state) == TABLES
        state.note_uses({"a": 1.0})
        assert state.last_uses() == {"a": 1.0}


def test_an_exception_takes_the_transaction_back(path: Path) -> None:
    def half(state: State) -> None:
        with state.connection() as db:
            db.execute("INSERT INTO uses VALUES ('a', 1.0)")
            raise KeyError

    with closing(State(path)) as state:
        with pytest.raises(KeyError):
            half(state)
        assert state.last_uses() == {}


def test_wrong_sql_is_the_callers_and_costs_nothing(path: Path) -> None:
    with closing(State(path)) as state:
        state.note_uses({"a": 1.0})
        with pytest.raises(sqlite3.OperationalError), state.connection() as db:
            db.execute("SELECT * FROM nowhere")
        with pytest.raises(sqlite3.IntegrityError), state.connection() as db:
            db.execute("INSERT INTO uses VALUES ('a', 1.0)")
        assert state.last_uses() == {"a": 1.0}
        assert state.persistent


_WRITER = """
import sys
from contextlib import closing
from pathlib import Path
from lmx.hub.state import State
print("there", flush=True)
sys.stdin.readline()
with closing(State(Path(sys.argv[1]))) as state:
    assert state.persistent
    for number in range(100):
        with state.connection() as db:
            db.execute("INSERT INTO benches VALUES (?, ?, '{}')", (sys.argv[2], number))
"""


def test_processes_that_make_it_and_write_at_once(path: Path) -> None:
    """Nobody finds it half-made, and no line of anybody is lost."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b", "c")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
    with closing(State(path)) as state, state.connection() as db:
        counts = db.execute("SELECT model, count(*) FROM benches GROUP BY model ORDER BY model").fetchall()
    assert counts == [("a", 100), ("b", 100), ("c", 100)]
    assert not list(path.parent.glob("*.broken-*"))


def test_threads_share_it(path: Path) -> None:
    def count(state: State) -> None:
        for _ in range(50):
            with state.connection() as db:
                [(value,)] = db.execute("SELECT last_used FROM uses WHERE model = 'a'").fetchall()
                db.execute("UPDATE uses SET last_used = ? WHERE model = 'a'", (value + 1,))

    with closing(State(path)) as first, closing(State(path)) as second, ThreadPoolExecutor(4) as pool:
        first.note_uses({"a": 0.0})
        list(pool.map(count, (first, second, first, second)))
        assert first.last_uses() == second.last_uses() == {"a": 200.0}


def damage_the_head(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)


def damage_a_page(path: Path) -> None:
    """The page of a table's rows; the head stays whole."""
    data = bytearray(path.read_bytes())
    data[4096 : 3 * 4096] = os.urandom(2 * 4096)
    path.write_bytes(data)


def make_another_programs(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (a)")
        db.commit()


@pytest.mark.parametrize("damage", [damage_the_head, damage_a_page, make_another_programs])
def test_a_damaged_file_is_put_aside(
    damage: Callable[[Path], None], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(State(path)) as state:
        state.note_uses({"a": 1.0})
    damage(path)
    damaged = path.read_bytes()
    with caplog.at_level(logging.WARNING, "lmx"), closing(State(path)) as state:
        assert state.persistent
        assert state.last_uses() == {}
        state.note_uses({"b": 1.0})
    [aside] = path.parent.glob("*.broken-*")
    assert aside.read_bytes() == damaged
    [record] = caplog.records
    assert str(path) in record.getMessage()
    assert aside.name in record.getMessage()
    with closing(State(path)) as state:
        assert state.last_uses() == {"b": 1.0}


def test_damage_while_it_is_open_costs_one_call(path: Path) -> None:
    with closing(State(path)) as state:
        with state.connection() as db:
            db.executemany("INSERT INTO benches VALUES ('a', ?, ?)", [(n, "x" * 2000) for n in range(100)])
            db.execute("COMMIT")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.execute("PRAGMA cache_size = 0")
            db.execute("BEGIN")
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(path.stat().st_size - 4096))
        with pytest.raises(sqlite3.DatabaseError), state.connection() as db:
            db.execute("SELECT sum(length(result)) FROM benches").fetchall()
        state.note_uses({"b": 1.0})
        assert state.last_uses() == {"b": 1.0}
        assert state.persistent


def test_a_newer_lmxs_file_is_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(State(path)) as state:
        state.note_uses({"a": 1.0})
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 1000")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    newer = path.read_bytes()
    with caplog.at_level(logging.WARNING, "lmx"), closing(State(path)) as state:
        assert not state.persistent
        state.note_uses({"b": 1.0})
        assert state.last_uses() == {"b": 1.0}
    assert path.read_bytes() == newer
    [record] = caplog.records
    assert "newer lmx" in record.getMessage()


@contextmanager
def nobody_may_write(folder: Path) -> Iterator[None]:
    """Root may write anywhere, so it becomes somebody else meanwhile."""
    user = os.geteuid()
    folder.chmod(0o555)
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_a_disk_that_cannot_be_written(caplog: pytest.LogCaptureFixture) -> None:
    """What it holds is still known, and what comes is kept while the process runs."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        with closing(State(folder / FILE_NAME)) as state:
            state.note_uses({"a": 1.0})
        (folder / FILE_NAME).chmod(0o444)
        before = (folder / FILE_NAME).read_bytes()
        with (
            nobody_may_write(folder),
            caplog.at_level(logging.WARNING, "lmx"),
            closing(State(folder / FILE_NAME)) as state,
        ):
            assert not state.persistent
            state.note_uses({"b": 1.0})
            assert state.last_uses() == {"a": 1.0, "b": 1.0}
        [record] = caplog.records
        assert "in memory only" in record.getMessage()
        assert (folder / FILE_NAME).read_bytes() == before


def test_a_place_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with closing(State(tmp_path / "file" / FILE_NAME)) as state:
        assert not state.persistent
        state.note_uses({"a": 1.0})
        assert state.last_uses() == {"a": 1.0}
