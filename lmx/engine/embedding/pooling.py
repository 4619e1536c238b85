"""From hidden states to one vector for each input: sentence-transformers' modules behind the model, on MLX arrays.

In float32 whatever the model's precision. Padding never counts. Called by ``embedder``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lmx.errors import ModelInvalid
from lmx.protocol import Pooling

_EPS = 1e-12


def _inside(hidden: mx.array, lengths: mx.array) -> mx.array:
    return (mx.arange(hidden.shape[1]) < lengths[:, None])[:, :, None]


def _sum(hidden: mx.array, lengths: mx.array) -> mx.array:
    # where() and no product: what stands in the padding may be anything.
    return mx.sum(mx.where(_inside(hidden, lengths), hidden, 0.0), axis=1)


def _cls(hidden: mx.array, _: mx.array) -> mx.array:
    return hidden[:, 0]


def _last(hidden: mx.array, lengths: mx.array) -> mx.array:
    return hidden[mx.arange(hidden.shape[0]), lengths - 1]


def _mean(hidden: mx.array, lengths: mx.array) -> mx.array:
    return _sum(hidden, lengths) / lengths[:, None]


def _mean_sqrt_len(hidden: mx.array, lengths: mx.array) -> mx.array:
    return _sum(hidden, lengths) / mx.sqrt(lengths[:, None].astype(mx.float32))


def _weighted_mean(hidden: mx.array, lengths: mx.array) -> mx.array:
    """Later tokens count more, by their place (SGPT)."""
    places = mx.arange(1, hidden.shape[1] + 1)[:, None].astype(mx.float32)
    whole = (lengths * (lengths + 1) / 2)[:, None]
    return _sum(hidden * places, lengths) / whole


def _max(hidden: mx.array, lengths: mx.array) -> mx.array:
    return mx.max(mx.where(_inside(hidden, lengths), hidden, -mx.inf), axis=1)


MODES: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "mean": _mean,
    "cls": _cls,
    "last": _last,
    "max": _max,
    "weighted_mean": _weighted_mean,
    "mean_sqrt_len": _mean_sqrt_len,
}
_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {"tanh": mx.tanh, "": lambda x: x}


@dataclass(frozen=True, slots=True)
class Dense:
    weight: mx.array
    bias: mx.array | None
    activation: str

    def __call__(self, x: mx.array) -> mx.array:
        x = x @ self.weight.T
        return _ACTIVATIONS[self.activation](x if self.bias is None else x + self.bias)


class Head:
    """All that follows the hidden states."""

    def __init__(self, pooling: Pooling, default_mode: str, width: int) -> None:
        """Raises ModelInvalid."""
        self.modes = (pooling.mode or default_mode).split("+")
        self._normalize = pooling.normalize
        self.layers = [_read_dense(spec) for spec in pooling.dense]
        self.dimension = self.layers[-1].weight.shape[0] if self.layers else width * len(self.modes)

    @property
    def words(self) -> str:
        steps = [f"{' + '.join(self.modes)} pooling", *["a linear layer"] * len(self.layers)]
        return ", ".join(steps + ["normalised"] * self._normalize)

    def __call__(self, hidden: mx.array, lengths: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> mx.array:
        """(B, L, D) → (B, dimension)."""
        hidden, places = hidden.astype(mx.float32), mx.array(lengths)
        vectors = mx.concatenate([MODES[mode](hidden, places) for mode in self.modes], axis=-1)
        for dense in self.layers:
            vectors = dense(vectors)
        if self._normalize:
            vectors = vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), _EPS)
        return vectors


class Classifier:
    """A cross-encoder's head: one score for each input."""

    dimension = 1

    def __init__(self, layers: Sequence[Callable[[mx.array], mx.array]], *, mean: bool, sigmoid: bool) -> None:
        self.layers = layers
        self._pool = _mean if mean else _cls
        self._sigmoid = sigmoid

    @property
    def words(self) -> str:
        return "scores of pairs" + (" from 0 to 1" if self._sigmoid else "")

    def __call__(self, hidden: mx.array, lengths: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> mx.array:
        """(B, L, D) → (B, 1)."""
        x = self._pool(hidden, mx.array(lengths))
        for layer in self.layers:
            x = layer(x)
        return mx.sigmoid(x.astype(mx.float32)) if self._sigmoid else x.astype(mx.float32)


def _read_dense(spec: str) -> Dense:
    """``spec``: the folder, and behind a "|" the name of the activation."""
    folder, activation = spec.rsplit("|", 1)
    path = Path(folder) / "model.safetensors"
    try:
        arrays: Any = mx.load(str(path))
        bias = arrays.get("linear.bias")
        weight = arrays["linear.weight"].astype(mx.float32)
    except (RuntimeError, KeyError) as error:
        raise ModelInvalid(f"{path} cannot be read as a linear layer: {error}.", param="model.embedding") from None
    return Dense(weight, None if bias is None else bias.astype(mx.float32), activation)
