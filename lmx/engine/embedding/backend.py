"""What the embedding loop asks of a model, whatever runs it.

An embedder knows inputs and vectors and keeps nothing between two calls; which inputs go together is the scheduler's
decision. Called by ``lmx.engine.embedding.loop`` on the engine's one thread.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "modernbert", "nomic_bert"})
"""Those of config.json's model_type that ``families`` reads; all others are mlx-lm's."""

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an embedding model once it is loaded; see ``protocol.Ready`` for most fields."""

    architecture: str
    context_length: int
    """Longest input."""
    vocab_size: int
    dimension: int
    weights_bytes: int
    device: str
    dtype: str
    path_reason: str
    """How inputs become vectors, in words."""
    step_tokens: int
    """What a step may hold of several inputs together."""
    probes: dict[str, str] = field(default_factory=dict)
    path: str = "embedding"
    eos_ids: tuple[int, ...] = ()
    kv_bytes_per_token: int = 0
    kv_budget_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Input:
    """One text, or one pair of texts."""

    tokens: Tokens
    second: int = 0
    """Where the second text of a pair begins; 0: there is none."""


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    active_bytes: int
    peak_bytes: int
    cache_bytes: int
    live_arrays: int
    handles: int = 0
    """GPU buffers, by an estimate; see ``protocol.Stats``."""
    most_handles: int = 0


class Embedder(Protocol):
    facts: Facts

    def embed(self, inputs: Sequence[Input]) -> npt.NDArray[np.float32]:
        """The vectors (n, dimension) of inputs in any order of length, each as if it were alone. One that is not finite
        is its own input's fault and reaches no other."""

    def memory(self) -> MemoryFacts: ...


def read_config(folder: Path) -> dict[str, Any]:
    """config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
