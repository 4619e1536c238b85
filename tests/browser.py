"""A real headless Chromium for tests of the operators' page, spoken to over its pipe (Chrome DevTools Protocol).

Waits are the page's own: a condition is looked at again whenever the document changes, never after a time. What goes
wrong in the page is kept (``Page.problems``), every request that it makes, too.
"""

import base64
import fcntl
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PATIENCE_S = 60
"""Bounds a failing test."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--proxy-server=direct://",
)
# The browser reads commands from 3 and answers on 4, and nobody can say so to Popen.
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
# Looks at a condition whenever the document changes.
_UNTIL = """new Promise((resolve) => {
  const seen = () => { const found = (() => %s)(); if (found) { watch.disconnect(); resolve(found); } };
  const watch = new MutationObserver(seen);
  watch.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
  seen();
})"""


class Browser:
    """The protocol's messages over the pipe; one thread reads and sorts them."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = commands
        self._answers = os.fdopen(answers, "rb")
        self._waiting: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._sent = 0
        self.pages: dict[str, Page] = {}
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """One command, and what it gives."""
        self._sent += 1
        number = self._sent
        answer = self._waiting[number] = queue.Queue()
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        told = answer.get(timeout=PATIENCE_S)
        assert "error" not in told, (method, told["error"])
        result: dict[str, Any] = told["result"]
        return result

    def _read(self) -> None:
        buffer = b""
        while data := self._answers.read1():
            *messages, buffer = (buffer + data).split(b"\0")
            for raw in messages:
                message = json.loads(raw)
                if "id" in message:
                    self._waiting.pop(message["id"]).put(message)
                elif page := self.pages.get(message.get("sessionId", "")):
                    page.heard(message["method"], message["params"])

    def open(self, url: str, *, width: int = 1440, height: int = 900, scale: float = 1, dark: bool = False) -> "Page":
        """A page of its own, without anything stored by others."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.loaded.clear()
        page.call("Page.navigate", url=url)
        assert page.loaded.wait(PATIENCE_S)
        return page

    def close(self) -> None:
        self._waiting[0] = queue.Queue()
        with suppress(BrokenPipeError):
            os.write(self._commands, b'{"id": 0, "method": "Browser.close"}\0')
        self._reader.join(PATIENCE_S)
        os.close(self._commands)
        self._answers.close()


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.loaded = threading.Event()
        self.problems: list[str] = []
        """Errors and warnings of the console, exceptions, requests that failed."""
        self.requests: list[str] = []
        """The URL of everything that was asked for."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def heard(self, method: str, event: dict[str, Any]) -> None:
        """Called by the thread that reads."""
        if method == "Page.loadEventFired":
            self.loaded.set()
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.problems.append(f"console: {event['args']}")
        elif method == "Runtime.exceptionThrown":
            self.problems.append(f"exception: {event['exceptionDetails']}")
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"log: {event['entry']['text']} {event['entry'].get('url', '')}")
        elif method == "Network.loadingFailed" and not event.get("canceled"):
            self.problems.append(f"failed: {event['errorText']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str) -> Any:
        """Wait for a JavaScript expression to be true; its value."""
        try:
            return self.run(_UNTIL % condition)
        except queue.Empty:
            text = self.run("document.body.innerText")
            raise AssertionError(f"never came true: {condition}\n{text}\n{self.problems}") from None

    def text(self, selector: str) -> str:
        value: str = self.run(f"document.querySelector({json.dumps(selector)}).innerText")
        return value

    def click(self, selector: str) -> None:
        """As a person does it: with the mouse, on what is there to be seen; again where it moved away meanwhile."""
        found = json.dumps(selector)
        clicked = False
        while not clicked:
            x, y = self.until(
                f"{{const e = document.querySelector({found}); const box = e && e.checkVisibility() && "
                "(e.scrollIntoView({block: 'center'}), e.getBoundingClientRect()); "
                "if (!box || !box.width) return null; window.clicked = false; "
                "e.addEventListener('click', () => { window.clicked = true; }, {once: true}); "
                "return [box.x + box.width / 2, box.y + box.height / 2]}"
            )
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
            clicked = self.run("window.clicked")

    def press(self, key: str) -> None:
        """A key that is not a letter: Tab, Enter, Escape."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def type(self, selector: str, text: str) -> None:
        self.click(selector)
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in ``folder``."""
    assert CHROMIUM
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
    os.close(theirs_in)
    os.close(theirs_out)
    root = ("--no-sandbox",) if os.geteuid() == 0 else ()
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, theirs), CHROMIUM, *_FLAGS, *root, f"--user-data-dir={folder}"],
            pass_fds=theirs,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    for end in theirs:
        os.close(end)
    browser = Browser(ours_out, ours_in)
    try:
        yield browser
    finally:
        browser.close()
        process.wait(PATIENCE_S)
