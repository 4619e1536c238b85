"""``lmx service``: the server as a service of this machine, at every boot."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmx.cli.options import Config, Json

if TYPE_CHECKING:
    from lmx.service import Manager

service = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Run the server as a service of this machine, at every boot."
)
User = Annotated[bool, typer.Option("--user", help="Your own service, without root, instead of the whole system's.")]


def add(app: typer.Typer) -> None:
    """Its commands."""
    app.add_typer(service, name="service")


@service.command()
def install(
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on, over the settings.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, over the settings.")] = None,
    run_as: Annotated[str | None, typer.Option("--as", metavar="USER", help="Whom it runs as (default: you).")] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable for it, as HF_HOME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the file.")] = False,
    user: User = False,
) -> None:
    """Install and start it; again: replace it, and restart."""
    from lmx.cli.local import file_of
    from lmx.cli.output import say
    from lmx.config import load_settings
    from lmx.service.wanted import calling_user, wanted

    file = file_of(config)
    settings = load_settings(file)
    arguments = [f"--{name}={value}" for name, value in (("host", host), ("port", port)) if value is not None]
    manager = _manager(user=user)
    made = wanted(
        file,
        arguments,
        user=calling_user() if user or run_as is None else run_as,
        environment=dict(_assignment(text) for text in env or ()),
        drain_s=settings.server.drain_s,
    )
    if dry_run:
        print(manager.text(made), end="")
        return
    for line in manager.install(made):
        say(line)
    say("`lmx service status` tells how it does, `lmx service uninstall` takes it back")


@service.command()
def uninstall(user: User = False) -> None:
    """Stop it and undo all that install did."""
    from lmx.cli.output import say

    for line in _manager(user=user).uninstall() or ["nothing is installed"]:
        say(line)


@service.command()
def restart(user: User = False) -> None:
    """Restart it, after a change of lmx.toml, say."""

    _manager(user=user).restart()


@service.command()
def status(user: User = False, as_json: Json = False) -> None:
    """Tell whether it runs and answers; exit code 1 unless it does both."""
    from dataclasses import asdict

    from lmx.cli.output import duration, facts, print_json

    manager = _manager(user=user)
    state = manager.state()
    health = _health(manager.command()) if state.running else None
    answers = health is not None and health["answer"] is not None
    uptime_s = _uptime(state.pid)
    if as_json:
        print_json(asdict(state) | {"file": str(manager.path), "uptime_s": uptime_s, "health": health})
    else:
        installed = str(manager.path) if state.installed else "no (`lmx service install`)"
        facts(
            [
                ("installed", installed),
                ("running", f"pid {state.pid}, for {duration(uptime_s)}" if state.running else "no"),
                ("restarts", str(state.restarts) if state.restarts else ""),
                ("last exit", state.last_exit),
                ("health", _words(health) if health else ""),
            ]
        )
    raise typer.Exit(0 if state.running and answers else 1)


@service.command()
def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=0, help="How many of the last lines.")] = 200,
    user: User = False,
) -> None:
    """Print its log."""
    import subprocess

    from lmx.cli.errors import CommandError

    command = _manager(user=user).logs(lines, follow=follow)
    try:
        code = subprocess.run(command).returncode
    except OSError as error:
        raise CommandError(f"`{command[0]}` cannot be run: {error.strerror or error}.") from None
    raise typer.Exit(min(abs(code), 1))


def _manager(*, user: bool) -> "Manager":
    from lmx.service import manager

    return manager(user_only=user)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise typer.BadParameter(f"{text!r} must look like NAME=VALUE", param_hint="--env")
    return name, value


def _health(command: tuple[str, ...]) -> dict[str, Any]:
    """What /health answers where the service listens."""
    from itertools import pairwise

    from lmx.cli.client import Client
    from lmx.cli.errors import CommandError
    from lmx.config import load_settings
    from lmx.errors import LmxError

    given = dict(pairwise(command))
    given |= dict(part.split("=", 1) for part in command if part.startswith("--") and "=" in part)
    try:
        settings = load_settings(Path(given["--config"]) if "--config" in given else None, {}).server
        host = given.get("--host", settings.host)
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{given.get('--port', settings.port)}"
        with Client(url, timeout_s=5) as client:
            return {"url": url, "answer": client.get("/health"), "error": None}
    except (CommandError, LmxError) as error:
        return {"url": None, "answer": None, "error": str(error)}


def _words(health: dict[str, Any]) -> str:
    if health["answer"] is None:
        return str(health["error"])
    models = ", ".join(f"{name} {state}" for name, state in health["answer"]["models"].items())
    return f"{health['answer']['status']} at {health['url']}" + (f" ({models})" if models else "")


def _uptime(pid: int | None) -> float | None:
    import time

    import psutil

    try:
        return None if pid is None else max(time.time() - psutil.Process(pid).create_time(), 0.0)
    except psutil.Error:
        return None
