"""The arguments that many commands have in common, each with its help."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

HOST = "http://127.0.0.1:1234"
COMPLETION_S = 0.5
"""How long the shell waits for names."""


def complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names for the shell: the server's, or none where none answers."""
    import os

    from lmx.cli.client import Client
    from lmx.cli.errors import CommandError

    host = ctx.params.get("host") or os.environ.get("LMX_HOST") or HOST
    key = ctx.params.get("key") or os.environ.get("LMX_API_KEY") or ""
    try:
        with Client(host, key, timeout_s=COMPLETION_S) as client:
            names = [str(model["id"]) for model in client.get("/v1/models")["data"]]
            with suppress(CommandError):  # a key for inference only
                names += [str(model["id"]) for model in client.get("/admin/models")["models"]]
    except (CommandError, LookupError, TypeError):
        return []
    return [name for name in dict.fromkeys(names) if name.lower().startswith(incomplete.lower())]


Host = Annotated[str, typer.Option("--host", envvar="LMX_HOST", metavar="URL", help="The server to ask.")]
Key = Annotated[
    str,
    typer.Option(
        "--key", envvar="LMX_API_KEY", metavar="KEY", help="Its API key, if it wants one.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=complete_model, help="Name of a model.")]
Models = Annotated[list[str], typer.Argument(metavar="MODEL...", autocompletion=complete_model, help="Their names.")]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings (default: lmx.toml here, if there is one).")
]
