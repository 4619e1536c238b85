"""Writes changed settings into lmx.toml, of which everything else stays as it is: comments, order, spelling.

``render`` is pure; ``write`` replaces the file in one step, so that whoever reads it sees the old one or the new one.
Blocking. Called by ``lmx.config.live``.
"""

import os
import secrets
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import InlineTable, Item, Table

from lmx.config.keys import MODELS
from lmx.config.keys import Path as Key
from lmx.errors import ConfigError

PRIVATE = 0o600
"""The mode of a new file: it may hold keys."""
MARK = "\ufeff"
"""A byte order mark, which some editors write."""


def read(path: Path) -> str:
    """The file's text, "" for one that does not exist. Raises ConfigError."""
    try:
        # Not read_text(), which would turn the line ends of Windows into others.
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read, so nothing was changed: {error}.", param="persist") from None


def render(text: str, changes: Mapping[Key, Any], path: Path) -> str:
    """``text`` with ``changes``; None takes a setting out. Raises ConfigError for a text that is no TOML."""
    mark = MARK if text.startswith(MARK) else ""
    try:
        document = tomlkit.parse(text.removeprefix(MARK))
        for key, value in changes.items():
            if value is None:
                _remove(document, key)
            else:
                _set(document, key, value)
        return mark + tomlkit.dumps(document)
    except (TOMLKitError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not valid TOML any more, so nothing was changed: {error}.", param="persist"
        ) from None


def _set(document: MutableMapping[str, Any], key: Key, value: Any) -> None:
    table = document
    for depth, part in enumerate(key[:-1], 1):
        if part not in table:
            inline = isinstance(table, InlineTable) or (depth == 2 and key[0] != MODELS)
            # [models] alone says nothing: it needs no line before [models."name"].
            table[part] = tomlkit.inline_table() if inline else tomlkit.table(is_super_table=part == MODELS)
        table = table[part]
    table[key[-1]] = _item(value)


def _item(value: Any) -> Item:
    if isinstance(value, Mapping):
        table = tomlkit.inline_table()
        table.update(value)
        return table
    item: Item = tomlkit.item(value)
    return item


def _remove(document: MutableMapping[str, Any], key: Key) -> None:
    table = document
    for part in key[:-1]:
        if part not in table:
            return
        table = table[part]
    table.pop(key[-1], None)
    if key[0] == MODELS and len(key) == 3 and not table and isinstance(table, Table | InlineTable):
        del document[MODELS][key[1]]  # its last setting is gone


def write(path: Path, text: str) -> None:
    """Replace the file at ``path``, which keeps its mode and owner; a link stays one.

    Raises ConfigError; then the file is as it was.
    """
    target = path.resolve()
    try:
        found = target.stat() if target.exists() else None
        if found is not None and not os.access(target, os.W_OK):
            raise PermissionError(None, "it is read-only")
        beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "wb") as file:
                if found is not None:
                    os.fchmod(file.fileno(), found.st_mode & 0o7777)
                    with suppress(PermissionError):  # somebody else's, whom the file does not let in any more
                        os.fchown(file.fileno(), found.st_uid, found.st_gid)
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
        _sync_folder(target.parent)
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written, so nothing was changed: {error.strerror}.", param="persist"
        ) from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
