"""A bidirectional transformer over inputs of any lengths: BERT and its kin, whatever their names for its parts.

The tokens of all inputs stand behind each other, (T, D), so that the products of a step are as large as can be; only
attention goes group by group, inputs of (nearly) one length each. Its arrays are MLX's (on a GPU) or NumPy's (on a
CPU); ``kernels`` knows both. ``families`` makes one of a model folder. Called by ``embedder`` on the engine's threads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmx.engine.embedding import kernels
from lmx.engine.embedding.kernels import Array

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": kernels.gelu,
    "gelu_tanh": kernels.gelu_tanh,
    "silu": kernels.silu,
    "relu": kernels.relu,
}


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Array
    """(in, out)."""
    bias: Array | None = None

    def __call__(self, x: Array) -> Array:
        return kernels.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Array
    bias: Array | None
    eps: float

    def __call__(self, x: Array) -> Array:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Linear
    out: Linear
    up: Linear
    """With ``Shape.gated`` twice as wide: what is activated, then what that is multiplied with."""
    down: Linear
    attention_norm: Norm | None
    mlp_norm: Norm
    rope_base: float | None
    """None: positions are learned."""
    window: int | None
    """How far to either side a token sees; None: everything."""


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int
    norm_first: bool
    """Before attention and MLP (ModernBERT), or after what they are added to (BERT)."""
    gated: bool
    activation: str
    """One of _ACTIVATIONS."""
    first_position: int
    """Of a learned position: RoBERTa's stand behind its padding's."""
    context_length: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Group:
    """Inputs that attend together, padded to the longest."""

    tokens: "np.ndarray[tuple[int, int], np.dtype[np.int32]]"
    """(B, L); padding is token 0."""
    lengths: "np.ndarray[tuple[int], np.dtype[np.int32]]"
    seconds: "np.ndarray[tuple[int], np.dtype[np.int32]] | None" = None
    """Where the second text of each pair begins."""

    @property
    def padded(self) -> bool:
        return bool((self.lengths < self.tokens.shape[1]).any())


@dataclass(frozen=True, slots=True)
class Encoder:
    shape: Shape
    words: Array
    positions: Array | None
    types: Array | None
    norm: Norm
    layers: tuple[Layer, ...]
    last_norm: Norm | None

    @property
    def width(self) -> int:
        return int(self.words.shape[1])

    @np.errstate(all="ignore")
    def hidden(self, groups: list[Group]) -> list[Array]:
        """The last hidden states of each group, (B, L, D); MLX's are lazy. Those of padding mean nothing."""
        x = self._embed(groups)
        masks = [_mask(x, group) for group in groups]
        near: dict[tuple[int, int], Array] = {}
        for layer in self.layers:
            before = layer.attention_norm(x) if self.shape.norm_first and layer.attention_norm else x
            attended = x + layer.out(self._attend(layer, layer.qkv(before), groups, masks, near))
            if self.shape.norm_first:
                x = attended + self._mlp(layer, layer.mlp_norm(attended))
            else:
                x = layer.attention_norm(attended) if layer.attention_norm else attended
                x = layer.mlp_norm(x + self._mlp(layer, x))
        if self.last_norm is not None:
            x = self.last_norm(x)
        return _split(x, groups)

    def _embed(self, groups: list[Group]) -> Array:
        x = self.words[self._like(np.concatenate([group.tokens.ravel() for group in groups]))]
        if self.positions is not None:
            places = [np.broadcast_to(np.arange(g.tokens.shape[1]), g.tokens.shape).ravel() for g in groups]
            x = x + self.positions[self._like(np.concatenate(places) + self.shape.first_position)]
        if self.types is not None:
            alike = self.types.shape[0] == 1 or all(group.seconds is None for group in groups)
            x = x + (self.types[0] if alike else self.types[self._like(_types(groups))])
        return self.norm(x)

    def _like(self, values: "npt.NDArray[np.integer]") -> Array:
        return kernels.like(self.words, values)

    def _attend(
        self,
        layer: Layer,
        qkv: Array,
        groups: list[Group],
        masks: list[Array | None],
        near: dict[tuple[int, int], Array],
    ) -> Array:
        heads, width = self.shape.heads, qkv.shape[1] // 3
        scale = (width // heads) ** -0.5
        parts = []
        for part, mask in zip(_split(qkv, groups), masks, strict=True):
            count, length, _ = part.shape
            queries, keys, values = part.reshape(count, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
            if layer.rope_base is not None:
                queries, keys = (kernels.rope(x, layer.rope_base) for x in (queries, keys))
            if layer.window is not None and layer.window < length:
                window = near.setdefault((length, layer.window), _near(qkv, length, layer.window))
                # Padding looks everywhere: what sees nothing is no number, and would spread.
                mask = window if mask is None else (window & mask) | ~mask.swapaxes(-1, -2)
            found = kernels.attention(queries, keys, values, scale=scale, mask=mask)
            parts.append(found.reshape(count * length, width))
        return kernels.concatenate(parts)

    def _mlp(self, layer: Layer, x: Array) -> Array:
        up, activate = layer.up(x), _ACTIVATIONS[self.shape.activation]
        if not self.shape.gated:
            return layer.down(activate(up))
        half = up.shape[1] // 2
        return layer.down(activate(up[:, :half]) * up[:, half:])


def _split(x: Array, groups: list[Group]) -> list[Array]:
    parts, start = [], 0
    for group in groups:
        end = start + group.tokens.size
        parts.append(x[start:end].reshape(*group.tokens.shape, -1))
        start = end
    return parts


def _mask(x: Array, group: Group) -> Array | None:
    if not group.padded:
        return None
    inside = np.arange(group.tokens.shape[1]) < group.lengths[:, None]
    return kernels.like(x, inside[:, None, None, :])


def _near(x: Array, length: int, window: int) -> Array:
    places = np.arange(length)
    return kernels.like(x, (np.abs(places[:, None] - places) <= window)[None, None])


def _types(groups: list[Group]) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    kinds = []
    for group in groups:
        places = np.broadcast_to(np.arange(group.tokens.shape[1]), group.tokens.shape)
        second = places >= group.seconds[:, None] if group.seconds is not None else np.zeros(group.tokens.shape, bool)
        kinds.append(second.astype(np.int32).ravel())
    return np.concatenate(kinds)
