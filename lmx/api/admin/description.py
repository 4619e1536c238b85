"""What the admin face tells of a model, on the disk or loaded (M in docs/admin.md).

From state at hand, the state database and, for what is not loaded, the headers of its files; never from an engine.
"""

from dataclasses import asdict, fields
from typing import Any

import trio

from lmx.config import Settings
from lmx.config.live import Live
from lmx.errors import ModelInvalid, ModelNotFound
from lmx.hub.estimate import Estimate
from lmx.hub.library import Entry
from lmx.serving.bench import Benches
from lmx.serving.models import AnyServed, Models
from lmx.serving.models.preview import Preview, preview
from lmx.serving.models.status import ModelStatus

_ELSEWHERE = ("path", "estimate", "owned_bytes", "measured_bytes")
_NOT_LOADED: dict[str, Any] = {
    "message": "",
    "since": None,
    "leases": 0,
    "pinned": False,
    "kept": False,
    "ttl_s": None,
    "expires_in_s": None,
    "last_used": None,
    "settings": {},
    "needed_bytes": 0,
    "reserved_bytes": 0,
    "load_s": None,
}


class Descriptions:
    """Of ``models``. What files say is read once, as long as neither they nor the settings change."""

    def __init__(self, models: Models, benches: Benches, live: Live) -> None:
        self._models = models
        self._benches = benches
        self._live = live
        self._previews: dict[Entry, tuple[Settings, Preview]] = {}

    async def all(self) -> list[dict[str, Any]]:
        """Every model; those that are loaded, or on their way in or out, first."""
        models = self._models
        statuses, entries = models.statuses(), models.library.entries
        uses = await trio.to_thread.run_sync(models.state.last_uses)
        self._previews = {entry: self._previews[entry] for entry in entries if entry in self._previews}
        told = []
        for number, status in enumerate(statuses):
            if status.id not in {other.id for other in statuses[:number]}:  # of two, one leaves and is told last
                told.append(self._in_memory(status))
        for entry in entries:
            if not any(status.is_of(entry) for status in statuses):
                told.append(await self._on_disk(entry, uses.get(entry.id)))
                await trio.lowlevel.checkpoint()  # there may be thousands
        return told

    async def of(self, name: str) -> dict[str, Any]:
        """One model, under any of its names, with its benches. Raises ModelNotFound, which lists the models."""
        models = self._models
        status = models.status(name)
        if status is None:
            entry = self.on_disk(name)
            status = next((one for one in models.statuses() if one.is_of(entry)), None)
        if status is not None:
            told = self._in_memory(status)
        else:
            uses = await trio.to_thread.run_sync(models.state.last_uses)
            told = await self._on_disk(entry, uses.get(entry.id))
        return told | {"benches": await trio.to_thread.run_sync(self._benches.of, (told["id"], *told["aliases"]))}

    def on_disk(self, name: str) -> Entry:
        """The files of the model that has this name, whole or broken. Raises ModelNotFound."""
        entries = self._models.library.entries
        status = self._models.status(name)
        if status is not None:
            for entry in entries:
                if status.is_of(entry):
                    return entry
            raise ModelNotFound(
                f"{status.id} ({status.path}) is in none of the folders that are looked through.", param="model"
            )
        try:
            found = self._models.look_up(name)
        except ModelInvalid:
            called = name.casefold()
            for entry in entries:
                if entry.problem and called in map(str.casefold, (entry.id, str(entry.path), *entry.aliases)):
                    return entry
            raise
        assert isinstance(found, Entry)
        return found

    def _in_memory(self, status: ModelStatus) -> dict[str, Any]:
        entry = next((entry for entry in self._models.library.entries if status.is_of(entry)), None)
        served = next((served for served in self._models.listing() if served.id == status.id), None)
        told = _entry(entry) if entry is not None else _outside(status, served)
        names = [name for name in (told["id"], *told["aliases"]) if name != status.id]
        estimate = _estimate(status.estimate, status.reserved_bytes or status.needed_bytes)
        return told | {
            **status_object(status),
            "id": status.id,
            "aliases": names,
            "path": told["path"],
            "backend": served.folder.backend if served is not None else None,
            "backend_reason": served.folder.backend_reason if served is not None else "",
            "memory": {
                "estimate": estimate,
                "owned_bytes": status.owned_bytes,
                "measured_bytes": status.measured_bytes,
            },
        }

    async def _on_disk(self, entry: Entry, last_used: float | None) -> dict[str, Any]:
        found = await self._preview(entry)
        failure = self._models.failure(entry.id)
        return _entry(entry) | {
            **_NOT_LOADED,
            "state": "on disk" if failure is None else "failed",
            "error": None if failure is None else failure.message,
            "last_used": last_used,
            "backend": found.backend,
            "backend_reason": found.backend_reason,
            "memory": {
                "estimate": _estimate(found.estimate, found.least_bytes),
                "owned_bytes": 0,
                "measured_bytes": 0,
            },
        }

    async def _preview(self, entry: Entry) -> Preview:
        if entry.problem:
            return Preview(None, entry.problem, None, 0)
        settings, found = self._previews.get(entry, (None, None))
        if found is None or settings is not self._live.now:
            settings = self._live.now
            # Abandoned: what a thread reads harms nobody.
            found = await trio.to_thread.run_sync(preview, entry, settings, abandon_on_cancel=True)
            self._previews[entry] = settings, found
        return found


def _entry(entry: Entry) -> dict[str, Any]:
    """What its files say."""
    return asdict(entry) | {"aliases": list(entry.aliases), "path": str(entry.path)}


def _outside(status: ModelStatus, served: AnyServed | None) -> dict[str, Any]:
    """The same of a model that was named by its path, and is in no folder that is looked through."""
    folder = served.folder if served is not None else None
    kind = served.kind if served is not None else None
    return {
        "id": status.id,
        "aliases": [],
        "path": status.path if folder is None else str(folder.source),
        "source": "folder",
        "format": folder and folder.format,
        "kind": kind,
        "architecture": folder and folder.architecture,
        "quantization": folder and folder.quantization,
        "parameters": None,
        "size_bytes": folder and folder.size_bytes,
        "context_length": folder and folder.context_length,
        "capabilities": ["embedding"] if kind == "embeddings" else [],
        "modified": None,
        "problem": "",
    }


def status_object(status: ModelStatus) -> dict[str, Any]:
    """Its stay in memory; the figures of its memory stand elsewhere."""
    told = {field.name: getattr(status, field.name) for field in fields(status) if field.name not in _ELSEWHERE}
    return told | {
        "settings": {name: {"value": value, "source": source} for name, (value, source) in status.settings.items()}
    }


def _estimate(estimate: Estimate | None, total_bytes: int) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate) | {"total_bytes": total_bytes}
