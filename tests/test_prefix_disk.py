"""The disk tier of the prefix store: whatever happens to files, index, folder or processes, it gives back what was kept
for exactly these tokens, or less, and never raises."""

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from lmx.cli import main
from lmx.engine.backend import Sequence
from lmx.engine.prefix import disk as disk_module
from lmx.engine.prefix import store as store_module
from lmx.engine.prefix.chain import BLOCK_TOKENS, root_key
from lmx.engine.prefix.chain import next_key as chain_key
from lmx.engine.prefix.disk import Disk, Head
from lmx.engine.prefix.store import PrefixStore
from lmx.prefix_disk import block_file, folders
from lmx.prefix_disk.index import NAME, Index
from lmx.protocol import Sampling, pack_tokens, unpack_tokens
from tests.api_server import serving, write_model
from tests.prefix_nodes import (
    BLOCK,
    FINGERPRINT,
    PATIENCE_S,
    ROOT,
    Tokens,
    find,
    keep,
    kv,
    next_key,
    nodes,
    ready,
    state,
    whole_keys,
)


def restore(disk: Disk, tokens: Tokens, *, checkpoints: bool = False, size: int = 400) -> int:
    """How many first tokens the disk has; all that it gives must be what was kept for just these tokens."""
    hit = find(disk, tokens, checkpoints=checkpoints)
    fetch = disk.fetch(hit, tokens)
    assert fetch.wait(PATIENCE_S)
    parent, position = ROOT, 0
    for node in fetch.take():
        head = node.head
        ids = unpack_tokens(head.ids)
        assert (head.parent, head.start, head.key) == (parent, position, next_key(parent, ids))
        assert node.block == kv(head.key, size)
        assert node.checkpoint == (state(head.key) if head.checkpoint else None)
        used = min(len(ids), hit.tokens - position)
        assert ids[:used] == list(tokens[position : position + used])
        parent, position = head.key, position + used
    if checkpoints and position:
        assert head.checkpoint
    assert position <= hit.tokens
    return position


@contextmanager
def opened(folder: Path, budget: int = 10**9, queue: int = 10**8, **more: Any) -> Iterator[Disk]:
    disk = Disk(folder, FINGERPRINT, budget, queue, **more)
    ready(disk)
    try:
        yield disk
    finally:
        disk.close()
        assert not disk._thread.is_alive()


def until(condition: Callable[[], object]) -> None:
    """For what another thread does on its own; a failing test is ended by the run's own limit."""
    while not condition():
        threading.Event().wait(0.002)


CONVERSATION = list(range(100, 100 + 3 * BLOCK + 5))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with a conversation of three blocks and a tail."""
    with opened(tmp_path / "kept") as disk:
        assert keep(disk, CONVERSATION)
    return tmp_path / "kept"


def test_a_disk_that_does_not_answer_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SILENT_S", 0.05)
    facts = SimpleNamespace(prefixes="kv", window=0, forks=False, publishes="chunks", kv_budget_bytes=10**9)
    prompt = list(range(2 * BLOCK_TOKENS + 1))
    with opened(tmp_path) as disk:
        root = parent = root_key(FINGERPRINT, "")
        for start in (0, BLOCK_TOKENS):
            ids = prompt[start : start + BLOCK_TOKENS]
            key = chain_key(parent, ids)
            assert disk.offer(key, parent, root, start, ids, kv(key), None, 1)
            parent = key
        assert disk.drain(PATIENCE_S)
        file = block_file.path_of(disk._folder, chain_key(root, prompt[:BLOCK_TOKENS]))
        file.unlink()
        os.mkfifo(file)  # whoever opens it waits for somebody who writes
        store = PrefixStore(SimpleNamespace(facts=facts), FINGERPRINT, 0, disk)  # type: ignore[arg-type]
        asking = [Sequence(seq, prompt, len(prompt), 1, Sampling(seed=0), ignore_eos=True) for seq in range(2)]
        for sequence in asking:
            store.enter(sequence)
        fetching = store.fetch(asking[0])
        assert fetching is not None
        until(lambda: store.arrived(fetching, 0.01))
        assert store.fetch(asking[1]) is None
        os.close(os.open(file, os.O_WRONLY))  # the disk's thread goes on, and finds nothing in it


# --- keeping and finding ------------------------------------------------------------------------------


def test_a_restart_finds_the_prefix(kept: Path) -> None:
    with opened(kept) as disk:
        assert restore(disk, CONVERSATION) == len(CONVERSATION)
        assert restore(disk, [*CONVERSATION, 1, 2, 3]) == len(CONVERSATION)
        record = disk.statistics()
    assert (record.nodes, record.read_nodes, record.bad_files, record.off) == (4, 8, 0, "")
    assert record.disk_bytes == sum(path.stat().st_size for path in block_file.files(kept / FINGERPRINT))


@pytest.mark.parametrize("same", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 2, len(CONVERSATION)])
def test_it_serves_up_to_the_first_different_token(kept: Path, same: int) -> None:
    prompt = CONVERSATION[:same] + [7] * 20
    with opened(kept) as disk:
        assert restore(disk, prompt) == same
        assert find(disk, CONVERSATION, most=same).tokens == same


def test_a_search_may_begin_behind_what_is_in_memory(kept: Path) -> None:
    keys = whole_keys(CONVERSATION)
    with opened(kept) as disk:
        hit = disk.find(keys[0], keys[1:], CONVERSATION, BLOCK)
        assert (hit.tokens, [head.key for head in hit.nodes[:2]]) == (len(CONVERSATION), keys[1:])
        fetch = disk.fetch(hit, CONVERSATION)
        assert fetch.wait(PATIENCE_S)
        assert [node.block for node in fetch.take()][:2] == [kv(key) for key in keys[1:]]


def test_with_checkpoints_a_prefix_ends_at_one(tmp_path: Path) -> None:
    with opened(tmp_path) as disk:
        assert keep(disk, CONVERSATION, checkpoints=[BLOCK, len(CONVERSATION)])
        assert disk.drain(PATIENCE_S)
        assert restore(disk, CONVERSATION, checkpoints=True) == len(CONVERSATION)
        assert restore(disk, CONVERSATION[:-1], checkpoints=True) == BLOCK
        assert restore(disk, CONVERSATION[: BLOCK - 1], checkpoints=True) == 0
        # The same tail, a longer one without a checkpoint, a shorter one with it.
        start, parent = 3 * BLOCK, whole_keys(CONVERSATION)[-1]
        for end, checkpoint in ((7, None), (2, True)):
            ids = [*CONVERSATION, 9, 9][start : start + end]
            key = next_key(parent, ids)
            assert disk.offer(key, parent, ROOT, start, ids, kv(key), checkpoint and state(key), 1)
        assert disk.drain(PATIENCE_S)
        assert restore(disk, [*CONVERSATION, 9, 9], checkpoints=True) == len(CONVERSATION)
        assert restore(disk, CONVERSATION[:-1], checkpoints=True) == start + 2


def test_many_children_of_one_parent_are_told_apart(tmp_path: Path) -> None:
    chance = random.Random(0)
    system = list(range(BLOCK))
    others = [system + [chance.randrange(3) for _ in range(chance.randrange(1, BLOCK))] for _ in range(60)]
    with opened(tmp_path) as disk:
        for tokens in others:
            assert keep(disk, tokens)
        assert disk.drain(PATIENCE_S)
        for _ in range(100):
            prompt = system + [chance.randrange(3) for _ in range(BLOCK)]
            best = max(next(n for n in range(99) if prompt[: n + 1] != tokens[: n + 1]) for tokens in others)
            assert restore(disk, prompt) == best
        # What a longer one begins with was deleted.
        tails = {tuple(tokens[BLOCK:]) for tokens in others}
        last = {one for one in tails if not any(other != one and other[: len(one)] == one for other in tails)}
        assert disk.statistics().nodes == 1 + len(last)


def test_a_node_is_kept_once_and_gains_what_it_lacked(tmp_path: Path) -> None:
    key, parent, start, ids = next(nodes(CONVERSATION))
    with opened(tmp_path) as disk:

        def offer(checkpoint: bytes | None, window: bool) -> int:
            assert disk.offer(key, parent, ROOT, start, ids, kv(key), checkpoint, 1, window=window)
            assert disk.drain(PATIENCE_S)
            return disk.statistics().written_nodes

        assert not disk.wants(next_key(key, ids), key, ROOT, ids, 100)  # its parent is not there
        assert disk.wants(key, parent, ROOT, ids, 100)
        assert [offer(None, False), offer(None, False), offer(None, True), offer(None, False)] == [1, 1, 2, 2]
        assert not disk.wants(key, parent, ROOT, ids, 100)
        assert disk.wants(key, parent, ROOT, ids, 100, checkpoint=True)
        # Not with the checkpoint and without the window.
        assert [offer(state(key), False), offer(state(key), True), offer(None, True)] == [2, 3, 3]
        assert restore(disk, CONVERSATION, checkpoints=True) == BLOCK
        assert disk.statistics().nodes == 1


def test_an_empty_checkpoint_is_one(tmp_path: Path) -> None:
    key, parent, start, ids = next(nodes(CONVERSATION))
    with opened(tmp_path) as disk:
        assert disk.offer(key, parent, ROOT, start, ids, b"", b"", 1)
        assert disk.drain(PATIENCE_S)
        fetch = disk.fetch(find(disk, CONVERSATION, checkpoints=True), CONVERSATION)
        assert fetch.wait(PATIENCE_S)
        assert [(node.block, node.checkpoint) for node in fetch.take()] == [(b"", b"")]


def test_a_full_queue_takes_nothing_more(tmp_path: Path) -> None:
    go = threading.Event()
    stopped = threading.Event()
    woken: list[int] = []

    def wake() -> None:
        woken.append(disk.statistics().queued_bytes)
        stopped.set()
        assert go.wait(PATIENCE_S)

    with opened(tmp_path, queue=1200, wake=wake) as disk:
        assert keep(disk, CONVERSATION[:BLOCK])
        assert disk.drain(PATIENCE_S)
        fetch = disk.fetch(find(disk, CONVERSATION), CONVERSATION)
        assert stopped.wait(PATIENCE_S)
        assert fetch.done
        assert not keep(disk, CONVERSATION)
        assert [disk.has_room(size) for size in (10, 1000)] == [True, False]
        record = disk.statistics()
        assert (record.refused_nodes, 0 < record.queued_bytes <= 1200) == (1, True)  # the last one's parent is missing
        go.set()
        assert disk.drain(PATIENCE_S)
        assert disk.statistics().queued_bytes == 0
        until(lambda: len(woken) == 2)  # there is room
        assert woken[1] <= 600
        assert keep(disk, CONVERSATION)
        assert disk.drain(PATIENCE_S)
        assert restore(disk, CONVERSATION) == len(CONVERSATION)


def test_the_budget_holds_and_the_least_used_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9, 2 * 10**9, 3600))
    monkeypatch.setattr(disk_module.time, "time", lambda: next(clock))
    system = [1] * (2 * BLOCK)
    one = block_file.file_bytes(bytes(4 * BLOCK), 400, 0)
    conversations = [[*system, *[100 + number] * (2 * BLOCK)] for number in range(8)]
    with opened(tmp_path, budget=7 * one) as disk:
        assert keep(disk, system, uses=8)
        for tokens in conversations:
            assert keep(disk, tokens)
            assert disk.drain(PATIENCE_S)
            # The first conversation goes on all the time.
            assert restore(disk, conversations[0]) == len(tokens)
        assert [restore(disk, tokens) for tokens in conversations[1:]] == [
            *[2 * BLOCK] * 5,
            3 * BLOCK,
            4 * BLOCK,
        ]
        assert disk.statistics().evicted_nodes == 18 - 7
        assert disk.statistics().disk_bytes == sum(p.stat().st_size for p in block_file.files(tmp_path / FINGERPRINT))
    with opened(tmp_path, budget=2 * one) as disk:
        assert restore(disk, conversations[0]) == 2 * BLOCK
        assert not disk.wants(next_key(ROOT, [5]), ROOT, ROOT, [5], 3 * one)


def test_a_conversation_larger_than_the_budget_keeps_its_beginning(tmp_path: Path) -> None:
    one = block_file.file_bytes(bytes(4 * BLOCK), 400, 0)
    long = list(range(20 * BLOCK))
    with opened(tmp_path, budget=5 * one) as disk:
        for _ in range(3):
            keep(disk, long)
            assert disk.drain(PATIENCE_S)
        assert restore(disk, long) == 5 * BLOCK
        assert disk.statistics().written_nodes == 6


def test_what_most_share_is_warmed_up_first(tmp_path: Path) -> None:
    system, agents = [1] * (2 * BLOCK), [2] * BLOCK
    with opened(tmp_path) as disk:
        assert keep(disk, system, uses=5)
        assert keep(disk, [*system, *agents], uses=2)
        assert keep(disk, [3] * (3 * BLOCK), uses=9)
        assert keep(disk, [4] * BLOCK)
        assert disk.drain(PATIENCE_S)
    size = block_file.file_bytes(bytes(4 * BLOCK), 400, 0)

    def warmed(most: int) -> list[tuple[list[int], int]]:
        with opened(tmp_path) as disk:
            return [(unpack_tokens(node.head.ids), node.uses) for node in disk.warm(most)]

    nine, five, two = [([3] * BLOCK, 9)] * 3, [([1] * BLOCK, 5)] * 2, [(agents, 2)]
    assert warmed(10**9) == nine + five + two
    assert warmed(3 * size) == nine
    assert warmed(2 * size) == nine[:2]
    with opened(tmp_path) as disk:
        first, second, third = whole_keys([*system, *agents])
        disk.used([(first, 15), (second, 12), (third, 1)])
    assert warmed(10**9) == [([1] * BLOCK, 15), ([1] * BLOCK, 12), *nine, *two]
    # A bad file costs what stands on it, and nothing else.
    victim = block_file.path_of(tmp_path / FINGERPRINT, whole_keys(system)[1])
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    assert warmed(10**9) == [([1] * BLOCK, 15), *nine]


# --- damage -------------------------------------------------------------------------------------------


def damage(chance: random.Random, data: bytes) -> bytes:
    kind = chance.randrange(5)
    place = chance.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes(len(data) - place)
    if kind == 2:
        return data + chance.randbytes(chance.randrange(1, 50))
    flipped = bytearray(data)
    flipped[place] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def test_damaged_files_are_dropped_and_never_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(1)
    with opened(tmp_path) as disk:
        checkpoints = [2 * BLOCK, len(CONVERSATION)]
        for _ in range(850):
            assert keep(disk, CONVERSATION, checkpoints=checkpoints)
            assert disk.drain(PATIENCE_S)
            files = list(block_file.files(tmp_path / FINGERPRINT))
            victim = chance.choice(files)
            before = victim.read_bytes()
            after = damage(chance, before) if chance.randrange(9) else chance.choice(files).read_bytes()
            victim.write_bytes(after)
            ends = [len(CONVERSATION)] if after == before else [0, BLOCK, 2 * BLOCK, 3 * BLOCK]
            assert restore(disk, CONVERSATION) in ends
            assert victim.exists() == (after == before)
        record = disk.statistics()
        assert record.off == ""
        assert record.bad_files > 800
        assert record.bad_files == capfd.readouterr().out.count("is dropped")


def test_a_damaged_index_costs_a_hit_at_most(kept: Path) -> None:
    chance = random.Random(2)
    files = {path: path.read_bytes() for path in block_file.files(kept / FINGERPRINT)}
    index = (kept / FINGERPRINT / NAME).read_bytes()
    found = 0
    for _ in range(150):
        (kept / FINGERPRINT / NAME).write_bytes(damage(chance, index))
        for path, data in files.items():
            path.write_bytes(data)
        with opened(kept) as disk:
            found += restore(disk, CONVERSATION) == len(CONVERSATION)
            assert disk.statistics().off == ""
            keep(disk, CONVERSATION)
    assert found > 100


def foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE nodes (key TEXT)")
        db.commit()


def old(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {block_file.VERSION - 1}")


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a database" * 1000),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        foreign,
        old,
    ],
    ids=["gone", "empty", "garbage", "truncated", "foreign", "old"],
)
def test_a_broken_index_is_made_anew_from_the_files(kept: Path, spoil: Callable[[Path], object]) -> None:
    spoil(kept / FINGERPRINT / NAME)
    with opened(kept) as disk:
        assert restore(disk, CONVERSATION) == len(CONVERSATION)
    with opened(kept) as disk:
        assert restore(disk, CONVERSATION) == len(CONVERSATION)


def test_an_index_that_breaks_while_it_is_used_turns_the_tier_off(
    kept: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with opened(kept) as disk:
        (kept / FINGERPRINT / NAME).write_bytes(b"x" * 100_000)
        (kept / FINGERPRINT / f"{NAME}-wal").write_bytes(b"")
        keep(disk, [5] * BLOCK)
        until(lambda: disk.statistics().off or not disk.statistics().queued_bytes)
    with opened(kept) as disk:
        assert restore(disk, CONVERSATION) == len(CONVERSATION)
        assert disk.statistics().off == ""


def test_files_of_another_version_or_model_are_deleted(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "f" * 32
    shutil.copytree(kept / FINGERPRINT, kept / other)
    disk = Disk(kept, other, 10**9, 10**8)
    ready(disk)
    assert restore(disk, CONVERSATION) == 0
    disk.close()
    (kept / FINGERPRINT / NAME).unlink()
    monkeypatch.setattr(block_file, "VERSION", block_file.VERSION + 1)
    with opened(kept) as disk:
        assert restore(disk, CONVERSATION) == 0
    assert list(block_file.files(kept / FINGERPRINT)) == []


def test_tokens_with_another_ones_key_are_not_used(kept: Path) -> None:
    """As if two prefixes had one key, or the index lied."""
    with opened(kept) as disk:
        hit = find(disk, CONVERSATION)
        fetch = disk.fetch(hit, [*CONVERSATION[:BLOCK], 5, *CONVERSATION[BLOCK + 1 :]])
        assert fetch.wait(PATIENCE_S)
        assert [node.head.start for node in fetch.take()] == [0]


def test_a_file_that_is_gone_ends_the_prefix_there(kept: Path) -> None:
    with opened(kept) as disk:
        block_file.path_of(kept / FINGERPRINT, whole_keys(CONVERSATION)[1]).unlink()
        assert restore(disk, CONVERSATION) == BLOCK
        assert find(disk, CONVERSATION).tokens == BLOCK
        assert keep(disk, CONVERSATION)
        assert disk.drain(PATIENCE_S)
        assert restore(disk, CONVERSATION) == len(CONVERSATION)
        assert disk.statistics().bad_files == 0


# --- a disk that does not work ------------------------------------------------------------------------


def test_a_full_disk_turns_the_tier_off_with_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    woken = threading.Event()
    with opened(tmp_path, wake=woken.set) as disk:
        assert keep(disk, CONVERSATION)
        assert disk.drain(PATIENCE_S)
        hit = find(disk, CONVERSATION)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            assert keep(disk, [1] * BLOCK, size=200_000)
            assert disk.drain(PATIENCE_S)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        record = disk.statistics()
        assert "File too large" in record.off
        assert (record.nodes, record.queued_bytes) == (0, 0)
        assert not keep(disk, [1] * BLOCK)
        assert find(disk, CONVERSATION).tokens == 0
        assert disk.fetch(hit, CONVERSATION).wait(PATIENCE_S)
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if "no longer kept" in line] == lines
    assert len(lines) == 1
    assert list((tmp_path / FINGERPRINT / block_file.UNFINISHED).iterdir()) == []
    with opened(tmp_path) as disk:
        assert restore(disk, CONVERSATION) == len(CONVERSATION)


def test_a_folder_that_goes_turns_the_tier_off(kept: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with opened(kept) as disk:
        shutil.rmtree(kept)
        assert restore(disk, CONVERSATION) == 0
        keep(disk, [1] * BLOCK)
        assert disk.drain(PATIENCE_S)
        assert disk.statistics().off
    assert capfd.readouterr().out.count("no longer kept") == 1


def test_a_folder_that_cannot_be_made_turns_the_tier_off(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with opened(tmp_path / "file") as disk:
        assert "NotADirectoryError" in disk.statistics().off or "FileExistsError" in disk.statistics().off
        assert not keep(disk, CONVERSATION)
        assert restore(disk, CONVERSATION) == 0
    assert capfd.readouterr().out.count("no longer kept") == 1


# --- several processes --------------------------------------------------------------------------------


def writer(folder: Path, numbers: range) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.prefix_nodes", str(folder), str(numbers.start), str(numbers.stop)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])


def test_a_killed_writer_leaves_nothing_wrong(tmp_path: Path) -> None:
    for life in range(3):
        with writer(tmp_path, range(life, 1000)) as process:
            assert process.stdout is not None
            for _ in range(5 + 4 * life):
                last = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
        with opened(tmp_path) as disk:
            for number in range(1000):
                tokens = [number] * 20
                if number <= last:
                    assert restore(disk, tokens, size=30_000) == 20
                elif restore(disk, tokens, size=30_000) == 0:
                    break
            assert disk.statistics().off == ""
            assert disk.statistics().bad_files == 0


def test_two_processes_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "LOOK_S", 0.005)
    with opened(tmp_path) as disk:
        with writer(tmp_path, range(40)) as one, writer(tmp_path, range(20, 60)) as other:
            keep(disk, [30] * 20, size=30_000)
            for process in (one, other):
                process.communicate()
        assert (one.returncode, other.returncode) == (0, 0)
        until(lambda: all(find(disk, [number] * 20).tokens == 20 for number in range(60)))
        for number in range(60):
            assert restore(disk, [number] * 20, size=30_000) == 20
        assert (disk.statistics().off, disk.statistics().bad_files) == ("", 0)
        # Somebody empties it.
        assert folders.clear(tmp_path) > 60 * 30_000
        until(lambda: disk.statistics().nodes == 0)
        assert disk.statistics().disk_bytes == 0
        assert keep(disk, CONVERSATION)
        assert disk.drain(PATIENCE_S)
        assert restore(disk, CONVERSATION) == len(CONVERSATION)


def test_leftovers_are_taken_or_deleted_at_the_next_start(kept: Path) -> None:
    model = kept / FINGERPRINT
    key = whole_keys([9] * BLOCK)[0]
    head = Head(key, ROOT, ROOT, 0, pack_tokens([9] * BLOCK), True, False, 0)
    block_file.write(model, FINGERPRINT, block_file.Node(head, kv(key), None))  # and then it was killed
    (model / "ab").mkdir(exist_ok=True)
    (model / "ab" / "stray.kv").write_bytes(b"?")
    long_ago, now = model / block_file.UNFINISHED / "a", model / block_file.UNFINISHED / "b"
    for path in (long_ago, now):
        path.write_bytes(b"half")
    os.utime(long_ago, (0, 0))
    with opened(kept) as disk:
        assert restore(disk, [9] * BLOCK) == BLOCK
        assert (long_ago.exists(), now.exists(), (model / "ab" / "stray.kv").exists()) == (False, True, False)


def test_what_a_model_was_before_goes_when_nobody_used_it_for_long(kept: Path) -> None:
    for fingerprint, model, days in (("a" * 32, "m", 8), ("b" * 32, "m", 1), ("c" * 32, "other", 8)):
        shutil.copytree(kept / FINGERPRINT, kept / fingerprint)
        with closing(Index(kept / fingerprint)) as index:
            index.model = model
            index._db.execute("UPDATE nodes SET used = used - ?", (days * 86400,))
    with opened(kept, model="m"):
        left = {one.fingerprint: one.summary and one.summary.nodes for one in folders.inventory(kept)}
    assert left == {FINGERPRINT: 4, "a" * 32: 0, "b" * 32: 4, "c" * 32: 4}


# --- what people see ----------------------------------------------------------------------------------


def test_the_command_lists_sums_up_and_clears(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(kept, model="tiny"):
        pass
    shutil.copytree(kept / FINGERPRINT, kept / ("f" * 32))
    (kept / ("e" * 32)).mkdir()
    (kept / ("e" * 32) / NAME).write_bytes(b"?" * 5000)
    monkeypatch.setenv("LMX_ENGINE_PREFIX_DIR", str(kept))

    def lmx(*arguments: str) -> list[str]:
        assert main(["cache", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    lines = [line.split() for line in lmx("ls")]
    assert lines[0][:3] == ["MODEL", "FINGERPRINT", "SIZE"]
    assert [line[:2] for line in lines[1:3]] == [["tiny", FINGERPRINT], ["tiny", "f" * 32]]
    assert lines[3][1:] == ["e" * 32, "file", "is", "not", "a", "database"]
    assert {line.split()[0]: line.split()[-1] for line in lmx("stats")}["tokens"] == str(2 * len(CONVERSATION))
    assert main(["cache", "clear", "nobody"]) == 2
    assert "1 models" in lmx("clear", "f" * 32)[0]
    assert "3 models" in lmx("clear")[0]
    assert list(block_file.files(kept / FINGERPRINT)) == []
    assert [line.split()[2:4] for line in lmx("ls")[1:]] == [["0", "B"]] * 3
    with opened(kept) as disk:
        assert restore(disk, CONVERSATION) == 0


def test_the_admin_face_tells_and_clears(kept: Path, tmp_path: Path) -> None:
    with opened(kept, model="tiny"):
        pass
    shutil.copytree(kept / FINGERPRINT, kept / ("f" * 32))
    model = write_model(tmp_path / "model")

    async def ask() -> None:
        async with serving(model, ready=False, prefix_dir=str(kept), prefix_disk_bytes=10**7) as server:
            facts = (await server.http.get("/admin/cache")).json()
            assert (facts["folder"], facts["budget_bytes_per_model"]) == (str(kept), 10**7)
            about = {"model": "tiny", "blocks": 4, "tokens": len(CONVERSATION), "checkpoints": 0, "shared_blocks": 0}
            assert [one | about for one in facts["models"]] == facts["models"]
            assert sum(one["bytes"] for one in facts["models"]) == facts["bytes"]
            unknown = await server.http.post("/admin/cache/clear", json={"model": "nobody"})
            assert (unknown.status_code, "'nobody'" in unknown.json()["error"]["message"]) == (404, True)
            for body in (b"[]", b'{"model": 5}', b"{"):
                assert (await server.http.post("/admin/cache/clear", content=body)).status_code == 400
            cleared = (await server.http.post("/admin/cache/clear", json={"model": FINGERPRINT})).json()
            assert cleared == {"cleared": [FINGERPRINT], "freed_bytes": facts["bytes"] // 2}
            cleared = (await server.http.post("/admin/cache/clear")).json()
            assert cleared["freed_bytes"] == facts["bytes"] // 2
            facts = (await server.http.get("/admin/cache")).json()
            assert (facts["bytes"], [one["last_used"] for one in facts["models"]]) == (0, [None, None])

    trio.run(ask)


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMX_ENGINE_PREFIX_DIR", str(tmp_path / "never" / "made"))
    assert [main(["cache", action]) for action in ("ls", "stats", "clear")] == [0, 0, 0]
    assert not (tmp_path / "never").exists()


def test_the_default_budget_leaves_the_disk_room(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = sum(path.stat().st_size for path in block_file.files(kept / FINGERPRINT))
    monkeypatch.setattr(folders, "free_bytes", lambda folder: 10**6 - stored)
    assert folders.budget(-1, kept) == 10**5
    assert folders.budget(0, kept) == 0
    monkeypatch.setattr(folders, "free_bytes", lambda folder: 10**15)
    assert folders.budget(-1, kept) == 16 * 2**30
