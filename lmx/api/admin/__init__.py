"""The admin face (API.md, "Admin face"): one file for each group of its routes, all of them put together here.

Under the admin rules of ``lmx.api.access``. Called by ``lmx.api.app``.
"""

from quart import Blueprint

from lmx.api.admin import bench, config, jobs, log, recycling, removal, requests, watch
from lmx.api.admin import models as model_routes
from lmx.api.admin.description import Descriptions
from lmx.api.core.calls import Calls
from lmx.config.live import Live
from lmx.serving.bench import Benches
from lmx.serving.gauges import ModelGauges
from lmx.serving.metrics import Metrics
from lmx.serving.models import Models
from lmx.serving.removal import Removals


def blueprints(models: Models, live: Live, metrics: Metrics, calls: Calls) -> list[Blueprint]:
    """Every group's routes."""
    metrics.registry.register(ModelGauges(models))
    benches = Benches(models.state)
    descriptions = Descriptions(models, benches, live)
    return [
        watch.blueprint(models, live, metrics),
        model_routes.blueprint(models, descriptions, live),
        recycling.blueprint(models),
        removal.blueprint(descriptions, Removals(models, live), live),
        jobs.blueprint(models.jobs, descriptions, live),
        bench.blueprint(models, benches, live),
        config.blueprint(live),
        log.blueprint(live),
        requests.blueprint(calls),
    ]
