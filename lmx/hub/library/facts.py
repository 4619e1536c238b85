"""What a model's files say about it: small files and headers are read, no weights.

A model that is not whole is described as far as it is there, with the reason why it cannot be loaded; whatever stands
in a file, one model's trouble stays its own. Called by ``Library.scan`` for files that are new or have changed.
"""

import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx.errors import ModelInvalid
from lmx.hub import folder as folders
from lmx.hub.architectures import mlx_lm_version, mlx_refusal
from lmx.hub.folder import inspect_folder, read_json
from lmx.hub.gguf.file import GgufFile
from lmx.hub.gguf.parts import part_paths, quantization_of
from lmx.hub.library.entry import Format, ModelKind
from lmx.hub.library.places import Found
from lmx.hub.sentence import ENCODERS, ranks
from lmx.hub.shape import read_shape

_VERSION = 1
"""Raise it when other facts are read from the same files."""
_GGUF_ENCODERS = (
    *("modern-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert", "gemma-embedding"),
    "t5encoder",
)
"""llama.cpp's, besides ENCODERS."""
_NO_MODELS = ("mmproj", "adapter", "imatrix", "vocab")
"""What general.type says of GGUF files that are for a model."""
_NO_ARCHITECTURES = ("clip", "mmproj", "imatrix", "controlvector")
_USES_TOOLS = re.compile(r"\{[%{](?:(?![%}]\}).)*?\b(?:tools|available_tools|builtin_tools)\b", re.DOTALL)
"""In a template's code, not in its text."""
_REASONS = re.compile(
    r"</?(?:seed:|mm:)?think>|enable_thinking|reasoning_content|reasoning_effort|\[THINK\]|<\|channel\|?>|START_THINKING"
    r"|open_tag\('think'|BEGIN FINAL RESPONSE|Here is my thought process|begin_of_thought|inner_prefix|◁think▷"
    r"|<thought>|<reasoning>"
)
_VISION = ("vision_config", "vision_tower", "mm_vision_tower")
_MOST_JSON = 64 * 1024 * 1024


def version() -> str:
    """Facts of another version are to be read again."""
    return f"{_VERSION}, mlx-lm {mlx_lm_version()}"


@dataclass(frozen=True, slots=True)
class Facts:
    format: Format = "safetensors"
    kind: ModelKind = "llm"
    architecture: str = ""
    quantization: str = ""
    parameters: int = 0
    context_length: int = 0
    capabilities: tuple[str, ...] = ()
    problem: str = ""
    is_model: bool = True
    """False: the files are something else."""


def read_facts(found: Found) -> Facts:
    """Never raises but for what ends a process."""
    try:
        facts = _of_gguf(found) if found.is_gguf else _of_folder(found)
    except OSError as error:
        facts = Facts(problem=f"{found.path} cannot be read: {error.strerror or error}.")
    except Exception as error:  # files from strangers: too deep, too long, no text at all
        facts = Facts(problem=f"{found.path} cannot be read: {type(error).__name__} {error}.")
    return facts


def _of_folder(found: Found) -> Facts:
    folder = found.path
    config: dict[str, Any] = {}
    with suppress(ModelInvalid):
        config = read_json(folder / "config.json", why="it describes the model")
    problem, parameters, context, quantization = (
        "",
        0,
        folders.context_length(config),
        folders.quantization(config, Counter()),
    )
    architecture = str(config.get("model_type") or "")
    if not architecture and (folder / "config.json").is_file() and not any(folder.glob("model*.safetensors*")):
        return Facts(is_model=False)
    try:
        told = inspect_folder(folder)
        context, quantization = told.context_length, told.quantization
        parameters = _parameters(folder)
        if refusal := mlx_refusal(config):
            problem = f"{folder} {refusal}. Take another model, or a newer lmx."
    except ModelInvalid as error:
        problem = error.message
    if found.unfinished and (problem or not _are_blobs(found.unfinished)):  # a whole model may have old ones beside it
        problem = _half(found)
    modules = folder / "modules.json"
    embeds = (
        architecture in ENCODERS
        or ranks(config)
        or (modules.is_file() and b".Pooling" in _bytes(modules))
    )  # fmt: skip
    capabilities = ["embedding"] if embeds else _of_template(_templates(folder))
    if any(config.get(name) for name in _VISION):
        capabilities.append("vision")
    return Facts(
        format="mlx" if _is_mlx(folder, config) else "safetensors",
        kind="embeddings" if embeds else "llm",
        architecture=architecture,
        quantization=quantization,
        parameters=parameters,
        context_length=context,
        capabilities=tuple(capabilities),
        problem=problem,
    )


def _parameters(folder: Path) -> int:
    """0: its configuration is one that nobody can count by."""
    with suppress(ModelInvalid, OSError, LookupError, ValueError, TypeError, ArithmeticError, AttributeError):
        return read_shape(folder).parameters
    return 0


def _are_blobs(names: tuple[str, ...]) -> bool:
    """As huggingface_hub calls what it fetches, which says nothing about the file."""
    return all(name.endswith(".incomplete") for name in names)


def _half(found: Found) -> str:
    files = ", ".join(found.unfinished[:3]) + (", ..." if len(found.unfinished) > 3 else "")
    if _are_blobs(found.unfinished):
        files = f"{len(found.unfinished)} unfinished file(s)"
    again = (
        f"or fetch it again with `lmx pull {found.repository}`"
        if found.source in ("lmx", "huggingface")
        else "or fetch it again"
    )
    return f"{found.path} is half-downloaded ({files}): let the download end, {again}."


def _is_mlx(folder: Path, config: dict[str, Any]) -> bool:
    """Whether mlx-lm wrote it."""
    quantization = config.get("quantization")
    if isinstance(quantization, dict) and "bits" in quantization:
        return True
    for shard in sorted(path for path in folder.glob("model*.safetensors") if path.is_file())[:1]:
        with suppress(OSError, ValueError, AttributeError), shard.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(min(size, _MOST_JSON))).get("__metadata__")
            return isinstance(metadata, dict) and metadata.get("format") == "mlx"
    return False


def _templates(folder: Path) -> str:
    """Every chat template's text, in one."""
    texts = [_bytes(path).decode(errors="replace") for path in _template_files(folder)]
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        with suppress(ModelInvalid):
            texts.append(
                json.dumps(read_json(folder / name, why="it has templates").get("chat_template"), ensure_ascii=False)
            )
    return "\n".join(texts)


def _template_files(folder: Path) -> list[Path]:
    paths = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("[!.]*.jinja"))]
    return [path for path in paths if path.is_file()]


def _of_template(text: str) -> list[str]:
    found = []
    if _USES_TOOLS.search(text):
        found.append("tools")
    if _REASONS.search(text):
        found.append("reasoning")
    return found


def _of_gguf(found: Found) -> Facts:
    name = quantization_of(found.path.name) or quantization_of(found.path.parent.name)
    if found.unfinished:
        return Facts("gguf", quantization=name, problem=_half(found))
    parts = part_paths(found.path)
    missing = [path.name for path in parts if not path.exists()]
    if missing and len(parts) > 1:
        return Facts(
            "gguf",
            quantization=name,
            problem=f"{found.path} is split into {len(parts)} parts, of which are missing: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Download them into {found.path.parent}.",
        )
    try:
        file = GgufFile(found.path, words=False)
    except ModelInvalid as error:
        return Facts("gguf", quantization=name, problem=error.message)
    architecture = file.architecture
    if file.get("general.type", "model") in _NO_MODELS or architecture in _NO_ARCHITECTURES:
        return Facts("gguf", is_model=False)
    embeds = architecture in (*ENCODERS, *_GGUF_ENCODERS) or bool(file.own("pooling_type", 0))
    texts = [value for key, value in file.fields.items() if key.startswith("tokenizer.chat_template")]
    capabilities = ["embedding"] if embeds else _of_template("\n".join(text for text in texts if isinstance(text, str)))
    if found.shows:
        capabilities.append("vision")
    context = file.own("context_length", 0)
    problem = ""
    if not file.get("tokenizer.ggml.model"):
        problem = (
            f"{found.path} has no vocabulary (tokenizer.ggml.model), so nothing can be said to it. Download another."
        )
    return Facts(
        format="gguf",
        kind="embeddings" if embeds else "llm",
        architecture=architecture,
        quantization=name or file.quantization,
        parameters=sum(tensor.elements for tensor in file.tensors.values()),
        context_length=context if isinstance(context, int) else 0,
        capabilities=tuple(capabilities),
        problem=problem,
    )


def _bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MOST_JSON)
