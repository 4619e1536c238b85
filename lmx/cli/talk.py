"""``lmx run``: one answer, or a conversation, in the terminal."""

import importlib
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

from lmx.cli.client import Client
from lmx.cli.errors import CommandError
from lmx.cli.options import HOST, Host, Json, Key, Model
from lmx.cli.output import clean, note, print_json

_HELP = "/clear forgets the conversation, /bye ends; Ctrl-C ends an answer."


def add(app: typer.Typer) -> None:
    """Its commands."""
    app.command()(run)


def run(
    model: Model = "default",
    prompt: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="Ask this and end.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    host: Host = HOST,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Chat with a model. With a prompt, or text on standard input: one answer."""
    fields = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
    body: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    before = [{"role": "system", "content": system}] if system else []
    asked = " ".join(prompt or [])
    if not sys.stdin.isatty():
        piped = sys.stdin.read().strip()
        asked = "\n\n".join(filter(None, (asked, piped)))
        if not asked:
            raise CommandError("there is nothing to ask: give a prompt, or text on standard input")
    with Client(host, key) as client:
        if asked:
            body["messages"] = [*before, {"role": "user", "content": asked}]
            if as_json:
                print_json(client.post("/v1/chat/completions", body))
            else:
                _answer(client, body)
        else:
            _converse(client, body, before)


def _answer(client: Client, body: dict[str, Any]) -> str:
    """Print an answer as it comes; what it said. Reasoning goes to standard error."""
    said, thinking = "", False
    with client.events("POST", "/v1/chat/completions", body | {"stream": True}) as events:
        for event in events:
            for choice in event.get("choices", ()):
                delta = choice.get("delta", {})
                thought, text = delta.get("reasoning_content") or "", delta.get("content") or ""
                if thought:
                    print(clean(thought), end="", file=sys.stderr, flush=True)
                    thinking = True
                if text:
                    if thinking:
                        print(file=sys.stderr)
                        thinking = False
                    print(clean(text), end="", flush=True)
                    said += text
    print()
    return said


def _converse(client: Client, body: dict[str, Any], before: list[dict[str, str]]) -> None:
    with suppress(ImportError):
        importlib.import_module("readline")  # input() then edits and remembers lines
    note(_HELP)
    messages = list(before)
    while True:
        try:
            line = input(">>> ").strip()
        except EOFError:
            print()
            return
        if line in ("/bye", "/exit", "/quit"):
            return
        if line == "/clear":
            messages = list(before)
        elif line.startswith("/"):
            note(_HELP)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                said = _answer(client, {**body, "messages": messages})
            except KeyboardInterrupt:  # leaving the stream has ended the answer; a second one, at the prompt, ends us
                print()
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": said})
