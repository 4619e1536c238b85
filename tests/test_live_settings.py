"""Settings that change while the server runs: whole or not at all, in the file as a person would write it, and with the
truth about when they count."""

import os
import stat
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.config import Settings, Sources, keys
from lmx.config.live import MASK, Changed, Live
from lmx.config.persist import render
from lmx.config.sources import parse_toml
from lmx.errors import ConfigError

LMX_TOML = Path(__file__).parents[1] / "lmx.toml"

WRITTEN = """\
# ours
[server]
port = 8080  # the proxy's
admin_keys = { root = "sk-1" }  # secret

[models."org/name-2.5"]
# long documents
context_length = 65536
temperature = 0.3
"""


def live_of(path: Path, text: str | None = None, environ: dict[str, str] | None = None, **command_line: Any) -> Live:
    if text is not None:
        path.write_text(text, encoding="utf-8")
    return Live(Sources.read(path if path.exists() else None, environ or {}, {"server": command_line}), path)


def change(live: Live, wanted: dict[str, Any], **options: Any) -> Changed:
    return trio.run(partial(live.change, wanted, **options))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lmx.toml"


def test_a_change_counts_at_once_and_can_be_taken_back(path: Path) -> None:
    live = live_of(path, WRITTEN)
    levels: list[str] = []
    live.watch(lambda settings: levels.append(settings.server.log_level))
    changed = change(live, {"server.log_level": "debug", "server.drain_s": "5", "model.kv_bits": 8})
    assert (live.now.server.log_level, live.now.server.drain_s) == ("debug", 5.0)
    assert changed.applied == {"server.log_level": "debug", "server.drain_s": 5.0, "model.kv_bits": 8}
    assert (changed.needs_reload, changed.needs_restart, changed.persisted) == (("model.kv_bits",), (), None)
    assert live.sources["server.log_level"] == "live"
    assert (live.sources["server.port"], live.sources["server.host"]) == ("file", "default")
    assert path.read_text() == WRITTEN
    assert (change(live, {"server.log_level": None})).applied == {"server.log_level": "info"}
    assert levels == ["info", "debug", "info"]
    assert live.sources["server.log_level"] == "default"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"server.drain_s": -1}, ["[server] drain_s", "greater than or equal to 0", "-1", "this change"]),
        ({"server.log_level": "loud"}, ["[server] log_level", "'debug'", "'loud'"]),
        ({"engine.max_queue": True}, ["[engine] max_queue", "no boolean", "True"]),
        ({"server.prot": 1}, ["server.prot", "did you mean port?"]),
        ({"sever.port": 1}, ["sever.port", "did you mean server?"]),
        ({"server": {"port": 1}}, ["'server'", "section", "port"]),
        ({"port": 1}, ["'port'", "server"]),
        ({"server..port": 1}, ["server..port", "names are like"]),
        ({"server.port = 1 #": 1}, ["names are like"]),
        ({"server.drain_s.x": 1}, ["server.drain_s", "no parts"]),
        ({"models.org/name.pin": True}, ["names are like", 'models."org/name"']),
        ({"models.qwen2.5.pin": True}, ["quoted", 'models."qwen2.5".pin']),
        ({'models."a".pim': True}, ["pim", "did you mean pin?"]),
        ({'models."a"': {"pim": True}}, ["pim", "did you mean pin?"]),
        ({'models."a"': 5}, ["models.a", "table", "5"]),
        ({'models."a".temperature': 3}, ["[models.a] temperature", "less than or equal to 2", "3"]),
        ({"models": {}}, ["'models'", "name a model"]),
        ({"server.admin_keys": {"root": MASK}}, ["server.admin_keys", MASK, "server.admin_keys.NAME"]),
        ({"server.admin_keys.root": MASK}, ["server.admin_keys.root", MASK]),
        ({"server.admin_keys.root": " "}, ["[server] admin_keys.root", "a key is not shown"]),
        ({"server.admin_keys": {"a": "b"}, "server.admin_keys.root": "c"}, ["server.admin_keys.root", "twice"]),
        ({"server.admin_keys.root": "c", "server.admin_keys": {"a": "b"}}, ["server.admin_keys", "twice"]),
        ({"engine.command": ["sh"]}, ["engine.command", "lmx.toml"]),
        ({"engine.openblas": "off"}, ["engine.openblas", "lmx.toml"]),
        ({"server.port": 99}, ["server.port", "persist", "restart"]),
    ],
)
def test_one_wrong_value_and_nothing_is_changed(path: Path, wanted: dict[str, Any], words: list[str]) -> None:
    live = live_of(path, WRITTEN)
    before = live.now
    with pytest.raises(ConfigError) as caught:
        change(live, {"server.log_level": "debug", **wanted})
    assert [word for word in words if word not in caught.value.message] == []
    assert caught.value.param
    assert live.now is before
    assert path.read_text() == WRITTEN


def test_the_file_keeps_what_people_wrote(path: Path) -> None:
    live = live_of(path, WRITTEN)
    path.chmod(0o640)
    changed = change(
        live,
        {
            "server.port": 9090,
            "server.admin_keys.bot": "sk-2",
            'models."org/name-2.5".context_length': 1024,
            'models."org/name-2.5".temperature': None,
            'models."x é \\"y\\"".pin': True,
            "memory.policy": "refuse",
        },
        persisted=True,
    )
    assert path.read_text(encoding="utf-8") == (
        "# ours\n"
        "[server]\n"
        "port = 9090  # the proxy's\n"
        'admin_keys = { root = "sk-1", bot = "sk-2"}  # secret\n'
        "\n"
        '[models."org/name-2.5"]\n'
        "# long documents\n"
        "context_length = 1024\n"
        "\n"
        '[models."x é \\"y\\""]\n'
        "pin = true\n"
        "\n"
        "[memory]\n"
        'policy = "refuse"\n'
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in path.parent.iterdir()] == ["lmx.toml"]
    assert changed.persisted == path
    assert (changed.needs_restart, live.pending) == (("server.port",), {"server.port": 9090})
    assert live.now.server.port == 8080
    assert changed.applied["server.admin_keys.bot"] == MASK
    assert live.now.server.admin_keys == {"root": "sk-1", "bot": "sk-2"}
    assert live.masked()["server"]["admin_keys"] == {"root": MASK, "bot": MASK}
    assert live.sources['models."org/name-2.5".context_length'] == "file"
    assert live.now.named(["ORG/Name-2.5"]).sampling == {}
    # What the next start reads is what was promised.
    assert Sources.read(path, {}).settings() == live.now.model_copy(
        update={"server": live.now.server.model_copy(update={"port": 9090})}
    )
    change(live, {"server.port": 8080, "server.admin_keys.root": None}, persisted=True)
    assert live.pending == {}
    assert live.now.server.admin_keys == {"bot": "sk-2"}


def test_without_a_file_the_next_start_s_one_is_made(path: Path) -> None:
    live = live_of(path)
    assert live.file is None
    changed = change(live, {"server.inference_keys.bot": "sk-b", "model.jit": False}, persisted=True)
    assert changed.persisted == live.file == path
    assert tomllib.loads(path.read_text()) == {"server": {"inference_keys": {"bot": "sk-b"}}, "model": {"jit": False}}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert live.sources["model.jit"] == "file"


def test_what_overrides_the_file_is_told(path: Path) -> None:
    live = live_of(path, "", {"LMX_SERVER_LOG_LEVEL": "error"}, drain_s=3)
    changed = change(live, {"server.log_level": "debug", "server.drain_s": 7, "memory.wait_s": 9}, persisted=True)
    assert changed.overridden == {
        "server.log_level": "the variable LMX_SERVER_LOG_LEVEL",
        "server.drain_s": "the command line",
    }
    assert (live.now.server.log_level, live.now.server.drain_s, live.now.memory.wait_s) == ("debug", 7.0, 9.0)
    assert [live.sources[key] for key in ("server.log_level", "memory.wait_s")] == ["live", "file"]


def test_a_live_change_survives_that_another_is_persisted(path: Path) -> None:
    live = live_of(path, 'model.aliases = {a = "b"}\n')
    change(live, {"model.aliases.c": "d"})
    change(live, {"model.aliases.e": "f"}, persisted=True)
    assert live.now.model.aliases == {"a": "b", "c": "d", "e": "f"}
    assert tomllib.loads(path.read_text())["model"]["aliases"] == {"a": "b", "e": "f"}


@pytest.mark.parametrize(
    ("text", "words"),
    [("[server\n", "not valid TOML"), ("[server]\nprot = 1\n", "did you mean port?"), ("\xff", "utf-8")],
)
def test_a_file_that_somebody_broke_is_not_written(path: Path, text: str, words: str) -> None:
    live = live_of(path, WRITTEN)
    path.write_bytes(text.encode("latin-1"))

    with pytest.raises(ConfigError) as caught:
        change(live, {"server.log_level": "debug"}, persisted=True)
    assert words in caught.value.message
    assert path.read_bytes() == text.encode("latin-1")
    assert live.now.server.log_level == "info"


def test_what_somebody_else_wrote_stays_and_counts_at_the_next_start(path: Path) -> None:
    live = live_of(path, WRITTEN)
    path.write_text(WRITTEN + "\n[memory]\nwait_s = 5\n")
    change(live, {"memory.drain_s": 6}, persisted=True)
    assert (live.now.memory.wait_s, live.now.memory.drain_s) == (120.0, 6.0)
    assert tomllib.loads(path.read_text())["memory"] == {"wait_s": 5, "drain_s": 6}


def test_a_file_that_cannot_be_written_is_left_alone(path: Path) -> None:
    live = live_of(path, WRITTEN)
    gone = path.parent / "gone" / "lmx.toml"
    with pytest.raises(ConfigError, match=r"gone.*cannot be written.*No such file"):
        change(Live(Sources(), gone), {"server.log_level": "debug"}, persisted=True)
    if os.getuid():
        path.chmod(0o400)
        with pytest.raises(ConfigError, match="read-only"):
            change(live, {"server.log_level": "debug"}, persisted=True)
    assert path.read_text() == WRITTEN
    assert live.now.server.log_level == "info"


def test_a_link_stays_a_link(path: Path) -> None:
    real = path.with_name("real.toml")
    real.write_text(WRITTEN)
    path.symlink_to(real)
    change(live_of(path), {"server.log_level": "debug"}, persisted=True)
    assert path.is_symlink()
    assert 'log_level = "debug"' in real.read_text()


def test_a_change_that_the_check_refuses_is_none(path: Path) -> None:
    live, seen = live_of(path, WRITTEN), []

    def check(settings: Settings) -> None:
        seen.append(settings.server.admin_keys)
        if "root" not in settings.server.admin_keys:
            raise ConfigError("you would be locked out")

    for persisted in (False, True):
        with pytest.raises(ConfigError, match="locked out"):
            change(
                live, {"server.admin_keys": {"bot": "x"}, "server.log_level": "debug"}, persisted=persisted, check=check
            )
    with pytest.raises(ConfigError, match="locked out"):
        change(live, {"server.admin_keys": None}, persisted=True, check=check)
    assert (live.now.server.admin_keys, live.now.server.log_level) == ({"root": "sk-1"}, "info")
    assert path.read_text() == WRITTEN


def test_changes_at_the_same_time_are_one_after_the_other(path: Path) -> None:
    live = live_of(path, WRITTEN)

    async def all_at_once() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(partial(live.change, {f"model.aliases.a{number}": "x"}, persisted=True))

    trio.run(all_at_once)
    assert len(live.now.model.aliases) == 8
    assert tomllib.loads(path.read_text())["model"]["aliases"] == live.now.model.aliases


TEXT = st.text("ab./-\"'\\ é#[]={}\n", max_size=6)
NAMES = st.text("ab./-\"'\\ é#[]={}", min_size=1, max_size=6)


@given(name=NAMES, key=st.sampled_from(["pin", "context_length"]))
def test_any_name_of_a_model_can_be_written_and_read(name: str, key: str) -> None:
    path = ("models", name, key)
    assert keys.parse_key(keys.dotted(path)) == path


def values(path: keys.Path) -> st.SearchStrategy[Any]:
    default = Settings().model_dump(mode="json").get(path[0], {}).get(path[1]) if path[0] != "models" else 1
    kinds: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 2**31),
        float: st.floats(0, 1e6),
        str: TEXT,
        list: st.lists(TEXT, max_size=3),
        dict: st.dictionaries(NAMES, TEXT, max_size=3),
    }
    return st.none() | kinds[type(default)]


PATHS = st.one_of(
    st.sampled_from([path for path in keys.flat(Settings().model_dump()) if path[0] != "models"]),
    st.tuples(st.just("models"), NAMES, st.sampled_from(["context_length", "max_rows", "top_k"])),
)
CHANGES = st.dictionaries(PATHS, st.none(), max_size=5).flatmap(
    lambda paths: st.fixed_dictionaries({path: values(path) for path in paths})
)


@settings(max_examples=40)
@given(
    changes=st.lists(CHANGES, min_size=1, max_size=3),
    text=st.sampled_from([WRITTEN, "", LMX_TOML.read_text(encoding="utf-8")]),
)
def test_whatever_is_written_is_what_was_meant(changes: list[dict[keys.Path, Any]], text: str) -> None:
    path = Path("lmx.toml")
    for change in changes:
        wanted = {key: value for key, value in {**parse_toml(text, path), **change}.items() if value is not None}
        comments = [line for line in text.split("\n") if line.startswith("#")]
        text = render(text, change, path)
        assert parse_toml(text, path) == wanted
        assert [line for line in text.splitlines() if line in comments] == comments or None in change.values()
