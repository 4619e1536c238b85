"""The settings: defaults here, then ``lmx.toml``, then ``LMX_<SECTION>_<KEY>`` variables, then the command line.

Each later source overrides the earlier one, key by key. A key that does not exist, or a value of the wrong kind, is a
``ConfigError`` that names the source, the key and what is allowed; nothing is guessed. ``lmx.toml`` in the repository
lists every key with its default (a test holds the two together).
"""

import difflib
import logging
import os
import sys
import tomllib
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from lmx.errors import ConfigError

logger = logging.getLogger("lmx")

Key = Annotated[str, Field(pattern=r"^[^\x00-\x20\x7f]([^\x00-\x1f\x7f]*[^\x00-\x20\x7f])?$")]
"""An API key must fit into a header: not empty, no control characters, no blanks around it."""

BackendName = Literal["auto", "mlx", "llama"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(_Section):
    host: str = "127.0.0.1"
    port: int = Field(1234, ge=0, le=65535)
    drain_s: float = Field(30.0, ge=0)
    max_body_bytes: int = Field(32 * 1024 * 1024, gt=0)
    keep_alive_s: float = Field(75.0, gt=0)
    write_timeout_s: float = Field(20.0, gt=0)
    sse_comment_s: float = Field(10.0, gt=0)
    request_timeout_s: float = Field(0.0, ge=0)
    allowed_hosts: list[str] = []
    cors_origins: list[str] = []
    inference_keys: dict[str, Key] = {}
    admin_keys: dict[str, Key] = {}
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"
    log_prompts: bool = False


class KVBits(IntEnum):
    """Of a key's or a value's number."""

    WHOLE = 16
    EIGHT = 8
    FOUR = 4


class ModelSettings(_Section):
    default: str = "smollm2-135m-instruct"
    embedding: str = ""
    aliases: dict[str, str] = {}
    placeholders: list[str] = [
        "default",
        "local-model",
        "model-placeholder",
        "auto",
        "gpt-3.5*",
        "gpt-4",
        "gpt-4-*",
        "gpt-4.*",
        "gpt-4o*",
        "gpt-5",
        "gpt-5-*",
        "gpt-5.*",
        "chatgpt-*",
        "o1",
        "o1-*",
        "o3",
        "o3-*",
        "o4-*",
        "claude-*",
    ]
    cache_dir: str = ""
    backend: BackendName = "auto"
    backends: dict[str, BackendName] = {}
    context_length: int = Field(0, ge=0, le=2**31 - 1)
    kv_bits: KVBits = KVBits.WHOLE
    tool_format: str = ""
    reasoning_format: str = ""
    preload: list[str] = []
    jit: bool = True
    jit_ttl_s: float = Field(3600.0, ge=0)

    @property
    def cache_path(self) -> Path:
        """Where converted models are kept: ``cache_dir``, or the system's place for caches."""
        if self.cache_dir:
            return Path(self.cache_dir).expanduser()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "lmx"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmx"


def _library(value: str) -> str:
    if value not in ("auto", "off") and not Path(value).is_file():
        raise PydanticCustomError(
            "no_file", 'there is no such file; give the path of libopenblas.so.0, "auto" or "off"'
        )
    return value


class EngineSettings(_Section):
    max_rows: int = Field(8, ge=1, le=512)
    max_queue: int = Field(1024, ge=1)
    kv_budget_bytes: int = Field(0, ge=0, le=2**63 - 1)
    max_chunk_tokens: int = Field(0, ge=0, le=2**20, multiple_of=32)
    itl_target_ms: float = Field(250.0, gt=0)
    lookahead: Literal["auto", "on", "off"] = "auto"
    batching: Literal["auto", "single"] = "auto"
    hang_timeout_s: float = Field(30.0, gt=0)
    load_timeout_s: float = Field(1800.0, gt=0)
    free_timeout_s: float = Field(30.0, gt=0)
    restart_backoff_s: float = Field(0.5, gt=0)
    restart_backoff_max_s: float = Field(30.0, gt=0)
    restart_cooldown_s: float = Field(60.0, ge=0)
    max_restarts: int = Field(5, ge=0)
    max_unread_tokens: int = Field(8192, ge=1)
    grammar_compile_s: float = Field(10.0, gt=0)
    grammar_mask_ms: float = Field(20.0, gt=0)
    prefix_cache: bool = True
    prefix_ram_bytes: int = Field(0, ge=0, le=2**63 - 1)
    prefix_disk_bytes: int = Field(-1, ge=-1, le=2**63 - 1)
    prefix_dir: str = ""
    openblas: Annotated[str, AfterValidator(_library)] = "auto"
    mlx_ops_per_buffer: int = Field(0, ge=0, le=2**31 - 1)
    mlx_mb_per_buffer: int = Field(0, ge=0, le=2**31 - 1)
    command: list[str] = []


class HubSettings(_Section):
    data_dir: str = ""
    models_dir: str = ""
    folders: list[str] = []
    huggingface: bool = True
    lmstudio: bool = True
    quantizations: list[str] = ["Q4_K_M", "Q4_K_S", "Q5_K_M", "Q4_1", "Q4_0", "Q6_K", "Q8_0", "F16", "BF16"]
    downloads: int = Field(2, ge=1, le=16)
    low_disk_bytes: int = Field(10 * 1024**3, ge=0, le=2**63 - 1)
    cleanup_days: int = Field(0, ge=0, le=36_500)

    @property
    def data_path(self) -> Path:
        """What lmx must not lose: its state, and the models that it downloaded."""
        if self.data_dir:
            return Path(self.data_dir).expanduser()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Application Support" / "lmx"
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "lmx"

    @property
    def models_path(self) -> Path:
        """lmx's own folder of models, <publisher>/<name> in it."""
        return Path(self.models_dir).expanduser() if self.models_dir else self.data_path / "models"


class MemorySettings(_Section):
    limit_bytes: int = Field(0, ge=0, le=2**63 - 1)
    policy: Literal["refuse", "wait", "preempt"] = "wait"
    wait_s: float = Field(120.0, ge=0)
    drain_s: float = Field(30.0, ge=0)


class NamedModelSettings(_Section):
    """``[models."name"]``: of one model; None where it has none of its own."""

    context_length: int | None = Field(None, ge=0, le=2**31 - 1)
    max_rows: int | None = Field(None, ge=1, le=512)
    kv_bits: KVBits | None = None
    kv_budget_bytes: int | None = Field(None, ge=0, le=2**63 - 1)
    backend: BackendName | None = None
    draft_model: str | None = None
    ttl_s: float | None = Field(None, ge=0)
    pin: bool | None = None
    tool_format: str | None = None
    reasoning_format: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)


class LlamaSettings(_Section):
    gpu_layers: int = Field(-1, ge=-1, le=10_000)
    threads: int = Field(0, ge=0, le=512)
    mmap: bool = True


class Settings(_Section):
    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    llama: LlamaSettings = LlamaSettings()
    hub: HubSettings = HubSettings()
    memory: MemorySettings = MemorySettings()
    models: dict[str, NamedModelSettings] = {}

    @property
    def prefix_path(self) -> Path:
        """Where prefixes are kept on the disk: ``prefix_dir``, or beside converted models."""
        return (
            Path(self.engine.prefix_dir).expanduser() if self.engine.prefix_dir else self.model.cache_path / "prefixes"
        )


def load_settings(
    path: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Settings:
    """Read the settings. ``overrides`` ({section: {key: value}}) come from the command line and win.

    Raises ConfigError.
    """
    merged: dict[str, dict[str, Any]] = {name: {} for name in Settings.model_fields}
    if path is not None:
        for section, values in _read_toml(path).items():
            if section not in merged or not isinstance(values, dict):
                known = ", ".join(f"[{name}]" for name in merged)
                raise ConfigError(
                    f"{path}: [{section}] is not a section of lmx.toml; there are {known}.", param=section
                )
            merged[section].update(values)
    for section, values in _read_environ(environ).items():
        merged[section].update(values)
    for section, values in (overrides or {}).items():
        merged[section].update(values)
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise _config_error(error, path) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}.", param="--config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.", param="--config") from None


def _read_environ(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """``LMX_SERVER_PORT=8080`` is ``[server] port``; lists and tables are written as in TOML."""
    found: dict[str, dict[str, Any]] = {name: {} for name in Settings.model_fields}
    for section, field in Settings.model_fields.items():
        if not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            continue  # [models]: tables of names that no variable can spell
        for key, setting in field.annotation.model_fields.items():
            name = f"LMX_{section}_{key}".upper()
            if name not in environ:
                continue
            value: Any = environ[name]
            if get_origin(setting.annotation) in (list, dict):
                try:
                    value = tomllib.loads(f"value = {value}")["value"]
                except tomllib.TOMLDecodeError as error:
                    raise ConfigError(f"{name}={value!r} is not a TOML value: {error}.", param=name) from None
            found[section][key] = value
    known = [f"LMX_{section}_{key}".upper() for section, values in _keys().items() for key in values]
    sections = tuple(f"LMX_{section}_".upper() for section in found)
    for name in sorted(name for name in environ if name.startswith("LMX_") and name not in known):
        nearest = difflib.get_close_matches(name, known, 1, cutoff=0.8)
        if nearest or name.startswith(sections):
            meant = f"; did you mean {nearest[0]}?" if nearest else "; lmx.toml lists every setting."
            logger.warning("the variable %s is no setting of lmx%s", name, meant)
    return found


def _keys() -> dict[str, list[str]]:
    return {section: list(values) for section, values in Settings().model_dump().items() if section != "models"}


def _config_error(error: ValidationError, path: Path | None) -> ConfigError:
    first = error.errors()[0]
    section, *rest = (str(part) for part in first["loc"])
    key = ".".join(rest)
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, _keys()[section], 1)
        problem = "there is no such setting" + (f" (did you mean {nearest[0]}?)" if nearest else "")
    else:
        problem = f"{first['msg']} (got {first['input']!r})"
    return ConfigError(
        f"[{section}] {key}: {problem}. It was set in {path or 'lmx.toml'}, in the variable "
        f"LMX_{section.upper()}_{key.upper()} or on the command line; lmx.toml lists every setting.",
        param=f"{section}.{key}",
    )
