"""Health, metrics and status: what watches lmx, not what uses it.

Answered from state at hand; nothing here may wait for an engine, which may be busy or hung, nor long for a disk.
"""

import platform
import time
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import trio
from quart import Blueprint, Response, request

from lmx import __version__
from lmx.api.admin.description import status_object
from lmx.api.core.formats import formats
from lmx.config.live import Live
from lmx.hub import disk
from lmx.serving.metrics import Metrics
from lmx.serving.models import AnyServed, Models
from lmx.serving.models.status import ModelStatus

DISK_S = 0.5
PACKAGES = ("mlx", "mlx-lm", "llama-cpp-python", "quart", "hypercorn", "trio")


def blueprint(models: Models, live: Live, metrics: Metrics) -> Blueprint:
    """The admin face's reading half."""
    routes = Blueprint("admin", __name__)
    started = time.monotonic()
    one_at_a_time = trio.CapacityLimiter(1)

    @routes.get("/health")
    @routes.get("/admin/health")
    async def health() -> tuple[dict[str, Any], int]:
        """Liveness: 200 while the server answers. With `?ready`: 503 unless every model takes requests."""
        states = models.states()
        ready = models.ready
        status = "draining" if models.draining else "ready" if ready else "not ready"
        asks_ready = "ready" in request.args
        return {"status": status if asks_ready else "ok", "models": states}, 503 if asks_ready and not ready else 200

    @routes.get("/metrics")
    @routes.get("/admin/metrics")
    async def prometheus() -> Response:
        """Prometheus's text format."""
        return Response(metrics.render(), content_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/admin/status")
    async def status() -> dict[str, Any]:
        """The server, its memory and disk, its jobs, and each model's stay in memory: state, engine, leases, KV."""
        report = models.memory.report()
        served = {one.id: one for one in models.listing()}
        return {
            "version": __version__,
            "versions": {name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "uptime_s": round(time.monotonic() - started, 3),
            "draining": models.draining,
            "memory": {
                "total_bytes": report.total_bytes,
                "available_bytes": report.available_bytes,
                "server_rss_bytes": psutil.Process().memory_info().rss,
                "budget_bytes": report.budget_bytes,
                "reserved_bytes": report.reserved_bytes,
                "owned_bytes": report.owned_bytes,
                "measured_bytes": report.measured_bytes,
                "difference_bytes": report.difference_bytes,
                "alarm": report.alarm,
            },
            "disk": await _disk(live, one_at_a_time),
            "jobs": sum(not job.is_over for job in models.jobs.list()),
            "models": [_served(served.get(one.id)) | status_object(one) | _memory(one) for one in models.statuses()],
        }

    return routes


@cache  # reading it takes the event loop a millisecond
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # an extra
        return None


async def _disk(live: Live, one_at_a_time: trio.CapacityLimiter) -> dict[str, Any] | None:
    """Where models are kept; None: the disk does not answer, and costs one thread however often it is asked."""
    with trio.move_on_after(DISK_S), suppress(OSError):
        space = await trio.to_thread.run_sync(disk.space, live.now, abandon_on_cancel=True, limiter=one_at_a_time)
        return {"free_bytes": space.free_bytes, "total_bytes": space.total_bytes, "low": space.low}
    return None


def _memory(status: ModelStatus) -> dict[str, Any]:
    return {
        "estimate": asdict(status.estimate) if status.estimate is not None else None,
        "owned_bytes": status.owned_bytes,
        "measured_bytes": status.measured_bytes,
    }


def _served(served: AnyServed | None) -> dict[str, Any]:
    """What its words and its engine tell; nothing, while there are none."""
    if served is None:
        return {"ready": None, "engine": None}
    folder, engine = served.folder, served.engine
    return {
        "type": served.kind,
        "format": folder.format,
        "backend": folder.backend,
        "backend_reason": folder.backend_reason,
        **formats(served),
        "quantization": folder.quantization,
        "size_bytes": folder.size_bytes,
        "ready": asdict(engine.ready) if engine.ready else None,
        "engine": asdict(engine.statistics()),
    }
