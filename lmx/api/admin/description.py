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
        # Of two of the same id, one leaves and is told last.
        statuses = {status.id: status for status in reversed(self._models.statuses())}
        entries = {entry.id: entry for entry in self._models.library.entries}
        served = {served.id: served for served in self._models.listing()}
        uses = await trio.to_thread.run_sync(self._models.state.last_uses)
        self._previews = {entry: self._previews[entry] for entry in entries.values() if entry in self._previews}
        names = dict.fromkeys((*reversed(statuses), *entries))
        return [
            await self._object(name, entries.get(name), statuses.get(name), served.get(name), uses.get(name))
            for name in names
        ]

    async def of(self, name: str) -> dict[str, Any]:
        """One model, under any of its names, with its benches. Raises ModelNotFound, which lists the models."""
        models, status = self._models, self._models.status(name)
        model_id = status.id if status is not None else self.on_disk(name).id
        status = status or next((one for one in models.statuses() if one.id == model_id), None)
        entry = next((one for one in models.library.entries if one.id == model_id), None)
        served = next((one for one in models.listing() if one.id == model_id), None)
        uses = await trio.to_thread.run_sync(models.state.last_uses)
        benches = await trio.to_thread.run_sync(self._benches.of, model_id)
        return await self._object(model_id, entry, status, served, uses.get(model_id)) | {"benches": benches}

    def on_disk(self, name: str) -> Entry:
        """The model that is not loaded and has this name, whole or broken. Raises ModelNotFound."""
        entries = self._models.library.entries
        try:
            found = self._models.look_up(name)
        except ModelInvalid:
            called = name.casefold()
            for entry in entries:
                if entry.problem and called in map(str.casefold, (entry.id, str(entry.path), *entry.aliases)):
                    return entry
            raise
        if isinstance(found, Entry):
            return found
        for entry in entries:
            if entry.id == found.id:
                return entry
        raise ModelNotFound(
            f"{found.id} ({found.folder.source}) is in none of the folders that are looked through.", param="model"
        )

    async def _object(
        self,
        model_id: str,
        entry: Entry | None,
        status: ModelStatus | None,
        served: AnyServed | None,
        last_used: float | None,
    ) -> dict[str, Any]:
        told = _entry(model_id, entry, served)
        if status is not None:
            told |= _status(status)
            told |= {"backend": None, "backend_reason": ""}
            if served is not None:
                told |= {"backend": served.folder.backend, "backend_reason": served.folder.backend_reason}
            return told
        assert entry is not None
        found = await self._preview(entry)
        failure = self._models.failure(entry.id)
        return told | {
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


def _entry(model_id: str, entry: Entry | None, served: AnyServed | None) -> dict[str, Any]:
    """What its files say. One that was named by its path is in no folder that is looked through."""
    if entry is not None:
        return asdict(entry) | {"path": str(entry.path)}
    folder = served.folder if served is not None else None
    kind = served.kind if served is not None else None
    return {
        "id": model_id,
        "aliases": [],
        "path": str(folder.source) if folder is not None else None,
        "source": "folder",
        "format": folder.format if folder is not None else None,
        "kind": kind,
        "architecture": folder.architecture if folder is not None else None,
        "quantization": folder.quantization if folder is not None else None,
        "parameters": None,
        "size_bytes": folder.size_bytes if folder is not None else None,
        "context_length": folder.context_length if folder is not None else None,
        "capabilities": ["embedding"] if kind == "embeddings" else [],
        "modified": None,
        "problem": "",
    }


def _status(status: ModelStatus) -> dict[str, Any]:
    told = status_object(status)
    estimate = _estimate(status.estimate, status.reserved_bytes or status.needed_bytes)
    return told | {
        "memory": {
            "estimate": estimate,
            "owned_bytes": told.pop("owned_bytes"),
            "measured_bytes": told.pop("measured_bytes"),
        }
    }


def status_object(status: ModelStatus) -> dict[str, Any]:
    """Its stay in memory, without the estimate."""
    told = {field.name: getattr(status, field.name) for field in fields(status) if field.name != "estimate"}
    return told | {
        "settings": {name: {"value": value, "source": source} for name, (value, source) in status.settings.items()}
    }


def _estimate(estimate: Estimate | None, total_bytes: int) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate) | {"total_bytes": total_bytes}
