"""The command ``lmx``: one thin module for each group of commands, and none with logic of its own.

Whatever concerns models asks the running server's admin face (``client``); ``serve``, ``cache``, ``service`` and
``doctor`` work without one. Imports are lazy, for ``lmx ls`` is typed by people: no command loads what another needs,
and none but ``serve`` the server. Exit codes: 0 done, 1 the server refused, 2 wrong usage or settings, 3 no server
there, 130 interrupted.
"""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    from lmx.cli.app import run

    return run(arguments)
