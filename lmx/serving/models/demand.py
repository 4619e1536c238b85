"""What a model needs before it is loaded, and what it is given. Reads headers; blocking."""

import logging
from dataclasses import dataclass

from lmx.config import Settings
from lmx.hub.backends import has_gpu
from lmx.hub.estimate import Estimate, estimate, grant, guess, least_kv
from lmx.hub.inventory import ModelFolder
from lmx.hub.shape import read_shape
from lmx.serving.models.options import Options

# As ``lmx.engine.llama.backend`` decides where nobody tells it a budget.
_WHOLE_SHARE = 0.25
_ROW_TOKENS = 1024

logger = logging.getLogger("lmx")


@dataclass(frozen=True, slots=True)
class Demand:
    estimate: Estimate
    backend: str
    context_asked: bool
    """Somebody named the context, which then must fit whole."""
    kv_budget_bytes: int
    """What the settings give it; 0: what there is room for."""

    @property
    def least_bytes(self) -> int:
        """Without which it is not loaded."""
        least = least_kv(self.estimate, context_asked=self.context_asked)
        return self.estimate.total(self.kv_budget_bytes or least)

    def kv_bytes(self, room_bytes: int) -> int:
        """Of KV, when so much is free, of which it takes the least at any rate."""
        found = self.estimate
        if self.kv_budget_bytes:
            return self.kv_budget_bytes
        granted = grant(found, room_bytes=room_bytes, context_asked=self.context_asked)
        if self.backend == "llama" and found.kv_bytes(found.context_length, found.rows) > _WHOLE_SHARE * room_bytes:
            # Its buffer is made whole at load, so it gets what is likely used: one row of the full context, or several
            # shorter ones.
            tokens = max(found.context_length, found.rows * _ROW_TOKENS)
            granted = min(granted, tokens * found.kv_bytes_per_token + found.rows * found.state_bytes)
        return granted


def demand(
    folder: ModelFolder, options: Options, settings: Settings, *, embeds: bool, draft: ModelFolder | None = None
) -> Demand:
    """Of ``folder`` loaded with ``options``, and a draft model beside it in the same process; of a model whose
    configuration is like no other's: as its files are large. Blocking. Raises ModelInvalid."""
    found = _reckon(folder, options, settings, embeds=embeds)
    if draft is not None:
        found = found.beside(_reckon(draft, options, settings, embeds=False))
    return Demand(found, folder.backend, bool(options.context_length), options.kv_budget_bytes)


def _reckon(folder: ModelFolder, options: Options, settings: Settings, *, embeds: bool) -> Estimate:
    try:
        return _estimate(folder, options, settings, embeds=embeds)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        logger.warning("model %s: what it needs is guessed from the size of its files (%r)", folder.id, error)
        return guess(
            folder.size_bytes,
            backend=folder.backend,
            context=options.context_length or folder.context_length,
            rows=options.max_rows,
            embedding=embeds,
        )


def _estimate(folder: ModelFolder, options: Options, settings: Settings, *, embeds: bool) -> Estimate:
    shape = read_shape(folder.path)
    if folder.size_bytes and not shape.weights_bytes:
        raise LookupError("no weights were found")
    return estimate(
        shape,
        backend=folder.backend,
        gpu=has_gpu() if folder.backend == "mlx" else settings.llama.gpu_layers != 0 and has_gpu(),
        kv_bits=options.kv_bits,
        context=options.context_length,
        rows=options.max_rows,
        chunk=settings.engine.max_chunk_tokens,
        embedding=embeds,
    )
