"""The first start of a GGUF file: the server answers while the file is converted, and can be ended at any moment of it
without a trace. And whose code the server's own processes run."""

import fcntl
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmx.hub.conversion import ConversionNeeded, lock_path
from lmx.hub.inventory import EMBEDDED_ID, find
from tests.models import build_gguf
from tests.server import PATIENCE_S, Server, serve

ASK = {"prompt": "x", "max_tokens": 2}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "Q4_0")


@contextmanager
def converting(gguf: Path, folder: Path, **options: Any) -> Iterator[tuple[Server, Any]]:
    """A server whose converter waits for another one, which holds the lock until it is closed."""
    cache = folder / "cache"
    with pytest.raises(ConversionNeeded) as needed:
        find(str(gguf), cache, "llama")
    lock = lock_path(needed.value.conversion.folder)
    lock.parent.mkdir(parents=True)
    settings = {"model": {"default": str(gguf), "cache_dir": str(cache), "backend": "llama"}}
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with serve(folder, settings=settings, null={}, **options) as server:
            server.line("making the words of")
            yield server, held


def leftovers(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache").rglob("*") if path.is_file()]


def test_the_server_answers_while_a_model_is_converted(gguf: Path, tmp_path: Path) -> None:
    with converting(gguf, tmp_path) as (server, held), ThreadPoolExecutor() as pool:
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "models": {"tiny": "converting"}}
        ready = httpx.get(f"{server.url}/health?ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
        assert [(model["id"], model["state"]) for model in server.status()["models"]] == [("tiny", "converting")]
        assert httpx.get(f"{server.url}/nowhere").status_code == 404
        waiting = pool.submit(httpx.post, f"{server.url}/v1/completions", json=ASK, timeout=PATIENCE_S)
        late = httpx.post(f"{server.url}/v1/completions", json=ASK, headers={"x-request-timeout": "0.1"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        with pytest.raises(httpx.ReadTimeout):  # and one that gives up
            httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=0.2)
        assert not waiting.done()
        held.close()  # what the other one had made is not there: our own converter makes it
        assert waiting.result().json()["usage"]["completion_tokens"] == 2
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "tiny"
        server.idle()
    assert not list((tmp_path / "cache").rglob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_converter_and_tells_who_waits(gguf: Path, tmp_path: Path, number: signal.Signals) -> None:
    with converting(gguf, tmp_path, stop=False) as (server, held), ThreadPoolExecutor() as pool:
        waiting = pool.submit(httpx.post, f"{server.url}/v1/completions", json=ASK, timeout=PATIENCE_S)
        server.stop(number)
        try:
            answer = waiting.result()
        except httpx.TransportError:  # it came too late to be taken
            pass
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_overloaded")
        held.close()
    assert [path.suffix for path in leftovers(tmp_path)] in ([], [".lock"])  # the lock is the other one's


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_is_cut_short_leaves_nothing_half_made(tmp_path: Path, number: signal.Signals) -> None:
    cache = tmp_path / "cache"
    settings = {"model": {"default": EMBEDDED_ID, "cache_dir": str(cache), "backend": "llama"}}
    with serve(tmp_path, settings=settings, null={}, stop=False) as server:
        while not list(cache.rglob("*.unfinished")):
            assert server.process.poll() is None, server.lines
        server.process.send_signal(number)
        server.ended(0) if number == signal.SIGTERM else server.process.wait()
        while server.left_behind():
            pass
    assert leftovers(tmp_path) == []
    assert not list(cache.rglob("*.unfinished"))


def test_a_model_that_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(1000))
    settings = {"model": {"default": str(bad), "cache_dir": str(tmp_path / "cache")}}
    with serve(tmp_path, settings=settings, null={}, stop=False) as server:
        server.line(r"lmx: .*bad\.gguf")
        server.ended(2)


def test_no_code_is_taken_from_the_working_directory(gguf: Path, tmp_path: Path) -> None:
    """The converter and the real engine; the server is started as the installed command is."""
    for name in ("numpy", "json", "lmx", "gguf", "tokenizers", "mlx", "sitecustomize", "usercustomize", "signal"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} '); raise SystemExit(9)"
        )
    settings = {"model": {"default": str(gguf), "cache_dir": str(tmp_path / "cache"), "backend": "mlx"}}
    with serve(tmp_path, settings=settings, python=[sys.executable, "-P"]) as server:
        server.line(r"lmx: model tiny ready")
        assert httpx.post(f"{server.url}/v1/completions", json=ASK).status_code == 200
    assert not (tmp_path / "ran").exists()
