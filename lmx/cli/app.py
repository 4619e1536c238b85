"""All commands put together, and what ends one of them turned into a line and an exit code."""

from collections.abc import Sequence

import typer

from lmx.cli import doctor, habits, jobs, local, models, running, service, settings, talk
from lmx.cli.errors import CommandError
from lmx.cli.output import note
from lmx.errors import LmxError

INTERRUPTED = 130

app = typer.Typer(
    name="lmx",
    help="A headless LLM inference server with OpenAI's API: serve, and ask the server that runs.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (local, talk, models, jobs, running, settings, service, doctor, habits):
    group.add(app)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and end.", is_eager=True)) -> None:
    if version:
        from lmx import __version__

        print(f"lmx {__version__}")
        raise typer.Exit


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    try:
        code = app(arguments, standalone_mode=False)
    except CommandError as error:
        note(f"lmx: {error}")
        return error.code
    except LmxError as error:
        note(f"lmx: {error.message}")
        return CommandError.code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except typer.Exit as end:
        return end.exit_code
    except BrokenPipeError:  # of `lmx ls | head`
        return 0
    except Exception as error:
        shown = getattr(error, "show", None)  # typer's own, of wrong usage
        if shown is None:
            raise
        shown()
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0
