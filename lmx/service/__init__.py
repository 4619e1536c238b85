"""lmx as a service of the system: made by ``lmx service install``, on macOS of launchd, on Linux of systemd.

``wanted`` says what is to run, ``launchd`` and ``systemd`` how their system is told; both have the same face,
``Manager``. What they write is the only source: the examples in ``launchd/`` are printed by them, and a test holds them
to it. Called by ``lmx.cli.service``; the server knows nothing of it.
"""

import sys
from pathlib import Path
from typing import Protocol

from lmx.service.launchd import Launchd
from lmx.service.systemd import Systemd
from lmx.service.wanted import ServiceError, State, Wanted

__all__ = ["Manager", "ServiceError", "State", "Wanted", "manager"]


class Manager(Protocol):
    """The system's own, for the whole machine or for one user."""

    @property
    def path(self) -> Path:
        """The file that makes it a service."""

    def text(self, wanted: Wanted) -> str:
        """What is in that file. Raises ServiceError for what it cannot hold."""

    def install(self, wanted: Wanted) -> list[str]:
        """Write the file, have it checked, and start the service, now and at every boot; a former one is replaced.
        What was done, in words. Raises ServiceError; then nothing is left behind."""

    def uninstall(self) -> list[str]:
        """Stop the service and undo all that ``install`` did; nothing, where there is none. Raises ServiceError."""

    def restart(self) -> None:
        """Raises ServiceError."""

    def state(self) -> State:
        """Raises ServiceError."""

    def command(self) -> tuple[str, ...]:
        """What the installed service runs; empty where there is none."""

    def logs(self, lines: int, *, follow: bool) -> tuple[str, ...]:
        """The command that prints its log."""


def manager(*, user_only: bool, platform: str = sys.platform) -> Manager:
    """This system's. Raises ServiceError where lmx knows none."""
    if platform == "darwin":
        return Launchd(user_only=user_only)
    if platform == "linux":
        return Systemd(user_only=user_only)
    raise ServiceError(f"lmx knows no services on {platform}; run `lmx serve` from what starts programs there.")
