"""The disk tier of the prefix store: nodes written and read by a thread of its own, found in memory at once.

The engine's thread only calls methods that take moments: it offers bytes, asks what is there, and collects what was
read. Whatever happens to the disk ends the tier, with one line in the log, and never the engine: no method raises. What
is read is used only when its checksum, its model, its place in the chain and its tokens are those that are wanted;
anything else is deleted. Knows no MLX and no back end. Only the prefix store calls it.
"""

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lmx.engine.prefix.catalog import Catalog, Hit
from lmx.prefix_disk import block_file, folders
from lmx.prefix_disk.block_file import BadFile, Head, Node
from lmx.prefix_disk.index import Entry, Index, broken, put_aside
from lmx.protocol import pack_tokens

__all__ = ["Disk", "DiskStatistics", "Fetch", "Head", "Hit", "Node"]

LOOK_S = 5.0
"""How often what was used is written down, and what other processes did is looked at."""
OPEN_S = 60.0
"""How long the load of a model may wait for the disk."""
WARM_BYTES = 64 * 2**20
"""Read ahead of whoever warms up, so that the bytes and what is made of them are not all held at once."""


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """The moment's figures; the counters since the start."""

    off: str
    """Why the tier is off; "": it is on."""
    nodes: int
    disk_bytes: int
    budget_bytes: int
    queued_bytes: int
    """Held in memory until they are written."""
    fetching_bytes: int
    """Asked for, and not all read yet; what is read waits in memory until it is taken."""
    written_nodes: int
    written_bytes: int
    read_nodes: int
    read_bytes: int
    refused_nodes: int
    """Not taken because the queue was full."""
    bad_files: int
    """Deleted because they were not what they should be."""
    evicted_nodes: int
    write_s: float
    read_s: float


class _Want(NamedTuple):
    """What a file must turn out to be."""

    head: Head
    parent: bytes
    start: int
    ids: bytes | None
    """Its first tokens; None: what it says itself."""


class Fetch:
    """Nodes being read. Made by ``Disk.fetch``, for the engine's thread."""

    def __init__(self, wants: Sequence[_Want]) -> None:
        self._wants = wants
        self._read: deque[Node] = deque()
        self._cancelled = False
        self._ended = threading.Event()

    @property
    def done(self) -> bool:
        """Nothing will come any more."""
        return self._ended.is_set()

    def take(self) -> list[Node]:
        """What was read since the last call, in its order. When it is done and less came than was asked for, the next
        one was not there or not right."""
        taken = []
        with suppress(IndexError):
            while True:
                taken.append(self._read.popleft())
        return taken

    def cancel(self) -> None:
        """Nobody wants it any more; what was not read will not be."""
        self._cancelled = True
        self._read.clear()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it is done; whether it is. Not for the step loop."""
        return self._ended.wait(timeout_s)


@dataclass(slots=True)
class _Counters:
    written_nodes: int = 0
    written_bytes: int = 0
    read_nodes: int = 0
    read_bytes: int = 0
    refused_nodes: int = 0
    bad_files: int = 0
    evicted_nodes: int = 0
    write_s: float = 0.0
    read_s: float = 0.0


@dataclass(slots=True)
class _Offered:
    node: Node
    uses: int
    at: float


class Disk:
    """``close`` it, or leave it to the process's end: what is half-written then is nobody's."""

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        budget_bytes: int,
        queue_bytes: int,
        *,
        model: str = "",
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """``folder``: of all models; in it each fingerprint has its own. ``queue_bytes``: most memory for what waits to
        be written. ``model``: its name, for people. ``wake`` is called by the tier's thread when a fetch is done, and
        when ``has_room`` has said no and would now say yes to half a queue."""
        self._all = folder
        self._folder = folder / fingerprint
        self._fingerprint = fingerprint
        self._budget_bytes = budget_bytes
        self._queue_bytes = queue_bytes
        self._model = model
        self._wake = wake
        # The condition guards what follows; whoever holds it does no I/O.
        self._changed = threading.Condition()
        self._catalog = Catalog()
        self._queue: dict[bytes, _Offered] = {}
        self._queued_bytes = 0
        self._awaited = False
        """Somebody asked for room in the queue, and there was none."""
        self._fetches: deque[Fetch] = deque()
        self._used: set[bytes] = set()
        """What the index was not told yet."""
        self._futile: set[bytes] = set()
        """Nodes that had to go as soon as they were written: everything else is worth more."""
        self._counters = _Counters()
        self._opened = False
        self._off = ""
        self._closing_at: float | None = None
        # The thread's own.
        self._index: Index | None = None
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="prefix disk", daemon=True)
        self._thread.start()

    # --- the engine's thread -----------------------------------------------------------------------

    def wants(
        self,
        key: bytes,
        parent: bytes,
        root: bytes,
        tokens: Sequence[int],
        nbytes: int,
        *,
        checkpoint: bool = False,
        window: bool = True,
    ) -> bool:
        """Whether ``offer`` would write this node, so that its bytes need not be made in vain: it is not there yet (or
        without the checkpoint or the sliding layers' part), and what stands before it is. Where it only has to wait,
        ``has_room`` says so."""
        head = Head(key, parent, root, 0, pack_tokens(tokens), window, checkpoint, nbytes)
        with self._changed:
            return self._missing(head)

    def has_room(self, nbytes: int) -> bool:
        """Whether the queue would take so many bytes now. Offer nothing that follows a node that had to wait before
        that node: it would be refused."""
        with self._changed:
            has_room = self._has_room(nbytes)
            self._awaited = self._awaited or not has_room
            return has_room

    def offer(
        self,
        key: bytes,
        parent: bytes,
        root: bytes,
        start: int,
        tokens: Sequence[int],
        data: bytes,
        checkpoint: bytes | None,
        uses: int,
        *,
        window: bool = True,
    ) -> bool:
        """Keep a node; whether it is kept or about to be. False: it may be offered again, once the queue is shorter or
        its parent is kept. ``uses``: how many clients used it; ``window``: it holds the sliding layers' part."""
        ids = pack_tokens(tokens)
        nbytes = block_file.file_bytes(ids, len(data), len(checkpoint or b""))
        head = Head(key, parent, root, start, ids, window, checkpoint is not None, nbytes)
        with self._changed:
            if not self._missing(head):
                return key in self._catalog.entries or key in self._queue or self._covers(head)
            if not self._has_room(nbytes):
                self._counters.refused_nodes += 1
                return False
            self._drop_queued(key)
            self._queue[key] = _Offered(Node(head, data, checkpoint), uses, time.time())
            self._queued_bytes += nbytes
            self._changed.notify_all()
        return True

    def _missing(self, head: Head) -> bool:
        key, parent = head.key, head.parent
        if not self._opened or self._off or self._closing_at is not None:
            return False
        if head.nbytes > self._budget_bytes or key in self._futile:
            return False
        queued, entry = self._queue.get(key), self._catalog.entries.get(key)
        there = queued.node.head if queued else entry.head if entry else None
        if there is not None:
            # A file is replaced only by one that has all of it.
            has, had = (head.checkpoint, head.window), (there.checkpoint, there.window)
            return has != had and has >= had and head.window >= there.window
        has_parent = parent == head.root or parent in self._catalog.entries or parent in self._queue
        return has_parent and not self._covers(head)

    def _covers(self, head: Head) -> bool:
        return self._catalog.covers(head.parent, head.ids, checkpoint=head.checkpoint, window=head.window)

    def _has_room(self, nbytes: int) -> bool:
        """One node may be larger than the queue."""
        return self._queued_bytes == 0 or self._queued_bytes + nbytes <= self._queue_bytes

    def _drop_queued(self, key: bytes) -> None:
        if (offered := self._queue.pop(key, None)) is not None:
            self._queued_bytes -= offered.node.head.nbytes

    def find(
        self,
        parent: bytes,
        keys: Iterable[bytes],
        tokens: Sequence[int],
        start: int = 0,
        most: int | None = None,
        *,
        checkpoints: bool = False,
    ) -> Hit:
        """What is on the disk of ``tokens[start:most]``, which follow the node ``parent`` (or a root). ``keys``: of the
        whole blocks there, in their order. With ``checkpoints`` only what ends at one."""
        most = len(tokens) if most is None else most
        with self._changed:
            return self._catalog.find(parent, keys, tokens, start, most, checkpoints=checkpoints)

    def fetch(self, hit: Hit, tokens: Sequence[int]) -> Fetch:
        """Read what ``find`` found for these tokens. All of it is held until it is taken: ask for part of a long hit by
        ``find``'s ``most``."""
        wants = []
        ids = pack_tokens(tokens[hit.start : hit.tokens])
        parent, start = hit.parent, hit.start
        for head in hit.nodes:
            size = len(head.ids)
            wants.append(_Want(head, parent, start, ids[:size]))
            ids = ids[size:]
            parent, start = head.key, start + size // 4
        return self._ask(wants)

    def _ask(self, wants: Sequence[_Want]) -> Fetch:
        fetch = Fetch(wants)
        with self._changed:
            if self._off or self._closing_at is not None or not wants:
                fetch._ended.set()
            else:
                self._fetches.append(fetch)
                self._changed.notify_all()
        return fetch

    def used(self, nodes: Iterable[tuple[bytes, int]]) -> None:
        """These were used just now (wherever from), each by so many clients up to now: what is kept longest, and what
        is warmed up, goes by that. Written down later."""
        now = time.time()
        with self._changed:
            for key, uses in nodes:
                if (entry := self._catalog.entries.get(key)) is not None:
                    entry.used = now
                    entry.uses = max(entry.uses, uses)
                    self._used.add(key)

    def warm(self, most_bytes: int, least_uses: int = 2) -> Iterator[Node]:
        """The nodes that at least so many clients used, parents before children: what most share first. Waits for the
        disk: before the engine is ready, not later."""
        with self._changed:
            self._changed.wait_for(lambda: self._opened or self._off, OPEN_S)
            heads = deque(self._catalog.shared(most_bytes, least_uses))
        lost: set[bytes] = set()
        while heads:
            wants: list[_Want] = []
            ahead = 0
            while heads and (not wants or ahead + heads[0].nbytes <= WARM_BYTES):
                head = heads.popleft()
                if head.parent in lost:
                    lost.add(head.key)
                    continue
                ahead += head.nbytes
                wants.append(_Want(head, head.parent, head.start, None))
            rest = wants
            while rest:
                fetch = self._ask(rest)
                if not fetch.wait(OPEN_S):
                    fetch.cancel()
                    return
                got = fetch.take()
                yield from got
                # Each may be of another prefix: after a bad one those go on that do not stand on it.
                for want in rest[len(got) : len(got) + 1]:
                    lost.add(want.head.key)
                after = rest[len(got) + 1 :]
                rest = []
                for want in after:
                    if want.parent in lost:
                        lost.add(want.head.key)
                    else:
                        rest.append(want)

    def statistics(self) -> DiskStatistics:
        with self._changed:
            counters = self._counters
            return DiskStatistics(
                off=self._off,
                nodes=len(self._catalog.entries),
                disk_bytes=self._catalog.nbytes,
                budget_bytes=self._budget_bytes,
                queued_bytes=self._queued_bytes,
                fetching_bytes=sum(want.head.nbytes for fetch in self._fetches for want in fetch._wants),
                written_nodes=counters.written_nodes,
                written_bytes=counters.written_bytes,
                read_nodes=counters.read_nodes,
                read_bytes=counters.read_bytes,
                refused_nodes=counters.refused_nodes,
                bad_files=counters.bad_files,
                evicted_nodes=counters.evicted_nodes,
                write_s=counters.write_s,
                read_s=counters.read_s,
            )

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is queued; whether nothing is. Not for the step loop."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, timeout_s)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is queued, as far as the time allows."""
        with self._changed:
            if self._closing_at is None:
                self._closing_at = time.monotonic() + timeout_s
            self._changed.notify_all()
        # A file that is being written may take a moment longer; a disk that does not answer is left behind.
        self._thread.join(timeout_s + 1.0)

    # --- the tier's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._open()
            while self._work():
                pass
            self._write_down()
        except Exception as error:  # whatever it is: the engine goes on without
            self._turn_off(error)
        finally:
            if self._index is not None:
                with suppress(sqlite3.Error):
                    self._index.close()
            with self._changed:
                self._end_fetches()

    def _open(self) -> None:
        self._index, entries, problem = folders.open_index(self._folder, self._fingerprint)
        if problem:
            print(f"prefixes on disk: the index in {self._folder} is made anew: {problem}", flush=True)
        if self._model:
            self._index.model = self._model
            folders.clear_superseded(self._all, self._fingerprint, self._model)
        gone = self._shrink()
        with self._changed:
            for entry in entries:
                if entry.head.key not in gone:
                    self._catalog.add(entry)
            self._opened = True
            self._changed.notify_all()

    def _work(self) -> bool:
        """The next thing to do: what somebody waits for goes first. False: it is closed."""

        def something() -> bool:
            return bool(self._fetches or self._queue) or self._closing_at is not None

        with self._changed:
            self._changed.wait_for(something, LOOK_S)
            closing_at = self._closing_at
            if closing_at is not None and (not self._queue or time.monotonic() > closing_at):
                return False
            fetch = self._fetches[0] if self._fetches and closing_at is None else None
            offered = next(iter(self._queue.values()), None) if fetch is None else None
        if fetch is not None:
            self._read(fetch)
        elif offered is not None:
            self._write(offered)
            self._tell_of_room()
        if time.monotonic() - self._looked >= LOOK_S:
            self._write_down()
            self._look()
            self._looked = time.monotonic()
        return True

    def _write(self, offered: _Offered) -> None:
        assert self._index is not None
        since = time.perf_counter()
        head = offered.node.head
        with self._changed:
            before = self._catalog.entries.get(head.key)
            has_parent = head.parent == head.root or head.parent in self._catalog.entries
            if not has_parent or (before is None and self._covers(head)):  # meanwhile
                self._drop_queued(head.key)
                self._changed.notify_all()
                return
        block_file.write(self._folder, self._fingerprint, offered.node)
        entry = Entry(head, max(offered.uses, before.uses if before else 0), offered.at)
        self._index.put([entry])
        with self._changed:
            covered = [other.key for other in self._catalog.covered(head)]
        if covered:
            self._index.delete(covered, self._unlink)
        gone = self._shrink()
        with self._changed:
            for key in (*covered, *gone):
                self._catalog.remove(key)
            if head.key in gone:
                self._futile.add(head.key)
            else:
                self._catalog.add(entry)
            if self._queue.get(head.key) is offered:
                self._drop_queued(head.key)
            self._changed.notify_all()
            self._counters.written_nodes += 1
            self._counters.written_bytes += head.nbytes
            self._counters.write_s += time.perf_counter() - since

    def _tell_of_room(self) -> None:
        with self._changed:
            tell = self._awaited and self._queued_bytes <= self._queue_bytes / 2
            if tell:
                self._awaited = False
        if tell:
            self._wake()

    def _shrink(self) -> set[bytes]:
        assert self._index is not None
        if self._index.nbytes <= self._budget_bytes:
            return set()
        self._write_down()  # what was used just now is not what goes
        gone = self._index.shrink(self._budget_bytes, self._unlink)
        if gone:
            with self._changed:
                self._counters.evicted_nodes += len(gone)
        return set(gone)

    def _unlink(self, key: bytes) -> None:
        folders.unlink(self._folder, key)

    def _read(self, fetch: Fetch) -> None:
        since = time.perf_counter()
        read: list[Node] = []
        for want in fetch._wants:
            if fetch._cancelled or self._closing_at is not None:
                break
            node = self._read_node(want)
            if node is None:
                break
            read.append(node)
            fetch._read.append(node)
        self.used((node.head.key, node.uses) for node in read)
        with self._changed:
            self._fetches.popleft()
            self._counters.read_nodes += len(read)
            self._counters.read_bytes += sum(node.head.nbytes for node in read)
            self._counters.read_s += time.perf_counter() - since
            fetch._ended.set()
        self._wake()

    def _read_node(self, want: _Want) -> Node | None:
        key = want.head.key
        try:
            node = block_file.read(block_file.path_of(self._folder, key), self._fingerprint)
            head = node.head
            if (head.parent, head.start) != (want.parent, want.start) or not head.ids.startswith(want.ids or b""):
                raise BadFile("its tokens are others")
            if want.head.checkpoint and not head.checkpoint:
                raise BadFile("its checkpoint is not there")
            with self._changed:
                entry = self._catalog.entries.get(key)
            return node._replace(uses=entry.uses) if entry is not None else node
        except FileNotFoundError:
            self._forget(key, bad=False)
        except BadFile as error:
            print(f"prefixes on disk: {key.hex()} is dropped: {error}", flush=True)
            self._forget(key, bad=True)
        except OSError as error:  # perhaps only now
            print(f"prefixes on disk: {key.hex()} cannot be read: {error}", flush=True)
            with self._changed:
                self._catalog.remove(key)
        return None

    def _forget(self, key: bytes, *, bad: bool) -> None:
        assert self._index is not None
        with self._changed:
            self._catalog.remove(key)
            self._counters.bad_files += bad
        self._index.delete([key], self._unlink)

    def _write_down(self) -> None:
        """When nodes were used, and by how many."""
        assert self._index is not None
        with self._changed:
            keys, self._used = self._used, set()
            entries = self._catalog.entries
            uses = [Entry(entries[key].head, entries[key].uses, entries[key].used) for key in keys & entries.keys()]
        if uses:
            self._index.use(uses)

    def _look(self) -> None:
        """What other processes wrote and deleted."""
        assert self._index is not None
        fresh, left = self._index.fresh(), self._index.deleted()
        for entry in fresh:  # each for itself: there may be many, and a step may want to know something
            with self._changed:
                self._catalog.add(entry)
        if left is not None:
            with self._changed:
                gone = self._catalog.entries.keys() - left
            for key in gone:
                with self._changed:
                    self._catalog.remove(key)

    def _turn_off(self, error: Exception) -> None:
        if isinstance(error, sqlite3.Error) and broken(error):
            with suppress(OSError):
                put_aside(self._folder)  # the next start makes it anew from the files
        with self._changed:
            self._off = f"{type(error).__name__}: {error}"
            self._catalog = Catalog()
            self._queue.clear()
            self._queued_bytes = 0
            self._changed.notify_all()
        self._tell_of_room()
        print(f"prefixes are no longer kept on disk ({self._folder}): {self._off}", flush=True)

    def _end_fetches(self) -> None:
        waiting = bool(self._fetches)
        while self._fetches:
            self._fetches.popleft()._ended.set()
        if waiting:
            self._wake()
