"""Gauges over all models and jobs, read when somebody scrapes: what is loaded, what memory it has, what is being done.

Beside ``lmx.serving.metrics``, which has those of each engine. Never asks an engine or the disk anything.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmx.serving.models import Models

_SUMS = (
    ("lmx_memory_budget_bytes", "What all models together may take.", "budget_bytes"),
    ("lmx_memory_available_bytes", "What the system could give now.", "available_bytes"),
    ("lmx_memory_difference_bytes", "Measured beyond what lmx accounts for.", "difference_bytes"),
    ("lmx_memory_alarm", "1 while that is too much.", "alarm"),
)
_EACH = (
    ("lmx_model_reserved_bytes", "What a model may take.", "reserved_bytes"),
    ("lmx_model_owned_bytes", "What lmx accounts for: weights, KV, prefixes, the process.", "owned_bytes"),
    ("lmx_model_measured_bytes", "What the system says of its process.", "measured_bytes"),
    ("lmx_model_difference_bytes", "Measured beyond what lmx accounts for.", "difference_bytes"),
)


class ModelGauges(Collector):
    """Register it with a server's metrics."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        states = Counter(self._models.states().values())
        yield _family("lmx_models", "Models in memory, or on their way in or out.", "state", states.items())
        report = self._models.memory.report()
        for name, text, field in _SUMS:
            yield GaugeMetricFamily(name, text, value=float(getattr(report, field)))
        for name, text, field in _EACH:
            yield _family(name, text, "model", ((held.model, getattr(held, field)) for held in report.models))
        jobs = GaugeMetricFamily("lmx_jobs", "Downloads and conversions.", labels=("kind", "state"))
        for labels, count in Counter((job.kind, job.state) for job in self._models.jobs.list()).items():
            jobs.add_metric(labels, count)
        yield jobs


def _family(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for value, number in values:
        family.add_metric((value,), number)
    return family
