"""What a model on the disk would be loaded as, if somebody asked for it now. Reads headers only; blocking."""

from dataclasses import dataclass

from lmx.config import Settings
from lmx.errors import LmxError
from lmx.hub.conversion import ConversionNeeded
from lmx.hub.estimate import Estimate
from lmx.hub.inventory import find
from lmx.hub.library import Entry
from lmx.serving.models.demand import demand
from lmx.serving.models.options import LoadOptions, options_of


@dataclass(frozen=True, slots=True)
class Preview:
    backend: str | None
    backend_reason: str
    """None: nothing can run it, and why."""
    estimate: Estimate | None
    """None: its words must be made first, or its files cannot be read."""
    least_bytes: int
    """Without which it is not loaded."""


def preview(entry: Entry, settings: Settings) -> Preview:
    """Of a model as the settings have it."""
    options = options_of(settings, [entry.id, *entry.aliases], LoadOptions(), jit=True)
    try:
        folder = find(entry.loadable, settings.model.cache_path, options.backend)
        wanted = demand(folder, options, settings, embeds=entry.kind == "embeddings")
    except ConversionNeeded as needed:
        return Preview(None, f"the {needed.conversion.what} of the file must be made first", None, 0)
    except LmxError as error:
        return Preview(None, error.message, None, 0)
    return Preview(folder.backend, folder.backend_reason, wanted.estimate, wanted.least_bytes)
