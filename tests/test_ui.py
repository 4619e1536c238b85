"""The operators' page at /ui in a real browser, over a real server: what it shows, what it lets people do, and what it
says when it may not or cannot."""

import fnmatch
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from werkzeug.datastructures import Headers

from lmx.api.access import authorize
from lmx.api.errors import ForeignHost
from lmx.config import ServerSettings
from lmx.errors import Unauthorized
from tests.browser import CHROMIUM, Browser, Page, chromium
from tests.server import ROOT, Server, serve

MARKUP = "<img src=x onerror=document.title=1>"
FILES = [path for path in (ROOT / "lmx" / "api" / "ui").iterdir() if path.suffix not in (".py", "")]
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not here: apt-get install --no-install-recommends chromium"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With two models in lmx's own folder: one that is loaded, whose name is markup, and lab/second."""
    folder = tmp_path_factory.mktemp("ui")
    for name in (MARKUP, "second"):
        shutil.copytree(tiny_model, folder / "models" / "lab" / name)
    hub = {"data_dir": str(folder / "data"), "models_dir": str(folder / "models"), "huggingface": False}
    settings = {"hub": hub | {"lmstudio": False}}
    with serve(folder, "--model", str(folder / "models" / "lab" / MARKUP), settings=settings) as server:
        server.line(r"lmx: model .+ ready")
        yield server


def harmless(page: Page, server: Server) -> bool:
    """Nothing went wrong in the page, and it asked nobody else."""
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(f"{server.url}/")] == []
    return True


def test_files_are_served_with_a_strict_policy_and_an_etag(null_server: Server) -> None:
    with httpx.Client(base_url=null_server.url) as client:
        for path in ["/ui", *(f"/ui/{file.name}" for file in FILES)]:
            response = client.get(path).raise_for_status()
            policy = response.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in policy
            assert client.get(path, headers={"if-none-match": response.headers["etag"]}).status_code == 304
        assert client.get("/ui/").headers["content-type"] == "text/html; charset=utf-8"
        missing = client.get("/ui/__init__.py")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
        assert not [path for path in client.get("/openapi.json").json()["paths"] if "/ui" in path]


def test_files_are_small_and_in_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["lmx"]
    for file in FILES:
        name = str(file.relative_to(ROOT / "lmx"))
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
    assert sum(file.stat().st_size for file in FILES) < 72_000


KEYS = ServerSettings(inference_keys={"bot": "sk-bot"}, admin_keys={"root": "sk-root"})


def test_the_page_needs_no_key_and_is_not_for_foreign_names() -> None:
    assert authorize(KEYS, "/ui", Headers({"host": "lmx.example"}), "10.0.0.9") == ""
    assert authorize(ServerSettings(), "/ui/page.js", Headers({"host": "10.0.0.1:1234"}), "10.0.0.9") == ""
    for path in ("/ui", "/ui/page.js"):
        with pytest.raises(ForeignHost):
            authorize(ServerSettings(), path, Headers({"host": "evil.example"}), "127.0.0.1")
    with pytest.raises(Unauthorized):
        authorize(KEYS, "/uis", Headers({"host": "lmx.example"}), "10.0.0.9")


@in_a_browser
def test_what_runs_is_seen_as_it_runs(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/ui")
    page.until("document.querySelector('#models .state.good')")
    assert page.text("#models .name").endswith(MARKUP)
    assert page.text("#summary") == "1 model ready"
    assert page.run("document.images.length") == 0

    body = {"prompt": "Once", "max_tokens": 8000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        chunks = stream.iter_raw()
        next(chunks)
        page.until("document.querySelector('#summary').innerText.includes('1 request')")
        page.until("document.querySelector('#models dd').innerText === '1'")
        page.until("parseFloat(document.querySelector('#rate .figure').innerText) > 0")
        # The line is above the ground somewhere.
        page.until(
            "[...document.querySelectorAll('#rate .line')].some((line) => "
            "[...line.getAttribute('d').matchAll(/[ML]\\S+ (\\S+?)(?=L|M|$)/g)].some(([, y]) => y < 100))"
        )
    page.until("document.querySelector('#summary').innerText === '1 model ready'")
    page.until("document.querySelector('#ttft .figure').innerText.match(/^[\\d.]+ m?s$/)")
    assert harmless(page, server)


@in_a_browser
def test_a_key_is_asked_for_and_a_server_that_is_gone_is_told(
    browser: Browser, tiny_model: Path, tmp_path: Path
) -> None:
    keys = {"inference_keys": {"bot": "sk-bot"}, "admin_keys": {"root": "sk-röot"}}
    with serve(tmp_path, "--model", str(tiny_model), settings={"server": keys}, null={}, stop=False) as server:
        page = browser.open(f"{server.url}/ui", dark=True)
        page.until("document.querySelector('#access-form').checkVisibility()")
        assert "API key" in page.text("#access-why")
        page.until("document.querySelector('#access-models .state')")
        assert page.text("#access-models .name") == tiny_model.name
        assert not page.run("document.querySelector('#columns').checkVisibility()")

        page.type("#access-key", "sk-bot")
        page.press("Enter")
        page.until("document.querySelector('#access-why').innerText.includes('for inference')")
        page.type("#access-key", "sk-röot")
        page.press("Enter")
        page.until("document.querySelector('#models .state.good')")
        assert not page.run("document.querySelector('#access').checkVisibility()")
        assert page.run("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]

        page.click("#forget")
        page.until("document.querySelector('#access-form').checkVisibility()")
        assert not page.run("document.querySelector('#columns').checkVisibility()")
        page.type("#access-key", "sk-röot")
        page.press("Enter")
        page.until("document.querySelector('#models .state.good')")

        server.stop()
        page.until("document.querySelector('#banner').innerText.includes('does not answer')")
        page.until("document.querySelector('#banner').innerText.match(/shown is [1-9][\\d.]* s old/)")
        assert page.run("document.body.classList.contains('stale')")
        assert "ready" not in page.text("#summary")


@in_a_browser
def test_an_operator_loads_cancels_unloads_and_deletes(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/ui")
    on_disk = "document.querySelector('#disk [aria-label=\"Load lab/second\"]')"
    page.until(on_disk)

    page.click('#disk [aria-label="Load lab/second"]')
    page.until("document.querySelectorAll('#models .state.good').length === 2")
    page.until(f"!{on_disk}")

    body = {"model": "lab/second", "prompt": "Once", "max_tokens": 8000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        chunks = stream.iter_text()
        next(chunks)
        page.click("#requests .row button")
        page.click("#confirm-yes")
        assert '"error"' in "".join(chunks)
    page.until("!document.querySelector('#requests .row')")
    page.until("document.querySelector('#summary').innerText === '2 models ready'")  # else it would ask first

    page.run("document.querySelector('#models [aria-label=\"Unload lab/second\"]').focus()")
    page.press("Enter")
    page.until("document.querySelector('#notices').innerText.includes('is unloaded')")
    page.until(on_disk)

    page.click('#disk [aria-label^="Delete lab/second"]')
    page.until("document.querySelector('#confirm').open")
    folder = Path(page.text("#confirm-list"))
    assert folder.name == "second"
    page.press("Escape")
    page.until("!document.querySelector('#confirm').open")
    assert folder.exists()
    page.click('#disk [aria-label^="Delete lab/second"]')
    page.click("#confirm-yes")
    page.until(f"!{on_disk}")
    assert not folder.exists()
    assert harmless(page, server)
