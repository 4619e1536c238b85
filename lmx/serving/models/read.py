"""From a model's files to what serves it: its words, and an engine that is not started yet.

Blocking, called from threads by ``lmx.serving.models.lifecycle``; it reads tokenizers and headers, never weights.
"""

import logging
import os
import sys
import time

from lmx import protocol
from lmx.chat.encoder import TextEncoder
from lmx.chat.model import ChatModel
from lmx.config import Settings
from lmx.config.live import Live
from lmx.errors import ModelInvalid
from lmx.hub.inventory import ModelFolder
from lmx.hub.sentence import ENCODERS
from lmx.prefix_disk.folders import budget
from lmx.serving.engine import Engine
from lmx.serving.metal import buffer_limits, chip_name
from lmx.serving.metrics import Metrics
from lmx.serving.models.options import Options
from lmx.serving.models.served import Served, ServedEmbedding

BACKENDS = {"mlx": "MLX", "llama": "llama.cpp"}

logger = logging.getLogger("lmx")


def read_writer(
    model_id: str, folder: ModelFolder, options: Options, live: Live, metrics: Metrics, draft: ModelFolder | None = None
) -> Served:
    """A model that writes; ``draft``: one that says what it might write next. Raises ModelInvalid, ConfigError."""
    settings = live.now
    _tell(model_id, folder)
    if folder.architecture in ENCODERS:
        raise ModelInvalid(
            f"{folder.source} is an encoder ({folder.architecture}) and writes no text. Name it as [model] embedding, "
            "and a model that writes as [model] default.",
            param="model.default",
        )
    chat = ChatModel.load(folder.words, options.tool_format, options.reasoning_format)
    load = protocol.Load(
        path=str(folder.path),
        backend=folder.backend,
        eos_ids=tuple(sorted(chat.eos_ids)),
        context_length=options.context_length,
        max_rows=options.max_rows,
        kv_budget_bytes=options.kv_budget_bytes,
        max_chunk_tokens=settings.engine.max_chunk_tokens,
        itl_target_ms=settings.engine.itl_target_ms,
        lookahead=settings.engine.lookahead,
        batching=settings.engine.batching,
        openblas=settings.engine.openblas,
        log_level=settings.server.log_level,
        kv_bits=options.kv_bits,
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
        speculation=options.speculation,
        draft_path=str(draft.path) if draft is not None else "",
        compile_decode=settings.engine.compile,
    )
    engine = Engine(model_id, load, lambda: live.now.engine, metrics, _environment(settings))
    return Served(model_id, folder, chat, engine, int(time.time()), options.context_length, options.names)


def read_embedding(
    model_id: str, folder: ModelFolder, options: Options, live: Live, metrics: Metrics
) -> ServedEmbedding:
    """A model that makes vectors. Raises ModelInvalid."""
    settings = live.now
    _tell(model_id, folder)
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
    engine = Engine(model_id, load, lambda: live.now.engine, metrics, environment)
    return ServedEmbedding(model_id, folder, encoder, engine, int(time.time()))


def _tell(model_id: str, folder: ModelFolder) -> None:
    logger.info("model %s runs on %s: %s", model_id, BACKENDS[folder.backend], folder.backend_reason)


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
