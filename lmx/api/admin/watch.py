"""Health, metrics and status: what watches lmx, not what uses it.

Answered from state at hand; nothing here may wait for an engine, which may be busy or hung.
"""

import platform
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
from quart import Blueprint, Response, request

from lmx import __version__
from lmx.api.core.formats import formats
from lmx.serving.metrics import Metrics
from lmx.serving.models import AnyServed, Models

PACKAGES = ("mlx", "mlx-lm", "llama-cpp-python", "quart", "hypercorn", "trio")


def blueprint(models: Models, metrics: Metrics) -> Blueprint:
    """The admin face's reading half."""
    routes = Blueprint("admin", __name__)
    started = time.monotonic()

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
        """The server, its memory, and each model's engine, leases and KV."""
        memory, process = psutil.virtual_memory(), psutil.Process()
        return {
            "version": __version__,
            "versions": {name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "uptime_s": round(time.monotonic() - started, 3),
            "draining": models.draining,
            "memory": {
                "total_bytes": memory.total,
                "available_bytes": memory.available,
                "server_rss_bytes": process.memory_info().rss,
            },
            "models": [_model_status(served) for served in models.listing()]
            or [{"id": name, "state": state} for name, state in models.states().items()],
        }

    return routes


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # an extra
        return None


def _model_status(served: AnyServed) -> dict[str, Any]:
    folder, engine = served.folder, served.engine
    return {
        "id": served.id,
        "type": served.kind,
        "state": engine.state,
        "format": folder.format,
        "backend": folder.backend,
        "backend_reason": folder.backend_reason,
        **formats(served),
        "quantization": folder.quantization,
        "size_bytes": folder.size_bytes,
        "ready": asdict(engine.ready) if engine.ready else None,
        "engine": asdict(engine.statistics()),
    }
