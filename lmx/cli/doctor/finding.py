"""What the checks look at, what they say, and what they share."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lmx.config import Settings
from lmx.hub.state import FILE_NAME, State

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    level: Level
    text: str
    advice: str = ""
    """What to change."""


@dataclass(slots=True)
class Patient:
    """What the checks look at; earlier ones fill in what later ones need."""

    file: Path | None
    environ: Mapping[str, str]
    host: str | None
    """The server that was named; None: the one that the settings describe."""
    key: str
    offline: bool
    platform: str = sys.platform
    settings: Settings = field(default_factory=Settings)
    state: State | None = None
    serves: bool = False
    """An lmx server answers at ``address``."""

    @property
    def address(self) -> str:
        server = self.settings.server
        host = f"[{server.host}]" if ":" in server.host else server.host
        return self.host or f"{host}:{server.port}"

    @property
    def state_path(self) -> Path:
        return self.settings.hub.data_path / FILE_NAME


Check = Callable[[Patient], Iterator[Finding]]


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What lmx's log would say."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, ear = logging.getLogger("lmx"), Ear(logging.WARNING)
    logger.addHandler(ear)
    try:
        yield heard
    finally:
        logger.removeHandler(ear)
