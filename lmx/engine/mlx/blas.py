"""Gives MLX a fast BLAS on Linux, where its wheel carries a slow one.

Measured, a float32 product of 1,024 × 1,024 on two cores: 6 GFLOP/s with the wheel's own, 200 with OpenBLAS. OpenBLAS
comes from the PyPI package scipy-openblas32, whose functions have prefixed names; ``lmx/_blas.c`` gives them the names
that MLX imports. Both are put into the process's global scope, where the dynamic linker looks before it looks into
MLX's own libraries, so ``load`` must be called before ``mlx.core`` is imported: by the engine's start, and by what runs
models without an engine (tests, benchmarks). On macOS it does nothing: MLX uses Accelerate and the GPU.
"""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

_SMALL_BYTES = 32 * 1024 * 1024
"""The products of a smaller model are not worth a second thread: a step of 4 layers of width 128 took 1.8 instead of
2.1 ms with one, and the other core is free for the server."""


def load(choice: str = "auto", weights_bytes: int = _SMALL_BYTES) -> str:
    """Give MLX its BLAS; which one, in words. ``choice``: "auto", "off" (MLX's own), or the path of a library that has
    the names MLX asks for. One that was preloaded by hand is left as it is.

    Raises OSError for a path that cannot be loaded.
    """
    if sys.platform != "linux":
        return "the system's"
    if weights_bytes < _SMALL_BYTES:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if hasattr(ctypes.CDLL(None), "cblas_sgemm"):
        return f"the one that was there already (LD_PRELOAD={os.environ.get('LD_PRELOAD', '')})"
    paths = {"auto": libraries(), "off": []}.get(choice, [choice])
    for path in paths:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    if paths:
        return f"OpenBLAS ({paths[0]})"
    slow = "MLX's own, many times slower than OpenBLAS"
    return slow if choice == "off" else f"{slow}, which is not installed (`make serve` installs it)"


def libraries() -> list[str]:
    """OpenBLAS under MLX's names, and what it needs, in the order in which to load them; empty where not installed."""
    shim, package = importlib.util.find_spec("lmx._blas"), importlib.util.find_spec("scipy_openblas32")
    if shim is None or shim.origin is None or package is None or package.origin is None:
        return []
    return [str(Path(package.origin).parent / "lib" / "libscipy_openblas.so"), shim.origin]
