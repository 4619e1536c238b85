"""Chooses the engine for a model: MLX or llama.cpp, and says why.

Pure but for the two questions to the machine at the end, and those import neither MLX nor llama_cpp. Called by the
inventory.
"""

import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmx.errors import ModelInvalid
from lmx.hub.conversion import GgufFacts

Backend = Literal["mlx", "llama"]
Wanted = Literal["auto", "mlx", "llama"]

LLAMA_INSTALL = "pip install 'lmx[gguf]'"
_CUDA_PACKAGES = ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")
_NVIDIA_FILES = ("dev/nvidia0", "proc/driver/nvidia")


@dataclass(frozen=True, slots=True)
class Choice:
    backend: Backend
    reason: str
    """One clause: "a GGUF file on a CPU"."""


def choose_for_folder(path: Path, wanted: Wanted) -> Choice:
    """The engine for an MLX folder. Raises ModelInvalid."""
    if wanted == "llama":
        raise ModelInvalid(
            f'{path} is an MLX folder, and llama.cpp loads GGUF files. Set backend to "auto" or "mlx", or name a .gguf '
            "file of the model."
        )
    return Choice("mlx", "an MLX folder")


def choose_for_gguf(path: Path, facts: GgufFacts, wanted: Wanted, *, llama_installed: bool, gpu: bool) -> Choice:
    """The engine for a GGUF file: MLX on a GPU where it is exact, else llama.cpp, which is the faster one on a CPU.

    SmolLM2 on 2 x86 cores: llama.cpp decodes 119 tok/s, MLX 18. Raises ModelInvalid.
    """
    if wanted == "mlx":
        if facts.mlx_refusal:
            raise ModelInvalid(
                f'{path} cannot run on MLX: {facts.mlx_refusal}. Set backend to "llama", or take the model as an MLX '
                "folder (mlx-community on Hugging Face has most)."
            )
        return Choice("mlx", 'backend = "mlx" was asked for')
    if wanted == "llama":
        reason = 'backend = "llama" was asked for'
    elif facts.mlx_refusal:
        reason = f"a GGUF file that MLX cannot run: {facts.mlx_refusal}"
    elif facts.inexact:
        reason = f"a GGUF file with tensors that MLX has no form for: {_inexact(facts)}"
    elif gpu:
        return Choice("mlx", "a GGUF file that MLX reads exactly, on a GPU")
    elif not llama_installed:
        return Choice("mlx", "llama-cpp-python is not installed")
    else:
        reason = "a GGUF file on a CPU"
    if not llama_installed:
        raise ModelInvalid(
            f"{path} needs llama.cpp ({reason}), and llama-cpp-python is not installed. Run `{LLAMA_INSTALL}`."
            + ("" if facts.mlx_refusal else ' Or set backend to "mlx", which dequantises what it must.')
        )
    return Choice("llama", reason)


def dequantizing_costs(path: Path, facts: GgufFacts) -> str:
    """What to tell the user before a file with types that MLX does not know is converted."""
    return (
        f"{path}: MLX has no form for its tensors of type {_inexact(facts)} and gets them as float16. "
        f"{facts.size_bytes / 1e6:,.0f} MB of file take {facts.mlx_bytes / 1e6:,.0f} MB in memory and in the cache, "
        f"or as float32 on a CPU, if it has as much, {4 * facts.parameters / 1e6:,.0f} MB."
    )


def _inexact(facts: GgufFacts) -> str:
    return ", ".join(f"{kind} ({count})" for kind, count in facts.inexact.items())


def is_llama_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def has_gpu(system: str = sys.platform, machine: str = platform.machine(), root: Path = Path("/")) -> bool:
    """Whether MLX computes on a GPU here: Metal on Apple Silicon, or MLX's CUDA package with an NVIDIA device."""
    if system == "darwin":
        return machine == "arm64"
    return any((root / name).exists() for name in _NVIDIA_FILES) and any(map(_is_distribution, _CUDA_PACKAGES))


def _is_distribution(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
