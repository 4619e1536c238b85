"""Everything lmx counts for Prometheus, in a registry of its own.

Counters and histograms are incremented where the fact is known (``lmx.serving.engine``, ``lmx.api``); gauges are read
from each engine's ``statistics()`` when somebody scrapes, so they can never be stale. Never asks an engine anything.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmx.serving.statistics import EngineStatistics

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_GAUGES: tuple[tuple[str, str, Callable[[EngineStatistics], float]], ...] = (
    ("lmx_live_leases", "Requests that hold a place in the engine.", lambda s: s.live_leases),
    ("lmx_live_sequences", "Sequences submitted and not yet confirmed free.", lambda s: s.live_sequences),
    ("lmx_waiting", "Leases without a first token.", lambda s: s.waiting),
    ("lmx_running", "Leases that have their first token.", lambda s: s.live_leases - s.waiting),
    (
        "lmx_kv_sequence_bytes",
        "KV of live sequences as the scheduler counts it, in whole quanta of 256 tokens; 0 when none lives.",
        lambda s: s.kv_sequence_bytes,
    ),
    ("lmx_kv_budget_bytes", "Limit of lmx_kv_sequence_bytes.", lambda s: s.kv_budget_bytes),
    ("lmx_ready", "1 while the engine takes work.", lambda s: s.state == "ready"),
    ("lmx_engine_age_seconds", "Since the engine process was ready.", lambda s: s.age_s),
    (
        "lmx_engine_growth_bytes",
        "By how much its memory has grown beyond what lmx accounts for.",
        lambda s: s.growth_bytes,
    ),
)
_ENGINE_GAUGES = (
    (
        "lmx_kv_arena_bytes",
        "KV buffers as the engine holds them, padding and free rows included (llama.cpp: from load on).",
        "arena_bytes",
    ),
    ("lmx_engine_rss_bytes", "Resident memory of the engine process (macOS: footprint).", "rss_bytes"),
    ("lmx_mlx_active_bytes", "Memory in MLX arrays.", "mlx_active_bytes"),
    ("lmx_mlx_peak_bytes", "Highest lmx_mlx_active_bytes.", "mlx_peak_bytes"),
    ("lmx_mlx_cache_bytes", "Freed buffers that MLX keeps.", "mlx_cache_bytes"),
    ("lmx_mlx_live_arrays", "MLX arrays that Python refers to.", "live_arrays"),
    ("lmx_engine_traces", "Graphs that the engine process compiled.", "traces"),
    (
        "lmx_engine_handles",
        "GPU buffers, estimated by the arrays that are alive; MLX's pool comes on top.",
        "handles",
    ),
    ("lmx_engine_handles_limit", "How many the system gives a process; 0: any number.", "most_handles"),
    ("lmx_engine_open_files", "Open files and sockets of the engine process.", "open_files"),
    ("lmx_engine_threads", "Threads of the engine process.", "threads"),
    ("lmx_preemptions", "Sequences preempted since the engine started.", "preemptions"),
)
_PREFIX_GAUGES = (
    (
        "lmx_prefix_bytes",
        "KV kept for those who begin with the same tokens.",
        {"ram": "ram_bytes", "disk": "disk_bytes"},
    ),
    (
        "lmx_prefix_hit_tokens",
        "Prompt tokens not computed, since the engine started: another row, memory, or the disk had them.",
        {"row": "row_hit_tokens", "ram": "ram_hit_tokens", "disk": "disk_hit_tokens"},
    ),
    (
        "lmx_prefix_evicted_blocks",
        "Blocks that gave way to others since the engine started.",
        {"ram": "evicted_blocks"},
    ),
    ("lmx_prefix_bad_files", "Files that were not what they should have been, and deleted.", {"disk": "bad_files"}),
    ("lmx_prefix_queued_bytes", "KV that waits to be written.", {"disk": "queued_bytes"}),
    ("lmx_prefix_restore_seconds", "What putting kept KV back took, since the engine started.", {"ram": "restore_s"}),
    ("lmx_prefix_publish_seconds", "What keeping KV took of the steps' time.", {"ram": "publish_s"}),
)


class Metrics(Collector):
    """The registry and its instruments. ``model`` is a model's id in every label set."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engines: dict[str, Callable[[], EngineStatistics]] = {}
        counter, histogram = self._counter, self._histogram
        self.requests = counter("lmx_requests", "HTTP requests answered.", "model", "face", "status", "finish")
        self.prompt_tokens = counter("lmx_prompt_tokens", "Prompt tokens computed.", "model")
        self.cached_tokens = counter("lmx_cached_prompt_tokens", "Prompt tokens found in a cache.", "model")
        self.generated_tokens = counter("lmx_generated_tokens", "Tokens generated.", "model")
        self.draft_tokens = counter("lmx_draft_tokens", "Drafts that were verified.", "model", "source")
        self.accepted_drafts = counter("lmx_accepted_draft_tokens", "Those that were right.", "model", "source")
        self.cancellations = counter("lmx_cancellations", "Sequences ended before they finished.", "model", "reason")
        self.engine_restarts = counter("lmx_engine_restarts", "Engine processes that ended.", "model", "cause")
        self.engine_recycles = counter(
            "lmx_engine_recycles", "Engine processes that were replaced by fresh ones.", "model", "reason"
        )
        self.ttft = histogram("lmx_time_to_first_token_seconds", "From lease to first token.")
        self.itl = histogram("lmx_inter_token_seconds", "Between two tokens of a sequence.")
        self.step = histogram("lmx_step_seconds", "One engine step.")
        self.cancel_free = histogram("lmx_cancel_free_seconds", "From a cancellation seen to its KV freed.")
        self.load = histogram("lmx_model_load_seconds", "From the first wish for a model until it took requests.")
        self.loads = counter(
            "lmx_model_loads", "Loads that ended, by how: ready, failed or cancelled.", "model", "outcome"
        )
        self.evictions = counter("lmx_model_evictions", "Unloads because another model needed the memory.", "model")
        self.registry.register(self)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ("model",), buckets=_SECONDS, registry=self.registry)

    def watch(self, model: str, statistics: Callable[[], EngineStatistics]) -> None:
        """Show the gauges of this engine at every scrape."""
        self._engines[model] = statistics

    def forget(self, model: str, statistics: Callable[[], EngineStatistics]) -> None:
        """This engine has ended: its gauges are shown no more, unless another one has its name by now."""
        if self._engines.get(model) == statistics:
            del self._engines[model]

    def collect(self) -> Iterator[Metric]:
        records = [(model, statistics()) for model, statistics in self._engines.items()]
        for name, text, read in _GAUGES:
            family = GaugeMetricFamily(name, text, labels=("model",))
            for model, record in records:
                family.add_metric((model,), float(read(record)))
            yield family
        for name, text, field in _ENGINE_GAUGES:
            family = GaugeMetricFamily(name, text, labels=("model",))
            for model, record in records:
                if record.engine is not None:
                    family.add_metric((model,), getattr(record.engine, field))
            yield family
        for name, text, tiers in _PREFIX_GAUGES:
            family = GaugeMetricFamily(name, text, labels=("model", "tier"))
            for model, record in records:
                if record.engine is not None:
                    for tier, field in tiers.items():
                        family.add_metric((model, tier), getattr(record.engine.prefix, field))
            yield family
        family = GaugeMetricFamily(
            "lmx_kv_arena_ratio",
            "KV buffers ÷ KV of live sequences, both at the engine's last account; 0 when none lives.",
            labels=("model",),
        )
        for model, record in records:
            if record.engine is not None:
                held = record.engine.kv_used_bytes
                family.add_metric((model,), record.engine.arena_bytes / held if held else 0.0)
        yield family

    def render(self) -> bytes:
        """Prometheus's text format, version 0.0.4."""
        return generate_latest(self.registry)
