"""The command ``lmx``: reads the settings and starts what was asked for. (``lmx cache`` needs no server, and only reads
or empties a folder.)
"""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmx.config import Sources
from lmx.config.live import Live
from lmx.errors import LmxError
from lmx.logs import Log, log_to_stderr
from lmx.prefix_disk.report import add_command as add_cache_command
from lmx.prefix_disk.report import command as cache_command
from lmx.serve import serve

CONFIG = Path("lmx.toml")

logger = logging.getLogger("lmx")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    with log_to_stderr() as log:
        return _run(options, log)


def _run(options: argparse.Namespace, log: Log) -> int:
    try:
        live = _settings(options)
        settings = live.now
        log.use(settings.server.log_format)
        logger.setLevel(settings.server.log_level.upper())
        if options.command == "cache":
            print(
                cache_command(options.action, options.models, settings.prefix_path, settings.engine.prefix_disk_bytes)
            )
            return 0
        return serve(live, log)
    except LmxError as error:
        logger.error("%s", error.message)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmx", description="A headless LLM inference server with OpenAI's API.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    server = commands.add_parser("serve", help="serve a model over HTTP")
    server.add_argument("--host", help="address to listen on; 0.0.0.0: every network (default: 127.0.0.1)")
    server.add_argument("--port", type=int, help="0 takes a free one (default: 1234)")
    server.add_argument(
        "--model", metavar="PATH_OR_ID", help="MLX folder, GGUF file, or id (default: the embedded model)"
    )
    for command in (server, add_cache_command(commands)):
        command.add_argument(
            "--config", type=Path, metavar="FILE", help="settings (default: lmx.toml here, if there is one)"
        )
    return parser


def _settings(options: argparse.Namespace) -> Live:
    given: dict[str, dict[str, Any]] = {}
    if options.command == "serve":
        given = {"server": {"host": options.host, "port": options.port}, "model": {"default": options.model}}
    overrides = {
        section: {key: value for key, value in values.items() if value is not None} for section, values in given.items()
    }
    path = options.config or (CONFIG if CONFIG.exists() else None)
    return Live(Sources.read(path, os.environ, overrides), options.config or CONFIG)
