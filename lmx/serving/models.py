"""The models that the server offers, under every name that means one of them.

One model in this version; ``resolve`` and ``listing`` are all that the API faces know of it, so that loading, unloading
and routing can come without them. Built by ``lmx.cli`` in a thread (``load`` blocks: it may convert a GGUF file).
"""

import logging
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase

import trio

from lmx import protocol
from lmx.chat.model import ChatModel
from lmx.config import Settings
from lmx.errors import LmxError, ModelNotFound, ModelOverloaded
from lmx.hub.inventory import ModelFolder, resolve
from lmx.serving.engine import Engine
from lmx.serving.metrics import Metrics

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


class Models:
    """All served models."""

    def __init__(self, settings: Settings, served: Served) -> None:
        self.draining = False
        """The server is about to stop: nothing new is taken."""
        self._settings = settings.model
        self._served = served

    @classmethod
    def load(cls, settings: Settings, metrics: Metrics) -> "Models":
        """Find the configured model and read what the server needs of it; its engine starts with ``run``. Blocking.

        Raises ModelNotFound, ModelInvalid, ConfigError.
        """
        name = settings.model.default
        backend = settings.model.backends.get(name, settings.model.backend)
        folder = resolve(name, settings.model.cache_path, backend)
        logger.info("model %s runs on %s: %s", folder.id, BACKENDS[folder.backend], folder.backend_reason)
        chat = ChatModel.load(folder.words)
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
        )
        engine = Engine(folder.id, load, settings.engine, metrics)
        return cls(settings, Served(folder.id, folder, chat, engine, int(time.time())))

    def resolve(self, requested: str) -> Served:
        """The model that ``requested`` means: its id, its path, an alias, or a placeholder for the default model.

        Raises ModelNotFound, which lists the models, and ModelOverloaded while the server shuts down.
        """
        if self.draining:
            raise ModelOverloaded("The server is shutting down.", retry_after_s=5.0)
        name = self._settings.aliases.get(requested, requested)
        if name in self._names() or any(fnmatchcase(name, pattern) for pattern in self._settings.placeholders):
            return self._served
        raise ModelNotFound(
            f"The model {requested[:200]!r} does not exist. There are: {', '.join(s.id for s in self.listing())}.",
            param="model",
        )

    def _names(self) -> set[str]:
        folder = self._served.folder
        return {folder.id, str(folder.path), str(folder.source), self._settings.default}

    def listing(self) -> list[Served]:
        """Every model, for /v1/models."""
        return [self._served]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the engines until cancelled. Cancelled: no engine process is left when Cancelled leaves."""
        async with trio.open_nursery() as nursery:
            for served in self.listing():
                await nursery.start(served.engine.run)
            task_status.started()

    def fail_all(self, error: LmxError) -> None:
        """End every running request with ``error``."""
        for served in self.listing():
            served.engine.fail_all(error)

    def kill(self) -> None:
        """End every engine process this instant."""
        for served in self.listing():
            served.engine.kill()
