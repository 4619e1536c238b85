"""A server over a zoo of models in the test's own Trio run: what the admin face's tests talk to."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trio

from lmx.api.app import create_app
from lmx.api.transport.http import serve_http
from lmx.serving.metrics import Metrics
from lmx.serving.models import Models
from tests.models_zoo import engines, live_of

PATIENCE_S = 20  # bounds a failing test only


@dataclass
class Face:
    models: Models
    http: httpx.AsyncClient
    port: int

    async def post(self, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
        return _checked(await self.http.post(f"/admin/{path}", json=body), status)

    async def get(self, path: str, status: int = 200) -> dict[str, Any]:
        return _checked(await self.http.get(f"/admin/{path}"), status)

    async def delete(self, path: str, status: int = 200) -> dict[str, Any]:
        return _checked(await self.http.delete(f"/admin/{path}"), status)

    async def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Of a stream, to its end."""
        answer = await self.http.post(f"/admin/{path}", json={"stream": True} | body)
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
        return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]

    async def send(self, path: str, **body: Any) -> trio.SocketStream:
        """POST over a socket of its own, whose answer nobody waits for."""
        client = await trio.open_tcp_stream("127.0.0.1", self.port)
        data = json.dumps(body).encode()
        head = f"POST /admin/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        await client.send_all(head.encode() + data)
        return client

    async def until(self, name: str, *states: str) -> None:
        """Wait until a model's state is one of these; "gone": it has none."""
        while self.models.states().get(name, "gone") not in states:
            await self.models.changes.wait()


def _checked(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    document: dict[str, Any] = answer.json()
    return document["error"] if status >= 400 else document


@asynccontextmanager
async def face(zoo: Path, data: Path, **sections: dict[str, Any]) -> AsyncIterator[Face]:
    """The face over running models; nothing is left of them afterwards."""
    live, metrics = live_of(zoo, data, **sections), Metrics()
    models = Models(live, metrics)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(models.run)
        app, shutdown = create_app(models, live, metrics), trio.Event()

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            await serve_http(app, [sock], live, shutdown=shutdown, task_status=task_status)

        async with trio.open_nursery() as serving:
            await serving.start(serve)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
                yield Face(models, http, port)
            serving.cancel_scope.cancel()
        nursery.cancel_scope.cancel()
    assert models.listing() == []
    assert engines() == []
