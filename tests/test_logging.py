"""The log of a server whose standard error nobody reads."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import tomlkit

from lmx.logs import Recent
from tests.server import PATIENCE_S, ROOT, serve

ASK = {"prompt": "x", "max_tokens": 2}


def test_a_pipe_that_nobody_reads_holds_nobody(tiny_model: Path, tmp_path: Path) -> None:
    """The engine prints more than the pipe and the queue hold, and so do failing requests; the server answers, and ends
    when told."""
    engine = tmp_path / "engine.py"
    engine.write_text(
        f"import sys\nfor i in range(20_000): print('noise', i, 'x' * 80)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nfrom bench.null_engine import main\nmain()\n"
    )
    settings = {"server": {"log_level": "info"}, "engine": {"command": [sys.executable, str(engine)]}}
    (tmp_path / "lmx.toml").write_text(tomlkit.dumps(settings))
    reader, writer = os.pipe()
    if sys.platform == "linux":
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 16384)
    with open("/dev/null", "wb") as null:
        process = subprocess.Popen(
            [sys.executable, "-m", "lmx", "serve", "--port", "0", "--model", str(tiny_model)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "LMX_NULL_FAIL_TOKEN": "5", "LMX_NULL_FIRST_TOKEN": "300"},
            stdout=null,
            stderr=writer,
        )
    os.close(writer)
    with open(reader, "rb", buffering=0) as log:
        try:
            head = b""
            while b"listening on http://127.0.0.1:" not in head or not head.endswith(b"\n"):
                head += log.read(1)  # and no byte more
            url = "http" + head.decode().rpartition("http")[2].strip()
            with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
                for _ in range(100):  # each is a warning
                    assert client.post("/v1/completions", json={"prompt": [5], "max_tokens": 2}).status_code == 500
                assert client.post("/v1/completions", json=ASK).status_code == 200
                assert client.get("/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            process.wait()
        rest = log.read()
    assert b"noise" in rest


def test_lines_that_were_dropped_are_counted(tmp_path: Path) -> None:
    program = (
        "import logging, os, sys\n"
        "from lmx import logs\n"
        "logs.QUEUE_RECORDS = 10\n"
        "with logs.log_to_stderr():\n"
        "    for i in range(5000): logging.warning('line %d %s', i, 'x' * 100)\n"
        "    print('full', flush=True)\n"
        "    sys.stdin.read()\n"
        "    logs.flush()\n"
        "    logging.warning('the end')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "full\n"
        process.stdin.close()
        lines = process.stderr.read().splitlines()
        process.stdout.read()
    assert process.returncode == 0
    assert lines[-1].endswith("the end")
    notices = [line for line in lines if "lines of the log were dropped" in line]
    assert notices
    dropped = sum(int(notice.split("lmx: ")[1].split()[0]) for notice in notices)
    assert dropped + len(lines) - len(notices) == 5001


def test_each_request_has_its_line(tiny_model: Path, tmp_path: Path) -> None:
    """As JSON: with what it asked, what it got and how it ended; the prompt only when that is asked for."""
    settings = {"server": {"log_format": "json"}}
    with serve(tmp_path, "--model", str(tiny_model), settings=settings, null={"step_ms": 1}) as server:
        headers = {"x-request-id": "mine-1"}
        body = {"prompt": "Top secret", "max_tokens": 5, "user": "bot", "ignore_eos": True}
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == 200
        line = json.loads(server.line('.*"request_id": ?"mine-1".*')[0])
        assert line["message"] == "POST /v1/completions"
        assert (line["level"], line["logger"], line["status"]) == ("info", "lmx.requests", 200)
        assert (line["client"], line["model"], line["route"]) == ("bot", "tiny-llama", "default")
        assert (line["completion_tokens"], line["cached_tokens"], line["finish"]) == (5, 0, "length")
        assert line["prompt_tokens"] > 0
        assert 0 < line["ttft_ms"] <= line["duration_ms"]
        assert line["itl_ms"] > 0
        assert "prompt" not in line
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": 5}, headers={"x-request-id": "mine-2"})
        assert refused.status_code == 400
        line = json.loads(server.line('.*"request_id": ?"mine-2".*')[0])
        assert (line["status"], line["duration_ms"] > 0) == (400, True)
        assert all(json.loads(line) for line in server.lines)


def test_a_client_that_left_has_its_line_too(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"server": {"log_prompts": True}}
    with serve(tmp_path, "--model", str(tiny_model), settings=settings, null={"step_ms": 1}) as server:
        body = {"prompt": "Not so secret", "max_tokens": 1_000_000, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            next(line for line in response.iter_lines() if line.startswith("data:"))
        line = server.line(r"lmx.requests: POST /v1/completions (.*)")[1]
        assert "status=499" in line
        assert "finish=none" in line
        assert 'prompt="Not so secret"' in line


LATE = """
import logging, threading, structlog
from lmx.logs import log_to_stderr
with log_to_stderr():
    log = structlog.stdlib.get_logger()
    log.warning("one", thread=lambda: threading.current_thread() is threading.main_thread())
    log.warning("two", broken=lambda: 1 / 0)
    log.warning("three", plain=3)
"""


def test_what_takes_long_to_say_is_said_by_the_log_s_thread() -> None:
    ran = subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    one, two, three = ran.stderr.splitlines()
    assert one.endswith("one thread=false")
    assert "ZeroDivisionError" in two
    assert three.endswith("three plain=3")


def test_recent_lines_are_numbered_and_what_is_lost_is_counted() -> None:
    recent, heard = Recent(most=3), []
    with recent.listening(lambda: heard.append(recent.last(1)[0])):
        for number in range(5):
            recent.add(f"line {number}")
    recent.add("x" * 10_000)
    assert heard == [[f"line {number}"] for number in range(5)]
    assert recent.last(2) == (["line 4", "x" * 4096 + "…"], 6)
    assert recent.last(0) == ([], 6)
    assert recent.since(6) == ([], 0, 6)
    assert recent.since(5) == (["x" * 4096 + "…"], 0, 6)
    lines, lost, following = recent.since(1)
    assert (lines[0], len(lines), lost, following) == ("line 3", 3, 2, 6)
