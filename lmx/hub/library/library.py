"""Keeps the list of models up to date, and tells which one a name means.

What files say is kept in the state database for as long as they have the same names, times and sizes, so that looking
again costs no more than listing folders. Called by the server's model manager and by the command line; ``scan`` blocks
and is called from a thread.
"""

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from lmx.config import Settings
from lmx.errors import ModelNotFound
from lmx.hub.inventory import embedded_gguf
from lmx.hub.library.entry import Entry
from lmx.hub.library.facts import Facts, read_facts, version
from lmx.hub.library.names import Names, assemble
from lmx.hub.library.places import Found, Look, Place, named_paths, places
from lmx.hub.state import State

logger = logging.getLogger("lmx")

WATCH_S = 3.0
_SHARE = 0.02
"""Of a core's time that looking again may take."""
_BATCH = 20
"""So many models are read before what they say is kept."""


class Library:
    def __init__(self, settings: Settings, state: State) -> None:
        """Knows at once what the last scan found. Blocking, for milliseconds."""
        self.settings = settings
        """May be replaced; the next scan goes by it."""
        self._state = state
        self._scanning = threading.Lock()
        self._told: set[str] = set()
        self._embedded = _embedded()
        self._known = self._load()
        self._nudged = trio.Event()
        self.entries: tuple[Entry, ...] = ()
        self._published: object = None
        self._publish(list(self._known.values()), places(settings, self._embedded), {})

    def scan(self) -> bool:
        """Look at every place. True: ``entries`` are others now. Blocking; any thread."""
        with self._scanning:
            settings = self.settings
            models: list[tuple[Found, Facts]] = []
            fresh: list[tuple[Found, Facts]] = []
            where = places(settings, self._embedded)
            twins: dict[Path, Path] = {}
            for found in self._look(where, twins):
                known = self._known.get(found.path)
                if known is not None and known[0].stamp == found.stamp:
                    facts = known[1]
                    if known[0] != found:
                        fresh.append((found, facts))
                else:
                    facts = read_facts(found)
                    fresh.append((found, facts))
                models.append((found, facts))
                if len(fresh) >= _BATCH:
                    self._keep(fresh)
                    fresh = []
            there = {found.path for found, _ in models}
            roots = {place.path for place in where if place.path.exists()}  # a disk may come back
            gone = [path for path, (found, _) in self._known.items() if path not in there and found.place in roots]
            self._keep(fresh, gone)
            return self._publish(models, where, twins)

    def find(self, name: str) -> Entry:
        """The model that is called so: its id, another name, or its path; in any case of letters where that is clear.

        Raises ModelNotFound, which lists near names, or ModelInvalid with the reason why it cannot be loaded.
        """
        return self._names.find(name)

    def look_up(self, name: str) -> Entry:
        """As ``find``, but also a broken model: to be shown, or removed. Raises ModelNotFound."""
        return self._names.look_up(name)

    def nudge(self) -> None:
        """Something was changed: look now. From the event loop's thread."""
        self._nudged.set()

    async def watch(self, changed: Callable[[], None]) -> None:
        """Look every few seconds, and when nudged, until cancelled; ``changed`` is called when entries are others.
        Cancelled, it leaves a thread behind that only reads and ends by itself."""
        while True:
            nudged = self._nudged = trio.Event()
            began = time.perf_counter()
            try:
                if await trio.to_thread.run_sync(self.scan, abandon_on_cancel=True):
                    changed()
            except Exception:
                logger.exception("looking for models failed; the list stays as it was")
            with trio.move_on_after(max(WATCH_S, (time.perf_counter() - began) / _SHARE)):
                await nudged.wait()

    def _publish(self, models: list[tuple[Found, Facts]], where: list[Place], twins: dict[Path, Path]) -> bool:
        """In an order that does not depend on how they were come by."""
        order = {place.path: number for number, place in reversed(list(enumerate(where)))}
        models.sort(key=lambda model: (order[model[0].place], os.fsencode(model[0].path)))
        called = {twins.get(path, path): name for path, name in named_paths(self.settings).items()}
        inputs = (models, list(self.settings.hub.quantizations), called, twins)
        if inputs == self._published:
            return False
        self._published = inputs
        entries = assemble(models, self.settings.hub.quantizations, called)
        before, self.entries = self.entries, entries
        self._names = Names(entries, twins)
        return entries != before

    def _look(self, where: list[Place], twins: dict[Path, Path]) -> Iterator[Found]:
        """What is there, each model's files once; ``twins`` gets other paths of the same."""
        seen: dict[tuple[int, int] | Path, Path] = {}
        for place in where:
            look = Look(place, version())
            for found in look.models():
                first = seen.setdefault(_identity(found.path), found.path)
                if first is found.path:
                    yield found
                elif first != found.path:
                    twins[found.path] = first
            for problem in look.problems:
                if problem not in self._told:
                    self._told.add(problem)
                    logger.warning("models are not looked for everywhere: %s", problem)

    # --- what is kept --------------------------------------------------------------------------------

    def _load(self) -> dict[Path, tuple[Found, Facts]]:
        rows: list[tuple[bytes, bytes, str]] = []
        with _state_is_a_help(), self._state.connection() as db:
            rows = db.execute("SELECT path, stamp, facts FROM files").fetchall()
        roots = {place.path for place in places(self.settings, self._embedded)}
        known = {}
        for path, stamp, text in rows:
            try:
                found, facts = _restore(path, stamp, json.loads(text))
            except (ValueError, TypeError, KeyError, AttributeError):  # another version's
                continue
            if found.place in roots:
                known[found.path] = (found, facts)
        return known

    def _keep(self, fresh: list[tuple[Found, Facts]], gone: list[Path] | None = None) -> None:
        gone = gone or []
        if not fresh and not gone:
            return
        for path in gone:
            del self._known[path]
        self._known |= {found.path: (found, facts) for found, facts in fresh}
        with _state_is_a_help(), self._state.connection() as db:
            db.executemany("DELETE FROM files WHERE path = ?", [(os.fsencode(path),) for path in gone])
            db.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
                [(os.fsencode(found.path), found.stamp, _text(found, facts)) for found, facts in fresh],
            )


@contextmanager
def _state_is_a_help() -> Iterator[None]:
    """Without it files are read again after a restart, and that is all."""
    try:
        yield
    except sqlite3.Error as error:
        logger.debug("what files say cannot be kept: %s", error)


def _text(found: Found, facts: Facts) -> str:
    kept = asdict(found) | {"path": None, "stamp": None, "place": str(found.place)}
    return json.dumps({"found": kept, "facts": asdict(facts)})


def _restore(path: bytes, stamp: bytes, kept: dict[str, Any]) -> tuple[Found, Facts]:
    """Raises ValueError, TypeError, KeyError or AttributeError for what another version kept."""
    found = kept["found"]
    lists = {name: tuple(found[name]) for name in ("names", "unfinished")}
    given = {**found, **lists, "path": Path(os.fsdecode(path)), "stamp": stamp, "place": Path(found["place"])}
    facts = {**kept["facts"], "capabilities": tuple(kept["facts"]["capabilities"])}
    return Found(**given), Facts(**facts)


def _embedded() -> Path | None:
    try:
        return embedded_gguf()
    except ModelNotFound:
        return None


def _identity(path: Path) -> tuple[int, int] | Path:
    """The same for the same files, by whichever way they are reached."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino
