"""Reads what a model folder says about text besides tokenizer.json: named tokens, chat template, ends of generation.

Called by ``ChatModel.load``. The files differ much between models and ages; everything but a contradiction is taken.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from lmx.chat.prompt.template import ChatTemplate
from lmx.errors import ModelInvalid
from lmx.hub.folder import read_json

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; either may be missing."""
    return _optional_json(folder / "special_tokens_map.json") | _optional_json(folder / "tokenizer_config.json")


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and so on, as the strings that templates print."""
    values = {name: settings.get(name) for name in _NAMED_TOKENS}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def read_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """From every place that transformers reads one from. None: the model has none. Raises ModelInvalid."""
    sources: dict[str, str] = {}
    path = folder / "tokenizer_config.json"
    try:
        # Later ones win: the files of their own are what newer versions write.
        sources |= _named_templates(settings.get("chat_template"))
        for path in (folder / "processor_config.json", folder / "chat_template.json"):
            sources |= _named_templates(_optional_json(path).get("chat_template"))
        for path in sorted((folder / "additional_chat_templates").glob("[!.]*.jinja")):
            sources[path.stem] = _read_text(path)
        path = folder / "chat_template.jinja"
        if path.is_file():
            sources["default"] = _read_text(path)
    except (TypeError, KeyError):
        raise ModelInvalid(f"the chat_template in {path} is neither a string nor named templates.") from None
    try:
        return ChatTemplate(sources, named_tokens(settings)) if sources else None
    except jinja2.TemplateSyntaxError as error:
        raise ModelInvalid(
            f"a chat template of {folder} does not compile: line {error.lineno}: {error.message}."
        ) from None


def _named_templates(value: Any) -> dict[str, str]:
    """A string, {name: template}, or a list of {"name": …, "template": …}. Raises TypeError or KeyError."""
    if not value:
        return {}
    if isinstance(value, str):
        return {"default": value}
    named = value if isinstance(value, dict) else {entry["name"]: entry["template"] for entry in value}
    if not all(isinstance(text, str) for item in named.items() for text in item):
        raise TypeError
    return named


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace")


def read_eos_ids(folder: Path, settings: Mapping[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """Every token that one of the files calls the end. Raises ModelInvalid if none does."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _optional_json(folder / name).get("eos_token_id")
        ids.update(token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))
    eos = tokenizer.token_to_id(named_tokens(settings).get("eos_token", ""))
    if eos is not None:
        ids.add(eos)
    if not ids:
        raise ModelInvalid(f"{folder} names no end-of-text token: config.json needs an eos_token_id.")
    return frozenset(ids)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, why="it describes the tokenizer") if path.is_file() else {}
