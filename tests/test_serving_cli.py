"""``lmx serve`` as a process: what it says at start, what it refuses, and how it ends."""

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server import Server, serve

ENDLESS = {"prompt": "on and on", "max_tokens": 1_000_000, "stream": True}


def begun(lines: Iterator[str]) -> None:
    """Wait until the engine answers: the comment before it only says that the request was read."""
    next(line for line in lines if line.startswith("data:"))


def test_it_says_where_it_listens_and_when_the_model_is_ready(null_server: Server) -> None:
    assert httpx.get(f"{null_server.url}/health").status_code == 200
    assert null_server.line(r"lmx: model (\S+) ready")[1] == "tiny-llama"
    record = null_server.until(state="ready", live_leases=0)
    assert record["restarts"] == 0
    null_server.idle()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_it_loads(tiny_model: Path, tmp_path: Path, number: signal.Signals) -> None:
    with serve(tmp_path, "--model", str(tiny_model), null={"load": "hang"}, stop=False) as server:
        assert httpx.get(f"{server.url}/health?ready").status_code == 503
        server.stop(number)


def test_a_model_that_does_not_load_leaves_the_server_up(tiny_model: Path, tmp_path: Path) -> None:
    with serve(tmp_path, "--model", str(tiny_model), null={"load": "model_invalid"}) as server:
        server.until(state="failed")
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/health?ready").status_code == 503
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "model_loading_failed"
        assert "told to fail with model_invalid" in refused.json()["error"]["message"]


def test_sigterm_lets_running_requests_finish(tiny_model: Path, tmp_path: Path) -> None:
    body = {"prompt": "x", "max_tokens": 100, "stream": True}
    with serve(tmp_path, "--model", str(tiny_model), null={"step_ms": 5}, stop=False) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            begun(lines)
            server.process.send_signal(signal.SIGTERM)
            server.line("lmx: stopping")
            rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in rest[-2]
        server.ended(0)


def test_after_drain_s_running_requests_end_with_a_clear_error(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"server": {"drain_s": 0.1}}
    with serve(tmp_path, "--model", str(tiny_model), settings=settings, null={"step_ms": 1}, stop=False) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS) as response:
            lines = response.iter_lines()
            begun(lines)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
            assert "The server is shutting down" in last
        server.ended(0)


def test_a_second_signal_ends_at_once(tiny_model: Path, tmp_path: Path) -> None:
    with (
        serve(tmp_path, "--model", str(tiny_model), null={"step_ms": 1}, stop=False) as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS) as response,
    ):
        begun(response.iter_lines())
        server.process.send_signal(signal.SIGTERM)
        server.line("lmx: stopping")
        server.process.send_signal(signal.SIGTERM)
        server.ended(128 + signal.SIGTERM)


def test_a_killed_server_takes_its_engine_along(tiny_model: Path, tmp_path: Path) -> None:
    with serve(tmp_path, "--model", str(tiny_model), null={}, stop=False) as server:
        server.until(state="ready")
        server.process.kill()
        server.process.wait()
        while server.left_behind():
            pass


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with serve(tmp_path, "--port", port, stop=False) as server:
            server.line(rf"Cannot listen on 127\.0\.0\.1 port {port}: another program.*--port")
            server.ended(2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "192.0.2.1"), r"Cannot listen on 192\.0\.2\.1.*--host must be"),
        (("--port", "70000"), r"\[server\] port.*70000"),
        (("--config", "nowhere.toml"), r"cannot read the configuration nowhere\.toml"),
        (("--model", "/nowhere/model"), r"no model '/nowhere/model'"),
    ],
)
def test_what_cannot_work_is_refused_at_start(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    with serve(tmp_path, *arguments, stop=False) as server:
        server.line(words)
        server.ended(2)


def test_a_missing_openblas_is_refused_at_start(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"engine": {"openblas": "/nowhere/libopenblas.so.0"}}
    with serve(tmp_path, "--model", str(tiny_model), settings=settings, stop=False) as server:
        server.line(r"\[engine\] openblas: there is no such file.*'/nowhere/libopenblas\.so\.0'")
        server.ended(2)


def test_every_address_of_a_host_gets_the_same_port(tiny_model: Path, tmp_path: Path) -> None:
    with serve(tmp_path, "--model", str(tiny_model), "--host", "localhost", null={}) as server:
        port = server.address[1]
        for line in [line for line in server.lines if "listening" in line]:
            assert line.endswith(f":{port}")
            assert httpx.get(f"{line.rpartition(' ')[2]}/health").status_code == 200
