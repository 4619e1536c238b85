"""What lmx remembers: whatever happened to the file, there is a database to work with, and nothing is overwritten."""

import logging
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lmx.hub.state import State


def test_it_outlives_its_process(tmp_path: Path) -> None:
    first = State(tmp_path / "deep" / "state.sqlite3")
    first.note_uses({"ant": 1.5, "bee": 2.0})
    first.note_uses({"ant": 3.0})
    first.close()
    assert State(tmp_path / "deep" / "state.sqlite3").last_uses() == {"ant": 3.0, "bee": 2.0}


def test_processes_and_threads_share_it(tmp_path: Path) -> None:
    """Ten processes migrate and write at once, and five threads of this one."""
    path = tmp_path / "state.sqlite3"
    script = (
        "import sys; from pathlib import Path; from lmx.hub.state import State\n"
        "state = State(Path(sys.argv[1]))\n"
        "[state.note_uses({f'{sys.argv[2]}-{n}': n}) for n in range(20)]"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(path), str(n)]) for n in range(4)]
    state = State(path)

    def write(name: str) -> None:
        for n in range(20):
            state.note_uses({f"{name}-{n}": n})

    threads = [threading.Thread(target=write, args=(f"thread{n}",)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0] * 4
    assert len(state.last_uses()) == 9 * 20


def test_a_block_that_raises_changes_nothing(tmp_path: Path) -> None:
    state = State(tmp_path / "state.sqlite3")
    with pytest.raises(sqlite3.ProgrammingError), state.connection() as database:
        database.executemany("INSERT INTO uses VALUES (?, ?)", [("ant", 1.0), ("bee",)])
    assert state.last_uses() == {}


@pytest.mark.parametrize("content", [b"no database at all" * 500, b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_file_is_put_aside(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.sqlite3"
    path.write_bytes(content)
    state = State(path)
    state.note_uses({"ant": 1.0})
    state.close()
    assert State(path).last_uses() == {"ant": 1.0}
    (aside,) = tmp_path.glob("state.sqlite3.broken-*")
    assert aside.read_bytes() == content
    assert "put aside" in caplog.text


def test_a_later_version_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.sqlite3"
    State(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 999")
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        state = State(path)
    state.note_uses({"ant": 1.0})
    assert state.last_uses() == {"ant": 1.0}
    assert path.read_bytes() == before
    assert "version 999" in caplog.text


def test_where_nothing_can_be_written_memory_serves(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    state = State(tmp_path / "file" / "state.sqlite3")
    state.note_uses({"ant": 1.0})
    assert state.last_uses() == {"ant": 1.0}
