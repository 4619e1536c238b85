"""The settings that hold now, and their change while the server runs.

Everything that works for requests reads ``Live.now`` each time, so that a change really counts. A change is checked
whole before any part of it counts, and with ``persist`` it is in lmx.toml before it counts. Made by the command line,
changed by ``lmx.api.admin.config``.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from lmx.config import keys, persist
from lmx.config.keys import MODELS, dotted
from lmx.config.settings import NamedModelSettings, Settings
from lmx.config.sources import Layer, Source, Sources, parse_toml
from lmx.errors import ConfigError

MASK = "***"
"""What is shown of a secret."""

Check = Callable[[Settings], None]
Watcher = Callable[[Settings], None]

logger = logging.getLogger("lmx")


@dataclass(frozen=True, slots=True)
class Changed:
    applied: Mapping[str, Any]
    """What holds now of the keys that were given, secrets masked."""
    needs_restart: tuple[str, ...]
    """Keys that are in the file, and count when the server starts next."""
    needs_reload: tuple[str, ...]
    """Keys that hold for models that are loaded from now on."""
    persisted: Path | None
    overridden: Mapping[str, str]
    """Keys that are in the file, and that a variable or the command line will override at the next start."""


class Live:
    """``path``: the file in which changes are persisted, which the server reads at its next start."""

    def __init__(self, sources: Sources, path: Path) -> None:
        self._sources = sources
        self._now = sources.settings()
        self._path = path.absolute()
        self._pending: dict[keys.Path, Any] = {}
        self._changing = trio.Lock()
        self._watchers: list[Watcher] = []

    @property
    def now(self) -> Settings:
        return self._now

    @property
    def file(self) -> Path | None:
        """The file that was read or written; None: there is none."""
        return self._sources.path

    @property
    def sources(self) -> dict[str, Source]:
        """Who said each setting's value. [models] has those that are set."""
        return {dotted(path): self._sources.source(path) for path in self._paths()}

    @property
    def pending(self) -> dict[str, Any]:
        """What was persisted, and counts when the server starts next."""
        return {dotted(path): value for path, value in self._pending.items()}

    def masked(self) -> dict[str, Any]:
        """All that holds now, by section; secrets masked. Of models what is set."""
        tables = self._now.model_dump(mode="json", exclude={MODELS})
        for path in self._paths():
            if path[0] != MODELS:
                tables[path[0]][path[1]] = _masked(path, tables[path[0]][path[1]])
        return tables | {MODELS: self._now.model_dump(mode="json", include={MODELS}, exclude_none=True)[MODELS]}

    def counting(self, applies: str) -> list[str]:
        """The keys whose change counts then; of models' own ones, those that are set."""
        return [dotted(path) for path in self._paths() if keys.applies(path) == applies]

    def watch(self, watcher: Watcher) -> None:
        """Call ``watcher`` now and after each change, in the event loop."""
        watcher(self._now)
        self._watchers.append(watcher)

    async def change(
        self, wanted: Mapping[str, Any], *, persisted: bool = False, check: Check = lambda settings: None
    ) -> Changed:
        """Set the settings called so; None takes back what was changed, and with ``persisted`` what the file says.

        ``check`` raises for settings that must not be: it sees those that would hold, and with ``persisted`` those of
        the next start, too (both in a thread).

        Raises ConfigError that names key and value, or what ``check`` does: then nothing has changed, in the file
        neither. Cancelled: all is changed or nothing.
        """
        given = _parsed(wanted)
        if not persisted:
            _refuse_useless(given)
        async with self._changing:
            given = self._as_read(given)
            # Not abandoned: the answer tells whether it is in the file.
            step = await trio.to_thread.run_sync(self._prepare, given, check, persisted)
            before, self._now, self._sources, self._pending = self._now, step.now, step.sources, step.pending
            for watcher in self._watchers:
                try:
                    watcher(self._now)
                except Exception:  # the settings hold all the same, and the others must hear of them
                    logger.exception("a change of the settings was not taken up everywhere")
        return Changed(
            applied={dotted(path): _masked(path, _value(self._now, path)) for path in given if not _at_start(path)},
            needs_restart=tuple(dotted(path) for path in given if path in self._pending),
            needs_reload=tuple(
                dotted(path)
                for path in given
                if keys.applies(path) == "at load" and _value(before, path) != _value(self._now, path)
            ),
            persisted=self._path if persisted else None,
            overridden={dotted(path): told for path in given if (told := self._later(path))} if persisted else {},
        )

    def _as_read(self, given: Mapping[keys.Path, Any]) -> dict[keys.Path, Any]:
        """The values as the settings have them ("8080" is a number). Raises ConfigError."""
        settings = replace(self._sources, live=_over(self._sources.live, self._whole(given))).settings()
        return {path: None if value is None else _value(settings, path) for path, value in given.items()}

    def _prepare(self, given: Mapping[keys.Path, Any], check: Check, persisted: bool) -> "_Step":
        """What will hold, and with ``persisted`` writes the file. Blocking; changes nothing here."""
        running = {path: value for path, value in given.items() if not _at_start(path)}
        sources = replace(self._sources, live=_over(self._sources.live, self._whole(running)))
        if not persisted:
            now = sources.settings()
            check(now)
            return _Step(now, sources, self._pending)
        text = persist.read(self._path)
        there = parse_toml(text.removeprefix(persist.MARK), self._path)
        written = persist.render(text, given, self._path)
        wanted = _with_entries(there, given)
        if parse_toml(written.removeprefix(persist.MARK), self._path) != wanted:
            raise ConfigError(
                f"{self._path} is written in a way in which {', '.join(map(dotted, given))} cannot be set without "
                "changing more; edit it by hand. Nothing was changed.",
                param="persist",
            )
        # Of the file what was read at the start: what somebody wrote into it since counts at the next start.
        roots = list(dict.fromkeys(path if path[0] == MODELS else path[:2] for path in running))
        file = _over(self._sources.file, {root: wanted.get(root) for root in roots})
        live = {
            path: value
            for path, value in sources.live.items()
            if path not in roots or file.get(path) != value or self._later(path)
        }
        sources = replace(sources, file=file, live=live, path=self._path)
        now, later = sources.settings(), replace(sources, file=wanted, live={}).settings()
        check(now)
        check(later)
        pending = {path for path in (*given, *self._pending) if _at_start(path)}
        step = _Step(now, sources, {p: _value(later, p) for p in pending if _value(later, p) != _value(now, p)})
        persist.write(self._path, written)
        return step

    def _whole(self, given: Mapping[keys.Path, Any]) -> dict[keys.Path, Any]:
        """Entries of tables become the whole tables that they make of those that hold now."""
        whole: dict[keys.Path, Any] = {}
        for path, value in given.items():
            if not _is_entry(path):
                whole[path] = value
                continue
            root = path[:2]
            table = dict(whole.get(root) or _value(self._now, root))
            table.pop(path[2], None)
            whole[root] = table if value is None else table | {path[2]: value}
        return whole

    def _later(self, path: keys.Path) -> str:
        """Which source will override the file."""
        if path[:2] in self._sources.command_line:
            return "the command line"
        return f"the variable {keys.variable(path)}" if path[:2] in self._sources.variables else ""

    def _paths(self) -> list[keys.Path]:
        fixed = [(section, key) for section, kind in keys.SECTIONS.items() for key in kind.model_fields]
        models = [
            (MODELS, name, key)
            for name, section in self._now.models.items()
            for key, value in section
            if value is not None
        ]
        return [*fixed, *models]


@dataclass(frozen=True, slots=True)
class _Step:
    """What a change makes of everything."""

    now: Settings
    sources: Sources
    pending: dict[keys.Path, Any]


def _parsed(wanted: Mapping[str, Any]) -> dict[keys.Path, Any]:
    """By path; a model's whole section as its settings. Raises ConfigError."""
    given: dict[keys.Path, Any] = {}
    for key, value in wanted.items():
        path = keys.parse_key(key)
        for own, content in _own(path, value).items():
            if any(own[: len(other)] == other[: len(own)] for other in given):
                raise ConfigError(f"{dotted(own)} is set twice.", param=key)
            _refuse(own, content, key)
            given[own] = content
    return given


def _own(path: keys.Path, value: Any) -> dict[keys.Path, Any]:
    if path[0] != MODELS or len(path) == 3:
        return {path: value}
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{dotted(path)}: a model's settings are a table (got {value!r}).", param=dotted(path))
    # The whole section, as it shall be.
    return {(*path, key): (value or {}).get(key) for key in {**NamedModelSettings.model_fields, **(value or {})}}


def _refuse(path: keys.Path, value: Any, key: str) -> None:
    if path[0] == MODELS and path[2] not in NamedModelSettings.model_fields:
        keys.parse_key(dotted(path))
    if keys.applies(path) == "by hand":
        raise ConfigError(
            f"{dotted(path)} names a program or a library that runs on the server's machine: set it in lmx.toml, and "
            "not from here.",
            param=key,
        )
    if keys.is_secret(path):
        values = list(value.values()) if isinstance(value, Mapping) else [value]
        if MASK in values:
            raise ConfigError(
                f"{dotted(path)}: {MASK!r} stands for a key that is not shown; leave it out, or set the key itself. "
                f"Single keys are set as {dotted(path[:2])}.NAME.",
                param=key,
            )


def _refuse_useless(given: Mapping[keys.Path, Any]) -> None:
    for path in given:
        if _at_start(path):
            raise ConfigError(
                f"{dotted(path)} counts when the server starts: change it with `persist`, which writes it into the "
                "configuration file, and restart the server.",
                param=dotted(path),
            )


def _at_start(path: keys.Path) -> bool:
    return keys.applies(path) == "at start"


def _is_entry(path: keys.Path) -> bool:
    """It is one of a table's, which is a setting."""
    return path[0] != MODELS and len(path) == 3


def _over(layer: Layer, given: Mapping[keys.Path, Any]) -> dict[keys.Path, Any]:
    """``layer`` with ``given`` over it; None takes out."""
    return {path: value for path, value in {**layer, **given}.items() if value is not None}


def _with_entries(layer: Layer, given: Mapping[keys.Path, Any]) -> dict[keys.Path, Any]:
    """The same, where ``given`` may have entries of tables; as a file says it."""
    made = dict(layer)
    for path, value in given.items():
        root = path[:2] if _is_entry(path) else path
        if root != path:
            table = {name: content for name, content in made.get(root, {}).items() if name != path[2]}
            if value is None and root not in made:
                continue
            value = table if value is None else table | {path[2]: value}
        if value is None:
            made.pop(root, None)
        else:
            made[root] = value
        if path[0] == MODELS:
            made.pop(path[:2], None)  # the section was empty
    return made


def _value(settings: Settings, path: keys.Path) -> Any:
    """None: a model or an entry that there is not."""
    value: Any = settings.model_dump(mode="json", include={path[0]})
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def masked(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, without its secrets, for the log. Of what is no setting nobody knows whether it is one."""
    return {key: value if _is_open(key) else MASK for key, value in wanted.items()}


def _is_open(key: str) -> bool:
    try:
        path = keys.parse_key(key)
    except ConfigError:
        return False
    return path[0] == MODELS or not keys.is_secret(path)


def _masked(path: keys.Path, value: Any) -> Any:
    if not keys.is_secret(path) or value is None:
        return value
    return dict.fromkeys(value, MASK) if isinstance(value, Mapping) else MASK
