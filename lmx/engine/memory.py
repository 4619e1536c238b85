"""What the operating system charges this process for. Called by the step loop for ``Stats``."""

import ctypes
import os
import sys

import psutil


def resident_bytes() -> int:
    """The resident set; on macOS ``phys_footprint``, which counts GPU buffers and compressed pages as Activity Monitor
    does."""
    if sys.platform == "darwin":
        return _phys_footprint()
    return int(psutil.Process().memory_info().rss)


def _phys_footprint() -> int:
    """From ``proc_pid_rusage`` (libproc.h): struct rusage_info_v0 is a 16-byte uuid and ten uint64, the eighth is
    this."""
    info = (ctypes.c_uint64 * 12)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.proc_pid_rusage(os.getpid(), 0, ctypes.byref(info)) != 0:
        raise OSError(ctypes.get_errno(), "proc_pid_rusage")
    return int(info[9])
