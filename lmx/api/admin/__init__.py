"""The admin face (API.md, "Admin face"): one file for each group of its routes, all of them put together here.

Under the admin rules of ``lmx.api.access``. Called by ``lmx.api.app``.
"""

from quart import Blueprint

from lmx.api.admin import watch
from lmx.config import Settings
from lmx.serving.metrics import Metrics
from lmx.serving.models import Models


def blueprints(models: Models, settings: Settings, metrics: Metrics) -> list[Blueprint]:
    """Every group's routes."""
    return [watch.blueprint(models, metrics)]
