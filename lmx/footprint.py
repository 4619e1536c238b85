"""What the operating system charges a process for. A leaf: imported by engines, for their ``Stats``, and by the server,
which looks at its engines from outside (``lmx.serving.measure``)."""

import ctypes
import os
import sys
from pathlib import Path

import psutil


def resident_bytes() -> int:
    """This process's resident set; on macOS its ``phys_footprint``. Cheap enough for a step loop."""
    if sys.platform == "darwin":
        return _phys_footprint(os.getpid())
    return int(psutil.Process().memory_info().rss)


def open_files() -> int:
    """This process's open file descriptors, sockets included."""
    return int(psutil.Process().num_fds())


def threads() -> int:
    """Those of this process."""
    return int(psutil.Process().num_threads())


def footprint_bytes(pid: int) -> int:
    """A process's own memory: on macOS ``phys_footprint``, which counts GPU buffers and compressed pages as Activity
    Monitor does; on Linux the proportional set, in which what two processes map (libraries, a GGUF file) counts once;
    elsewhere the resident set. Walks page tables: a few milliseconds for each GB, so call it in a thread.

    Raises ProcessLookupError when there is no such process, PermissionError for somebody else's.
    """
    if sys.platform == "darwin":
        return _phys_footprint(pid)
    if sys.platform == "linux" and (proportional := _proportional_set(pid)):
        return proportional
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        raise ProcessLookupError(f"no process {pid}") from None
    except psutil.AccessDenied:
        raise PermissionError(f"process {pid} is somebody else's") from None


def _proportional_set(pid: int) -> int:
    """0 where the kernel does not tell (before 4.14, or a zombie)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _phys_footprint(pid: int) -> int:
    """From ``proc_pid_rusage`` (libproc.h): struct rusage_info_v0 is a 16-byte uuid and ten uint64, the eighth is
    this."""
    info = (ctypes.c_uint64 * 12)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.proc_pid_rusage(pid, 0, ctypes.byref(info)) != 0:
        raise OSError(ctypes.get_errno(), "proc_pid_rusage")
    return int(info[9])
