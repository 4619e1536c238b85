"""Reads what an embedding model's folder says beside its configuration: sentence-transformers' files.

How hidden states become a vector (modules.json and what it names), how long an input may be, which prompts there are,
and to which sizes a vector may be cut. Without modules.json: what is usual. Reads small files only. Called by
``lmx.chat.encoder``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx.errors import ModelInvalid
from lmx.hub.folder import read_json
from lmx.protocol import Pooling

ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "modernbert", "nomic_bert", "nomic-bert")
"""Architectures that read and never write, as config.json and GGUF files call them."""

_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
"""In the order in which sentence-transformers puts several behind each other."""
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {"Tanh": "tanh", "Identity": ""}
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")
_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Their positions begin behind that of the padding token."""
_NO_LIMIT = 10**9
"""transformers writes 10^30 for "no limit"."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """What there is to know of an embedding model besides its weights."""

    pooling: Pooling
    max_tokens: int
    """Longest input, special tokens included; 0: not said."""
    lowercase: bool
    prompts: Mapping[str, str]
    """What goes before a text for a purpose: {"query": "Instruct: …"}."""
    prompts_count: bool
    """Whether the pooling takes the prompt's tokens in."""
    default_prompt: str | None
    dimensions: tuple[int, ...]
    """To which a vector may be cut (Matryoshka)."""
    any_dimension: bool
    """It may be cut to any."""


def read_sentence(folder: Path) -> Sentence:
    """Raises ModelInvalid for a module that is not built, naming it."""
    config = _optional(folder / "config.json")
    texts = _optional(folder / "config_sentence_transformers.json")
    modules = folder / "modules.json"
    pooling, transformer, prompts_count = Pooling(), folder, True
    if ranks(config):
        pooling = Pooling("rank", normalize=_sigmoid(config))
    elif modules.is_file():
        pooling, transformer, prompts_count = _read_modules(folder, modules)
    sentence = _optional(transformer / "sentence_bert_config.json") or _optional(folder / "sentence_bert_config.json")
    prompts = texts.get("prompts")
    sizes = [source.get(name) for source in (texts, config) for name in ("matryoshka_dims", "matryoshka_dimensions")]
    return Sentence(
        pooling=pooling,
        max_tokens=_max_tokens(folder, config, sentence),
        lowercase=sentence.get("do_lower_case") is True,
        prompts={str(key): value for key, value in prompts.items() if isinstance(value, str)}
        if isinstance(prompts, dict)
        else {},
        prompts_count=prompts_count,
        default_prompt=texts.get("default_prompt_name"),
        dimensions=tuple(sorted({size for some in sizes if isinstance(some, list) for size in some})),
        any_dimension=any(source.get("is_matryoshka") is True for source in (texts, config)),
    )


def ranks(config: Mapping[str, Any]) -> bool:
    """A cross-encoder: a classifier of one class behind an encoder."""
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and str(architectures[:1]).find("ForSequenceClassification") >= 0
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    return named and count == 1


def _sigmoid(config: dict[str, Any]) -> bool:
    """Whether scores are squeezed into 0 to 1, as is usual; some models' files say that they are not."""
    texts = config.get("sentence_transformers")
    name = (texts.get("activation_fn") if isinstance(texts, dict) else None) or config.get(
        "sbert_ce_default_activation_function"
    )
    return not str(name or "").endswith("Identity")


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, why="it describes an embedding model") if path.is_file() else {}


def _max_tokens(folder: Path, config: dict[str, Any], sentence: dict[str, Any]) -> int:
    limits = [sentence.get("max_seq_length")]
    if not limits[0]:
        positions = next((config[name] for name in _POSITIONS if isinstance(config.get(name), int)), 0)
        if config.get("model_type") in _BEHIND_PADDING:
            positions -= config.get("pad_token_id", 1) + 1
        limits = [positions, _optional(folder / "tokenizer_config.json").get("model_max_length")]
    return int(min((limit for limit in limits if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT), default=0))


def _read_modules(folder: Path, path: Path) -> tuple[Pooling, Path, bool]:
    """The pooling, the transformer's folder, and whether prompts count."""
    try:
        modules = [
            (str(module["type"]).rpartition(".")[2], folder / module["path"])
            for module in json.loads(path.read_bytes())
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelInvalid(f"{path} is no list of modules ({error!r}). Download the file again.") from None
    mode, dense, normalize, transformer, prompts_count = "", [], False, folder, True
    for kind, where in modules:
        match kind:
            case "Transformer":
                transformer = where
            case "Pooling" if not mode:
                config = read_json(where / "config.json", why="it says how vectors are made")
                mode, prompts_count = _mode(where, config), config.get("include_prompt", True) is not False
            case "Dense" if mode and not normalize:
                dense.append(_dense(where))
            case "Normalize" if mode:
                normalize = True
            case "Dropout":
                pass
            case _:
                raise ModelInvalid(
                    f"{path} has a module {kind!r} that lmx does not build there; it knows Transformer, Pooling, Dense "
                    "and Normalize, in this order."
                )
    if not mode:
        raise ModelInvalid(f"{path} names no Pooling, without which there is no vector of a text.")
    return Pooling(mode, tuple(dense), normalize), transformer, prompts_count


def _mode(folder: Path, config: dict[str, Any]) -> str:
    asked = config.get("pooling_mode") or [new for old, new in _OLD_MODES.items() if config.get(old)] or "mean"
    names = [asked] if isinstance(asked, str) else asked
    unknown = [name for name in names if name not in _MODES]
    if unknown:
        raise ModelInvalid(f"{folder / 'config.json'}: pooling_mode {unknown[0]!r}; lmx knows {', '.join(_MODES)}.")
    return "+".join(_MODES[name] for name in names)


def _dense(folder: Path) -> str:
    """Its folder and activation, as ``Pooling.dense`` has them."""
    config = read_json(folder / "config.json", why="it describes a linear layer")
    name = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise ModelInvalid(f"{folder / 'config.json'}: activation {name!r}; lmx knows {', '.join(_ACTIVATIONS)}.")
    if not (folder / "model.safetensors").is_file():
        raise ModelInvalid(f"{folder} has no model.safetensors; download the whole repository, or convert its .bin.")
    return f"{folder}|{_ACTIVATIONS[name]}"
