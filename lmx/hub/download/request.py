"""What the server tells the fetching child, and what was chosen: plain data that crosses as JSON.

Called by ``lmx.serving.jobs`` and ``lmx.hub.download``.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class File:
    path: str
    """In the repository; in the model's folder the same."""
    size: int
    sha256: str
    """Of a file in LFS or Xet storage, else ""."""
    blob: str
    """Git's name of its content (of its pointer, where ``sha256`` is set)."""


@dataclass(frozen=True, slots=True)
class Chosen:
    repo: str
    revision: str
    """The commit: a download that is taken up again fetches the same files, whatever was pushed meanwhile."""
    files: tuple[File, ...]
    total_bytes: int
    format: str
    """"mlx", "gguf" or "safetensors"."""
    quantization: str
    """"4bit", "Q4_K_M", ...; "" where nothing says so."""
    why: str

    @property
    def key(self) -> str:
        """Names the staging folder."""
        words = [self.repo, self.revision, *sorted(file.path for file in self.files)]
        return hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Chosen":
        return cls(**{**value, "files": tuple(File(**file) for file in value["files"])})


@dataclass(frozen=True, slots=True)
class Request:
    """The child's one argument."""

    model: str
    revision: str
    quantization: str
    allow_patterns: tuple[str, ...]
    quantizations: tuple[str, ...]
    """Of GGUF files, in the order preferred."""
    models_path: str
    low_disk_bytes: int
    promised_bytes: int = 0
    """What other jobs will still write to the disk."""
    chosen: dict[str, Any] | None = None
    """Of an earlier try."""
    first_wait_s: float = 1.0
    """After a failed attempt; doubled with each further one."""
    give_up_s: float = 600.0
    """Without a byte from the Hub. Before anything was chosen it is a twentieth, since somebody is waiting for it."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Request":
        return cls(
            **{
                **value,
                "allow_patterns": tuple(value["allow_patterns"]),
                "quantizations": tuple(value["quantizations"]),
            }
        )


def staging_root(models_path: Path) -> Path:
    return models_path / ".downloads"


def staging_folder(models_path: Path, key: str) -> Path:
    return staging_root(models_path) / key


def model_folder(models_path: Path, repo: str) -> Path:
    """<publisher>/<name>. Some of the Hub's oldest repositories have no publisher."""
    publisher, _, name = repo.rpartition("/")
    return models_path / (publisher or "huggingface") / name
