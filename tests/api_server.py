"""The whole server in the test's own Trio run, over the null engine: the API's tests see every part from inside.

What a test needs to be real is real: sockets, HTTP, tokenizer, template, leases, an engine process. The engine's
weights are not; it draws token 300, 301, ... whatever the prompt, or what the test has it say (``Server.say``).
"""

import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import trio
from safetensors.numpy import save_file

from lmx.api.app import create_app
from lmx.api.transport.http import serve_http
from lmx.chat.pieces import read_pieces
from lmx.config import EngineSettings, ModelSettings, Sources
from lmx.config.live import Live
from lmx.serving.metrics import Metrics
from lmx.serving.models import Models
from tests.models import train_tokenizer, write_tokenizer

FIRST_TOKEN = 300
CONTEXT = 4096
PATIENCE_S = 10  # bounds a failing test only


def write_model(folder: Path) -> Path:
    """A model folder whose weights are one number: all that the server reads, and nothing that an engine could run."""
    folder.mkdir()
    vocab_size = train_tokenizer().get_vocab_size()
    config = {"model_type": "llama", "vocab_size": vocab_size, "max_position_embeddings": CONTEXT, "eos_token_id": 2}
    # By which its KV is as large as the null engine's: 1,024 bytes a token.
    config |= {"num_hidden_layers": 1, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def answer_text(tokens: int, first: int = FIRST_TOKEN) -> str:
    """What the null engine's first ``tokens`` tokens say."""
    text: str = train_tokenizer().decode(list(range(first, first + tokens)))
    return text


@cache
def _byte_ids() -> dict[int, int]:
    """The token of each byte."""
    pieces = read_pieces(train_tokenizer()).text
    return {piece[0]: index for index, piece in enumerate(pieces) if len(piece) == 1}


class Server:
    def __init__(self, port: int, models: Models, shutdown: trio.Event) -> None:
        self.port = port
        self.models = models
        self.engine = models.listing()[0].engine
        self.shutdown = shutdown
        self.serving = trio.CancelScope()
        """Cancel it to end the HTTP face, whatever runs."""
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S)
        self.sdk = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any", http_client=self.http, max_retries=0)
        self.sockets: list[trio.SocketStream] = []

    def say(self, *steps: str | bytes, finish: str = "stop") -> None:
        """What each request from now on is answered, a step each; bytes get a token each."""
        tokenizer = train_tokenizer()
        byte_ids = _byte_ids()
        told = [
            [byte_ids[byte] for byte in step] if isinstance(step, bytes) else tokenizer.encode(step).ids
            for step in steps
        ]
        Path(os.environ["LMX_NULL_SCRIPT"]).write_text(json.dumps({"steps": told, "finish": finish}))

    def grammars(self) -> list[str]:
        """Of every request so far, as the engine got them."""
        return [submit["grammar"] for submit in self.submits()]

    def submits(self) -> list[dict[str, Any]]:
        """Every request so far, as the engine got it: grammar and sampling."""
        return [json.loads(line) for line in Path(os.environ["LMX_NULL_SUBMITS"]).read_text().splitlines()]

    async def connect(self, receive_buffer_bytes: int | None = None) -> trio.SocketStream:
        sock = trio.socket.socket()
        if receive_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        await sock.connect(("127.0.0.1", self.port))
        self.sockets.append(trio.SocketStream(sock))
        return self.sockets[-1]

    async def send(self, path: str, body: dict[str, Any], behind: bytes = b"", **options: Any) -> trio.SocketStream:
        """POST over a socket of its own, with ``behind`` after the request."""
        client = await self.connect(**options)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        await client.send_all(head.encode() + data + behind)
        return client

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until /admin/status says so of the model's engine."""
        while not condition((await self.http.get("/admin/status")).json()["models"][0]["engine"]):
            pass

    async def leased(self, count: int) -> None:
        await self.until(lambda engine: engine["live_leases"] == count)

    async def free(self) -> None:
        """No request holds anything, in the server's account and in the engine's."""
        await self.until(lambda engine: engine["live_leases"] == engine["live_sequences"] == 0)
        await self.until(lambda engine: engine["kv_sequence_bytes"] == 0)


@asynccontextmanager
async def serving(folder: Path, *, ready: bool = True, **options: Any) -> AsyncIterator[Server]:
    engine = {key: options.pop(key) for key in list(options) if key in EngineSettings.model_fields}
    model = {key: options.pop(key) for key in list(options) if key in ModelSettings.model_fields}
    sources = Sources.read(
        environ={},
        overrides={
            "server": options,
            "model": {"default": str(folder), "aliases": {"mine": folder.name}, **model},
            "engine": {"command": [sys.executable, "-m", "bench.null_engine"], "openblas": "off", **engine},
        },
    )
    metrics = Metrics()
    live = Live(sources, folder / "lmx.toml")
    models = Models(live, metrics)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    async with trio.open_nursery() as engines:
        await engines.start(models.run)
        started = Server(sock.getsockname()[1], models, trio.Event())
        async with trio.open_nursery() as nursery:
            app = create_app(models, live, metrics)

            async def serve(task_status: trio.TaskStatus[None]) -> None:
                with started.serving:
                    await serve_http(app, [sock], live, shutdown=started.shutdown, task_status=task_status)

            await nursery.start(serve)
            if ready:
                await started.engine.wait_state("ready")
            try:
                yield started
            finally:
                for client in started.sockets:
                    client.socket.close()
                with trio.CancelScope(shield=True):
                    await started.http.aclose()
            nursery.cancel_scope.cancel()
        engines.cancel_scope.cancel()


Test = Callable[[Server], Awaitable[None]]


def with_server(**options: Any) -> Callable[[Test], Callable[..., None]]:
    """Run the test as a Trio task beside its own server. Options: ``LMX_NULL_…``, [server], [model] and [engine]
    keys."""
    null = {key: str(options.pop(key)) for key in list(options) if key.startswith("LMX_")}
    patience_s = options.pop("patience_s", PATIENCE_S)

    def decorate(test: Test) -> Callable[..., None]:
        def run(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
            for name, value in {"LMX_NULL_FIRST_TOKEN": str(FIRST_TOKEN), **null}.items():
                monkeypatch.setenv(name, value)

            async def main() -> None:
                with trio.fail_after(patience_s):
                    async with serving(model_folder, **options) as server:
                        await test(server)

            with TemporaryDirectory() as words:
                monkeypatch.setenv("LMX_NULL_SCRIPT", f"{words}/script.json")
                monkeypatch.setenv("LMX_NULL_SUBMITS", f"{words}/submits.jsonl")
                trio.run(main)

        run.__doc__ = test.__doc__
        return run

    return decorate
