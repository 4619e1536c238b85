"""Runs a conversion of ``lmx.hub`` in its own process, beside a server that already answers.

A converter never outlives its server: it is ended when the server stops waiting for it, and ends itself when the server
dies without a word. Called by ``lmx.serving.models``.
"""

import os
import signal
from contextlib import suppress

import trio

from lmx.hub.conversion import Conversion

GRACE_S = 0.75
"""From SIGTERM to SIGKILL: it only has to remove a folder, but may be in a long call."""


async def run_converter(conversion: Conversion) -> None:
    """Do ``conversion``. Raises ModelInvalid. Cancelled: the process has ended, and nothing half-made is left, before
    Cancelled leaves."""
    held, life = os.pipe()  # its standard input, which closes when this process dies
    try:
        process = await trio.run_process(
            conversion.command,
            stdin=held,
            capture_stderr=True,
            check=False,
            deliver_cancel=_end,
            start_new_session=True,  # a terminal's Ctrl-C is the server's business
        )
    except trio.Cancelled:
        conversion.discard()
        raise
    finally:
        os.close(held)
        os.close(life)
    assert process.stderr is not None
    conversion.check(process.returncode, process.stderr)


async def _end(process: trio.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        await trio.sleep(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
