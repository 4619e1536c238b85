"""GET /ui: a page for operators, over the admin face's JSON.

Files as they are, from the package: no build step, nothing from elsewhere, no word of the server's in them; the page
asks the admin face for everything, under that one's rules. Called by ``lmx.api.app``.
"""

from hashlib import sha256
from pathlib import Path

from quart import Blueprint, Response, request
from quart_schema import hide

from lmx.api.errors import UnknownPath

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Trusted types: a browser that knows them refuses markup in a string, whoever wrote the line.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # kept, but asked for each time: the page is never older than its server
}


def blueprint() -> Blueprint:
    """The page and its files, read once."""
    routes = Blueprint("ui", __name__)
    files = {
        path.name: (path.read_bytes(), TYPES[path.suffix])
        for path in Path(__file__).parent.iterdir()
        if path.suffix in TYPES
    }

    @routes.get("/ui")
    @routes.get("/ui/<name>")
    @hide
    async def page(name: str = "page.html") -> Response:
        if name not in files:
            raise UnknownPath(f"Unknown path: /ui/{name[:100]}; the page is at /ui.")
        content, content_type = files[name]
        response = Response(content, content_type=content_type, headers=HEADERS)
        response.set_etag(sha256(content).hexdigest()[:16])
        await response.make_conditional(request)
        return response

    return routes
