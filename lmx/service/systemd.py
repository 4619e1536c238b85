"""Linux's systemd: a unit of the whole system, or of one user, whose services then start at boot, too (lingering)."""

import os
import re
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

from lmx.service import wanted as shared
from lmx.service.wanted import ServiceError, State, Wanted

UNIT = "lmx.service"
LINGERS = "# Lingering was switched on for this service."
"""In the unit: what ``uninstall`` has to undo."""

FORM = """{lingers}[Unit]
Description=lmx inference server
Wants=network-online.target
After=network-online.target
# Never give up.
StartLimitIntervalSec=0

[Service]
Type=exec
{user}WorkingDirectory={folder}
{environment}ExecStart={command}
Restart=always
RestartSec={retry_s}
# Longer than [server] drain_s, so that running requests can finish.
TimeoutStopSec={stop_s}
# Only the server gets SIGTERM; it ends its engines itself. What is left after it is killed.
KillMode=mixed
# An engine that the kernel ends for memory is the server's business, who starts another.
OOMPolicy=continue
LimitNOFILE={open_files}

[Install]
WantedBy={target}
"""


class Systemd:
    def __init__(self, *, user_only: bool, root: Path = Path("/")) -> None:
        """``root``: of the file system, for tests."""
        self._user_only = user_only
        self._scope = ("--user",) if user_only else ()
        self._lingering = root / "var" / "lib" / "systemd" / "linger"
        if user_only:
            own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
            self.path = own / "systemd" / "user" / UNIT
        else:
            self.path = root / "etc" / "systemd" / "system" / UNIT

    def text(self, wanted: Wanted) -> str:
        return self._text(wanted, lingers=False)

    def _text(self, wanted: Wanted, *, lingers: bool) -> str:
        shared.refuse_unprintable(wanted)
        environment = (f"{name}={value}" for name, value in wanted.environment.items())
        return FORM.format(
            lingers=f"{LINGERS}\n" if lingers else "",
            user="" if self._user_only else f"User={_specified(wanted.user)}\n",
            folder=_specified(str(wanted.folder)),
            environment="".join(f"Environment={_quoted(assignment)}\n" for assignment in environment),
            command=" ".join(_quoted(part).replace("$", "$$") for part in wanted.command),
            retry_s=shared.RETRY_S,
            stop_s=wanted.stop_s,
            open_files=shared.OPEN_FILES,
            target="default.target" if self._user_only else "multi-user.target",
        )

    def install(self, wanted: Wanted) -> list[str]:
        # Before anything is written: without a running systemd there is nothing to install into.
        self._systemctl("show-environment")
        lingers = self._user_only and not (self._lingering / wanted.user).exists()
        before = self.path.read_text(encoding="utf-8") if self.path.exists() else None
        if before is not None and before.startswith(LINGERS):
            lingers = True
        shared.write(self.path, self._text(wanted, lingers=lingers))
        try:
            self._verify()
            self._systemctl("daemon-reload")
            if lingers:
                shared.run("loginctl", "enable-linger", wanted.user)
            self._systemctl("enable", UNIT)
            self._systemctl("restart", UNIT)
        except ServiceError:
            if before is not None:
                shared.write(self.path, before)
                with suppress(ServiceError):
                    self._systemctl("daemon-reload")
            else:
                with suppress(ServiceError):
                    self._remove()
            raise
        done = [f"wrote {self.path}", f"started {UNIT}, now and at every boot"]
        return [*done, f"{wanted.user}'s services run without a login, too (lingering)"] if lingers else done

    def uninstall(self) -> list[str]:
        if not self.path.exists():
            return []
        lingers = self.path.read_text(encoding="utf-8", errors="replace").startswith(LINGERS)
        self._remove()
        done = [f"stopped {UNIT}", f"removed {self.path}"]
        if lingers:
            user = shared.calling_user()
            shared.run("loginctl", "disable-linger", user)
            done.append(f"{user}'s services run only while somebody is logged in, as before")
        return done

    def _remove(self) -> None:
        self._systemctl("disable", "--now", UNIT)
        shared.remove(self.path)
        self._systemctl("daemon-reload")
        with suppress(ServiceError):  # it is not in the state "failed"
            self._systemctl("reset-failed", UNIT)

    def restart(self) -> None:
        self._systemctl("restart", UNIT)

    def state(self) -> State:
        names = ("ActiveState", "MainPID", "NRestarts", "Result", "ExecMainStatus")
        told = dict(
            line.split("=", 1)
            for line in self._systemctl("show", UNIT, "-p", ",".join(names)).splitlines()
            if "=" in line
        )
        pid = int(told.get("MainPID") or 0) or None
        failed = told.get("Result", "success") != "success" or told.get("ExecMainStatus", "0") != "0"
        return State(
            installed=self.path.exists(),
            running=told.get("ActiveState") == "active" and pid is not None,
            pid=pid,
            restarts=int(told.get("NRestarts") or 0),
            last_exit=f"{told.get('Result')}, status {told.get('ExecMainStatus')}" if failed else "",
        )

    def command(self) -> tuple[str, ...]:
        with suppress(OSError, ValueError):
            found = re.search(r"^ExecStart=(.*)$", self.path.read_text(encoding="utf-8"), re.MULTILINE)
            return tuple(part.replace("$$", "$").replace("%%", "%") for part in shlex.split(found[1])) if found else ()
        return ()

    def logs(self, lines: int, *, follow: bool) -> tuple[str, ...]:
        unit = ("--user-unit", UNIT) if self._user_only else ("--unit", UNIT)
        return ("journalctl", *unit, "--lines", str(lines), "--no-pager", *(("--follow",) if follow else ()))

    def _verify(self) -> None:
        if shutil.which("systemd-analyze") is None:
            return
        checked = shared.attempt("systemd-analyze", *self._scope, "verify", "--man=no", str(self.path))
        # It exits 0 also where it ignores a line; other units' faults are not ours.
        ours = [line for line in checked.stderr.splitlines() if UNIT in line]
        if ours:
            raise ServiceError(f"systemd does not take {self.path}: {' '.join(ours)}")

    def _systemctl(self, *arguments: str) -> str:
        return shared.run("systemctl", *self._scope, *arguments)


def _specified(text: str) -> str:
    """A whole value of a unit: "%" begins what systemd puts in."""
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """A word of a unit, in quotes where it needs them."""
    text = _specified(text)
    if re.fullmatch(r"[\w@%+=:,./$-]+", text, re.ASCII):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
