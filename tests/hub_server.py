"""A small Hub: what huggingface_hub asks of the real one when it looks for models and downloads them, over real HTTP.

Metadata, search, revisions, the tree in pages, files by redirect to a CDN (another origin) with Range, ETag and the
``X-`` headers; no Xet. Tests point ``HF_ENDPOINT`` at it and switch its troubles on: transfers that are cut, held or
damaged, gated and missing repositories, any status with ``Retry-After``. It counts what it serves.
"""

import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS = (".safetensors", ".gguf", ".bin", ".model")
CHUNK = 16 * 1024


@dataclass
class Repo:
    id: str
    files: dict[str, bytes]
    tags: tuple[str, ...] = ()
    library: str = ""
    config: dict[str, Any] | None = None
    downloads: int = 0
    gated: bool = False
    branches: tuple[str, ...] = ("main",)
    token: str = ""
    """The one that opens it, where it is gated."""

    @property
    def commit(self) -> str:
        names = "".join(f"{path}{hashlib.sha1(data).hexdigest()}" for path, data in sorted(self.files.items()))
        return hashlib.sha1(f"{self.id}{names}".encode()).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        if not path.endswith(LFS):
            return {"type": "file", "path": path, "size": len(data), "oid": blob_name(data)}
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": path, "size": len(data), "oid": blob_name(b"pointer"), "lfs": lfs}

    def info(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "modelId": self.id,
            "sha": self.commit,
            "tags": list(self.tags),
            "library_name": self.library or None,
            "config": self.config,
            "downloads": self.downloads,
            "gated": "manual" if self.gated else False,
            "siblings": [{"rfilename": path} for path in self.files],
        }


@dataclass
class Answer:
    """For requests whose "METHOD /path" matches, so many times."""

    pattern: str
    status: int
    headers: Mapping[str, str]
    times: int


@dataclass
class Hub:
    url: str = ""
    cdn: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """Of a path: after how many bytes its next transfers break off."""
    damaged: Counter[str] = field(default_factory=Counter)
    """Of a path: how many transfers send other bytes."""
    holds: dict[str, int] = field(default_factory=dict)
    """Of a path: after how many bytes of the file its transfers wait for ``go_on``."""
    stalled: Counter[str] = field(default_factory=Counter)
    """Of a path: how many transfers send their headers and then nothing."""
    ranges: bool = True
    page: int = 3
    requests: list[str] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    """Bytes of each path that went out."""
    leaked: list[str] = field(default_factory=list)
    """Tokens that came to the CDN."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    held: set[str] = field(default_factory=set)
    going: bool = False

    def add(self, id: str, files: Mapping[str, bytes], **more: Any) -> Repo:
        repo = Repo(id, dict(files), **more)
        self.repos[id] = repo
        return repo

    def answer(self, pattern: str, status: int, times: int = 1, **headers: str) -> None:
        self.answers.append(
            Answer(pattern, status, {name.replace("_", "-"): text for name, text in headers.items()}, times)
        )

    def until_held(self, path: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: path in self.held, 60)

    def go_on(self) -> None:
        with self.changed:
            self.holds.clear()
            self.going = True
            self.changed.notify_all()


def blob_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()
    servers = [_Server(("127.0.0.1", 0), kind) for kind in (_HubHandler, _CdnHandler)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.hub = hub
        thread.start()
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        hub.go_on()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.close_all()
            server.server_close()
    assert not hub.leaked, "the token went to another origin"


class _Server(ThreadingHTTPServer):
    hub: Hub
    daemon_threads = True
    block_on_close = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def close_all(self) -> None:
        """Connections that clients keep alive."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what many tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        line = f"{self.command} {self.path}"
        self.hub.requests.append(line)
        for answer in self.hub.answers:
            if answer.times and re.search(answer.pattern, line):
                answer.times -= 1
                self.reply(answer.status, b'{"error": "as the test wants"}', **answer.headers)
                return
        self.serve(urlsplit(self.path))

    def serve(self, address: Any) -> None:
        raise NotImplementedError

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, **headers: str) -> None:
        self.reply(200, json.dumps(value).encode(), **headers)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply(
            status, json.dumps({"error": message}).encode(), **{"X-Error-Code": code, "X-Error-Message": message}
        )

    def send_file(self, path: str, data: bytes, **headers: str) -> None:
        """With Range, and the troubles that were ordered for it."""
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.hub.ranges:
            start = int(wanted[1])
            if start >= len(data):
                self.reply(416, **{"Content-Range": f"bytes */{len(data)}"})
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.damaged[path] > 0:
            self.hub.damaged[path] -= 1
            data = bytes(255 - byte for byte in data)
        if self.hub.stalled[path] > 0:
            self.hub.stalled[path] -= 1
            with self.hub.changed:
                self.hub.changed.wait_for(lambda: self.hub.going, 60)
            return
        cuts = self.hub.cuts.get(path) or [len(data)]
        end = min(len(data), start + cuts.pop(0))
        position = start
        while position < end:
            with self.hub.changed:
                if position >= self.hub.holds.get(path, len(data) + 1):
                    self.hub.held.add(path)
                    self.hub.changed.notify_all()
                    self.hub.changed.wait_for(lambda: self.hub.going, 60)
            piece = data[position : min(end, position + CHUNK)]
            self.wfile.write(piece)
            position += len(piece)
            self.hub.served[path] += len(piece)
        if end < len(data):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


class _HubHandler(_Handler):
    def serve(self, address: Any) -> None:
        path, query = unquote(address.path), parse_qs(address.query)
        if path == "/api/models":
            self.search(query)
        elif match := re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)", path):
            if repo := self.repo(match[1], match[2]):
                self.tree(repo, path, query)
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            if repo := self.repo(match[1], match[2] or "main"):
                self.json(repo.info())
        elif match := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/[^/]+/(.+)", path):
            data = self.hub.repos[match[1]].files[match[2]]
            self.send_file(
                match[2], data, ETag=f'"{blob_name(data)}"', **{"X-Repo-Commit": self.hub.repos[match[1]].commit}
            )
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if repo := self.repo(match[1], match[2], content=True):
                self.resolve(repo, match[3])
        else:
            self.refuse(404, "", "no such address")

    def repo(self, id: str, revision: str, content: bool = False) -> Repo | None:
        repo = self.hub.repos.get(id)
        if repo is None:  # as the real one does to those without a token
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif revision not in (*repo.branches, repo.commit):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif content and repo.gated and self.headers.get("Authorization") != f"Bearer {repo.token}":
            known = "Authorization" in self.headers
            self.refuse(403 if known else 401, "GatedRepo", f"Access to model {id} is restricted.")
        else:
            return repo
        return None

    def search(self, query: dict[str, list[str]]) -> None:
        words = query.get("search", [""])[0].lower().split()
        found = [
            repo
            for repo in sorted(self.hub.repos.values(), key=lambda repo: -repo.downloads)
            if all(word in repo.id.lower() for word in words)
            and all(tag in repo.tags for tag in query.get("filter", []))
        ]
        self.json([repo.info() for repo in found[: int(query.get("limit", ["100"])[0])]])

    def tree(self, repo: Repo, path: str, query: dict[str, list[str]]) -> None:
        entries: list[dict[str, Any]] = []
        folders: set[str] = set()
        for name in sorted(repo.files):
            folder = name.rpartition("/")[0]
            if folder and folder not in folders:
                folders.add(folder)
                entries.append({"type": "directory", "path": folder, "size": 0, "oid": blob_name(folder.encode())})
            entries.append(repo.entry(name))
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + self.hub.page < len(entries):
            following = f"{self.hub.url}{quote(path)}?recursive=True&cursor={start + self.hub.page}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.json(entries[start : start + self.hub.page], **headers)

    def resolve(self, repo: Repo, path: str) -> None:
        if path not in repo.files:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        entry = repo.entry(path)
        if "lfs" not in entry:
            where = f"/api/resolve-cache/models/{repo.id}/{repo.commit}/{quote(path)}"
            self.reply(307, Location=where, **{"X-Repo-Commit": repo.commit})
            return
        self.reply(
            302,
            Location=f"{self.hub.cdn}/{repo.id}/{quote(path)}",
            **{
                "X-Repo-Commit": repo.commit,
                "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"',
                "X-Linked-Size": str(entry["size"]),
            },
        )


class _CdnHandler(_Handler):
    def serve(self, address: Any) -> None:
        if token := self.headers.get("Authorization"):
            self.hub.leaked.append(token)
        publisher, name, path = unquote(address.path).lstrip("/").split("/", 2)
        data = self.hub.repos[f"{publisher}/{name}"].files[path]
        self.send_file(path, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')
