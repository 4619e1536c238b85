"""Where settings come from: ``lmx.toml``, then ``LMX_<SECTION>_<KEY>`` variables, then the command line, then what was
changed while the server ran.

Each later source overrides the earlier one, key by key. A key that does not exist, or a value of the wrong kind, is a
``ConfigError`` that names the source, the key and what is allowed; nothing is guessed.
"""

import difflib
import logging
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import ValidationError

from lmx.config import keys
from lmx.config.keys import MODELS, SECTIONS, dotted, shown, suggestion, variable
from lmx.config.settings import NamedModelSettings, Settings
from lmx.errors import ConfigError

logger = logging.getLogger("lmx")

Source = Literal["default", "file", "variable", "command line", "live"]
Layer = Mapping[keys.Path, Any]

MOST_TOLD = 5
"""Mistakes of one configuration."""
SHOWN_CHARACTERS = 100
"""Of a wrong value."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What each source says, by path."""

    file: Layer = field(default_factory=dict)
    variables: Layer = field(default_factory=dict)
    command_line: Layer = field(default_factory=dict)
    live: Layer = field(default_factory=dict)
    path: Path | None = None
    """Of the file; None: there is none."""

    @classmethod
    def read(
        cls,
        path: Path | None = None,
        environ: Mapping[str, str] = os.environ,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> "Sources":
        """``overrides`` ({section: {key: value}}) come from the command line. Raises ConfigError for a file that cannot
        be read, and for sections that do not exist."""
        file = read_toml(path) if path is not None else {}
        return cls(file, keys.flat(_read_environ(environ)), keys.flat(overrides or {}), {}, path)

    def settings(self) -> Settings:
        """All of them together. Raises ConfigError."""
        merged: dict[keys.Path, Any] = {}
        for _, layer in self._layers():
            merged |= layer
        try:
            return Settings.model_validate(keys.nested(merged))
        except ValidationError as error:
            problems = dict.fromkeys(self._problem(found) for found in error.errors())
            told = [problem for problem, _ in list(problems)[:MOST_TOLD]]
            more = f" And {len(problems) - MOST_TOLD} more." if len(problems) > MOST_TOLD else ""
            param = next(iter(problems))[1]
            raise ConfigError(f"{' '.join(told)}{more} lmx.toml lists every setting.", param=param) from None

    def source(self, path: keys.Path) -> Source:
        """Whose value of ``path`` holds."""
        return next((name for name, layer in reversed(self._layers()) if path in layer), "default")

    def _told(self, path: keys.Path) -> str:
        """The same for people, of a part or the whole of a setting."""
        layers = reversed(self._layers())
        match next((name for name, layer in layers if any(_overlap(path, own) for own in layer)), "default"):
            case "file":
                return str(self.path)
            case "variable":
                return f"the variable {variable(path)}"
            case "command line":
                return "the command line"
            case "live":
                return "this change"
        return "nowhere"

    def _layers(self) -> list[tuple[Source, Layer]]:
        return [
            ("file", self.file),
            ("variable", self.variables),
            ("command line", self.command_line),
            ("live", self.live),
        ]

    def _problem(self, error: Mapping[str, Any]) -> tuple[str, str]:
        """In words, and the key that it is about."""
        is_name = error["loc"][-1] == "[key]"  # of a table's entry, or a model
        path = tuple(str(part) for part in (error["loc"][:-1] if is_name else error["loc"]))
        given = error["input"]
        if error["type"] == "extra_forbidden":
            what = f"there is no such setting ({_meant(path, given)})"
        elif path[0] == MODELS and len(path) == 2 and not is_name and not isinstance(given, Mapping):
            name = dotted(path)
            what = f"a model has a section of its own, [{name}] (got {_short(given)})"
        elif keys.is_secret(path[:2]) if path[0] != MODELS else False:
            what = f"{error['msg']} (a key is not shown)"
        else:
            what = f"{error['msg']} (got {_short(given)})"
        return f"{shown(path)}: {what}; it is set in {self._told(path)}.", dotted(path)


def _overlap(one: keys.Path, other: keys.Path) -> bool:
    return all(a == b for a, b in zip(one, other, strict=False))


def _meant(path: keys.Path, given: object) -> str:
    if path[0] != MODELS:
        return suggestion(path[-1], SECTIONS[path[0]].model_fields)
    if isinstance(given, Mapping):
        name = dotted((MODELS, ".".join(path[1:])))
        return f"a name that holds dots is quoted: [{name}]"
    return suggestion(path[-1], NamedModelSettings.model_fields)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def load_settings(
    path: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Settings:
    """What the sources say together. Raises ConfigError."""
    return Sources.read(path, environ, overrides).settings()


def read_toml(path: Path) -> Layer:
    """What the file says. Raises ConfigError."""
    try:
        return parse_toml(path.read_text(encoding="utf-8-sig"), path)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}.", param="--config") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.", param="--config") from None


def parse_toml(text: str, path: Path) -> Layer:
    """What the text of the file at ``path`` says. Raises ConfigError."""
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.", param="--config") from None
    for section, values in tables.items():
        if section not in Settings.model_fields or not isinstance(values, dict):
            known = ", ".join(f"[{name}]" for name in Settings.model_fields)
            raise ConfigError(f"{path}: [{section}] is not a section of lmx.toml; there are {known}.", param=section)
    return keys.flat(tables)


def _read_environ(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """``LMX_SERVER_PORT=8080`` is ``[server] port``; lists and tables are written as in TOML."""
    found: dict[str, dict[str, Any]] = {}
    known: list[str] = []
    for name, (section, key), setting in _variables():
        known.append(name)
        if name not in environ:
            continue
        value: Any = environ[name]
        if get_origin(setting) in (list, dict):
            try:
                value = tomllib.loads(f"value = {value}")["value"]
            except tomllib.TOMLDecodeError as error:
                shown_value = "" if keys.is_secret((section, key)) else f"={value!r}"
                raise ConfigError(f"{name}{shown_value} is not a TOML value: {error}.", param=name) from None
        found.setdefault(section, {})[key] = value
    sections = tuple(f"LMX_{section}_".upper() for section in Settings.model_fields)
    for name in sorted(name for name in environ if name.startswith("LMX_") and name not in known):
        nearest = difflib.get_close_matches(name, known, 1, cutoff=0.8)
        if nearest or name.startswith(sections):
            meant = f"; did you mean {nearest[0]}?" if nearest else "; lmx.toml lists every setting."
            logger.warning("the variable %s is no setting of lmx%s", name, meant)
    return found


def _variables() -> Iterator[tuple[str, tuple[str, str], Any]]:
    """Each one's name, setting and type. [models] has none: no variable can spell its names."""
    for section, kind in SECTIONS.items():
        for key, setting in kind.model_fields.items():
            yield variable((section, key)), (section, key), setting.annotation
