"""What is to run as a service, and what the managers share: writing the file, and running the system's own commands."""

import os
import pwd
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmx.errors import LmxError

OPEN_FILES = 65_536
RETRY_S = 10
"""After a crash at the start (a port in use, say), before the next try."""
LEAST_STOP_S = 60
SPARE_STOP_S = 30
"""Beyond ``drain_s``: for the last words of requests, and for engines to end."""
COMMAND_S = 120.0


class ServiceError(LmxError):
    """The system's services do not do what is asked; the message says why, and the way out."""

    code = "service_error"


@dataclass(frozen=True, slots=True)
class Wanted:
    command: tuple[str, ...]
    folder: Path
    """Working directory."""
    user: str
    """Whom it runs as."""
    home: Path
    environment: Mapping[str, str]
    stop_s: int
    """How long it has to end."""


@dataclass(frozen=True, slots=True)
class State:
    installed: bool
    running: bool
    pid: int | None
    restarts: int | None
    last_exit: str
    """Of the run before, in the manager's words."""


def wanted(
    config: Path | None,
    arguments: Sequence[str],
    *,
    user: str,
    environment: Mapping[str, str],
    drain_s: float,
) -> Wanted:
    """``lmx serve`` with this Python, these settings and arguments. Raises ServiceError for an unknown user."""
    try:
        home = Path(pwd.getpwnam(user).pw_dir)
    except KeyError:
        raise ServiceError(f"There is no user {user!r} on this machine.", param="--as") from None
    settings = ("--config", str(config.absolute())) if config is not None else ()
    # No code from the working directory, as for every process of lmx.
    command = (sys.executable, "-P", "-m", "lmx", "serve", *settings, *arguments)
    folder = config.absolute().parent if config is not None else home
    return Wanted(command, folder, user, home, dict(environment), max(LEAST_STOP_S, int(drain_s) + SPARE_STOP_S))


def calling_user() -> str:
    """Who asks, also behind sudo."""
    return os.environ.get("SUDO_USER") or pwd.getpwuid(os.geteuid()).pw_name


def refuse_unprintable(wanted: Wanted) -> None:
    """Raises ServiceError: no line end in a path may become a line of a unit."""
    for text in (*wanted.command, str(wanted.folder), *wanted.environment, *wanted.environment.values()):
        if not text.isprintable():
            raise ServiceError(f"{text!r} holds characters that a service's file cannot.")


def write(path: Path, text: str) -> None:
    """Whole or not at all. Raises ServiceError."""
    aside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.chmod(0o644)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise denied(path, error) from None


def remove(path: Path) -> None:
    """Raises ServiceError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise denied(path, error) from None


def denied(path: Path, error: OSError) -> ServiceError:
    way_out = ""
    if isinstance(error, PermissionError):
        way_out = "; a service of the whole system needs root (sudo), one of your own --user"
    return ServiceError(f"{path} cannot be changed: {error.strerror or error}{way_out}.")


def run(*command: str) -> str:
    """What the command printed. Raises ServiceError."""
    done = attempt(*command)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise ServiceError(f"`{' '.join(command)}` failed ({done.returncode}): {said or 'it does not say why'}")
    return done.stdout


def attempt(*command: str) -> "subprocess.CompletedProcess[str]":
    """The same where failing is an answer. Raises ServiceError where it cannot be run at all."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ServiceError(
            f"This system has no {command[0]}; run `lmx serve` from what starts programs here."
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"`{' '.join(command)}` cannot be run: {error}.") from None
