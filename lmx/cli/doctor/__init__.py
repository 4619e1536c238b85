"""``lmx doctor``: what is right, wrong or could be better about lmx on this machine, with the way out.

Works whether or not a server runs, changes nothing but the stored fingerprints (and the cache of models' files), and
never loads MLX into its own process, nor a model into the server. Each check is a function that yields findings
(``finding``); one that fails itself is a finding, too (``examine``). Everything blocks.
"""

import os
from dataclasses import asdict
from typing import Annotated

import typer

from lmx.cli.options import Config, Json, Key


def add(app: typer.Typer) -> None:
    """Its command."""
    app.command()(doctor)


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the Hub.")] = False,
    host: Annotated[
        str | None,
        typer.Option("--host", envvar="LMX_HOST", metavar="URL", help="The server to ask (default: the settings')."),
    ] = None,
    key: Key = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Look for what is wrong, and say what to change; needs no server. Exit code 1 where something fails."""
    from lmx.cli.doctor.examine import examine
    from lmx.cli.doctor.finding import Finding, Patient
    from lmx.cli.local import file_of
    from lmx.cli.output import print_json, say

    found: list[Finding] = []
    for finding in examine(Patient(file_of(config), os.environ, host, key, offline)):
        found.append(finding)
        if not as_json:
            say(f"{finding.level:4}  {finding.check:11}  {finding.text}")
            if finding.advice:
                say(f"{'':19}→ {finding.advice}")
    fails = any(finding.level == "fail" for finding in found)
    if as_json:
        print_json({"ok": not fails, "findings": [asdict(finding) for finding in found]})
    if fails:
        raise typer.Exit(1)
