"""The HTTP client of the command line: documents and streams of one server, and its errors as exit codes.

Never asks a proxy: the server is this machine's, or named by address.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx2

from lmx.cli.errors import CommandError, Refused, Unreachable

PORT = 1234
CONNECT_S = 5.0


class Client:
    """Asks one server. A context manager."""

    def __init__(self, host: str, key: str = "", *, timeout_s: float | None = None) -> None:
        """``timeout_s``: of connections and answers; None: loading takes as long as it takes. Raises CommandError."""
        self.url = base_url(host)
        try:
            self._http = httpx2.Client(
                base_url=self.url,
                headers={"authorization": f"Bearer {key}"} if key else {},
                timeout=httpx2.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s or CONNECT_S)),
                trust_env=False,
            )
        except (ValueError, httpx2.InvalidURL) as error:
            raise CommandError(f"{host!r} or the key cannot be used: {error}.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, **query: Any) -> Any:
        """The document there. Raises Refused, Unreachable."""
        return self._ask("GET", path, query)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What the server answers, once it is done. Raises Refused, Unreachable."""
        return self._ask("POST", path, body=body)

    def delete(self, path: str, **query: Any) -> Any:
        """As ``post``."""
        return self._ask("DELETE", path, query)

    @contextmanager
    def events(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[Iterator[Any]]:
        """The documents of a stream, as they come; leaving the block ends the request, and with it what it asked for.

        Raises Refused, also for an error in mid-stream, and Unreachable.
        """
        with self._trouble(), self._http.stream(method, path, json=body) as response:
            if response.is_error:
                response.read()
                raise self._refusal(response)
            yield self._documents(response)

    def _documents(self, response: httpx2.Response) -> Iterator[Any]:
        for event in httpx2.EventSource(response):
            if event.data == "[DONE]":
                return
            try:
                document = json.loads(event.data)
            except ValueError:
                raise self._foreign(response) from None
            if isinstance(document, dict) and isinstance(document.get("error"), dict):
                raise Refused(_message(document))
            yield document

    def _ask(
        self, method: str, path: str, query: Mapping[str, Any] | None = None, body: Mapping[str, Any] | None = None
    ) -> Any:
        asked = {name: json.dumps(value) if isinstance(value, bool) else value for name, value in (query or {}).items()}
        with self._trouble():
            response = self._http.request(method, path, params=asked, json=body)
        if response.is_error:
            raise self._refusal(response)
        try:
            return response.json()
        except ValueError:
            raise self._foreign(response) from None

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except httpx2.ConnectError as error:
            raise Unreachable(
                f"No server answers at {self.url} ({error}). Start one with `lmx serve`, or name another with --host "
                "or LMX_HOST."
            ) from None
        except httpx2.TimeoutException:
            raise Unreachable(f"The server at {self.url} does not answer in time; `lmx doctor` looks why.") from None
        except httpx2.TransportError as error:
            raise Unreachable(
                f"The server at {self.url} went away in the middle of its answer ({error}); its log says why (`lmx "
                "log`, `lmx service logs`)."
            ) from None

    def _refusal(self, response: httpx2.Response) -> CommandError:
        try:
            message = _message(response.json())
        except (ValueError, LookupError, TypeError):
            return self._foreign(response)
        if response.status_code == 401:
            message += " (Here: --key KEY, or the variable LMX_API_KEY.)"
        return Refused(message)

    def _foreign(self, response: httpx2.Response) -> CommandError:
        return Refused(
            f"What answers at {self.url} is no lmx server ({response.status_code} to {response.request.url.path}); "
            "name the right one with --host or LMX_HOST."
        )


def base_url(host: str) -> str:
    """The URL that somebody means who writes "mac", "mac:8080", ":8080", "::1", "http://mac:1234/v1"."""
    text = host.strip().rstrip("/").removesuffix("/v1")
    scheme, separator, rest = text.rpartition("://")
    if separator and scheme not in ("http", "https"):
        raise CommandError(f"{host!r} is no address of a server: it must look like http://127.0.0.1:1234.")
    if not separator:
        if rest.count(":") > 1 and not rest.startswith("["):
            rest = f"[{rest}]"
        name, colon, port = rest.rpartition(":")
        if not colon or rest.endswith("]"):
            name, port = rest, str(PORT)
        scheme, rest = "http", f"{name or '127.0.0.1'}:{port}"
    url = f"{scheme}://{rest}"
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise CommandError(f"{host!r} is no address of a server ({error}).") from None
    # Where a server listens on every address, this machine is one of them.
    return str(parsed.copy_with(host="127.0.0.1") if parsed.host in ("0.0.0.0", "::") else parsed).rstrip("/")


def named(folder: str, name: str) -> str:
    """The path of one thing; names of models may hold slashes."""
    return f"{folder}/{quote(name, safe='/')}"


def _message(document: Any) -> str:
    return str(document["error"]["message"])
