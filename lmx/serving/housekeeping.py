"""What a server does about its disk without being asked: it warns when space runs low, and removes models of lmx's own
that were not used for ``[hub] cleanup_days``, a day after it has said so. Run beside the models by ``lmx.serve``."""

import logging

import trio

from lmx.config.live import Live
from lmx.errors import LmxError
from lmx.hub import disk
from lmx.serving.removal import Removals

EVERY_S = 3600.0
NOTICE_S = 24 * 3600.0
"""Between the line in the log and the removal: time to pin a model, to use it, or to change the setting."""

logger = logging.getLogger("lmx")


class Housekeeping:
    def __init__(self, removals: Removals, live: Live) -> None:
        self._removals = removals
        self._live = live
        self._low = False
        self._announced: dict[str, float] = {}
        """When it was said of a model that it will go, on Trio's clock."""

    async def run(self) -> None:
        """Look after the disk until cancelled."""
        while True:
            try:
                await self.look()
            except (OSError, LmxError) as error:
                logger.warning("the disk could not be looked after: %s", error)
            await trio.sleep(EVERY_S)

    async def look(self) -> None:
        """Once. Raises OSError, LmxError."""
        settings = self._live.now
        space = await trio.to_thread.run_sync(disk.space, settings, abandon_on_cancel=True)
        if space.low and not self._low:
            logger.warning(
                "the disk of %s has %.1f GB left, less than [hub] low_disk_bytes; POST /admin/cleanup lists models "
                "that nobody uses",
                space.path,
                space.free_bytes / 1e9,
            )
        self._low = space.low
        if settings.hub.cleanup_days:
            await self._clean_up(settings.hub.cleanup_days)

    async def _clean_up(self, days: int) -> None:
        now = trio.current_time()
        unused = [model.id for model in await self._removals.clean_up(days, dry_run=True, own=True)]
        self._announced = {name: self._announced.get(name, now) for name in unused}
        for name, since in self._announced.items():
            if since == now:
                logger.warning("%s was not used for %d days and goes tomorrow ([hub] cleanup_days)", name, days)
        due = {name for name, since in self._announced.items() if now - since >= NOTICE_S}
        if due:
            for gone in await self._removals.clean_up(days, dry_run=False, own=True, only=due):
                outcome = gone.problem or f"removed, {gone.size_bytes / 1e9:.2f} GB"
                logger.warning("%s was not used for %d days: %s", gone.id, days, outcome)
