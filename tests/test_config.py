"""The settings: what lmx.toml promises, which source wins, and what a person reads who made a mistake."""

import itertools
import tomllib
from pathlib import Path

import pytest

from lmx.config import NamedModelSettings, Settings, load_settings
from lmx.errors import ConfigError

LMX_TOML = Path(__file__).parents[1] / "lmx.toml"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "lmx.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_lmx_toml_lists_every_setting_with_its_default() -> None:
    assert tomllib.loads(LMX_TOML.read_text(encoding="utf-8")) == Settings().model_dump()
    assert load_settings(LMX_TOML, {}) == Settings()


def test_every_setting_has_a_comment() -> None:
    lines = LMX_TOML.read_text(encoding="utf-8").splitlines()
    bare = [line for before, line in itertools.pairwise(lines) if " = " in line and not before.startswith("# ")]
    assert [line for line in bare if not line.startswith("#")] == []


def test_later_sources_win(tmp_path: Path) -> None:
    path = written(tmp_path, "[server]\nhost = '::1'\nport = 1\nkeep_alive_s = 5")
    settings = load_settings(path, {"LMX_SERVER_PORT": "2", "LMX_SERVER_KEEP_ALIVE_S": "6"}, {"server": {"port": 3}})
    assert (settings.server.host, settings.server.keep_alive_s, settings.server.port) == ("::1", 6.0, 3)


def test_variables_hold_lists_and_tables_as_toml() -> None:
    environ = {
        "LMX_MODEL_ALIASES": '{small = "smollm2-135m-instruct"}',
        "LMX_ENGINE_COMMAND": '["python", "x y.py"]',
        "LMX_ENGINE_LOOKAHEAD": "off",
        "LMX_MODEL_CACHE_DIR": "/var/cache/lmx",
        "LMX_MODEL_BACKENDS": '{small = "llama"}',
        "LMX_MODEL_KV_BITS": "8",
    }
    settings = load_settings(None, environ)
    assert settings.model.aliases == {"small": "smollm2-135m-instruct"}
    assert settings.engine.command == ["python", "x y.py"]
    assert settings.engine.lookahead == "off"
    assert settings.model.backends == {"small": "llama"}
    assert settings.model.kv_bits == 8
    assert settings.model.cache_path == Path("/var/cache/lmx")


@pytest.mark.parametrize(
    ("text", "environ", "words"),
    [
        ("[server\nport = 1", {}, ["lmx.toml", "not valid TOML", "line 1"]),
        ("\udcff", {}, ["lmx.toml", "not valid TOML"]),
        ("[sever]\nport = 1", {}, ["[sever]", "[server]", "[engine]"]),
        ("port = 1", {}, ["[port]", "[server]"]),
        ("[server]\nprot = 1", {}, ["[server] prot", "no such setting", "did you mean port?"]),
        ("[server]\nport = 'high'", {}, ["[server] port", "'high'", "lmx.toml"]),
        ("[engine]\nmax_rows = 0", {}, ["[engine] max_rows", "greater than or equal to 1"]),
        ("[engine]\nmax_chunk_tokens = 100", {}, ["[engine] max_chunk_tokens", "multiple of 32"]),
        (
            "",
            {"LMX_ENGINE_KV_BUDGET_BYTES": f"{10**30}"},
            ["[engine] kv_budget_bytes", "less than or equal", f"{10**30}"],
        ),
        ("[model]\nkv_bits = 5", {}, ["[model] kv_bits", "16, 8 or 4", "5"]),
        ("[model]\nbackend = 'mlc'", {}, ["[model] backend", "'mlc'", "'llama'"]),
        ("", {"LMX_SERVER_PORT": "70000"}, ["[server] port", "70000", "LMX_SERVER_PORT"]),
        ("[models.a]\npim = 1", {}, ["[models.a] pim", "did you mean pin?", "lmx.toml"]),
        ("[models.'org/a']\nmax_rows = 0", {}, ['[models."org/a"] max_rows', "greater than or equal to 1", "got 0"]),
        ("[models.qwen2.5-7b]\npin = true", {}, ["dots", '[models."qwen2.5-7b"]']),
        ("[models]\na = 5", {}, ["[models] a", "[models.a]", "got 5"]),
        ("[engine]\nmax_rows = true", {}, ["[engine] max_rows", "no boolean", "True"]),
        ("[server]\ndrain_s = inf", {}, ["[server] drain_s", "finite", "inf"]),
        ("[server]\nadmin_keys = 'sk-1'", {}, ["[server] admin_keys", "dictionary", "not shown"]),
        ("[server]\nport = -1\ndrain_s = -1", {}, ["[server] port", "[server] drain_s"]),
        ("", {"LMX_SERVER_CORS_ORIGINS": "http://a"}, ["LMX_SERVER_CORS_ORIGINS", "http://a", "TOML"]),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, environ: dict[str, str], words: list[str]) -> None:
    path = tmp_path / "lmx.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_settings(path, environ)
    assert [word for word in words if word not in caught.value.message] == []


def test_a_secret_is_not_shown(tmp_path: Path) -> None:
    for text, environ in (
        ("[server]\nadmin_keys = {root = ' sk-1'}", {}),
        ("", {"LMX_SERVER_ADMIN_KEYS": "{root = sk-1"}),
    ):
        with pytest.raises(ConfigError) as caught:
            load_settings(written(tmp_path, text), environ)
        assert "sk-1" not in caught.value.message


def test_a_model_s_section_is_found_by_any_of_its_names(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, "[models.'Org/A.b']\ntop_k = 4\n[models.a]\ntop_k = 5\nmin_p = 0.1"), {})
    assert settings.named(["x", "org/a.B", "a"]).sampling == {"top_k": 4}
    assert settings.named(["a"]).sampling == {"top_k": 5, "min_p": 0.1}
    assert settings.named(["x"]) == NamedModelSettings()


def test_a_misspelt_variable_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"LMX_SERVER_PROT": "1", "LMX_ENGIN_MAX_ROWS": "2", "LMX_SERVER_WHATEVER": "3", "LMX_NULL_STEP_MS": "4"}
    assert load_settings(None, environ | {"LMX_SERVER_PORT": "5"}).server.port == 5
    assert [record.getMessage() for record in caplog.records] == [
        "the variable LMX_ENGIN_MAX_ROWS is no setting of lmx; did you mean LMX_ENGINE_MAX_ROWS?",
        "the variable LMX_SERVER_PROT is no setting of lmx; did you mean LMX_SERVER_PORT?",
        "the variable LMX_SERVER_WHATEVER is no setting of lmx; lmx.toml lists every setting.",
    ]


def test_a_byte_order_mark_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "lmx.toml"
    path.write_text("[server]\nport = 7", encoding="utf-8-sig")
    assert load_settings(path, {}).server.port == 7


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere\.toml: No such file"):
        load_settings(tmp_path / "nowhere.toml", {})
