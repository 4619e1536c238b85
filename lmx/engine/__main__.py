"""``python -m lmx.engine --fd N``: the engine process of one model. Started by the server only; speaks on the
inherited socket."""

import argparse
import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from lmx.engine.backend import Backend, Facts
from lmx.engine.drafts import Drafts
from lmx.engine.embedding.backend import Embedder
from lmx.engine.embedding.backend import Facts as EmbeddingFacts
from lmx.engine.link import Link, ServerGone
from lmx.engine.loop import StepLoop
from lmx.engine.prefix.disk import Disk
from lmx.engine.prefix.fingerprint import fingerprint
from lmx.engine.prefix.stops import message_marks
from lmx.engine.prefix.store import PrefixStore
from lmx.errors import ModelInvalid
from lmx.protocol import Failed, Load, Ready

_QUEUE_BYTES = 256 * 1024**2
"""Most memory for KV that waits to be written to the disk."""
_LLAMA_RAM_BYTES = 8 * 1024**3
_LLAMA_RAM_SHARE = 1 / 8
"""Of the free memory, for llama.cpp's blocks without a setting."""

Loaded = tuple[Facts | EmbeddingFacts, Callable[[], None]]
"""What is known of the model, and its loop, which begins when the server has been told."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lmx.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the socketpair")
    fd = parser.parse_args().fd
    # A terminal's Ctrl-C is the server's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = Link(socket.socket(fileno=fd))
    with contextlib.suppress(ServerGone):
        return _serve(link)
    return 0


def _serve(link: Link) -> int:
    options = next(link.receive(None))
    if not isinstance(options, Load):
        raise ValueError(f"the first frame must be Load, not {type(options).__name__}")
    started = time.monotonic()
    try:
        facts, run = (_load_text if options.embedding is None else _load_embeddings)(link, options)
    except ModelInvalid as error:
        link.send(Failed(-1, "model_invalid", error.message))
        return 3
    link.send(
        Ready(
            backend=options.backend,
            architecture=facts.architecture,
            context_length=facts.context_length,
            vocab_size=facts.vocab_size,
            eos_ids=facts.eos_ids,
            kv_bytes_per_token=facts.kv_bytes_per_token,
            kv_budget_bytes=facts.kv_budget_bytes,
            weights_bytes=facts.weights_bytes,
            device=facts.device,
            dtype=facts.dtype,
            path=facts.path,
            path_reason=facts.path_reason,
            probes=facts.probes,
            load_s=time.monotonic() - started,
            dimension=facts.dimension if isinstance(facts, EmbeddingFacts) else 0,
        )
    )
    run()
    return 0


def _load_text(link: Link, options: Load) -> Loaded:
    backend = _loader(options.backend)(options)
    prefixes = _prefix_store(link, backend, options) if options.prefix_cache and backend.facts.prefixes else None
    drafts = Drafts(options, backend.facts, backend) if options.speculation != "off" else None

    def run() -> None:
        loop = StepLoop(link, backend, options, prefixes=prefixes, drafts=drafts)
        try:
            loop.run()
        finally:
            if prefixes:
                prefixes.close(loop.save_s)

    return backend.facts, run


def _prefix_store(link: Link, backend: Backend, options: Load) -> PrefixStore:
    name = fingerprint(Path(options.path), options.backend, f"{backend.facts.architecture}, {backend.facts.dtype}")
    disk = None
    if options.prefix_disk_bytes:
        folder = Path(options.prefix_dir)
        disk = Disk(folder, name, options.prefix_disk_bytes, _QUEUE_BYTES, model=options.path, wake=link.wake)
    ram_bytes = options.prefix_ram_bytes
    if not ram_bytes and options.backend == "llama":  # its KV buffer is made whole at load, so blocks come on top
        ram_bytes = min(_LLAMA_RAM_BYTES, int(_LLAMA_RAM_SHARE * psutil.virtual_memory().available))
    prefixes = PrefixStore(backend, name, ram_bytes, disk, message_marks(options.words))
    if warmed := prefixes.warm():
        backend.facts.probes["prefixes"] = f"{warmed} bytes that most conversations share were read from the disk"
    return prefixes


def _load_embeddings(link: Link, options: Load) -> Loaded:
    from lmx.engine.embedding.loop import EmbeddingLoop

    embedder = _load_embedder(options)
    return embedder.facts, lambda: EmbeddingLoop(link, embedder, options).run()


def _load_embedder(options: Load) -> Embedder:
    """Imports one back end only."""
    if options.backend == "llama":
        from lmx.engine.embedding.llama import LlamaEmbedder

        return LlamaEmbedder.load(options)
    used = _load_blas(options)
    from lmx.engine.embedding.embedder import MLXEmbedder

    embedder = MLXEmbedder.load(options)
    embedder.facts.probes["BLAS"] = used
    # The model lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    return embedder


def _loader(backend: str) -> Callable[[Load], Backend]:
    """Imports one back end only: MLX alone takes half a second."""
    if backend == "llama":
        from lmx.engine.llama.backend import LlamaBackend

        return LlamaBackend.load
    return _load_mlx


def _load_mlx(options: Load) -> Backend:
    used = _load_blas(options)
    from lmx.engine.mlx.backend import MLXBackend

    backend = MLXBackend.load(options)
    backend.facts.probes["BLAS"] = used
    return backend


def _load_blas(options: Load) -> str:
    """Before MLX is imported; which one, in words."""
    from lmx.engine.mlx import blas

    weights_bytes = sum(file.stat().st_size for file in Path(options.path).glob("*.safetensors"))
    try:
        return blas.load(options.openblas, weights_bytes)
    except OSError as error:
        raise ModelInvalid(f"[engine] openblas: {options.openblas!r} cannot be loaded: {error}.") from None


if __name__ == "__main__":
    # At once: a grammar that is being compiled cannot be interrupted, and sys.exit would wait for its thread.
    os._exit(main())
