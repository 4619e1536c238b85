"""What ``lmx doctor`` finds, and what it says to do about it."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from lmx.cli import main
from lmx.cli.doctor import coherence, examine, installation, machine, models, server
from lmx.cli.doctor.finding import Finding, Patient
from lmx.hub.state import State
from tests.hub_server import hub_server
from tests.model_places import write_folder
from tests.server import Server

WHOLE = {"float32": {"gflops": 200.0, "right": True}, "bfloat16": {"gflops": 9.0, "right": True}}


def patient(tmp_path: Path, text: str = "", **more: Any) -> Patient:
    """Of settings with ``text`` in them, and a home of its own."""
    file = tmp_path / "lmx.toml"
    file.write_text(f'[hub]\ndata_dir = "{tmp_path / "data"}"\nhuggingface = false\nlmstudio = false\n{text}')
    file.chmod(0o644)
    made = Patient(file, {}, None, "", True, **more)
    list(installation.check_settings(made))
    return made


def only(findings: Iterator[Finding], level: str) -> str:
    """The one finding of that level, with its advice."""
    (found,) = [finding for finding in findings if finding.level == level]
    return f"{found.text} {found.advice}"


def test_a_whole_machine_passes_without_mlx_in_the_process(tmp_path: Path) -> None:
    found = patient(tmp_path, "[server]\nport = 0")
    code = (
        "import sys; from lmx.cli import main; code = main(sys.argv[1:]);"
        "assert not {'mlx', 'llama_cpp', 'quart'} & set(sys.modules); sys.exit(code)"
    )
    arguments = ["doctor", "--json", "--offline", "--config", str(found.file)]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    document = json.loads(ended.stdout)
    assert ended.returncode == (0 if document["ok"] else 1), ended.stderr
    checks = {finding["check"] for finding in document["findings"]}
    assert checks >= {"settings", "lmx", "packages", "machine", "mlx", "memory", "disk", "server", "state", "models"}
    assert "hub" not in checks
    mlx = next(finding for finding in document["findings"] if finding["check"] == "mlx")
    assert "float32" in mlx["text"]
    assert [one for one in document["findings"] if one["level"] == "fail" and one["check"] != "models"] == []
    assert not (tmp_path / "data").exists()  # it changed nothing


def test_wrong_settings_fail_and_the_rest_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(examine, "CHECKS", (installation.check_settings, machine.check_memory))
    file = tmp_path / "lmx.toml"
    file.write_text("[server]\nprot = 1")
    assert main(["doctor", "--config", str(file)]) == 1
    out = capsys.readouterr().out
    assert "did you mean port?" in out
    assert "ok    memory" in out


def test_settings_that_are_valid_and_unwise_are_named(tmp_path: Path) -> None:
    text = "[server]\nhost = '0.0.0.0'"
    assert "inference_keys" in only(installation.check_settings(patient(tmp_path, text)), "warn")
    keys = patient(tmp_path, f"{text}\ninference_keys = {{bot = 'secret'}}")
    told = only(installation.check_settings(keys), "warn")
    assert "chmod 600" in told
    assert "secret" not in told
    variables = Patient(None, {"LMX_SERVER_PROT": "1"}, None, "", True)
    assert "LMX_SERVER_PORT?" in only(installation.check_settings(variables), "warn")


def test_a_check_that_fails_itself_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_broken(_: Patient) -> Iterator[Finding]:
        yield Finding("one", "ok", "")
        raise ValueError("boom")

    monkeypatch.setattr(examine, "CHECKS", (check_broken, machine.check_memory))
    found = list(examine.examine(patient(tmp_path)))
    assert [finding.check for finding in found[:3]] == ["one", "broken", "memory"]
    assert "ValueError: boom" in found[1].text


@contextmanager
def somebody() -> Iterator[int]:
    """Another program's HTTP server."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield other.server_port
        finally:
            other.shutdown()
            thread.join()


def test_the_port_is_free_or_somebodys(tmp_path: Path, null_server: Server) -> None:
    with somebody() as port:
        told = only(server.check_server(patient(tmp_path, f"[server]\nport = {port}")), "fail")
        assert f"pid {os.getpid()}" in told
        named = patient(tmp_path)
        named.host = f"127.0.0.1:{port}"
        assert "no lmx answers" in only(server.check_server(named), "fail")
    assert "is free" in only(server.check_server(patient(tmp_path, f"[server]\nport = {port}")), "ok")
    ours = patient(tmp_path, f"[server]\nport = {null_server.address[1]}")
    assert "answers at" in only(server.check_server(ours), "ok")
    assert ours.serves
    nowhere = patient(tmp_path, "[server]\nhost = '192.0.2.1'")  # nobody's address
    assert server._port("192.0.2.1", 1234).level == "fail"
    assert not nowhere.serves


def test_the_hub_is_asked_with_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = patient(tmp_path)
    assert list(server.check_hub(found)) == []
    found.offline = False
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert "no token" in only(server.check_hub(found), "ok")
        hub.answer("GET /api/models", 503)
        assert "503" in only(server.check_hub(found), "warn")
        monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
        hub.answer("GET /api/whoami-v2", 401)
        told = only(server.check_hub(found), "warn")
        assert "refuses the token" in told
        assert "hf_secret" not in told
    assert "cannot be reached" in only(server.check_hub(found), "warn")


def test_models_that_are_broken_or_missing_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "zoo/good")
    write_folder(tmp_path / "zoo/bad")
    (tmp_path / "zoo/bad/model.safetensors").write_bytes(b"\x00" * 4)
    folders = (
        f'folders = ["{tmp_path / "zoo"}", "{tmp_path / "gone"}"]\n[model]\ndefault = "good"\npreload = ["missing"]'
    )
    levels = [(finding.level, finding.text) for finding in models.check_models(patient(tmp_path, folders))]
    warns = [text for level, text in levels if level == "warn"]
    assert [text.partition(":")[0] for text in warns] == [
        "models are not looked for everywhere",
        "bad",
        "[model] preload",
    ]
    assert not [text for level, text in levels if level == "fail"]
    missing = patient(tmp_path, '[model]\ndefault = "missing"')
    assert "[model] default" in only(models.check_models(missing), "fail")


def test_a_damaged_state_is_told(tmp_path: Path) -> None:
    found = patient(tmp_path)
    assert "first server" in only(models.check_state(found), "ok")
    found.state_path.parent.mkdir()
    found.state_path.write_bytes(b"no database" * 100)
    assert "damaged" in only(models.check_state(found), "warn")
    assert found.state is not None
    found.state.close()


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    assert "lmx cleanup" in only(machine.check_disk(patient(tmp_path, f"low_disk_bytes = {2**62}")), "warn")
    assert "free at" in only(machine.check_disk(patient(tmp_path, "low_disk_bytes = 0")), "ok")


def test_a_budget_beyond_the_machine_fails(tmp_path: Path) -> None:
    assert "limit_bytes" in only(machine.check_memory(patient(tmp_path, f"[memory]\nlimit_bytes = {2**60}")), "fail")


def test_mlx_is_judged_by_what_it_says(tmp_path: Path) -> None:
    def judged(platform: str = "linux", text: str = "", **about: Any) -> list[Finding]:
        whole = {"device": "gpu", "name": "", "working_set_bytes": 0, "buffer_bytes": 0, "blas": "", "kinds": WHOLE}
        return list(machine._about_mlx(patient(tmp_path, text, platform=platform), whole | about))

    assert [finding.level for finding in judged()] == ["ok"]
    wrong = WHOLE | {"float32": {"gflops": 1.0, "right": False}}
    assert "products of float32 come out wrong" in only(iter(judged(kinds=wrong)), "fail")
    assert "arm64" in only(iter(judged("darwin", device="cpu", blas="the system's")), "fail")
    assert "scipy-openblas32" in only(iter(judged(device="cpu", blas="MLX's own, slow")), "warn")
    budget = "[memory]\nlimit_bytes = 2_000_000_000"
    metal = {"working_set_bytes": 10**9, "buffer_bytes": 10**9}
    assert "iogpu.wired_limit_mb" in only(iter(judged("darwin", budget, **metal)), "warn")
    assert [finding.level for finding in judged("darwin", budget, working_set_bytes=3 * 10**9)] == ["ok", "ok"]


def test_an_mlx_that_does_not_run_fails(tmp_path: Path) -> None:
    found = patient(tmp_path)
    engine = found.settings.engine.model_copy(update={"openblas": str(tmp_path / "lmx.toml")})  # no library
    found.settings = found.settings.model_copy(update={"engine": engine})
    if sys.platform == "linux":
        assert "MLX does not run" in only(machine.check_mlx(found), "fail")


def test_a_macs_own_limits_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sysctl(**values: str) -> None:
        cases = "".join(f"*{name}*) echo '{value}' ;;\n" for name, value in values.items())
        (tmp_path / "sysctl").write_text(f'#!/bin/sh\ncase "$*" in\n{cases}*) exit 1 ;;\nesac\n')
        (tmp_path / "sysctl").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    mac = patient(tmp_path, platform="darwin")
    sysctl(brand_string="Apple M5 Max", wired_limit_mb="0")
    assert "Apple M5 Max" in next(machine.check_machine(mac)).text
    assert list(machine.check_memory(mac))[-1].text.startswith("the system's own")
    sysctl(proc_translated="1", wired_limit_mb=str(2**40))
    assert "Rosetta" in only(machine.check_machine(mac), "fail")
    assert "may freeze" in only(iter(list(machine.check_memory(mac))[1:]), "warn")


def test_loaded_models_are_compared_with_themselves(tmp_path: Path, null_server: Server) -> None:
    null_server.line(r"lmx: model \S+ ready")
    found = patient(tmp_path)
    found.host = null_server.url
    found.serves = True

    def looked(level: str) -> str:
        assert list(models.check_state(found))
        assert found.state is not None
        told = only(coherence.check_coherence(found), level)
        found.state.close()
        return told

    assert "first time" in looked("ok")
    assert "the same tokens" in looked("ok")

    def change(edit: str, value: str) -> None:
        with sqlite3.connect(found.state_path) as db:
            db.execute("UPDATE fingerprints SET result = json_set(result, ?, ?)", (edit, value))
        db.close()

    change("$.answers[1][4]", "other")
    assert "prompt 2 from token 5 on" in looked("warn")
    change("$.answers[0][0]", "other")
    change("$.about.quantization", "2-bit")
    assert "its quantization changed" in looked("ok")
    with State(found.state_path).connection() as db:
        (text,) = db.execute("SELECT result FROM fingerprints ORDER BY at DESC").fetchone()
    assert [len(answer) for answer in json.loads(text)["answers"]] == [coherence.TOKENS] * 3


def test_a_model_that_repeats_one_token_fails() -> None:
    now = {"answers": [["a", "b"], ["x"] * 24], "about": {}, "version": "1"}
    assert coherence._compare("m", now, None).level == "fail"


def test_no_server_is_asked_for_what_is_not_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = patient(tmp_path)
        found.host = f"127.0.0.1:{silent.getsockname()[1]}"
        assert list(coherence.check_coherence(found)) == []
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()
