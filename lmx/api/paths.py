"""Paths as clients write them: base URLs without /v1, with it twice, with doubled or trailing slashes, request targets
in HTTP's further forms.

An ASGI layer in front of the app, so that routing and access rules see one spelling only, which begins with a slash.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Any

App = Callable[[Any, Any, Any], Awaitable[None]]

_WITHOUT_V1 = re.compile(r"/(chat/completions|completions|models|embeddings|rerank|responses|messages)(/|$)")


def normalised(path: str) -> str:
    """
    >>> normalised("//v1/v1/models/"), normalised("/chat/completions")
    ('/v1/models', '/v1/chat/completions')
    >>> normalised("http://localhost:1234/v1/models"), normalised("*"), normalised("example.com:443"), normalised("")
    ('/v1/models', '/?*', '/?example.com:443', '/?')
    """
    if re.match("https?://", path, re.IGNORECASE):  # the absolute form, as to a proxy
        path = re.sub("^[^/]*//[^/]*", "", path) or "/"
    elif not path.startswith("/"):  # OPTIONS *, CONNECT host:port, or nonsense: no route has such a path
        path = f"/?{path}"
    path = re.sub("/{2,}", "/", path)
    path = re.sub("^(/v1)+(?=/v1(/|$))", "", path)
    if _WITHOUT_V1.match(path):
        path = "/v1" + path
    return path.rstrip("/") or "/"


def with_normal_paths(app: App) -> App:
    """Wrap ``app`` so that it sees normalised paths. Adds no checkpoint and no task."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["path"] = normalised(scope["path"])
        await app(scope, receive, send)

    return wrapped
