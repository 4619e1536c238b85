"""What ends a command: one line on standard error, which says the way out, and an exit code."""

from typing import ClassVar


class CommandError(Exception):
    """Wrong usage or settings."""

    code: ClassVar[int] = 2


class Refused(CommandError):
    """The server said no, or what was asked for failed there."""

    code = 1


class Unreachable(CommandError):
    """No server answers, or it went away."""

    code = 3
