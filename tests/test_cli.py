"""The command line against a real server: what it prints, what it says when it cannot, and its exit codes."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from lmx.cli import main
from lmx.cli.app import app
from lmx.cli.client import base_url
from lmx.cli.errors import CommandError
from lmx.cli.options import complete_model
from tests.api_server import write_model
from tests.hub_server import hub_server
from tests.server import Server, serve


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Lmx:
    """The command, asking one server."""

    def __init__(self, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.url = url
        monkeypatch.setenv("LMX_HOST", url)
        monkeypatch.setenv("COLUMNS", "200")
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str, stdin: str = "") -> Ran:
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(list(arguments))
        return Ran(code, *self._capsys.readouterr())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("cli")
    zoo = folder / "zoo"
    zoo.mkdir()
    for name in ("ant", "bee"):
        write_model(zoo / name)
    settings = {
        "model": {"default": str(zoo / "ant")},
        "hub": {"data_dir": str(folder / "data"), "folders": [str(zoo)], "huggingface": False, "lmstudio": False},
    }
    with serve(folder, settings=settings, null={"step_ms": 1}) as running:
        running.until(state="ready")
        yield running


@pytest.fixture
def lmx(server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lmx:
    return Lmx(server.url, monkeypatch, capsys)


def lines(ran: Ran) -> list[list[str]]:
    assert ran.code == 0, ran.err
    return [line.split() for line in ran.out.splitlines()]


def test_models_are_listed(lmx: Lmx) -> None:
    listed = {line[0]: line[-1] for line in lines(lmx("ls"))}
    assert listed["ant"] == "ready"
    assert listed["bee"] == "disk"
    assert {model["id"] for model in lmx("ls", "--json").json["models"]} >= {"ant", "bee"}
    assert lmx("list").out == lmx("ls").out


def test_a_model_is_loaded_and_unloaded(lmx: Lmx) -> None:
    loaded = lmx("load", "bee", "--context-length", "512", "--pin")
    assert loaded.out.startswith("bee is ready, loaded in ")
    assert "loading" in loaded.err
    assert [line[0] for line in lines(lmx("ps"))] == ["MODEL", "ant", "bee"]
    shown = lmx("show", "bee").out
    assert "context_length 512 (request)" in shown
    assert lmx("show", "BEE", "--json").json["pinned"]
    assert lmx("stop", "bee").out.startswith("bee is unloaded")
    assert lmx("load", "bee", "--no-wait", "--json").json["id"] == "bee"
    assert lmx("unload", "bee", "--drain", "0").code == 0


def test_a_model_answers(lmx: Lmx) -> None:
    said = lmx("run", "ant", "hello", "there", "--max-tokens", "3")
    assert (said.code, said.err) == (0, "")
    assert said.out.strip()
    assert lmx("run", "default", "--max-tokens", "3", stdin="hello there").out == said.out
    answer = lmx("run", "ant", "hello there", "--max-tokens", "3", "--json").json
    assert answer["choices"][0]["message"]["content"] + "\n" == said.out
    assert lmx("run", "ant").code == 2


def test_a_conversation(lmx: Lmx, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("hello\n/what\n/clear\nagain\n/bye\nnever\n"))
    assert main(["run", "ant", "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.count(">>> ") == 5
    assert err.count("/bye ends") == 2


def test_how_the_server_is(lmx: Lmx) -> None:
    status = lines(lmx("status"))
    assert status[0][:3] == ["lmx", "0.1.0", "at"]
    assert status[3][:2] == ["ant", "ready"]
    assert lmx("status", "--json").json["version"] == "0.1.0"
    assert lmx("requests").err == "nothing is asked\n"
    assert lmx("requests", "--json").json == {"requests": []}
    assert lmx("requests", "cancel", "nothing").code == 1
    assert len(lmx("log", "-n", "2").out.splitlines()) == 2
    assert lmx("log", "--level", "debug").out == "the log's level is debug\n"
    assert lmx("log", "--level", "info", "--json").json == {"level": "info"}


def test_a_model_is_measured(lmx: Lmx) -> None:
    measured = lmx("bench", "ant", "-p", "16", "-g", "4", "-c", "1", "-c", "2")
    assert [line[:3] for line in lines(measured)[2:]] == [["16", "4", "1"], ["16", "4", "2"]]
    assert lmx("bench", "ant", "-p", "9999999", "--json").code == 1


def test_settings_are_read_and_changed(lmx: Lmx) -> None:
    assert lmx("config", "get", "server.keep_alive_s").out == "75.0\n"
    assert lmx("config", "set", "server.keep_alive_s=60", 'models."bee".temperature=0.5').code == 0
    assert lmx("config", "get", "server.keep_alive_s", "--json").json == 60.0
    assert ["server.keep_alive_s", "60.0", "live"] in lines(lmx("config", "get", "server"))
    assert 'models."bee".temperature' in lmx("config", "get").out
    assert lmx("config", "set", "server.keep_alive_s=null", "--json").json["applied"] == {"server.keep_alive_s": 75.0}
    for wrong, code in (("server.keep_alive_s", 2), ("server.keep_alive_s=-1", 1), ("server.nothing=1", 1)):
        refused = lmx("config", "set", wrong)
        assert (refused.code, refused.out) == (code, "")
        assert wrong.partition("=")[0].rpartition(".")[2] in refused.err
    assert lmx("config", "get", "nothing").code == 2


def test_models_are_removed(lmx: Lmx, server: Server, tmp_path: Path) -> None:
    own = Path(lmx("config", "get", "hub.data_dir", "--json").json) / "models" / "me"
    own.mkdir(parents=True)
    write_model(own / "cow")
    while "me/cow" not in [model["id"] for model in lmx("ls", "--json").json["models"]]:
        pass
    assert "would be freed" in lmx("rm", "me/cow", "--dry-run").out
    assert lmx("rm", "me/cow", stdin="n\n").code == 130
    assert (own / "cow").exists()
    assert "me/cow is removed" in lmx("rm", "me/cow", "--yes").out
    assert not (own / "cow").exists()
    assert lmx("rm", "bee", "--yes").code == 1  # not lmx's own
    assert "every model was used" in lmx("cleanup", "--days", "30").err


def test_what_is_refused_says_the_way_out(lmx: Lmx) -> None:
    for arguments, words in (
        (("load", "cow"), "does not exist"),
        (("load", "org/cow"), "lmx pull"),
        (("unload", "bee"), "not loaded"),
        (("show", "cow"), "cow"),
        (("pull", "no/such/thing"), "org/name"),
        (("jobs", "cancel", "job-1"), "no job"),
    ):
        refused = lmx(*arguments)
        assert (refused.code, refused.out) == (1, "")
        assert words in refused.err


def test_habits_from_elsewhere(lmx: Lmx) -> None:
    for name in ("create", "import", "push", "server", "cp"):
        told = lmx(name, "x", "--from", "y")
        assert (told.code, told.out) == (2, "")
        assert f"there is no `lmx {name}`" in told.err
    assert lmx("version").out == lmx("--version").out == "lmx 0.1.0\n"
    assert lmx("nonsense").code == 2


def test_no_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lmx = Lmx("http://127.0.0.1:9", monkeypatch, capsys)
    for arguments in (("ls",), ("status", "--json"), ("load", "x"), ("run", "x", "hello"), ("pull", "x/y"), ("top",)):
        ran = lmx(*arguments)
        assert (ran.code, ran.out) == (3, "")
        assert "lmx serve" in ran.err


def test_names_complete(server: Server) -> None:
    context = typer.Context(typer.main.get_command(app))
    context.params = {"host": server.url}
    assert complete_model(context, "B") == ["bee"]
    context.params = {"host": "127.0.0.1:9"}
    assert complete_model(context, "b") == []


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("mac", "http://mac:1234"),
        ("mac:80", "http://mac"),
        (":8080", "http://127.0.0.1:8080"),
        ("::1", "http://[::1]:1234"),
        ("http://mac:1234/v1/", "http://mac:1234"),
        ("https://mac.local", "https://mac.local"),
        ("0.0.0.0:1234", "http://127.0.0.1:1234"),
    ],
)
def test_a_server_is_named_in_many_ways(written: str, url: str) -> None:
    assert base_url(written) == url


@pytest.mark.parametrize("written", ["ftp://mac", "mac:port"])
def test_what_names_no_server(written: str) -> None:
    with pytest.raises(CommandError):
        base_url(written)


def test_a_download_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a small Hub of our own, with the server's own child at work."""
    model = write_model(tmp_path / "made")
    with hub_server() as hub:
        hub.add("org/made", {path.name: path.read_bytes() for path in model.iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        settings = {"hub": {"data_dir": str(tmp_path / "data"), "huggingface": False, "lmstudio": False}}
        settings["model"] = {"default": str(model)}
        with serve(tmp_path, settings=settings, null={}) as running:
            lmx = Lmx(running.url, monkeypatch, capsys)
            pulled = lmx("pull", "org/made")
            assert pulled.code == 0, pulled.err
            assert "org/made is there" in pulled.out
            assert lmx("jobs", "--json").json["jobs"][0]["state"] == "done"
            assert json.loads(lmx("pull", "org/made", "--json").out.splitlines()[-1])["state"] == "done"
            assert lmx("rm", "org/made", "-y").code == 0


def test_control_c_ends_the_answer(server: Server) -> None:
    """And its lease with it."""
    environment = {**os.environ, "LMX_HOST": server.url}
    command: Sequence[str] = [sys.executable, "-m", "lmx", "run", "ant", "on and on", "--max-tokens", "1000000"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    server.idle()
