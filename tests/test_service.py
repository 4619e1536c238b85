"""lmx as a service: what is written for launchd and systemd, and in which order they are told.

Neither runs where these tests mostly do (macOS has launchd, a container no systemd), so their commands are programs
here that note what they are called with and keep the one bit that matters, whether the service is loaded. What can be
checked by the real ones is: plists by plistlib, units by ``systemd-analyze verify``, the whole life where systemd runs.
"""

import json
import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmx.cli import main
from lmx.service.launchd import LABEL, Launchd
from lmx.service.systemd import LINGERS, Systemd
from lmx.service.wanted import ServiceError, Wanted, calling_user, wanted
from tests.server import ROOT

AS_LMX = ("/opt/lmx/.venv/bin/python", "-P", "-m", "lmx", "serve", "--config", "/opt/lmx/lmx.toml")
MAC = Wanted(AS_LMX, Path("/opt/lmx"), "lmx", Path("/Users/lmx"), {}, 60)
LINUX = Wanted(AS_LMX, Path("/opt/lmx"), "lmx", Path("/home/lmx"), {}, 60)
ODD = Wanted(
    (*AS_LMX, "100%", "a b", 'say "hi"', "$HOME", "back\\slash"),
    Path("/opt/l m%x"),
    "lmx",
    Path("/home/lmx"),
    {"HF_HOME": "/disk 2/50%"},
    75,
)
SYSTEMD_RUNS = os.path.isdir("/run/systemd/system")

RECORDER = """#!{python}
import json, os, sys
from pathlib import Path

folder, name, arguments = Path({folder!r}), {name!r}, sys.argv[1:]
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps([name, *arguments]) + "\\n")
loaded, plain = folder / "loaded", [a for a in arguments if a != "--user"]
if (folder / "refuse").exists() and (folder / "refuse").read_text() in arguments:
    sys.exit("Bootstrap failed: 5: Input/output error")
if plain[0] in ("bootstrap", "restart"):
    loaded.touch()
elif plain[0] in ("bootout", "disable"):
    loaded.unlink(missing_ok=True)
elif plain[0] == "print":
    if not loaded.exists():
        sys.exit(113)
    print("io.lmx.server = {{\\n\\tstate = running\\n\\tpid = {pid}\\n\\truns = 3\\n\\tlast exit code = 2\\n}}")
elif plain[0] == "show":
    pid, active = ({pid}, "active") if loaded.exists() else (0, "inactive")
    print(f"ActiveState={{active}}\\nMainPID={{pid}}\\nNRestarts=2\\nResult=success\\nExecMainStatus=0")
"""


class Calls:
    """Of the programs that stand for the system's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("launchctl", "systemctl", "loginctl"):
            program = folder / name
            text = RECORDER.format(python=sys.executable, folder=str(folder), name=name, pid=os.getpid())
            program.write_text(text, encoding="utf-8")
            program.chmod(0o755)

    def taken(self) -> list[str]:
        """Those since the last time; questions left out."""
        calls = self._folder / "calls"
        lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        told = (" ".join(json.loads(line)) for line in lines)
        return [call for call in told if not any(word in call for word in (" print ", " show"))]

    def refuse(self, word: str) -> None:
        (self._folder / "refuse").write_text(word, encoding="utf-8")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return Calls(programs)


# --- launchd --------------------------------------------------------------------------------------------


def test_a_daemon_starts_at_boot_and_again_after_each_end() -> None:
    facts = plistlib.loads(Launchd(user_only=False).text(MAC).encode())
    assert facts["Label"] == LABEL
    assert (facts["RunAtLoad"], facts["KeepAlive"], facts["ThrottleInterval"]) == (True, True, 10)
    assert facts["ProgramArguments"] == list(AS_LMX)
    assert (facts["UserName"], facts["EnvironmentVariables"]["HOME"]) == ("lmx", "/Users/lmx")
    assert facts["ProcessType"] == "Interactive"
    assert facts["SoftResourceLimits"]["NumberOfFiles"] == 65_536
    assert facts["StandardErrorPath"] == "/Users/lmx/Library/Logs/lmx.log"


def test_an_agent_is_its_users_and_odd_words_stay_whole() -> None:
    facts = plistlib.loads(Launchd(user_only=True).text(ODD).encode())
    assert "UserName" not in facts
    assert facts["ProgramArguments"] == list(ODD.command)
    assert facts["EnvironmentVariables"]["HF_HOME"] == "/disk 2/50%"
    assert facts["ExitTimeOut"] == 75


def test_a_daemons_life(calls: Calls, tmp_path: Path) -> None:
    daemon = Launchd(user_only=False, root=tmp_path)
    home = tmp_path / "home"
    mine = Wanted(AS_LMX, tmp_path, "lmx", home, {}, 60)
    assert not daemon.state().installed
    assert daemon.uninstall() == []
    assert calls.taken() == []

    daemon.install(mine)
    assert calls.taken() == [f"launchctl enable system/{LABEL}", f"launchctl bootstrap system {daemon.path}"]
    state = daemon.state()
    assert (state.installed, state.running, state.pid, state.restarts) == (True, True, os.getpid(), 2)
    assert state.last_exit == "2"
    assert daemon.command() == AS_LMX
    assert daemon.logs(5, follow=True) == ("tail", "-n", "5", "-F", str(home / "Library/Logs/lmx.log"))

    daemon.install(mine)  # again: the former one ends first
    assert calls.taken()[0] == f"launchctl bootout system/{LABEL}"

    log = home / "Library" / "Logs" / "lmx.log"
    log.parent.mkdir(parents=True)
    log.touch()
    assert len(daemon.uninstall()) == 3
    assert calls.taken() == [f"launchctl bootout system/{LABEL}"]
    assert not daemon.path.exists()
    assert not log.exists()
    assert not daemon.state().running


def test_what_launchd_refuses_leaves_nothing(calls: Calls, tmp_path: Path) -> None:
    calls.refuse("bootstrap")
    daemon = Launchd(user_only=False, root=tmp_path)
    with pytest.raises(ServiceError, match="Bootstrap failed: 5"):
        daemon.install(MAC)
    assert not daemon.path.exists()


# --- systemd ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("user_only", [False, True])
def test_systemd_takes_the_unit(tmp_path: Path, user_only: bool) -> None:
    program = tmp_path / "a b" / "python"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    odd = Wanted((str(program), *ODD.command[1:]), tmp_path / "a b", calling_user(), tmp_path, ODD.environment, 75)
    unit = tmp_path / "lmx.service"
    unit.write_text(Systemd(user_only=user_only).text(odd), encoding="utf-8")
    scope = ("--user",) if user_only else ()
    environ = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    checked = subprocess.run(
        ["systemd-analyze", *scope, "verify", "--man=no", str(unit)], capture_output=True, text=True, env=environ
    )
    assert [line for line in checked.stderr.splitlines() if "lmx" in line] == []
    assert checked.returncode == 0


def test_a_unit_restarts_always_and_lets_requests_finish() -> None:
    lines = Systemd(user_only=False).text(ODD).splitlines()
    assert {"User=lmx", "Restart=always", "KillMode=mixed", "TimeoutStopSec=75", "LimitNOFILE=65536"} <= set(lines)
    assert {"OOMPolicy=continue", "StartLimitIntervalSec=0", "WantedBy=multi-user.target"} <= set(lines)
    assert "WorkingDirectory=/opt/l m%%x" in lines
    assert 'Environment="HF_HOME=/disk 2/50%%"' in lines
    mine = Systemd(user_only=True).text(ODD)
    assert "User=" not in mine
    assert "WantedBy=default.target" in mine


def test_a_users_service_has_a_whole_life(calls: Calls, tmp_path: Path) -> None:
    service = Systemd(user_only=True, root=tmp_path)
    user = calling_user()
    mine = Wanted((sys.executable, *ODD.command[1:]), tmp_path, user, tmp_path, {}, 60)
    service.install(mine)
    assert calls.taken() == [
        "systemctl --user daemon-reload",
        f"loginctl enable-linger {user}",
        "systemctl --user enable lmx.service",
        "systemctl --user restart lmx.service",
    ]
    assert service.command() == mine.command
    state = service.state()
    assert (state.installed, state.running, state.pid, state.restarts) == (True, True, os.getpid(), 2)
    service.install(mine)
    assert service.path.read_text(encoding="utf-8").startswith(LINGERS)  # it was not there before lmx
    calls.taken()
    service.uninstall()
    assert calls.taken() == [
        "systemctl --user disable --now lmx.service",
        "systemctl --user daemon-reload",
        "systemctl --user reset-failed lmx.service",
        f"loginctl disable-linger {user}",
    ]
    assert not service.path.exists()


def test_lingering_that_was_there_stays(calls: Calls, tmp_path: Path) -> None:
    user = calling_user()
    lingering = tmp_path / "var" / "lib" / "systemd" / "linger" / user
    lingering.parent.mkdir(parents=True)
    lingering.touch()
    service = Systemd(user_only=True, root=tmp_path)
    service.install(Wanted((sys.executable, *AS_LMX[1:]), tmp_path, user, tmp_path, {}, 60))
    service.uninstall()
    assert not any("linger" in call for call in calls.taken())


@pytest.mark.parametrize("word", ["show-environment", "enable", "restart"])
def test_what_systemd_refuses_leaves_what_was(calls: Calls, tmp_path: Path, word: str) -> None:
    service = Systemd(user_only=False, root=tmp_path)
    former = Wanted((sys.executable, "-P"), tmp_path, calling_user(), tmp_path, {}, 60)
    calls.refuse(word)
    with pytest.raises(ServiceError, match="failed"):
        service.install(former)
    assert not service.path.exists()
    calls.refuse("nothing")
    service.install(former)
    calls.refuse(word)
    with pytest.raises(ServiceError, match="failed"):
        service.install(Wanted((sys.executable, "-P", "-v"), tmp_path, calling_user(), tmp_path, {}, 60))
    assert service.command() == former.command


# --- both -----------------------------------------------------------------------------------------------------


def test_the_examples_are_what_is_written() -> None:
    assert (ROOT / "launchd" / f"{LABEL}.plist").read_text() == Launchd(user_only=False).text(MAC)
    assert (ROOT / "launchd" / "lmx.service").read_text() == Systemd(user_only=False).text(LINUX)


@pytest.mark.parametrize("kind", [Launchd, Systemd])
def test_no_path_becomes_a_line(kind: type[Launchd] | type[Systemd]) -> None:
    with pytest.raises(ServiceError, match="characters"):
        kind(user_only=True).text(Wanted(("/a\nExecStart=/bin/evil",), Path("/"), "lmx", Path("/"), {}, 60))


def test_it_runs_this_python_with_these_settings_and_outlives_a_drain(tmp_path: Path) -> None:
    config = tmp_path / "lmx.toml"
    made = wanted(config, ("--port=5",), user=calling_user(), environment={}, drain_s=100)
    assert made.command == (sys.executable, "-P", "-m", "lmx", "serve", "--config", str(config), "--port=5")
    assert (made.folder, made.stop_s) == (tmp_path, 130)
    with pytest.raises(ServiceError, match="no user 'nobody-here'"):
        wanted(config, (), user="nobody-here", environment={}, drain_s=1)


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="lmx knows no services there")
def test_the_command_prints_what_it_would_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lmx.toml").write_text("[server]\ndrain_s = 200\n")
    assert main(["service", "install", "--dry-run", "--user", "--env", "HF_HOME=/x"]) == 0
    text = capsys.readouterr().out
    assert "230" in text
    assert str(tmp_path / "lmx.toml") in text
    assert "HF_HOME" in text
    assert main(["service", "install", "--dry-run", "--env", "nonsense"]) == 2


@pytest.mark.skipif(sys.platform != "linux" or SYSTEMD_RUNS, reason="services can be installed here")
def test_without_systemd_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["service", "install", "--user"]) == 2
    assert "systemctl" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not SYSTEMD_RUNS or os.geteuid() != 0, reason="needs a running systemd, and root")
def test_systemd_runs_it(tmp_path: Path) -> None:
    service = Systemd(user_only=False)
    if service.path.exists():
        pytest.skip("lmx is installed on this machine")
    python = (sys.executable, "-P", "-m", "lmx", "serve", "--port=0")
    try:
        service.install(Wanted(python, tmp_path, calling_user(), tmp_path, {"PYTHONPATH": str(ROOT)}, 60))
        first = service.state().pid
        assert first is not None
        os.kill(first, 9)
        while (again := service.state().pid) in (None, first):
            pass
        assert again is not None
    finally:
        service.uninstall()
    assert not service.state().running
    assert not service.path.exists()
