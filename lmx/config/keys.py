"""The names of settings: ``server.port``, ``server.admin_keys.root``, ``models."org/name".context_length``, as TOML
writes dotted keys; and what the fields of ``lmx.config.settings`` say of each. Pure.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from lmx.config.settings import Applies, NamedModelSettings, Section, Settings
from lmx.errors import ConfigError

Path = tuple[str, ...]
"""A section and a key; or "models", a model's name, and a key."""

MODELS = "models"
SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
"""Those that stand in lmx.toml once."""
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_LEAF = "the value of a dotted key"


def dotted(path: Path) -> str:
    """As TOML writes it."""
    return ".".join(part if _BARE.fullmatch(part) else _quoted(part) for part in path)


def _quoted(part: str) -> str:
    # JSON's escapes are TOML's, and it leaves letters as they are.
    shown = part.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\u{ord(found[0]):04x}", shown) + '"'


def shown(path: Path) -> str:
    """As people look for it in lmx.toml: ``[server] port``."""
    return (
        f"[{path[0]}] {dotted(path[1:])}" if path[0] != MODELS or len(path) < 3 else f"[{dotted(path[:2])}] {path[2]}"
    )


def parse_key(key: str) -> Path:
    """The path that ``key`` writes: of a setting, of an entry of one that is a table, or of a model's whole section.

    Raises ConfigError for what is no setting, with what was probably meant.
    """
    path = _split(key)
    section = path[0]
    if section == MODELS:
        if len(path) > 3:
            meant = dotted((MODELS, ".".join(path[1:-1]), path[-1]))
            raise _unknown(key, f"a model's name that holds dots is quoted: {meant}")
        if len(path) == 1:
            raise _unknown(key, 'name a model, and one of its settings: models."org/name".context_length')
        if len(path) == 3:
            _check_known(key, path[2], NamedModelSettings.model_fields)
        return path
    _check_known(key, section, [*SECTIONS, MODELS])
    if len(path) == 1:
        raise _unknown(key, f"it is a section; name one of its settings: {', '.join(SECTIONS[section].model_fields)}")
    _check_known(key, path[1], SECTIONS[section].model_fields)
    if len(path) > (3 if is_table(path) else 2):
        raise _unknown(key, f"{dotted(path[:2])} has no parts")
    return path


def _split(key: str) -> Path:
    try:
        value: Any = tomllib.loads(f'{key} = "{_LEAF}"') if "\n" not in key else None
    except (tomllib.TOMLDecodeError, RecursionError):
        value = None
    path: list[str] = []
    while isinstance(value, dict) and len(value) == 1:
        part, value = next(iter(value.items()))
        path.append(part)
    if value != _LEAF:
        raise _unknown(key, 'names are like server.port, or models."org/name".context_length')
    return tuple(path)


def _check_known(key: str, part: str, known: Iterable[str]) -> None:
    if part not in known:
        raise _unknown(key, suggestion(part, known))


def suggestion(part: str, known: Iterable[str]) -> str:
    """What was probably meant, else all that there is."""
    names = list(known)
    nearest = difflib.get_close_matches(part, names, 1)
    return f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(names)}"


def _unknown(key: str, hint: str) -> ConfigError:
    end = "" if hint.endswith("?") else "."
    return ConfigError(f"There is no setting {key[:200]!r}: {hint}{end}", param=key[:200])


def field_of(path: Path) -> FieldInfo:
    """Of a setting that there is."""
    if path[0] == MODELS:
        return NamedModelSettings.model_fields[path[2]]
    return SECTIONS[path[0]].model_fields[path[1]]


def is_table(path: Path) -> bool:
    """Whether the setting is a table of names, each of which can be set alone."""
    return path[0] != MODELS and get_origin(field_of(path).annotation) is dict


def applies(path: Path) -> Applies:
    """When a change of it counts."""
    told: Applies = _extra(path).get("applies", "at once")
    return told


def is_secret(path: Path) -> bool:
    """Whether its value must not be shown; of a table, its values."""
    return bool(_extra(path).get("secret"))


def _extra(path: Path) -> Mapping[str, Any]:
    extra = field_of(path).json_schema_extra
    return extra if isinstance(extra, Mapping) else {}


def variable(path: Path) -> str:
    """The variable that sets it; models' own settings have none."""
    return f"LMX_{path[0]}_{path[1]}".upper() if path[0] != MODELS else ""


def flat(tables: Mapping[str, Any]) -> dict[Path, Any]:
    """{section: {key: value}} by path. What is no table where there should be one stays as it is, to be refused."""
    return dict(_flat(tables))


def _flat(tables: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    for section, values in tables.items():
        for key, value in values.items():
            if section == MODELS and isinstance(value, Mapping) and value:
                yield from (((section, key, own), content) for own, content in value.items())
            else:
                yield (section, key), value


def nested(values: Mapping[Path, Any]) -> dict[str, Any]:
    """``flat`` undone."""
    tables: dict[str, Any] = {}
    for (section, *middle, last), value in values.items():
        table = tables.setdefault(section, {})
        for part in middle:
            table = table.setdefault(part, {})
        if value == {}:  # a model's section without settings, to which another source may add some
            table.setdefault(last, {})
        else:
            table[last] = value
    return tables
