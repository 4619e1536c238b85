"""Who may ask: API keys, the admin face's loopback rule, and the Host and Origin check that stops DNS rebinding.

Without keys a web page anywhere could use the server through the browser of whoever runs it, by pointing its own name
at 127.0.0.1; so a request must then name this machine. Pure decisions over headers; called before each request.
"""

import hmac
import ipaddress
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import urlsplit

from werkzeug.datastructures import Headers

from lmx.api.errors import ForeignHost
from lmx.config import ServerSettings
from lmx.errors import Forbidden, Unauthorized

OPEN_PATHS = frozenset({"/", "/health", "/api/hello"})
"""Answered to anybody: they tell nothing but that a server runs."""


def authorize(settings: ServerSettings, path: str, headers: Headers, address: str) -> str:
    """The name of the key used, "" without one. Raises Unauthorized, Forbidden or ForeignHost."""
    if path in OPEN_PATHS:
        return ""
    if path == "/ui" or path.startswith("/ui/"):
        # A browser that opens a page sends no key. The page holds nothing; it asks for the key that its calls need.
        if not settings.inference_keys:
            _refuse_foreign(settings, headers)
        return ""
    admin = path.startswith("/admin/")
    if settings.admin_keys if admin else settings.inference_keys:
        return _key_name(settings, headers, admin=admin)
    if admin and not is_loopback(address):
        raise Forbidden(
            f"The admin face answers to this machine only (you are {address}) until [server] admin_keys in lmx.toml "
            "has a key."
        )
    _refuse_foreign(settings, headers)
    return ""


def _key_name(settings: ServerSettings, headers: Headers, *, admin: bool) -> str:
    bearer = headers.get("authorization", "")
    # HTTP's own blanks only: in a key in UTF-8, read as Latin-1, str.strip() takes part of an "à" for one.
    given = bearer[7:].strip(" \t") if bearer[:7].lower() == "bearer " else headers.get("x-api-key", "")
    if not given:
        raise Unauthorized("No API key given; send `Authorization: Bearer KEY` or `x-api-key: KEY`.")
    admin_name = _matching(settings.admin_keys, given)
    name = _matching(settings.inference_keys, given)
    if admin_name:
        return admin_name
    if name and admin:
        raise Forbidden(f"The key {name!r} is for inference; the admin face takes the keys of [server] admin_keys.")
    if name:
        return name
    raise Unauthorized("Incorrect API key given; the keys are in [server] inference_keys and admin_keys of lmx.toml.")


def _matching(keys: Mapping[str, str], given: str) -> str:
    """Compares with every key, each in constant time, so that the time taken tells nothing.

    A header is bytes: clients send letters outside ASCII as UTF-8 or as Latin-1.
    """
    found, raw = "", given.encode("latin-1", errors="backslashreplace")
    for name, key in keys.items():
        for encoding in ("utf-8", "latin-1"):
            with suppress(UnicodeEncodeError):  # no such letters in Latin-1
                if hmac.compare_digest(key.encode(encoding), raw):
                    found = name
    return found


def _refuse_foreign(settings: ServerSettings, headers: Headers) -> None:
    host = headers.get("host", "")
    if host and not _is_ours(settings, _hostname(f"//{host}")):
        raise ForeignHost(
            f"This server does not answer to the name {host[:100]!r}; use its address, or add the name to [server] "
            "allowed_hosts in lmx.toml, or configure keys."
        )
    origin = headers.get("origin", "")
    ours = origin_allowed(settings, origin) or _is_local(_hostname(origin)) or origin.partition("://")[2] == host
    if origin and not ours:
        raise Forbidden(
            f"Web pages from {origin[:100]!r} may not use this server; add the origin to [server] cors_origins in "
            "lmx.toml, or configure keys."
        )


def origin_allowed(settings: ServerSettings, origin: str) -> bool:
    """Whether CORS is granted to ``origin``."""
    return origin in settings.cors_origins or "*" in settings.cors_origins


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_ours(settings: ServerSettings, name: str) -> bool:
    """A literal address cannot be rebound, so any is taken, and neither can a name that public DNS cannot hand out; any
    other name must be this machine's or a configured one."""
    ours = {socket.gethostname().lower(), settings.host.lower(), *(host.lower() for host in settings.allowed_hosts)}
    return _is_local(name) or _is_address(name) or _is_private(name) or name in ours


def _is_local(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def _is_private(name: str) -> bool:
    """Names of the network around this machine: containers' (host.docker.internal; a service's single word), mDNS's."""
    return bool(re.fullmatch(r"[\w-]+|[\w.-]+\.(local|internal|home\.arpa)", name, re.ASCII))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.split("%")[0])
    except ValueError:
        return False
    return True


def is_loopback(text: str) -> bool:
    """Whether it is an address of this machine alone."""
    if not _is_address(text):
        return False
    address = ipaddress.ip_address(text.split("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
