"""Placeholder of helper inv's library: replaced by the merge of w16-inv."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from lmx.config import Settings
from lmx.errors import ModelInvalid, ModelNotFound
from lmx.hub.folder import inspect_folder
from lmx.hub.state import State


@dataclass(frozen=True, slots=True)
class Entry:
    id: str
    aliases: tuple[str, ...]
    path: Path
    source: str
    format: str
    kind: str
    architecture: str
    quantization: str
    parameters: int
    size_bytes: int
    context_length: int
    capabilities: tuple[str, ...]
    modified: float
    problem: str


class Library:
    def __init__(self, settings: Settings, state: State) -> None:
        self.settings = settings
        self.entries: tuple[Entry, ...] = ()

    def scan(self) -> bool:
        found = []
        for folder in self.settings.hub.folders:
            for path in sorted(Path(folder).iterdir()):
                try:
                    facts = inspect_folder(path)
                except ModelInvalid:
                    continue
                found.append(
                    Entry(path.name, (), path, "folder", "mlx", "llm", facts.architecture, facts.quantization, 0,
                          facts.size_bytes, facts.context_length, (), path.stat().st_mtime, "")
                )  # fmt: skip
        self.entries, before = tuple(found), self.entries
        return self.entries != before

    def find(self, name: str) -> Entry:
        for entry in self.entries:
            if name.casefold() == entry.id.casefold() or name == str(entry.path):
                return entry
        raise ModelNotFound(f"There is no model {name[:200]!r}.")

    async def watch(self, changed: Callable[[], None]) -> None:
        while True:
            await trio.sleep(2)
            if await trio.to_thread.run_sync(self.scan, abandon_on_cancel=True):
                changed()

    def nudge(self) -> None:
        pass
