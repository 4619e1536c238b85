"""What needs no running server: ``serve``, and the prefixes on the disk."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmx.cli.errors import CommandError
from lmx.cli.options import Config, Json
from lmx.cli.output import print_json, say

if TYPE_CHECKING:
    from lmx.config.live import Live

CONFIG = Path("lmx.toml")

cache = typer.Typer(help="Prefixes that are kept on the disk: ls, stats, clear.", no_args_is_help=True)


def add(app: typer.Typer) -> None:
    """Its commands."""
    app.command()(serve)
    app.add_typer(cache, name="cache")


def file_of(config: Path | None) -> Path | None:
    """The settings' file: the one that is named, or lmx.toml here, or none."""
    return config or (CONFIG if CONFIG.exists() else None)


def settings_of(config: Path | None, **given: dict[str, Any]) -> "Live":
    """The settings of this machine, with what the command line says over them. Raises LmxError."""
    import os

    from lmx.config import Sources
    from lmx.config.live import Live

    overrides = {
        section: {key: value for key, value in values.items() if value is not None} for section, values in given.items()
    }
    return Live(Sources.read(file_of(config), os.environ, overrides), config or CONFIG)


def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 0.0.0.0: every network.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one.", show_default="1234")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_ID",
            help="The default model: MLX folder, GGUF file, or id.",
            show_default="the embedded model",
        ),
    ] = None,
    config: Config = None,
) -> None:
    """Serve the machine's models over HTTP."""
    import logging

    from lmx.errors import LmxError
    from lmx.logs import log_to_stderr

    logger = logging.getLogger("lmx")
    with log_to_stderr() as log:
        try:
            live = settings_of(config, server={"host": host, "port": port}, model={"default": model})
            log.use(live.now.server.log_format)
            logger.setLevel(live.now.server.log_level.upper())
            from lmx.serve import serve as run

            code = run(live, log)
        except LmxError as error:
            logger.error("%s", error.message)
            code = 2
    raise typer.Exit(code)


def _cache(action: str, models: list[str], config: Path | None, *, as_json: bool) -> None:
    from lmx.errors import LmxError
    from lmx.prefix_disk import report

    try:
        now = settings_of(config).now
        folder, asked_bytes = now.prefix_path, now.engine.prefix_disk_bytes
        if not as_json:
            say(report.command(action, models, folder, asked_bytes))
        elif action == "clear":
            print_json(report.clear(folder, models))
        else:
            print_json(report.document(folder, asked_bytes))
    except (LmxError, OSError) as error:
        raise CommandError(str(error)) from None


@cache.command("ls")
def cache_ls(config: Config = None, as_json: Json = False) -> None:
    """What is kept of each model."""
    _cache("ls", [], config, as_json=as_json)


@cache.command("stats")
def cache_stats(config: Config = None, as_json: Json = False) -> None:
    """The sums."""
    _cache("stats", [], config, as_json=as_json)


@cache.command("clear")
def cache_clear(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL...", help="Names or fingerprints.")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Delete what is kept of these models, or of all."""
    _cache("clear", models or [], config, as_json=as_json)
