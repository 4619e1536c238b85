"""The models of the running server: what there is, into memory and out of it, off the disk."""

from typing import Annotated, Any

import typer

from lmx.cli.client import Client, named
from lmx.cli.options import HOST, Host, Json, Key, Model, Models
from lmx.cli.output import ago, count, duration, facts, note, print_json, progress, say, size, table

_ON_DISK = "on disk"


def add(app: typer.Typer) -> None:
    """Its commands."""
    for command in (ls, ps, show, load, unload, rm, cleanup):
        app.command()(command)


def ls(host: Host = HOST, key: Key = "", as_json: Json = False) -> None:
    """List the models on this machine."""
    with Client(host, key) as client:
        answer = client.get("/admin/models")
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            model["id"],
            model["format"],
            model["quantization"],
            count(model["parameters"]),
            size(model["size_bytes"]),
            str(model["context_length"] or ""),
            " ".join(model["capabilities"]),
            "broken" if model["problem"] else model["state"],
        )
        for model in answer["models"]
    ]
    columns = ("MODEL", "FORMAT", "QUANT", ">PARAMS", ">SIZE", ">CONTEXT", "CAN", "STATE")
    table(columns, rows, empty="no models; `lmx pull NAME` downloads one")
    for model in answer["models"]:
        if model["problem"]:
            note(f"{model['id']}: {model['problem']}")


def ps(host: Host = HOST, key: Key = "", as_json: Json = False) -> None:
    """List the models in memory."""
    with Client(host, key) as client:
        answer = client.get("/admin/models")
    answer["models"] = [model for model in answer["models"] if model["state"] != _ON_DISK]
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            model["id"],
            model["state"],
            model["backend"] or "",
            size(model["memory"]["measured_bytes"] or model["reserved_bytes"]),
            str(model["leases"]),
            "pinned" if model["pinned"] else duration(model["expires_in_s"]) or "-",
            ago(model["last_used"]),
        )
        for model in answer["models"]
    ]
    columns = ("MODEL", "STATE", "ENGINE", ">MEMORY", ">REQUESTS", "UNTIL", "LAST USED")
    table(columns, rows, empty="no model is loaded; a request loads the one that it names, and so does `lmx load NAME`")


def show(model: Model, host: Host = HOST, key: Key = "", as_json: Json = False) -> None:
    """Tell all that is known of a model."""
    with Client(host, key) as client:
        found = client.get(named("/admin/models", model))
    if as_json:
        print_json(found)
        return
    estimate = found["memory"]["estimate"] or {}
    facts(
        [
            ("id", found["id"]),
            ("also", ", ".join(found["aliases"])),
            ("path", found["path"]),
            ("problem", found["problem"]),
            ("architecture", found["architecture"]),
            ("parameters", count(found["parameters"])),
            ("format", f"{found['format']} {found['quantization']}"),
            ("size", size(found["size_bytes"])),
            ("context", str(found["context_length"] or "")),
            ("can", ", ".join(found["capabilities"])),
            ("engine", " ".join(filter(None, (found["backend"], f"({found['backend_reason']})")))),
            ("state", " ".join(filter(None, (found["state"], found["message"])))),
            ("needs", size(estimate.get("total_bytes"))),
            ("has", size(found["memory"]["measured_bytes"] or None)),
            ("settings", ", ".join(f"{name} {one['value']} ({one['source']})" for name, one in _set(found).items())),
            ("last used", ago(found["last_used"])),
        ]
    )
    for bench in found["benches"][:1]:
        say("")
        print_bench(bench)


def _set(found: dict[str, Any]) -> dict[str, Any]:
    """Those that are not as for all models."""
    return {name: one for name, one in (found["settings"] or {}).items() if one["source"] != "default"}


def print_bench(bench: dict[str, Any]) -> None:
    """A measurement, as a table."""
    rows = [
        (
            str(row["prompt_tokens"]),
            str(row["generate_tokens"]),
            str(row["concurrency"]),
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s']:.1f}" if row["decode_tokens_per_s"] else "-",
            f"{row['ttft_ms']['p50']:.0f}",
            f"{row['itl_ms']['p50']:.1f}" if row["itl_ms"] else "-",
        )
        for row in bench["rows"]
    ]
    columns = (">PROMPT", ">ANSWER", ">STREAMS", ">PREFILL tok/s", ">DECODE tok/s", ">TTFT ms", ">ITL ms")
    table(columns, rows, empty="nothing was measured")


def load(
    model: Model,
    context_length: Annotated[int | None, typer.Option(help="Longest prompt plus answer, in tokens.")] = None,
    kv_bits: Annotated[int | None, typer.Option(help="16, 8 or 4.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Requests that are computed together.")] = None,
    draft_model: Annotated[str | None, typer.Option(help="A smaller model that says what comes next.")] = None,
    speculation: Annotated[str | None, typer.Option(help="auto, lookup or off: whose drafts are verified.")] = None,
    ttl: Annotated[float | None, typer.Option(help="Seconds without a request after which it goes; 0: never.")] = None,
    pin: Annotated[bool | None, typer.Option("--pin/--no-pin", help="Never unload it for another one.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it takes requests.")] = True,
    host: Host = HOST,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Load a model into memory."""
    given: dict[str, object] = {"context_length": context_length, "kv_bits": kv_bits, "max_batch": max_batch}
    given |= {"draft_model": draft_model, "speculation": speculation, "ttl": ttl, "pin": pin}
    body = {"model": model, **{name: value for name, value in given.items() if value is not None}}
    with Client(host, key) as client:
        if not wait:
            loaded = client.post("/admin/load", body | {"wait": False})
        else:
            loaded = None
            with client.events("POST", "/admin/load", body | {"stream": True}) as events, progress() as tell:
                for event in events:
                    loaded = event.get("done")
                    tell(" ".join(filter(None, (event.get("state"), event.get("message")))))
    if as_json or loaded is None:
        print_json(loaded)
        return
    took = f", loaded in {loaded['load_s']:.1f} s" if loaded["load_s"] else ""
    say(f"{loaded['id']} is {loaded['state']}{took}")


def unload(
    models: Models,
    drain: Annotated[float | None, typer.Option(help="Seconds that running requests have to finish.")] = None,
    host: Host = HOST,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Unload models: running requests may finish first."""
    body = {} if drain is None else {"drain": drain}
    with Client(host, key) as client:
        for model in models:
            unloaded = client.post("/admin/unload", {"model": model, **body})
            if as_json:
                print_json(unloaded)
            else:
                say(f"{unloaded['id']} is unloaded, {size(unloaded['freed_bytes'])} are free again")


def rm(
    models: Models,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option(help="Also what is loaded, and what is not in lmx's own folder.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only tell what would go.")] = False,
    host: Host = HOST,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Remove models from the disk."""
    with Client(host, key) as client:
        for model in models:
            path = named("/admin/models", model)
            if dry_run or not (yes or as_json):
                planned = client.delete(path, dry_run=True, force=force)
                if dry_run and as_json:
                    print_json(planned)
                    continue
                for one in planned["paths"]:
                    say(one)
                if dry_run:
                    say(f"{planned['id']}: {size(planned['freed_bytes'])} would be freed")
                    continue
                typer.confirm(f"Remove {planned['id']} ({size(planned['freed_bytes'])})?", abort=True)
            removed = client.delete(path, force=force)
            if as_json:
                print_json(removed)
            else:
                say(f"{removed['id']} is removed, {size(removed['freed_bytes'])} are free again")


def cleanup(
    days: Annotated[int | None, typer.Option(min=1, help="Unused for so long.", show_default="as set")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Really remove them.")] = False,
    host: Host = HOST,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """List models that nobody has used for long, or remove them."""
    body = {"dry_run": not yes} | ({} if days is None else {"days": days})
    with Client(host, key) as client:
        answer = client.post("/admin/cleanup", body)
    if as_json:
        print_json(answer)
        return
    rows = [(one["id"], size(one["size_bytes"]), ago(one["last_used"]), one["problem"]) for one in answer["models"]]
    table(("MODEL", ">SIZE", "LAST USED", "PROBLEM"), rows, empty="every model was used since")
    if rows:
        freed = size(answer["freed_bytes"])
        say(f"{freed} are free again" if yes else f"{freed} would be freed; --yes removes them")
