"""The running server's settings: read, and change."""

import json
from typing import Annotated, Any

import typer

from lmx.cli.client import Client
from lmx.cli.errors import CommandError
from lmx.cli.options import HOST, Host, Json, Key
from lmx.cli.output import note, print_json, say, table

config = typer.Typer(help="The running server's settings: get and set.", no_args_is_help=True)


def add(app: typer.Typer) -> None:
    """Its commands."""
    app.add_typer(config, name="config")


@config.command()
def get(
    name: Annotated[str, typer.Argument(metavar="SECTION[.KEY]", help="One, or a section; none: all.")] = "",
    host: Host = HOST,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Show settings, and who said so."""
    with Client(host, key) as client:
        answer = client.get("/admin/config")
    if as_json and not name:
        print_json(answer)
        return
    flat = {
        f"{section}.{one}": value
        for section, values in answer["settings"].items()
        for one, value in values.items()
        if section != "models"
    }
    flat |= {
        f'models."{model}".{one}': value
        for model, values in answer["settings"]["models"].items()
        for one, value in values.items()
    }
    chosen = {one: value for one, value in flat.items() if not name or one == name or one.startswith(f"{name}.")}
    if not chosen:
        raise CommandError(f"there is no setting {name!r}; `lmx config get` lists them all")
    if as_json:
        print_json(chosen.get(name, chosen))
        return
    if name in chosen:
        say(json.dumps(chosen[name], ensure_ascii=False))
        return
    rows = [
        (one, json.dumps(value, ensure_ascii=False), answer["sources"].get(one, "")) for one, value in chosen.items()
    ]
    table(("SETTING", "VALUE", "FROM"), rows, empty="nothing is set")


@config.command("set")
def set_(
    pairs: Annotated[list[str], typer.Argument(metavar="SECTION.KEY=VALUE...", help="Values as JSON; bare words too.")],
    persist: Annotated[bool, typer.Option(help="Write them into lmx.toml, too.")] = False,
    host: Host = HOST,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Change settings while the server runs; `null` takes a change back."""
    wanted: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise CommandError(f"{pair!r} is no setting: write SECTION.KEY=VALUE, such as server.log_level=debug")
        try:
            wanted[name.strip()] = json.loads(text)
        except ValueError:
            wanted[name.strip()] = text
    with Client(host, key) as client:
        answer = client.post("/admin/config", {"set": wanted, "persist": persist})
    if as_json:
        print_json(answer)
        return
    for name, value in answer["applied"].items():
        say(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    if answer["persisted"]:
        note(f"written to {answer['persisted']}")
    for name in answer["needs_reload"]:
        note(f"{name} holds for models that are loaded from now on")
    for name in answer["needs_restart"]:
        note(f"{name} holds when the server starts again")
    for name, why in answer["overridden"].items():
        note(f"{name} will be overridden by {why} at the next start")
