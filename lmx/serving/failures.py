"""Why an engine process ended, told from how it ended and what it said last.

Pure; called by ``lmx.serving.engine`` after every death. It must never claim more than the evidence: what it cannot
name is "bug" (with the last words in the message) or "killed".
"""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Cause = Literal["out_of_memory", "gpu_timeout", "buffer_handles", "model_invalid", "hung", "killed", "bug", "shutdown"]

# What MLX, Metal, CUDA and the C++ runtime print before they abort; the first match wins.
_WORDS: tuple[tuple[Cause, str], ...] = (
    ("buffer_handles", r"resource limit \(\d+\) exceeded"),
    ("gpu_timeout", r"ErrorTimeout|ErrorImpactingInteractivity|GPU Timeout|cudaErrorLaunchTimeout"),
    (
        "out_of_memory",
        r"insufficient memory|ErrorOutOfMemory|out of memory|unable to allocate|failed to allocate"
        r"|bad_alloc|MemoryError|greater than the maximum allowed buffer size",
    ),
)

_SENTENCES: dict[Cause, str] = {
    "out_of_memory": "it ran out of memory; a smaller model, context_length, max_rows or kv_budget_bytes needs less",
    "gpu_timeout": "the GPU driver gave up on work that took too long; a smaller max_chunk_tokens makes it shorter",
    "buffer_handles": "it reached the limit of Metal's buffer handles",
    "model_invalid": "the model cannot be used",
    "hung": "it hung and was killed",
    "killed": "it was killed from outside (by a person, or by the kernel for want of memory)",
    "bug": "it crashed",
    "shutdown": "the server shuts down",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of one engine process."""

    cause: Cause
    detail: str
    """Exit code or signal, and the last line it wrote."""
    loading: bool
    """It had not become ready."""

    def __str__(self) -> str:
        return f"{_SENTENCES[self.cause]} ({self.detail})" if self.detail else _SENTENCES[self.cause]


def classify(returncode: int, last_lines: Sequence[str], *, loading: bool) -> Failure:
    """The failure of a process that ended by itself. ``last_lines``: its output, oldest first."""
    ended = f"exit code {returncode}" if returncode >= 0 else _signal_name(-returncode)
    for line in reversed(last_lines):
        for cause, words in _WORDS:
            if re.search(words, line, re.IGNORECASE):
                return Failure(cause, f"{ended}; {line.strip()}", loading)
    # Python's fault handler prints where it was; why (an assertion of llama.cpp or MLX) stands before it.
    fault = next((i for i, line in enumerate(last_lines) if i and line.startswith("Fatal Python error")), None)
    last = next((line.strip() for line in reversed(last_lines[:fault]) if line.strip()), "no output")
    cause = "killed" if -returncode in (signal.SIGKILL, signal.SIGTERM) else "bug"
    return Failure(cause, f"{ended}; {last}", loading)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def failed_load(code: str, message: str) -> Failure:
    """What an engine said of its own load before it ended (``protocol.Failed`` with ``seq == -1``)."""
    causes: dict[str, Cause] = {"model_invalid": "model_invalid", "out_of_memory": "out_of_memory"}
    return Failure(causes.get(code, "bug"), message, loading=True)
