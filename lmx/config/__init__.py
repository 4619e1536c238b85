"""The settings: their classes and defaults (``settings``), names (``keys``) and sources (``sources``), and their change
while the server runs (``live``, ``persist``).

``lmx.toml`` in the repository lists every key with its default (a test holds the two together).
"""

from lmx.config.settings import (
    BackendName,
    EngineSettings,
    HubSettings,
    KVBits,
    LlamaSettings,
    MemorySettings,
    ModelSettings,
    NamedModelSettings,
    ServerSettings,
    Settings,
    Speculation,
)
from lmx.config.sources import Sources, load_settings

__all__ = [
    "BackendName",
    "EngineSettings",
    "HubSettings",
    "KVBits",
    "LlamaSettings",
    "MemorySettings",
    "ModelSettings",
    "NamedModelSettings",
    "ServerSettings",
    "Settings",
    "Sources",
    "Speculation",
    "load_settings",
]
