"""Downloads and conversions: jobs of the server, which go on when nobody watches."""

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from lmx.cli.client import Client, named
from lmx.cli.errors import Refused
from lmx.cli.options import HOST, Host, Json, Key, Model
from lmx.cli.output import ago, duration, note, print_json, print_json_line, progress_bar, say, size, table

jobs = typer.Typer(help="Downloads and conversions: list them, or cancel one.", invoke_without_command=True)


def add(app: typer.Typer) -> None:
    """Its commands."""
    app.command()(pull)
    app.command()(convert)
    app.add_typer(jobs, name="jobs")


def pull(
    model: Annotated[str, typer.Argument(help="org/name, org/name@revision, org/name:Q4_K_M, or a name to look for.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    quantization: Annotated[str | None, typer.Option(help="Which of several GGUF files.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it is there.")] = True,
    host: Host = HOST,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Download a model from the Hugging Face Hub. Ctrl-C stops the watching; the download goes on."""
    given = {"revision": revision, "quantization": quantization}
    body = {"model": model, **{name: value for name, value in given.items() if value is not None}}
    _start("/admin/download", body, host, key, wait=wait, as_json=as_json)


def convert(
    model: Model,
    bits: Annotated[int | None, typer.Option(help="Of a weight.", show_default="4")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale.")] = None,
    mode: Annotated[str | None, typer.Option(help="affine, mxfp4, nvfp4 or mxfp8.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Without bits: leave it unquantised, in this type.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the new model.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it is there.")] = True,
    host: Host = HOST,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Make MLX weights of a model in plain safetensors."""
    given = {"bits": bits, "group_size": group_size, "mode": mode, "dtype": dtype, "name": name}
    body = {"model": model, **{field: value for field, value in given.items() if value is not None}}
    _start("/admin/convert", body, host, key, wait=wait, as_json=as_json)


@jobs.callback()
def list_jobs(context: typer.Context, host: Host = HOST, key: Key = "", as_json: Json = False) -> None:
    """List them."""
    if context.invoked_subcommand is not None:
        return
    with Client(host, key) as client:
        answer = client.get("/admin/jobs")
    if as_json:
        print_json(answer)
        return
    rows = [(job["id"], job["model"], job["state"], _done(job), ago(job["created"])) for job in answer["jobs"]]
    table(("JOB", "MODEL", "STATE", ">DONE", "BEGUN"), rows, empty="no jobs")
    for job in answer["jobs"]:
        if job["error"]:
            note(f"{job['id']}: {job['error']}")


@jobs.command()
def cancel(
    job: Annotated[str, typer.Argument(help="Its id.")], host: Host = HOST, key: Key = "", as_json: Json = False
) -> None:
    """Cancel one, and remove what it has fetched or made."""
    with Client(host, key) as client:
        ended = client.delete(named("/admin/jobs", job))
    if as_json:
        print_json(ended)
    else:
        say(f"{ended['id']} is {ended['state']}")


def _start(path: str, body: dict[str, Any], host: str, key: str, *, wait: bool, as_json: bool) -> None:
    with Client(host, key) as client:
        if not wait:
            begun = client.post(path, body)
            print_json(begun) if as_json else say(f"{begun['id']} is {begun['state']}; `lmx jobs` tells how far it is")
            return
        job: dict[str, Any] | None = None
        try:
            shown = nullcontext(None) if as_json else progress_bar()
            with client.events("POST", path, body | {"stream": True}) as events, shown as bar:
                for event in events:
                    chosen, job = (job or {}).get("chosen"), event.get("done", event)
                    if as_json:
                        print_json_line(job)
                    elif bar is not None:
                        if job["chosen"] and not chosen and job["chosen"].get("why"):
                            note(f"{job['chosen'].get('repo', job['model'])}: {job['chosen']['why']}")
                        bar(job["message"] or job["state"], job["done_bytes"], job["total_bytes"])
        except KeyboardInterrupt:
            if job is not None:
                note(f"{job['id']} goes on; `lmx jobs cancel {job['id']}` ends it")
            raise
    if job is None or job["state"] != "done":
        raise Refused((job or {}).get("error") or f"the job was {(job or {}).get('state', 'not begun')}")
    if not as_json:
        say(f"{job['model']} is there: {job['path']} ({size(job['done_bytes'])})")


def _done(job: dict[str, Any]) -> str:
    if not job["total_bytes"]:
        return size(job["done_bytes"] or None)
    share = f"{100 * job['done_bytes'] / job['total_bytes']:.0f} %"
    rate = f", {size(job['bytes_per_s'])}/s" if job["bytes_per_s"] else ""
    left = f", {duration(job['eta_s'])} left" if job["eta_s"] else ""
    return f"{share} of {size(job['total_bytes'])}{rate}{left}"
