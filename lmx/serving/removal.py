"""Removes models from the disk as long as nobody needs them: by hand, or those that were not used for long.

``lmx.hub.disk`` knows what goes with a model; here is who uses it: what is loaded is unloaded first, or refused. Called
by the admin face. Removing is never given up halfway: whoever asked for it may go.
"""

from collections.abc import Collection
from dataclasses import dataclass

import trio

from lmx.config.live import Live
from lmx.errors import Conflict, Forbidden, InvalidRequest, LmxError, ModelInvalid, ModelNotFound
from lmx.hub import disk
from lmx.hub.disk import Removal
from lmx.hub.library import Entry
from lmx.serving.models import Models


@dataclass(frozen=True, slots=True)
class Unused:
    id: str
    size_bytes: int
    """That go with it."""
    last_used: float | None
    """Unix time; None: never, as far as anybody remembers."""
    problem: str = ""
    """Why it is still there."""


class Removals:
    """Of ``models``."""

    def __init__(self, models: Models, live: Live) -> None:
        self._models = models
        self._live = live

    async def plan(self, entry: Entry) -> Removal:
        """What would go. Raises Forbidden, ModelNotFound."""
        return await trio.to_thread.run_sync(disk.removal, entry, self._live.now, abandon_on_cancel=True)

    async def remove(self, entry: Entry, *, force: bool) -> Removal:
        """What went. ``force``: also what is loaded, after its requests have had their time, and what is not lmx's own.

        Raises Conflict, Forbidden, ModelNotFound, or LmxError for what could not be deleted. Cancelled: while the model
        is unloaded nothing is removed; once it is being removed, it is.
        """
        planned = await self.plan(entry)
        if planned.needs_force and not force:
            raise Forbidden(f"{planned.needs_force} (?force=true)", param="force")
        self._refuse_converting(entry)
        while loaded := self._loaded(entry):
            if not force:
                raise Conflict(
                    f"{loaded} is in memory ({self._models.states()[loaded]}). Unload it first, or say force=true.",
                    param="model",
                )
            await self._models.unload(loaded)
        await trio.to_thread.run_sync(lambda: disk.remove(planned, force=force))
        if self._models.failure(entry.id) is not None:
            await self._models.unload(entry.id)  # nobody waits for it to come back
        await self._look_again()
        return planned

    async def clean_up(
        self, days: int, *, dry_run: bool, own: bool = False, only: Collection[str] | None = None
    ) -> list[Unused]:
        """The models that nobody has used for so many days, the longest unused first; unless ``dry_run``, removed. None
        of them is loaded, pinned, or named in the settings. ``own``: none outside lmx's own folder; ``only``: none but
        these.

        Raises InvalidRequest. Cancelled: some may be left.
        """
        models, uses = self._models, await trio.to_thread.run_sync(self._models.state.last_uses)
        unused = await trio.to_thread.run_sync(disk.unused, models.library.entries, uses, days, self._needed())
        found = []
        for entry in unused:
            if (own and entry.source != "lmx") or (only is not None and entry.id not in only):
                continue
            size, problem = 0, ""
            try:
                size = (await (self.plan(entry) if dry_run else self.remove(entry, force=False))).freed_bytes
            except LmxError as error:
                problem = error.message
            found.append(Unused(entry.id, size, uses.get(entry.id), problem))
        return found

    def _loaded(self, entry: Entry) -> str | None:
        """Under which id it is in memory, or on its way in or out."""
        return next((status.id for status in self._models.statuses() if status.is_of(entry)), None)

    def _refuse_converting(self, entry: Entry) -> None:
        for job in self._models.jobs.list():
            if job.kind == "convert" and job.model == entry.id and not job.is_over:
                raise Conflict(f"The job {job.id} reads {entry.id}; wait for its end, or cancel it.", param="model")

    def _needed(self) -> set[str]:
        """The ids of what is loaded, pinned, or named in the settings."""
        settings = self._live.now
        needed: set[str] = set()
        for entry in self._models.library.entries:
            if self._loaded(entry) or settings.named([entry.id, *entry.aliases]).pin:
                needed.add(entry.id)
        for name in (settings.model.default, settings.model.embedding, *settings.model.preload):
            try:
                needed.add(self._models.library.find(settings.model.aliases.get(name, name)).id)
            except (ModelNotFound, ModelInvalid, InvalidRequest):
                continue
        return needed

    async def _look_again(self) -> None:
        if await trio.to_thread.run_sync(self._models.library.scan, abandon_on_cancel=True):
            self._models.changes.send()
