"""What commands print: documents, tables, and figures in words. Text of models and servers is printed without control
characters, which could do anything to a terminal."""

import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@cache
def console() -> "Console":
    """Standard output."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


@cache
def progress_console() -> "Console":
    """Standard error, for what is over when the command is."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """A line of the answer."""
    print(clean(text))


def note(text: str) -> None:
    """A line about the answer."""
    print(clean(text), file=sys.stderr)


def print_json(document: Any) -> None:
    print(json.dumps(document, ensure_ascii=False, indent=2))


def print_json_line(document: Any) -> None:
    """One of several documents, on a line of its own."""
    print(json.dumps(document, ensure_ascii=False), flush=True)


def clean(text: str) -> str:
    """Without control characters but line ends and tabs."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """Print one. Columns that begin with ">" are of numbers."""
    made = make_table(columns, rows)
    if not made.row_count:
        note(empty)
        return
    out = console()
    if out.is_terminal:
        out.print(made)
        return
    out.width = 10_000  # nobody's screen: no line is cut
    with out.capture() as captured:
        out.print(made)
    for line in captured.get().splitlines():
        print(line.rstrip())


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(
            Text(column.removeprefix(">")), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        made.add_row(*(Text(clean(cell)) for cell in row))
    return made


def facts(pairs: Iterable[tuple[str, str]], *, indent: str = "") -> None:
    """Names and values, one a line; what has no value is left out."""
    told = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in told), default=0)
    for name, value in told:
        say(f"{indent}{name.ljust(width)}  {value}")


def size(nbytes: float | None) -> str:
    """Bytes, as "1.2 GiB"."""
    if nbytes is None:
        return ""
    amount, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{nbytes:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def count(number: float | None) -> str:
    """Parameters, as "135M"; nothing where it is not known."""
    if not number:
        return ""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            amount = number / factor
            return f"{amount:.0f}{unit}" if amount >= 100 else f"{amount:.3g}{unit}"
    return f"{number:.0f}"


def duration(seconds: float | None) -> str:
    """As "3 min"; nothing where it is not known."""
    if seconds is None:
        return ""
    for length, unit in ((86_400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * length or (seconds >= length and unit != "min"):
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def ago(at: float | None) -> str:
    """Of a Unix time: "5 min ago"; "never" where there is none."""
    return f"{duration(max(0.0, time.time() - at))} ago" if at else "never"


def moment(at: float | None) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds") if at else ""


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is being done, and goes in the end; without a terminal a line each."""
    err = progress_console()
    if not err.is_terminal:
        told = ""

        def tell(text: str) -> None:
            nonlocal told
            if text and text != told:
                note(text)
            told = text

        yield tell
        return
    with err.status("") as status:
        yield lambda text: status.update(clean(text))


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """The same with bytes: ``(text, done, total)``, total 0 where it is not known."""
    err = progress_console()
    if not err.is_terminal:
        with progress() as tell:
            yield lambda text, done, total: tell(text)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda text, done, total: bar.update(task, description=clean(text), completed=done, total=total or None)
