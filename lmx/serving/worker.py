"""A child process that works for a job: started, its lines read, ended. It knows nothing of jobs.

A child never outlives ``work``: it is killed with its whole session when that is left, and ends itself (a pipe as
standard input that closes) should the server die without a word. Called by ``lmx.serving.jobs``.
"""

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import trio

TAIL_LINES = 20
MOST_LINE_BYTES = 32 * 1024 * 1024
"""A line names every file of a repository."""


async def work(module: str, request: Mapping[str, Any], line: Callable[[dict[str, Any]], None]) -> tuple[int, str]:
    """Run ``python -P -m module REQUEST`` and pass each of its lines on; its exit status and the end of its stderr.

    Raises OSError if it cannot be started. Cancelled: it has ended before Cancelled leaves.
    """
    command = [sys.executable, "-P", "-m", module, json.dumps(request)]
    # What huggingface_hub tells of the machine it tells without.
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    with trio.CancelScope(shield=True):
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is the server's business
        )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read, process.stdout, lambda text: line(json.loads(text)) if text[:1] == b"{" else None)
            nursery.start_soon(_read, process.stderr, lambda text: tail.append(text.decode(errors="replace")))
            status = await process.wait()
    finally:
        with trio.CancelScope(shield=True):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                await stream.aclose()
    return status, " / ".join(tail)


async def _read(stream: trio.abc.ReceiveStream, take: Callable[[bytes], object]) -> None:
    rest = b""
    async for data in stream:
        *lines, rest = (rest + data).split(b"\n")
        for text in lines:
            take(text)
        if len(rest) > MOST_LINE_BYTES:
            rest = b""


def signal_name(status: int) -> str:
    """Of a negative exit status."""
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
