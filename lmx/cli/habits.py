"""What users of ``ollama`` and ``lms`` type: it works, or says which command does."""

from typing import Annotated

import typer

from lmx.cli import jobs, models
from lmx.cli.errors import CommandError

_ELSEWHERE = {
    "create": '`lmx convert MODEL` makes MLX weights; settings of a model go into [models."name"] of lmx.toml',
    "import": "put the model's folder or file into a folder of models and list that with `lmx config set "
    "'hub.folders=[\"/path\"]' --persist`; `lmx ls` shows what is found",
    "push": "lmx does not upload models",
    "cp": 'give a model another name with `lmx config set \'model.aliases={"new": "old"}\' --persist`',
    "server": "`lmx serve` starts the server, `lmx service install` keeps it running, `lmx status` tells how it is",
    "daemon": "`lmx service install` keeps the server running",
    "start": "`lmx serve` starts the server, `lmx service install` keeps it running",
    "chat": "`lmx run MODEL` chats",
}


def add(app: typer.Typer) -> None:
    """Its commands, which no list shows."""
    app.command("list", hidden=True)(models.ls)
    app.command("stop", hidden=True)(models.unload)
    app.command("remove", hidden=True)(models.rm)
    app.command("get", hidden=True)(jobs.pull)
    app.command("download", hidden=True)(jobs.pull)
    app.command("version", hidden=True)(version)
    for name, way in _ELSEWHERE.items():
        _tell(app, name, way)


def version() -> None:
    """Print the version."""
    from lmx import __version__

    print(f"lmx {__version__}")


def _tell(app: typer.Typer, name: str, way: str) -> None:
    def told(words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
        raise CommandError(f"there is no `lmx {name}`: {way}")

    settings = {"ignore_unknown_options": True}
    app.command(name, hidden=True, context_settings=settings)(told)
