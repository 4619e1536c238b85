"""What can be set, with the defaults: the sections of lmx.toml as frozen classes, which check their values.

Beside each field stands when a change of it counts. Plain: at once. ``at_load``: when a model is next loaded.
``at_start``: when the server next starts. ``by_hand``: as ``at_load``, but it names what runs on this machine, so that
only who may write lmx.toml may set it, never a client. Pure; imported by everybody who reads settings.
"""

import os
import sys
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Key = Annotated[str, Field(pattern=r"^[^\x00-\x20\x7f]([^\x00-\x1f\x7f]*[^\x00-\x20\x7f])?$")]
"""An API key must fit into a header: not empty, no control characters, no blanks around it."""

ModelName = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]

BackendName = Literal["auto", "mlx", "llama"]

Applies = Literal["at once", "at load", "at start", "by hand"]


def at_load(default: Any, **limits: Any) -> Any:
    return Field(default, json_schema_extra={"applies": "at load"}, **limits)


def at_start(default: Any, **limits: Any) -> Any:
    return Field(default, json_schema_extra={"applies": "at start"}, **limits)


def by_hand(default: Any, **limits: Any) -> Any:
    return Field(default, json_schema_extra={"applies": "by hand"}, **limits)


def secret(default: Any) -> Any:
    """Never shown."""
    return Field(default, json_schema_extra={"secret": True})


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        if isinstance(value, bool) and info.field_name is not None:
            kind = cls.model_fields[info.field_name].annotation
            if kind is not bool and bool not in get_args(kind):
                raise PydanticCustomError("no_flag", "Input should be no boolean")
        return value


class ServerSettings(Section):
    host: str = at_start("127.0.0.1")
    port: int = at_start(1234, ge=0, le=65535)
    drain_s: float = Field(30.0, ge=0)
    max_body_bytes: int = Field(32 * 1024 * 1024, gt=0)
    keep_alive_s: float = Field(75.0, gt=0)
    write_timeout_s: float = Field(20.0, gt=0)
    sse_comment_s: float = Field(10.0, gt=0)
    request_timeout_s: float = Field(0.0, ge=0)
    allowed_hosts: list[str] = []
    cors_origins: list[str] = []
    inference_keys: dict[str, Key] = secret({})
    admin_keys: dict[str, Key] = secret({})
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"
    log_prompts: bool = False


Speculation = Literal["auto", "lookup", "off"]


class KVBits(IntEnum):
    """Of a key's or a value's number."""

    WHOLE = 16
    EIGHT = 8
    FOUR = 4


class ModelSettings(Section):
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
    cache_dir: str = at_start("")
    backend: BackendName = at_load("auto")
    backends: dict[str, BackendName] = at_load({})
    context_length: int = at_load(0, ge=0, le=2**31 - 1)
    kv_bits: KVBits = at_load(KVBits.WHOLE)
    speculation: Speculation = at_load("auto")
    tool_format: str = at_load("")
    reasoning_format: str = at_load("")
    preload: list[str] = at_start([])
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


class EngineSettings(Section):
    max_rows: int = at_load(8, ge=1, le=512)
    max_queue: int = Field(1024, ge=1)
    kv_budget_bytes: int = at_load(0, ge=0, le=2**63 - 1)
    max_chunk_tokens: int = at_load(0, ge=0, le=2**20, multiple_of=32)
    itl_target_ms: float = at_load(250.0, gt=0)
    lookahead: Literal["auto", "on", "off"] = at_load("auto")
    batching: Literal["auto", "single"] = at_load("auto")
    compile: Literal["auto", "on", "off"] = at_load("auto")
    hang_timeout_s: float = Field(30.0, gt=0)
    load_timeout_s: float = Field(1800.0, gt=0)
    free_timeout_s: float = Field(30.0, gt=0)
    restart_backoff_s: float = at_load(0.5, gt=0)
    restart_backoff_max_s: float = at_load(30.0, gt=0)
    restart_cooldown_s: float = at_load(60.0, ge=0)
    max_restarts: int = at_load(5, ge=0)
    recycle_hours: float = Field(0.0, ge=0)
    recycle_growth_bytes: int = Field(8 * 1024**3, ge=0, le=2**63 - 1)
    recycle_traces: int = Field(0, ge=0)
    recycle_handles: float = Field(0.8, ge=0, le=1)
    recycle_wait_s: float = Field(3600.0, ge=0)
    recycle_drain_s: float = Field(30.0, ge=0)
    max_unread_tokens: int = Field(8192, ge=1)
    grammar_compile_s: float = at_load(10.0, gt=0)
    grammar_mask_ms: float = at_load(20.0, gt=0)
    prefix_cache: bool = at_load(True)
    prefix_ram_bytes: int = at_load(0, ge=0, le=2**63 - 1)
    prefix_disk_bytes: int = at_load(-1, ge=-1, le=2**63 - 1)
    prefix_dir: str = at_start("")
    openblas: Annotated[str, AfterValidator(_library)] = by_hand("auto")
    mlx_ops_per_buffer: int = at_load(0, ge=0, le=2**31 - 1)
    mlx_mb_per_buffer: int = at_load(0, ge=0, le=2**31 - 1)
    command: list[str] = by_hand([])


class HubSettings(Section):
    data_dir: str = at_start("")
    models_dir: str = at_start("")
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


class MemorySettings(Section):
    limit_bytes: int = Field(0, ge=0, le=2**63 - 1)
    policy: Literal["refuse", "wait", "preempt"] = "wait"
    wait_s: float = Field(120.0, ge=0)
    drain_s: float = Field(30.0, ge=0)


class NamedModelSettings(Section):
    """``[models."name"]``: of one model; None where it has none of its own. The last five are for requests that leave
    them open, before what the model's makers say."""

    context_length: int | None = at_load(None, ge=0, le=2**31 - 1)
    max_rows: int | None = at_load(None, ge=1, le=512)
    kv_bits: KVBits | None = at_load(None)
    kv_budget_bytes: int | None = at_load(None, ge=0, le=2**63 - 1)
    backend: BackendName | None = at_load(None)
    draft_model: str | None = at_load(None)
    speculation: Speculation | None = at_load(None)
    ttl_s: float | None = Field(None, ge=0)
    pin: bool | None = None
    tool_format: str | None = at_load(None)
    reasoning_format: str | None = at_load(None)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)

    @property
    def sampling(self) -> dict[str, float]:
        """What it says of sampling."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class LlamaSettings(Section):
    gpu_layers: int = at_load(-1, ge=-1, le=10_000)
    threads: int = at_load(0, ge=0, le=512)
    mmap: bool = at_load(True)


class Settings(Section):
    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    llama: LlamaSettings = LlamaSettings()
    hub: HubSettings = HubSettings()
    memory: MemorySettings = MemorySettings()
    models: dict[ModelName, NamedModelSettings] = {}

    @property
    def prefix_path(self) -> Path:
        """Where prefixes are kept on the disk: ``prefix_dir``, or beside converted models."""
        return (
            Path(self.engine.prefix_dir).expanduser() if self.engine.prefix_dir else self.model.cache_path / "prefixes"
        )

    def named(self, names: Iterable[str]) -> NamedModelSettings:
        """The section of the model that has these names, likeliest first; whatever their case."""
        sections = {name.casefold(): section for name, section in self.models.items()}
        found = (self.models.get(name) or sections.get(name.casefold()) for name in names)
        return next(filter(None, found), NamedModelSettings())
