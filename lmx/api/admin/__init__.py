"""The admin face (API.md, "Admin face"): one file for each group of its routes, all of them put together here.

Under the admin rules of ``lmx.api.access``. Called by ``lmx.api.app``.
"""

from quart import Blueprint

from lmx.api.admin import config, log, requests, watch
from lmx.api.core.calls import Calls
from lmx.config.live import Live
from lmx.serving.metrics import Metrics
from lmx.serving.models import Models


def blueprints(models: Models, live: Live, metrics: Metrics, calls: Calls) -> list[Blueprint]:
    """Every group's routes."""
    return [
        watch.blueprint(models, metrics),
        config.blueprint(live),
        log.blueprint(live),
        requests.blueprint(calls),
    ]
