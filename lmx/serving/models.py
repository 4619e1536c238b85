"""The models that the server offers, under every name that means one of them.

One model that writes and one that makes vectors, in this version; ``resolve``, ``resolve_embedding``, ``find`` and
``listing`` are all that the API faces know of it, so that loading, unloading and routing can come without them. A model
is offered when the server has its words; until then, at the first start of a GGUF file, it is loading. Run by
``lmx.serve``.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

import trio

from lmx import protocol
from lmx.chat.encoder import TextEncoder
from lmx.chat.model import ChatModel, Source
from lmx.config import Settings
from lmx.errors import InvalidRequest, LmxError, ModelInvalid, ModelNotFound, ModelOverloaded
from lmx.hub.conversion import ConversionNeeded
from lmx.hub.inventory import ModelFolder, find
from lmx.hub.sentence import ENCODERS
from lmx.prefix_disk.folders import budget
from lmx.serving.converter import run_converter
from lmx.serving.engine import Engine
from lmx.serving.metal import buffer_limits, chip_name
from lmx.serving.metrics import Metrics
from lmx.serving.readers import Readers

BACKENDS = {"mlx": "MLX", "llama": "llama.cpp"}
OPENAI_EMBEDDINGS = ("text-embedding-3-*", "text-embedding-ada-*")
"""What clients ask for who were never told a name."""
NO_EMBEDDING = "This server has no model for embeddings: set [model] embedding in lmx.toml"

Read = TypeVar("Read", "Served", "ServedEmbedding")

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
    kind: ClassVar = "llm"

    @property
    def source(self) -> Source:
        """Of its words, for another process."""
        return self.chat.source

    @property
    def context_length(self) -> int:
        """Longest prompt plus answer. While the model loads only its folder can tell; 0 where that does not."""
        ready = self.engine.ready
        return ready.context_length if ready else self.folder.context_length


@dataclass(frozen=True, slots=True)
class ServedEmbedding:
    """A model that makes vectors of texts, and what serves it."""

    id: str
    folder: ModelFolder
    encoder: TextEncoder
    engine: Engine
    created: int
    kind: ClassVar = "embeddings"

    @property
    def source(self) -> Source:
        """Of its words, for another process."""
        return Source(str(self.folder.words))

    @property
    def dimension(self) -> int:
        """Of its vectors; 0 until the engine has been ready."""
        return self.engine.ready.dimension if self.engine.ready else 0

    @property
    def ranks(self) -> bool:
        """A cross-encoder: it scores pairs of texts, and makes no vectors."""
        return self.encoder.sentence.pooling.mode == "rank"

    @property
    def context_length(self) -> int:
        """Longest input: what its files say, as far as the engine can. 0: nobody can tell yet."""
        limits = [self.encoder.sentence.max_tokens, self.engine.ready.context_length if self.engine.ready else 0]
        return min(filter(None, limits), default=0)


AnyServed = Served | ServedEmbedding


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
        self._embedding: ServedEmbedding | None = None
        self.readers = Readers(lambda: [served.source for served in self.listing() if isinstance(served, Served)])
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
                writer = await self._load(_read)
                if self._settings.embedding:
                    self._embedding = await self._load(partial(_read_embedding, taken=writer.id))
                self._served = writer
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

    async def _load(self, read: Callable[[Settings, Metrics], Read]) -> Read:
        made: set[Path] = set()
        while True:
            try:
                # Abandoned: what a thread reads harms nobody.
                return await trio.to_thread.run_sync(read, self._all_settings, self._metrics, abandon_on_cancel=True)
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
            return dict.fromkeys(filter(None, (self._settings.default, self._settings.embedding)), "loading")
        return {served.id: served.engine.state for served in self.listing()}

    def resolve(self, requested: str) -> Served:
        """The model that ``requested`` means: its id, its path, an alias, or a placeholder for the default model.

        ``lmstudio/`` or ``openai/`` may stand before any of them, as routers write them.

        Raises ModelNotFound, which lists the models, InvalidRequest for a model that does not write, and
        ModelOverloaded while the server shuts down.
        """
        served = self.find(requested)
        if isinstance(served, ServedEmbedding):
            raise InvalidRequest(
                f"The model {served.id!r} makes embeddings and does not write text. Ask it at /v1/embeddings, or ask "
                f"{self._ids(Served)} here.",
                param="model",
            )
        return served

    def resolve_embedding(self, requested: str | None) -> ServedEmbedding:
        """As ``resolve``, for the model that makes embeddings; None, a placeholder or OpenAI's name for one of its own
        means it, too.

        Raises as ``resolve`` does, and InvalidRequest for a model that makes no embeddings.
        """
        self._refuse_early()
        embedding = self._embedding
        if embedding is not None and (
            requested is None
            or any(fnmatchcase(requested, pattern) for pattern in (*self._settings.placeholders, *OPENAI_EMBEDDINGS))
        ):
            return embedding
        served = self.find(requested or self._settings.default, ServedEmbedding)
        if isinstance(served, ServedEmbedding):
            return served
        there = f"Ask {self._ids(ServedEmbedding)} for that" if embedding else NO_EMBEDDING
        raise InvalidRequest(f"The model {served.id!r} writes text and makes no embeddings. {there}.", param="model")

    def find(self, requested: str, kind: type[AnyServed] = Served) -> AnyServed:
        """The model of either kind that ``requested`` means, as in ``resolve``; of two rather that of ``kind``.

        Raises ModelNotFound, and ModelOverloaded while the server shuts down.
        """
        self._refuse_early()
        for name in (requested, requested.removeprefix("lmstudio/").removeprefix("openai/")):
            meant = self._settings.aliases.get(name, name)
            found = [served for served in self.listing() if self._means(meant, served)]
            if found:
                return next((served for served in found if isinstance(served, kind)), found[0])
        raise ModelNotFound(
            f"The model {requested[:200]!r} does not exist. There are: {', '.join(s.id for s in self.listing())}.",
            param="model",
        )

    def _refuse_early(self) -> None:
        if self.draining:
            raise ModelOverloaded("The server is shutting down.", retry_after_s=5.0)
        if self._served is None:
            raise ModelOverloaded(f"The model {self._settings.default!r} is not there yet.", retry_after_s=5.0)

    def _ids(self, kind: type[AnyServed]) -> str:
        return ", ".join(repr(served.id) for served in self.listing() if isinstance(served, kind))

    def _means(self, name: str, served: AnyServed) -> bool:
        names = {served.id, str(served.folder.path), str(served.folder.source)}
        if isinstance(served, ServedEmbedding):
            return name in names or name == self._settings.embedding
        patterns = self._settings.placeholders
        return name in names or name == self._settings.default or any(fnmatchcase(name, p) for p in patterns)

    def listing(self) -> list[AnyServed]:
        """Every model, for /v1/models; first the one that writes."""
        return [served for served in (self._served, self._embedding) if served is not None] if self._served else []

    def fail_all(self, error: LmxError) -> None:
        """End every running request with ``error``."""
        for served in self.listing():
            served.engine.fail_all(error)

    def kill(self) -> None:
        """End every engine process this instant."""
        for served in self.listing():
            served.engine.kill()


def _read_embedding(settings: Settings, metrics: Metrics, *, taken: str) -> ServedEmbedding:
    """As ``_read``, for the model that makes embeddings; ``taken``: the other one's id, which may be of the same
    folder."""
    name = settings.model.embedding
    folder = find(name, settings.model.cache_path, settings.model.backends.get(name, settings.model.backend))
    logger.info("embedding model %s runs on %s: %s", folder.id, BACKENDS[folder.backend], folder.backend_reason)
    model_id = folder.id if folder.id != taken else f"{taken}-embedding"
    encoder = TextEncoder.load(folder.words)
    load = protocol.Load(
        path=str(folder.path),
        backend=folder.backend,
        context_length=encoder.sentence.max_tokens,
        itl_target_ms=settings.engine.itl_target_ms,
        openblas=settings.engine.openblas,
        log_level=settings.server.log_level,
        gpu_layers=settings.llama.gpu_layers,
        threads=settings.llama.threads,
        mmap=settings.llama.mmap,
        embedding=encoder.sentence.pooling,
    )
    environment = _environment(settings)
    if folder.architecture in ENCODERS:
        # Each core takes a share of a step, products included; NumPy's BLAS reads this when it is imported.
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    engine = Engine(model_id, load, settings.engine, metrics, environment)
    return ServedEmbedding(model_id, folder, encoder, engine, int(time.time()))


def _environment(settings: Settings) -> dict[str, str]:
    limits = buffer_limits(
        settings.engine.mlx_ops_per_buffer,
        settings.engine.mlx_mb_per_buffer,
        os.environ,
        sys.platform,
        chip_name(sys.platform),
    )
    return {**os.environ, **limits}


def _prefix_disk_bytes(settings: Settings) -> int:
    try:
        return budget(settings.engine.prefix_disk_bytes, settings.prefix_path)
    except OSError as error:
        logger.warning("no prefixes are kept on disk: %s cannot be used: %s", settings.prefix_path, error.strerror)
        return 0


def _read(settings: Settings, metrics: Metrics) -> Served:
    """The configured model, with what the server needs of it. Blocking. Raises ConversionNeeded."""
    name = settings.model.default
    backend = settings.model.backends.get(name, settings.model.backend)
    folder = find(name, settings.model.cache_path, backend)
    logger.info("model %s runs on %s: %s", folder.id, BACKENDS[folder.backend], folder.backend_reason)
    if folder.architecture in ENCODERS:
        raise ModelInvalid(
            f"{folder.source} is an encoder ({folder.architecture}) and writes no text. Name it as [model] embedding, "
            "and a model that writes as [model] default.",
            param="model.default",
        )
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
        kv_bits=settings.model.kv_bits,
        gpu_layers=settings.llama.gpu_layers,
        threads=settings.llama.threads,
        mmap=settings.llama.mmap,
        words=str(folder.words),
        # While it compiles, a single request gives no step: that must not look like a hang.
        grammar_compile_s=min(settings.engine.grammar_compile_s, settings.engine.hang_timeout_s / 2),
        grammar_mask_ms=settings.engine.grammar_mask_ms,
        prefix_cache=settings.engine.prefix_cache,
        prefix_ram_bytes=settings.engine.prefix_ram_bytes,
        prefix_disk_bytes=_prefix_disk_bytes(settings),
        prefix_dir=str(settings.prefix_path),
    )
    engine = Engine(folder.id, load, settings.engine, metrics, _environment(settings))
    return Served(folder.id, folder, chat, engine, int(time.time()))
