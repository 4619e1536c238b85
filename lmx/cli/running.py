"""How the running server is: its state, live figures, log, requests, and how fast its models are."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmx.cli.client import Client, named
from lmx.cli.models import print_bench
from lmx.cli.options import HOST, Host, Json, Key, complete_model
from lmx.cli.output import console, duration, make_table, print_json, progress, say, size, table

if TYPE_CHECKING:
    from rich.console import Group

EVERY_S = 1.0

requests = typer.Typer(help="What models work for now: list it, or cancel a request.", invoke_without_command=True)


def add(app: typer.Typer) -> None:
    """Its commands."""
    for command in (status, top, log, bench):
        app.command()(command)
    app.add_typer(requests, name="requests")


def status(host: Host = HOST, key: Key = "", as_json: Json = False) -> None:
    """Tell how the server is."""
    with Client(host, key) as client:
        answer = client.get("/admin/status")
    if as_json:
        print_json(answer)
        return
    say(f"lmx {answer['version']} at {client.url}, up for {duration(answer['uptime_s'])}")
    say(_memory(answer))
    table(_COLUMNS, _rows(answer), empty="no model is loaded")


def top(host: Host = HOST, key: Key = "") -> None:
    """Show models and requests as they run, until Ctrl-C."""
    from rich.live import Live

    with Client(host, key) as client, Live(console=console(), screen=True, auto_refresh=False) as live:
        while True:
            live.update(_screen(client), refresh=True)
            time.sleep(EVERY_S)


def _screen(client: Client) -> "Group":
    from rich.console import Group
    from rich.text import Text

    answer, running = client.get("/admin/status"), client.get("/admin/requests")["requests"]
    rows = [
        (
            request["id"],
            request["model"],
            request["state"],
            request["client"],
            f"{request['age_s']:.0f} s",
            str(request["prompt_tokens"]),
            str(request["completion_tokens"]),
        )
        for request in running
    ]
    columns = ("REQUEST", "MODEL", "STATE", "CLIENT", ">AGE", ">IN", ">OUT")
    return Group(
        Text(f"lmx {answer['version']} at {client.url}   {_memory(answer)}   Ctrl-C ends"),
        Text(),
        make_table(_COLUMNS, _rows(answer)),
        Text(),
        make_table(columns, rows),
    )


_COLUMNS = (
    "MODEL",
    "STATE",
    ">MEMORY",
    ">RUNNING",
    ">WAITING",
    ">tok/s",
    ">PROMPT tok/s",
    ">TTFT ms",
    ">ITL ms",
    ">KV",
)


def _rows(answer: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for model in answer["models"]:
        engine = model.get("engine") or {}
        ttft, itl = engine.get("ttft_ms"), engine.get("itl_ms")
        rows.append(
            (
                model["id"],
                model["state"],
                size(model.get("measured_bytes") or model.get("reserved_bytes")),
                str(engine.get("live_leases", 0) - engine.get("waiting", 0)),
                str(engine.get("waiting", 0)),
                f"{engine.get('generated_per_s_1s', 0):.1f}",
                f"{engine.get('prompt_per_s_60s', 0):.0f}",
                f"{ttft[0]:.0f}" if ttft else "-",
                f"{itl[0]:.1f}" if itl else "-",
                size(engine.get("kv_sequence_bytes")),
            )
        )
    return rows


def _memory(answer: dict[str, Any]) -> str:
    memory = answer["memory"]
    text = f"models have {size(memory['measured_bytes'])} of {size(memory['budget_bytes'])}"
    if memory["alarm"]:
        text += f", {size(memory['difference_bytes'])} more than lmx accounts for"
    disk = answer["disk"]
    if disk is not None and disk["low"]:
        text += f"; the disk has only {size(disk['free_bytes'])} left"
    return text


def log(
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=2000, help="So many of the last.")] = 200,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="And those that come.")] = False,
    level: Annotated[
        str | None, typer.Option(help="Set the log's level instead: debug, info, warning or error.")
    ] = None,
    host: Host = HOST,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Show the server's log."""
    with Client(host, key) as client:
        if level is not None:
            answer = client.post("/admin/log", {"level": level})
            print_json(answer) if as_json else say(f"the log's level is {answer['level']}")
        elif follow:
            with client.events("GET", f"/admin/log/lines?n={lines}&follow=true") as events:
                for event in events:
                    _say_lines(event, as_json=as_json)
        else:
            _say_lines(client.get("/admin/log/lines", n=lines), as_json=as_json)


def _say_lines(answer: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    if answer.get("lost"):
        say(f"... ({answer['lost']} lines)")
    for line in answer["lines"]:
        say(line)


def bench(
    model: Annotated[
        str, typer.Argument(autocompletion=complete_model, help="Name of a model.", show_default="the default one")
    ] = "",
    prompt_tokens: Annotated[list[int] | None, typer.Option("--prompt-tokens", "-p", show_default="512")] = None,
    generate_tokens: Annotated[int, typer.Option("--generate-tokens", "-g")] = 128,
    concurrency: Annotated[list[int] | None, typer.Option("--concurrency", "-c", show_default="1 and 4")] = None,
    host: Host = HOST,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Measure a model in the running server. Options with lists are given several times."""
    body: dict[str, Any] = {"generate_tokens": generate_tokens, "stream": True}
    body |= {"model": model} if model else {}
    body |= {"prompt_tokens": prompt_tokens} if prompt_tokens else {}
    body |= {"concurrency": concurrency} if concurrency else {}
    done = None
    with Client(host, key) as client, client.events("POST", "/admin/bench", body) as events, progress() as tell:
        for event in events:
            done = event.get("done")
            tell(" ".join(filter(None, (event.get("state"), event.get("message")))))
    if as_json or done is None:
        print_json(done)
        return
    say(f"{done['model']} on {done['device']}")
    print_bench(done)


@requests.callback()
def list_requests(context: typer.Context, host: Host = HOST, key: Key = "", as_json: Json = False) -> None:
    """List them, oldest first."""
    if context.invoked_subcommand is not None:
        return
    with Client(host, key) as client:
        answer = client.get("/admin/requests")
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            request["id"],
            request["model"],
            request["state"],
            request["client"],
            f"{request['age_s']:.0f} s",
            str(request["prompt_tokens"]),
            str(request["completion_tokens"]),
        )
        for request in answer["requests"]
    ]
    table(("REQUEST", "MODEL", "STATE", "CLIENT", ">AGE", ">IN", ">OUT"), rows, empty="nothing is asked")


@requests.command()
def cancel(
    request: Annotated[str, typer.Argument(help="Its id.")], host: Host = HOST, key: Key = "", as_json: Json = False
) -> None:
    """End a request; its client gets an error."""
    with Client(host, key) as client:
        answer = client.post(named("/admin/requests", request) + "/cancel", {})
    print_json(answer) if as_json else say(f"{answer['id']} is cancelled")
