"""How much memory this machine has for models, where lmx.toml names no limit: what the operating system, a container's
limit, or Metal leaves.

Asked by ``lmx.serving.memory``, never of MLX, which the server does not load. Reads a few small files or two sysctls.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import psutil

LINUX_SHARE = 0.9
METAL_SHARE, SMALL_METAL_SHARE = 0.75, 0.67
"""What Metal wires at most by default: three quarters of the memory, two thirds on smaller machines."""
SMALL_BYTES = 64 * 1024**3

_ROOT = Path("/sys/fs/cgroup")
_GROUPS = Path("/proc/self/cgroup")


def model_bytes(total: int, platform: str = sys.platform, sysctl: Callable[[str], int] | None = None) -> int:
    """Of ``total``, what all models together may take: on macOS what Metal may wire (``iogpu.wired_limit_mb``, if an
    operator has set it), else nine tenths."""
    if platform != "darwin":
        return int(LINUX_SHARE * total)
    if limit_mb := (sysctl or _sysctl)("iogpu.wired_limit_mb"):
        return min(limit_mb * 1024**2, total)
    return int((SMALL_METAL_SHARE if total < SMALL_BYTES else METAL_SHARE) * total)


def total_bytes() -> int:
    """What the machine has, or the container may use."""
    total = int(psutil.virtual_memory().total)
    return min([total, *(limit for limit, _ in limits())])


def available_bytes() -> int:
    """What the system could give now, without swapping."""
    free = int(psutil.virtual_memory().available)
    return max(min([free, *(limit - used for limit, used in limits())]), 0)


def limits(groups: Path = _GROUPS, root: Path = _ROOT) -> Iterator[tuple[int, int]]:
    """Of the control groups that this process is in, and those above them, as far as they have a limit: the limit, and
    what of it is in use (file pages that the kernel would drop first are not)."""
    try:
        lines = groups.read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _limits(root / "memory", path, *names)


def _limits(root: Path, path: str, limit: str, used: str, droppable: str) -> Iterator[tuple[int, int]]:
    # Inside a container the path is often that of the host, and the group is mounted as the root.
    inner = PurePosixPath(path.lstrip("/"))
    for group in dict.fromkeys((root / inner, *(root / parent for parent in inner.parents), root)):
        try:
            most = (group / limit).read_text("ascii").strip()
            if most == "max" or int(most) >= 2**62:  # no limit, of version 2 and 1
                continue
            statistics = dict(line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
            yield int(most), int((group / used).read_text("ascii")) - int(statistics.get(droppable, 0))
        except (OSError, ValueError):
            continue


def _sysctl(name: str) -> int:
    """0: there is no such thing."""
    value, size = ctypes.c_uint64(), ctypes.c_size_t(8)
    libc = ctypes.CDLL(None)
    if libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0) != 0:
        return 0
    return int(value.value)
