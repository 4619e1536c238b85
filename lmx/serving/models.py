"""The models that the server offers, under every name that means one of them.

One model in this version; ``resolve`` and ``listing`` are all that the API faces know of it, so that loading, unloading
and routing can come without them. A model is offered when the server has its words; until then, at the first start of a
GGUF file, it is loading. Run by ``lmx.cli``.
"""

import logging
import os
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import trio

from lmx import protocol
from lmx.chat.model import ChatModel
from lmx.config import Settings
from lmx.errors import LmxError, ModelNotFound, ModelOverloaded
from lmx.hub.conversion import ConversionNeeded
from lmx.hub.inventory import ModelFolder, find
from lmx.serving.converter import run_converter
from lmx.serving.engine import Engine
from lmx.serving.metal import buffer_limits, chip_name
from lmx.serving.metrics import Metrics
from lmx.serving.readers import Readers

BACKENDS = {"mlx": "MLX", "llama": "llama.cpp"}

logger = logging.getLogger("lmx")


@dataclass(frozen=True, slots=True)
class Served:
    """A model and what serves it."""

    id: str
    folder: ModelFolder
    chat: ChatModel
    engine: Engine
    created: int
    """Unix time of its start."""

    @property
    def context_length(self) -> int:
        """Longest prompt plus answer. While the model loads only its folder can tell; 0 where that does not."""
        ready = self.engine.ready
        return ready.context_length if ready else self.folder.context_length


class Models:
    """All served models. ``run`` it in a nursery."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.draining = False
        """The server is about to stop: nothing new is taken."""
        self.presentable = trio.Event()
        """The server may listen: the model was found, even if it must be converted first."""
        self._all_settings = settings
        self._settings = settings.model
        self._metrics = metrics
        self._served: Served | None = None
        self.readers = Readers(lambda: [served.chat.source for served in self.listing()])
        """Processes for large request bodies."""
        self._loading = trio.CancelScope()
        self.settled = trio.Event()
        """The model is there, or will never be."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Find the model, have it converted if need be, and run its engine until cancelled. ``task_status`` is started
        when the engine is.

        Raises ModelNotFound, ModelInvalid, ConfigError. Cancelled: no process is left when Cancelled leaves.
        """
        try:
            with self._loading:
                self._served = await self._load()
        finally:
            self.settled.set()
            self.presentable.set()
        try:
            async with trio.open_nursery() as nursery:
                for served in self.listing():
                    await nursery.start(served.engine.run)
                task_status.started()
        finally:
            await self.readers.aclose()

    async def _load(self) -> Served:
        made: set[Path] = set()
        while True:
            try:
                # Abandoned: what a thread reads harms nobody.
                return await trio.to_thread.run_sync(_read, self._all_settings, self._metrics, abandon_on_cancel=True)
            except ConversionNeeded as needed:
                conversion = needed.conversion
            conversion.refuse_if_made(made)
            self.presentable.set()
            logger.info("making the %s of %s, once: %s", conversion.what, conversion.source, conversion.folder)
            await run_converter(conversion)

    def stop_loading(self) -> None:
        """Give up a model that is not there yet, and with it those who wait for it."""
        self._loading.cancel()

    def states(self) -> dict[str, str]:
        """Each model's state, as ``Engine.state``; one whose words are not there yet is "loading"."""
        if self._served is None:
            return {self._settings.default: "loading"}
        return {served.id: served.engine.state for served in self.listing()}

    def resolve(self, requested: str) -> Served:
        """The model that ``requested`` means: its id, its path, an alias, or a placeholder for the default model.

        ``lmstudio/`` or ``openai/`` may stand before any of them, as routers write them.

        Raises ModelNotFound, which lists the models, and ModelOverloaded while the server shuts down.
        """
        if self.draining:
            raise ModelOverloaded("The server is shutting down.", retry_after_s=5.0)
        if self._served is None:
            raise ModelOverloaded(f"The model {self._settings.default!r} is not there yet.", retry_after_s=5.0)
        for name in (requested, requested.removeprefix("lmstudio/").removeprefix("openai/")):
            if self._means(self._settings.aliases.get(name, name), self._served.folder):
                return self._served
        raise ModelNotFound(
            f"The model {requested[:200]!r} does not exist. There are: {', '.join(s.id for s in self.listing())}.",
            param="model",
        )

    def _means(self, name: str, folder: ModelFolder) -> bool:
        names = {folder.id, str(folder.path), str(folder.source), self._settings.default}
        return name in names or any(fnmatchcase(name, pattern) for pattern in self._settings.placeholders)

    def listing(self) -> list[Served]:
        """Every model, for /v1/models."""
        return [] if self._served is None else [self._served]

    def fail_all(self, error: LmxError) -> None:
        """End every running request with ``error``."""
        for served in self.listing():
            served.engine.fail_all(error)

    def kill(self) -> None:
        """End every engine process this instant."""
        for served in self.listing():
            served.engine.kill()


def _read(settings: Settings, metrics: Metrics) -> Served:
    """The configured model, with what the server needs of it. Blocking. Raises ConversionNeeded."""
    name = settings.model.default
    backend = settings.model.backends.get(name, settings.model.backend)
    folder = find(name, settings.model.cache_path, backend)
    logger.info("model %s runs on %s: %s", folder.id, BACKENDS[folder.backend], folder.backend_reason)
    chat = ChatModel.load(folder.words, settings.model.tool_format, settings.model.reasoning_format)
    load = protocol.Load(
        path=str(folder.path),
        backend=folder.backend,
        eos_ids=tuple(sorted(chat.eos_ids)),
        context_length=settings.model.context_length,
        max_rows=settings.engine.max_rows,
        kv_budget_bytes=settings.engine.kv_budget_bytes,
        max_chunk_tokens=settings.engine.max_chunk_tokens,
        itl_target_ms=settings.engine.itl_target_ms,
        lookahead=settings.engine.lookahead,
        batching=settings.engine.batching,
        openblas=settings.engine.openblas,
        log_level=settings.server.log_level,
        kv_bits=settings.llama.kv_bits,
        gpu_layers=settings.llama.gpu_layers,
        threads=settings.llama.threads,
        mmap=settings.llama.mmap,
        words=str(folder.words),
        # While it compiles, a single request gives no step: that must not look like a hang.
        grammar_compile_s=min(settings.engine.grammar_compile_s, settings.engine.hang_timeout_s / 2),
    )
    limits = buffer_limits(
        settings.engine.mlx_ops_per_buffer,
        settings.engine.mlx_mb_per_buffer,
        os.environ,
        sys.platform,
        chip_name(sys.platform),
    )
    engine = Engine(folder.id, load, settings.engine, metrics, {**os.environ, **limits})
    return Served(folder.id, folder, chat, engine, int(time.time()))
