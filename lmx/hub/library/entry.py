"""A model on the disk, as far as its files say what it is. Data only."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmx.hub.inventory import EMBEDDED_ID

Source = Literal["lmx", "huggingface", "lmstudio", "folder", "embedded"]
Format = Literal["mlx", "gguf", "safetensors"]
ModelKind = Literal["llm", "embeddings"]


@dataclass(frozen=True, slots=True)
class Entry:
    id: str
    """Unique: "org/name" in the folders of lmx, LM Studio and the Hugging Face cache, the folder's or file's name
    elsewhere. Behind it stands ":QUANT" where a repository has several GGUF models, "@source" where another place has
    it, too."""
    aliases: tuple[str, ...]
    """Other names that mean it and no other; like ids, in any case of letters."""
    path: Path
    """Its folder, or its GGUF file (of a split one the first part). It need not be there when ``problem`` says so."""
    source: Source
    """Whose place it is; "folder": one that lmx.toml names."""
    format: Format
    """"safetensors": a folder that is not MLX's. mlx-lm runs many as they are; others are to be converted."""
    kind: ModelKind
    architecture: str
    """As the files call it: "qwen3", "llama", "bert"; "" where they do not."""
    quantization: str
    """"4-bit", "Q4_K_M", "bf16", ..."""
    parameters: int
    """0: nobody can tell."""
    size_bytes: int
    """Of its files."""
    context_length: int
    """The model's own maximum; 0: it names none."""
    capabilities: tuple[str, ...]
    """Of "tools", "reasoning", "vision", "embedding"."""
    modified: float
    """Unix time of its newest file."""
    problem: str
    """Why it cannot be loaded, and the way out, in one sentence; "" when it is whole."""

    @property
    def loadable(self) -> str:
        """What ``lmx.hub.inventory.find`` finds it by."""
        return EMBEDDED_ID if self.source == "embedded" else str(self.path)

    def is_called(self, name: str) -> bool:
        """Whether ``name``, an id, an alias or a path, is this one's. Asks no disk: the model may be gone."""
        if name in (self.loadable, self.id) or name in self.aliases:
            return True
        return os.path.abspath(os.path.expanduser(name)) == self.loadable
