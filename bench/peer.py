"""Starts a peer's server on a free port: ``mlx_lm server``, with the same OpenBLAS as lmx's engines, or
``llama_cpp.server``. Blocking."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.models import with_openblas

_START_S = 120.0


@contextmanager
def mlx_lm_server(folder: Path) -> Iterator[str]:
    """Its URL, once it answers; the model loads with the first request. Its defaults, but for the log."""
    with _server(["mlx_lm", "server", "--model", str(folder), "--log-level", "ERROR"], "health") as url:
        yield url


@contextmanager
def llama_cpp_server(path: Path, context_tokens: int, threads: int) -> Iterator[str]:
    """Its URL, once it answers. Its defaults, but for context, threads, and that no request ends the one before."""
    options = {"n_ctx": context_tokens, "n_threads": threads, "n_threads_batch": threads}
    fixed = ["--interrupt_requests", "false", "--logits_all", "false", "--verbose", "false"]
    chosen = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with _server(["llama_cpp.server", "--model", str(path), *chosen, *fixed], "v1/models") as url:
        yield url


@contextmanager
def _server(module: list[str], ready_path: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-m", *module, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=with_openblas(),
    ) as process:
        try:
            _wait(process, f"http://127.0.0.1:{port}/{ready_path}", module[0])
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _wait(process: "subprocess.Popen[bytes]", url: str, name: str) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{name} did not start (status {process.poll()}); are its packages there (`make bench`)?")
