"""macOS's launchd: a LaunchDaemon, which starts at boot without a login, or a LaunchAgent of one user."""

import os
import plistlib
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmx.service import wanted as shared
from lmx.service.wanted import ServiceError, State, Wanted

LABEL = "io.lmx.server"
_LOOK_S = 0.2


class Launchd:
    def __init__(self, *, user_only: bool, root: Path = Path("/")) -> None:
        """``root``: of the file system, for tests."""
        self._user_only = user_only
        self.path = (
            (Path.home() if user_only else root) / "Library" / ("LaunchAgents" if user_only else "LaunchDaemons")
        )
        self.path /= f"{LABEL}.plist"
        self._domain = f"gui/{os.getuid()}" if user_only else "system"

    @property
    def _target(self) -> str:
        return f"{self._domain}/{LABEL}"

    def text(self, wanted: Wanted) -> str:
        shared.refuse_unprintable(wanted)
        log = str(_log(wanted.home))
        facts: dict[str, Any] = {
            "Label": LABEL,
            "ProgramArguments": list(wanted.command),
            "WorkingDirectory": str(wanted.folder),
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": shared.RETRY_S,
            # Longer than [server] drain_s, so that running requests can finish.
            "ExitTimeOut": wanted.stop_s,
            # Else macOS slows what runs in the background down.
            "ProcessType": "Interactive",
            "SoftResourceLimits": {"NumberOfFiles": shared.OPEN_FILES},
            "HardResourceLimits": {"NumberOfFiles": shared.OPEN_FILES},
            "StandardOutPath": log,
            "StandardErrorPath": log,
            # launchd gives a daemon none; models, state and caches are below it.
            "EnvironmentVariables": {"HOME": str(wanted.home), **wanted.environment},
        }
        if not self._user_only:
            facts["UserName"] = wanted.user
        written = plistlib.dumps(facts, sort_keys=False)
        assert plistlib.loads(written) == facts
        return written.decode()

    def install(self, wanted: Wanted) -> list[str]:
        text = self.text(wanted)
        self._stop()
        shared.write(self.path, text)
        try:
            # A former `launchctl disable` would outlive the file.
            shared.run("launchctl", "enable", self._target)
            shared.run("launchctl", "bootstrap", self._domain, str(self.path))
        except ServiceError:
            with suppress(ServiceError):
                self._stop()
            shared.remove(self.path)
            raise
        return [f"wrote {self.path}", f"started {self._target}", f"its log is {_log(wanted.home)}"]

    def uninstall(self) -> list[str]:
        done = [f"stopped {self._target}"] if self._stop() else []
        log = self._installed().get("StandardErrorPath")
        if self.path.exists():
            shared.remove(self.path)
            done.append(f"removed {self.path}")
        if isinstance(log, str) and Path(log).is_file():
            shared.remove(Path(log))
            done.append(f"removed {log}")
        return done

    def restart(self) -> None:
        shared.run("launchctl", "kickstart", "-k", self._target)

    def state(self) -> State:
        asked = shared.attempt("launchctl", "print", self._target)
        if asked.returncode:
            return State(self.path.exists(), False, None, None, "")
        told = asked.stdout
        pid, runs = _number(told, "pid"), _number(told, "runs")
        last = re.search(r"^\s*last exit (?:code|reason) = (.+)$", told, re.MULTILINE)
        return State(
            installed=self.path.exists(),
            running=pid is not None,
            pid=pid,
            restarts=max(runs - 1, 0) if runs is not None else None,
            last_exit=last[1].strip() if last else "",
        )

    def command(self) -> tuple[str, ...]:
        return tuple(map(str, self._installed().get("ProgramArguments", ())))

    def logs(self, lines: int, *, follow: bool) -> tuple[str, ...]:
        log = self._installed().get("StandardErrorPath") or str(_log(Path.home()))
        return ("tail", "-n", str(lines), *(("-F",) if follow else ()), log)

    def _stop(self) -> bool:
        """Whether there was anything to stop. ``bootout`` returns before the process is gone, and nothing can be
        started under its name until it is."""
        if not self._is_loaded():
            return False
        shared.run("launchctl", "bootout", self._target)
        deadline = time.monotonic() + shared.COMMAND_S
        while self._is_loaded():
            if time.monotonic() > deadline:
                raise ServiceError(f"{self._target} does not end; `launchctl kill KILL {self._target}` ends it hard.")
            time.sleep(_LOOK_S)
        return True

    def _is_loaded(self) -> bool:
        return shared.attempt("launchctl", "print", self._target).returncode == 0

    def _installed(self) -> dict[str, Any]:
        try:
            return dict(plistlib.loads(self.path.read_bytes()))
        except (OSError, ValueError, plistlib.InvalidFileException):
            return {}


def _log(home: Path) -> Path:
    return home / "Library" / "Logs" / "lmx.log"


def _number(told: str, name: str) -> int | None:
    found = re.search(rf"^\s*{name} = (\d+)$", told, re.MULTILINE)
    return int(found[1]) if found else None
