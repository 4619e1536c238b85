"""GET and POST /admin/config: the settings, and their change while the server runs.

Secrets are never shown. A change that would keep whoever makes it from making the next one is refused: the very
request must be admitted under the new settings, too, and find the server where it found it now.
"""

import socket
from typing import Any

from pydantic import Field
from quart import Blueprint, request
from quart_schema import document_request
from werkzeug.datastructures import Headers

from lmx.api.access import authorize, is_loopback
from lmx.api.admin.bodies import AdminRequest, receive
from lmx.api.core.call import current_call
from lmx.config import ServerSettings, Settings
from lmx.config.keys import parse_key
from lmx.config.live import Live, masked
from lmx.errors import ConfigError, Forbidden, InvalidRequest, LmxError, Unauthorized

PATH = "/admin/config"
ADMISSION = {("server", "admin_keys"), ("server", "allowed_hosts"), ("server", "cors_origins"), ("server", "host")}
"""The settings that decide who may ask, and where."""


class InvalidConfig(InvalidRequest):
    code = "invalid_config"


class LockedOut(Forbidden):
    """Its sender could not take it back."""

    code = "would_lock_out"


class ConfigRequest(AdminRequest):
    set: dict[str, Any] = Field(
        min_length=1,
        max_length=1000,
        description='Settings by name, as `server.log_level` or `models."org/name".context_length`; null takes a '
        "change back, and with `persist` what the file says.",
    )
    persist: bool = Field(False, description="Write them into lmx.toml, too, of which all else stays as it is.")


def blueprint(live: Live) -> Blueprint:
    """The routes over ``live``."""
    routes = Blueprint("admin_config", __name__)

    @routes.get(PATH)
    async def config() -> dict[str, Any]:
        """What is set, and by whom (`sources`); which settings count when a model is next loaded (`reload`), or when
        the server next starts (`restart`), and what then will differ (`pending`). Keys are not shown."""
        return {
            "settings": live.masked(),
            "sources": live.sources,
            "file": str(live.file) if live.file is not None else None,
            "restart": live.counting("at start"),
            "reload": [*live.counting("at load"), *live.counting("by hand")],
            "pending": live.pending,
        }

    @routes.post(PATH)
    @document_request(ConfigRequest)
    async def change() -> dict[str, Any]:
        """Change settings: all of them, or none when one is wrong. Tells what holds now (`applied`), what counts only
        when models are loaded anew or the server restarts, and what a variable or the command line will override at
        the next start."""
        body = await receive(ConfigRequest)
        current_call().audit |= {"set": masked(body.set), "persist": body.persist}
        try:
            decides = any(parse_key(key)[:2] in ADMISSION for key in body.set)
            check = _AdmitsAgain(live) if decides else lambda settings: None
            changed = await live.change(body.set, persisted=body.persist, check=check)
        except ConfigError as error:
            raise InvalidConfig(error.message, param=error.param) from None
        return {
            "applied": changed.applied,
            "needs_restart": changed.needs_restart,
            "needs_reload": changed.needs_reload,
            "persisted": str(changed.persisted) if changed.persisted is not None else None,
            "overridden": changed.overridden,
        }

    return routes


class _AdmitsAgain:
    """Raises LockedOut for settings under which the current request would find nobody, or not be heard. Blocking."""

    def __init__(self, live: Live) -> None:
        self._now = live.now.server
        self._headers = Headers(request.headers)
        self._address = current_call().address
        self._arrived_at = (request.scope.get("server") or ("",))[0]

    def __call__(self, settings: Settings) -> None:
        self._check_keys(settings.server)
        if settings.server.host != self._now.host:
            self._check_host(settings.server)

    def _check_keys(self, server: ServerSettings) -> None:
        if server.admin_keys and not self._now.admin_keys:
            return  # the first ones, which the sender has just written
        try:
            authorize(server, PATH, self._headers, self._address)
        except LmxError as error:
            gone = isinstance(error, Unauthorized | Forbidden) and bool(server.admin_keys)
            why = "Your own key is not among the admin keys any more." if gone else error.message
            raise LockedOut(
                f"With these settings you could not change them again. {why} Nothing was changed.", param="set"
            ) from None

    def _check_host(self, server: ServerSettings) -> None:
        addresses = _bindable(server.host)
        same = socket.AF_INET6 if ":" in self._arrived_at else socket.AF_INET
        heard = any(
            address == self._arrived_at or (family == same and address in ("0.0.0.0", "::"))
            for family, address in addresses
        )
        if not heard and not (is_loopback(self._address) and server.admin_keys):
            raise LockedOut(
                f"[server] host {server.host!r} does not answer at {self._arrived_at}, where you ask: with it you "
                'could not change it again. Use "0.0.0.0", or set it on the server\'s machine. Nothing was changed.',
                param="set",
            )


def _bindable(host: str) -> list[tuple[int, str]]:
    """Family and address of all that the server would listen on. Raises InvalidConfig."""
    found: list[tuple[int, str]] = []
    try:
        for family, kind, proto, _, address in socket.getaddrinfo(
            host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, proto) as sock:
                sock.bind((address[0], 0, *address[2:]))
            found.append((family, str(address[0])))
    except OSError as error:
        raise InvalidConfig(
            f"[server] host: the server could not listen on {host!r}: {error.strerror or error}. Nothing was changed.",
            param="server.host",
        ) from None
    return found
