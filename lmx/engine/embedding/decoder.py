"""A model that writes, used to make vectors (Qwen3-Embedding, E5-Mistral, any of mlx-lm's): its hidden states before
the output head.

Inputs stand at the left of their rows, so that padding comes after them, where no token of theirs can look: no mask
is needed, and each state is what it would be alone. Called by ``embedder``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from lmx.engine.embedding.encoder import Group
from lmx.engine.mlx import adapter
from lmx.errors import ModelInvalid


@dataclass(frozen=True, slots=True)
class Decoder:
    loaded: adapter.LoadedModel
    trunk: Callable[..., mx.array]
    width: int

    def hidden(self, groups: list[Group]) -> list[mx.array]:
        """The last hidden states of each group, (B, L, D); lazy. Those of padding mean nothing."""
        return [self.trunk(mx.array(group.tokens)) for group in groups]


def load_decoder(folder: Path, wired_bytes: int = -1) -> Decoder:
    """Raises ModelInvalid, also for a model whose states before the head mlx-lm's code does not show."""
    loaded = adapter.load(folder, headless=True)
    adapter.wire(wired_bytes)
    trunk: Any = getattr(loaded.model, "model", None)
    if trunk is None:
        raise ModelInvalid(
            f"{folder} cannot make embeddings: mlx-lm's code for {loaded.architecture} has no trunk apart from its "
            "output head.",
            param="model.embedding",
        )
    states = trunk(mx.zeros((1, 1), mx.int32))
    if getattr(states, "ndim", 0) != 3:
        raise ModelInvalid(
            f"{folder} cannot make embeddings: the trunk of {loaded.architecture} gives no hidden states.",
            param="model.embedding",
        )
    return Decoder(loaded, trunk, int(states.shape[2]))
