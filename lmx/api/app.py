"""The HTTP application: routes of every face, and the rules all of them share (API.md, "Common").

Before a request: its id, the access rules. After: the headers that every response carries. Errors go through
``lmx.api.errors``. Made by ``lmx.serve``, served by ``lmx.api.transport.http``.
"""

import logging
from functools import partial
from typing import Any

import trio
from quart import Blueprint, Quart, Response, request
from quart_schema import Info, QuartSchema
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from lmx import __version__
from lmx.api import admin, docs, prefix_cache, ui
from lmx.api.access import authorize, origin_allowed
from lmx.api.core.call import Call, current_call
from lmx.api.core.calls import Calls
from lmx.api.errors import UnknownPath, contained, error_response, expected, from_http
from lmx.api.events import EventStream, HTTPConnection
from lmx.api.openai import chat, completions, embeddings
from lmx.api.openai import models as model_routes
from lmx.api.paths import with_normal_paths
from lmx.config import ServerSettings
from lmx.config.live import Live
from lmx.serving.metrics import Metrics
from lmx.serving.models import Models


class _App(QuartTrio):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("lmx.api", static_folder=None)
        self.calls = Calls()

    async def dispatch_request(self, request_context: Any = None) -> Any:
        """The handler's whole work but a stream's, which ``EventStream`` contains."""
        with current_call().cancellable(), contained():
            return await super().dispatch_request(request_context)


def create_app(models: Models, live: Live, metrics: Metrics) -> QuartTrio:
    """The whole HTTP face over ``models``, under the settings that hold at each request."""
    app = _App()
    app.asgi_http_class = HTTPConnection
    app.asgi_app = with_normal_paths(app.asgi_app)
    live.watch(lambda settings: app.config.update(MAX_CONTENT_LENGTH=settings.server.max_body_bytes))
    app.logger.setLevel(logging.WARNING)
    _add_rules(app, models, live, metrics)
    _add_errors(app, live)
    for routes in (
        _root(),
        chat.blueprint(models, live),
        completions.blueprint(models, live),
        embeddings.blueprint(models, live),
        model_routes.blueprint(models, live),
        *admin.blueprints(models, live, metrics, app.calls),
        prefix_cache.blueprint(live),
        docs.blueprint(),
        ui.blueprint(),
    ):
        app.register_blueprint(routes)
    info = Info("lmx", __version__, description="A headless LLM inference server with OpenAI's API.")
    # Our own docs page instead of the extension's three: theirs load their scripts from the internet.
    QuartSchema(app, info=info, swagger_ui_path=None, redoc_ui_path=None, scalar_ui_path=None)
    app.json.sort_keys = False
    return app


def _add_rules(app: Quart, models: Models, live: Live, metrics: Metrics) -> None:
    @app.before_request
    async def admit() -> None:
        call, settings = current_call(), live.now.server
        if not _is_preflight(settings):
            call.key_name = authorize(settings, request.path, request.headers, call.address)
        if request.method == "POST" and not request.path.startswith("/admin/"):
            call.face = request.blueprint or ""
        if request.method == "GET" and "websocket" in request.headers.get("upgrade", "").lower():
            raise UnknownPath(f"There is no WebSocket at {request.path[:200]}; this server answers to plain HTTP.")

    @app.after_request
    async def add_headers(response: Response) -> Response:
        call = current_call()
        response.headers["x-request-id"] = call.id
        response.headers["openai-processing-ms"] = str(round((trio.current_time() - call.started) * 1000))
        if live.now.server.cors_origins:
            _add_cors(response, live.now.server)
        count = partial(_count, metrics, call, request.blueprint or "")
        if isinstance(response, EventStream):
            response.on_end = count
        else:
            count(response.status_code)
        return response


def _count(metrics: Metrics, call: Call, face: str, status: int) -> None:
    call.status = status
    metrics.requests.labels(call.model, face, str(status), call.finish).inc()


def _is_preflight(settings: ServerSettings) -> bool:
    """A browser asks, without the key, whether a page of an allowed origin may send a request."""
    asks = request.method == "OPTIONS" and "access-control-request-method" in request.headers
    return asks and origin_allowed(settings, request.headers.get("origin", ""))


def _add_cors(response: Response, settings: ServerSettings) -> None:
    origin = request.headers.get("origin", "")
    response.headers.add("vary", "origin")
    if not origin or not origin_allowed(settings, origin):
        return
    response.headers["access-control-allow-origin"] = origin
    response.headers["access-control-expose-headers"] = "x-request-id, openai-processing-ms, retry-after"
    if _is_preflight(settings):
        response.headers["access-control-allow-methods"] = "GET, HEAD, POST, DELETE, OPTIONS"
        wanted = request.headers.get("access-control-request-headers", "authorization, content-type")
        response.headers["access-control-allow-headers"] = wanted
        response.headers["access-control-max-age"] = "600"


def _add_errors(app: Quart, live: Live) -> None:
    @app.errorhandler(Exception)
    async def refuse(error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return error_response(expected(error, current_call().id))
        response = error_response(from_http(error, request.method, request.path, live.now.server.max_body_bytes))
        if isinstance(error, MethodNotAllowed):
            response.headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
        return response


def _root() -> Blueprint:
    routes = Blueprint("root", __name__)

    @routes.get("/")
    @routes.get("/api/hello")
    async def hello() -> dict[str, Any]:
        """Whether anybody is there."""
        return {"name": "lmx", "version": __version__, "docs": "/docs", "openapi": "/openapi.json", "ui": "/ui"}

    return routes
