"""How a model is loaded: what a request asked for, before what ``[models."name"]`` says, before what holds for all."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from lmx.config import BackendName, Settings, Speculation

Source = Literal["request", "model", "default"]


class Applied(NamedTuple):
    """A value that holds, and who said so."""

    value: Any
    source: Source


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a request to load asks for; None: nothing."""

    context_length: int | None = None
    max_rows: int | None = None
    kv_bits: int | None = None
    kv_budget_bytes: int | None = None
    draft_model: str | None = None
    speculation: Speculation | None = None
    ttl_s: float | None = None
    pin: bool | None = None

    def given(self) -> dict[str, Any]:
        """Those that are something."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def over(self, earlier: "LoadOptions") -> "LoadOptions":
        """What a reload keeps of ``earlier``."""
        return LoadOptions(**(earlier.given() | self.given()))


@dataclass(frozen=True, slots=True)
class Options:
    """What holds for one load."""

    context_length: int
    max_rows: int
    kv_bits: int
    kv_budget_bytes: int
    backend: BackendName
    draft_model: str
    """By any of its names; "": none."""
    speculation: Speculation
    ttl_s: float
    """Seconds without a request after which it is unloaded; 0: never."""
    pin: bool
    tool_format: str
    reasoning_format: str
    applied: Mapping[str, Applied]
    """All of the above, with their sources."""
    names: tuple[str, ...]
    """The model's, by any of which ``[models."name"]`` may call it."""


def options_of(settings: Settings, names: list[str], given: LoadOptions, *, jit: bool) -> Options:
    """For the model called ``names``. ``jit``: a request for an answer loads it, so that it goes when it is idle."""
    section, asked = settings.named(names), given.given()
    model = settings.model
    backend = next((model.backends[name] for name in names if name in model.backends), model.backend)
    defaults = {
        "context_length": model.context_length,
        "max_rows": settings.engine.max_rows,
        "kv_bits": model.kv_bits,
        "kv_budget_bytes": settings.engine.kv_budget_bytes,
        "backend": backend,
        "draft_model": "",
        "speculation": model.speculation,
        "ttl_s": model.jit_ttl_s if jit else 0.0,
        "pin": False,
        "tool_format": model.tool_format,
        "reasoning_format": model.reasoning_format,
    }

    def choose() -> Iterator[tuple[str, Applied]]:
        for name, default in defaults.items():
            if name in asked:
                yield name, Applied(asked[name], "request")
            elif (own := getattr(section, name)) is not None:
                yield name, Applied(own, "model")
            else:
                yield name, Applied(default, "default")

    applied = dict(choose())
    return Options(**{name: value for name, (value, _) in applied.items()}, applied=applied, names=tuple(names))
