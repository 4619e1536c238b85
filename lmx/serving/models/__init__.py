"""The models that the server offers: names, lifecycle, memory (``manager`` holds them together)."""

from lmx.serving.models.manager import Models
from lmx.serving.models.served import AnyServed, Served, ServedEmbedding

__all__ = ["AnyServed", "Models", "Served", "ServedEmbedding"]
