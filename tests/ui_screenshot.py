"""Takes the picture in docs/ui.md of a real server at work: ``python -m tests.ui_screenshot docs/ui.png``.

The embedded model and two of random weights answer a few clients for a minute and a half.
"""

import argparse
import os
import random
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import httpx

from tests.browser import chromium
from tests.models import build_model
from tests.server import serve

CLIENTS = ("ci-bot", "notes", "mail-sorter", "translator", "review")
TOPICS = ("the sea", "a lighthouse", "bread", "maps of old towns", "how a clock works", "the night sky")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seconds", type=float, default=90, help="how long the plots are")
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("llama", "qwen3"):
            build_model(kind, folder / "models" / "lab" / f"tiny-{kind}", hidden_size=256, num_hidden_layers=8)
        broken = shutil.copytree(folder / "models" / "lab" / "tiny-llama", folder / "models" / "lab" / "half-there")
        os.truncate(broken / "model.safetensors", 100_000)
        hub = {"data_dir": str(folder / "data"), "models_dir": str(folder / "models"), "huggingface": False}
        settings = {"hub": hub | {"lmstudio": False}}
        (folder / "server").mkdir()
        (folder / "browser").mkdir()
        with serve(folder / "server", settings=settings) as server, chromium(folder / "browser") as browser:
            server.line(r"lmx: model \S+ ready")
            embedded = server.status()["models"][0]["id"]
            with httpx.Client(base_url=server.url, timeout=None) as client:
                client.post("/admin/load", json={"model": "lab/tiny-qwen3", "context_length": 4096}).raise_for_status()
            page = browser.open(f"{server.url}/ui", height=960, dark=given.dark)
            over = threading.Event()
            threads = [
                threading.Thread(target=_ask, args=(server.url, client, number, embedded, over))
                for number, client in enumerate(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            over.wait(given.seconds)
            page.until("document.querySelectorAll('#requests .row').length >= 3")
            page.screenshot(given.picture)
            over.set()
            for thread in threads:
                thread.join()
            assert page.problems == [], page.problems
    print(f"{given.picture}: {given.picture.stat().st_size:,} bytes")


def _ask(url: str, client: str, number: int, embedded: str, over: threading.Event) -> None:
    """One client: an answer, a pause, the next one; every third speaks to the other model."""
    chance = random.Random(number)
    model = "lab/tiny-qwen3" if number % 3 == 2 else embedded
    with httpx.Client(base_url=url, timeout=None) as http:
        while not over.wait(chance.uniform(0.2, 3)):
            text = f"Tell me something about {chance.choice(TOPICS)}, as {client} would. " * chance.randint(1, 20)
            tokens = chance.randint(100, 400) * (6 if model != embedded else 1)
            body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
            with (
                suppress(httpx.HTTPError),
                http.stream(
                    "POST", "/v1/chat/completions", json=body | {"user": client, "stream": True, "ignore_eos": True}
                ) as stream,
            ):
                for _ in stream.iter_raw():
                    if over.is_set():
                        break


if __name__ == "__main__":
    main()
