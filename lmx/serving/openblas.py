"""Gives the engine process a fast BLAS on Linux, where MLX's wheel carries a slow one.

Measured: a float32 matrix product runs at about 4 GFLOP/s with the wheel's own and 130 with OpenBLAS put first by
LD_PRELOAD. Blocking; called once at start by ``lmx.cli``. On macOS it does nothing (MLX uses Accelerate and the GPU).
"""

import ctypes.util
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from lmx.errors import ConfigError

logger = logging.getLogger("lmx")

# Debian (threads first: the plain name may be the serial build), Fedora, Arch.
_PLACES = (
    ("/usr/lib", "*-linux-gnu/openblas-pthread/libopenblas.so.0"),
    ("/usr/lib", "*-linux-gnu/libopenblas.so.0"),
    ("/usr/lib64", "libopenblasp.so.0"),
    ("/usr/lib64", "libopenblas.so.0"),
    ("/usr/lib", "libopenblas.so.0"),
    ("/usr/lib", "libopenblas.so"),
)


SMALL_BYTES = 32 * 1024 * 1024
"""The products of a smaller model are not worth a second thread: a step of 4 layers of width 128 took 1.8 instead of
2.1 ms with one, and the other core is free for the server."""


def engine_environment(
    backend: str, openblas: str, weights_bytes: int, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment of an engine process. ``openblas``: "auto", "off", or the library's path. llama.cpp brings its
    own kernels.

    Raises ConfigError for a path that does not exist.
    """
    environment = {**environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    if backend == "llama" or sys.platform != "linux" or openblas == "off":
        return environment
    if openblas == "auto":
        library = _find()
        if library is None:
            logger.warning(
                "OpenBLAS was not found: models on the CPU run many times slower without it. "
                "Install it with `apt install libopenblas0-pthread` (Fedora: `dnf install openblas-threads`; "
                "Arch: `pacman -S openblas`)."
            )
            return environment
    elif Path(openblas).is_file():
        library = openblas
    else:
        raise ConfigError(
            f'[engine] openblas: there is no file {openblas!r}; give the path of libopenblas.so.0, "auto" or "off".',
            param="engine.openblas",
        )
    logger.info("the engine uses OpenBLAS (%s)", library)
    preload = environment.get("LD_PRELOAD")
    if weights_bytes < SMALL_BYTES:
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    environment["LD_PRELOAD"] = f"{library}:{preload}" if preload else library
    return environment


def _find() -> str | None:
    for folder, pattern in _PLACES:
        for path in sorted(Path(folder).glob(pattern)):
            return str(path)
    return ctypes.util.find_library("openblas")
