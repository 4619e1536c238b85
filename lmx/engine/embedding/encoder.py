"""A bidirectional transformer over inputs of any lengths: BERT and its kin, whatever their names for its parts.

The tokens of all inputs stand behind each other, (T, D), so that the products of a step are as large as can be; only
attention goes group by group, inputs of (nearly) one length each. ``families`` makes one of a model folder. Called by
``embedder`` on the engine's threads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lmx.engine.embedding.kernels import attention, gelu

_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": gelu,
    "gelu_tanh": nn.gelu_approx,
    "silu": nn.silu,
    "relu": nn.relu,
}


@dataclass(frozen=True, slots=True)
class Linear:
    weight: mx.array
    """(in, out)."""
    bias: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight if self.bias is None else mx.addmm(self.bias, x, self.weight)


@dataclass(frozen=True, slots=True)
class Norm:
    weight: mx.array
    bias: mx.array | None
    eps: float

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self.weight, self.bias, self.eps)


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
    words: mx.array
    positions: mx.array | None
    types: mx.array | None
    norm: Norm
    layers: tuple[Layer, ...]
    last_norm: Norm | None

    @property
    def width(self) -> int:
        return int(self.words.shape[1])

    def hidden(self, groups: list[Group]) -> list[mx.array]:
        """The last hidden states of each group, (B, L, D); lazy. Those of padding mean nothing."""
        x = self._embed(groups)
        masks = [_mask(group) for group in groups]
        near: dict[tuple[int, int], mx.array] = {}
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

    def _embed(self, groups: list[Group]) -> mx.array:
        x = self.words[mx.array(np.concatenate([group.tokens.ravel() for group in groups]))]
        if self.positions is not None:
            places = [np.broadcast_to(np.arange(g.tokens.shape[1]), g.tokens.shape).ravel() for g in groups]
            x = x + self.positions[mx.array(np.concatenate(places) + self.shape.first_position)]
        if self.types is not None:
            alike = self.types.shape[0] == 1 or all(group.seconds is None for group in groups)
            x = x + (self.types[0] if alike else self.types[_types(groups)])
        return self.norm(x)

    def _attend(
        self,
        layer: Layer,
        qkv: mx.array,
        groups: list[Group],
        masks: list[mx.array | None],
        near: dict[tuple[int, int], mx.array],
    ) -> mx.array:
        heads, width = self.shape.heads, qkv.shape[1] // 3
        scale = (width // heads) ** -0.5
        parts = []
        for part, mask in zip(_split(qkv, groups), masks, strict=True):
            count, length, _ = part.shape
            queries, keys, values = part.reshape(count, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
            if layer.rope_base is not None:
                queries, keys = (_rope(x, layer.rope_base) for x in (queries, keys))
            if layer.window is not None and layer.window < length:
                window = near.setdefault((length, layer.window), _near(length, layer.window))
                # Padding looks everywhere: what sees nothing is no number, and would spread.
                mask = window if mask is None else (window & mask) | ~mask.swapaxes(-1, -2)
            found = attention(queries, keys, values, scale=scale, mask=mask)
            parts.append(found.transpose(0, 2, 1, 3).reshape(count * length, width))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _mlp(self, layer: Layer, x: mx.array) -> mx.array:
        up = layer.up(x)
        if not self.shape.gated:
            return layer.down(self._activate(up))
        activated, other = mx.split(up, 2, axis=-1)
        return layer.down(self._activate(activated) * other)

    def _activate(self, x: mx.array) -> mx.array:
        activated: mx.array = _ACTIVATIONS[self.shape.activation](x)
        return activated


def _rope(x: mx.array, base: float) -> mx.array:
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=base, scale=1.0, offset=0)


def _split(x: mx.array, groups: list[Group]) -> list[mx.array]:
    parts, start = [], 0
    for group in groups:
        end = start + group.tokens.size
        parts.append(x[start:end].reshape(*group.tokens.shape, -1))
        start = end
    return parts


def _mask(group: Group) -> mx.array | None:
    if not group.padded:
        return None
    inside = np.arange(group.tokens.shape[1]) < group.lengths[:, None]
    return mx.array(inside)[:, None, None, :]


def _near(length: int, window: int) -> mx.array:
    places = np.arange(length)
    return mx.array(np.abs(places[:, None] - places) <= window)[None, None]


def _types(groups: list[Group]) -> mx.array:
    kinds = []
    for group in groups:
        places = np.broadcast_to(np.arange(group.tokens.shape[1]), group.tokens.shape)
        second = places >= group.seconds[:, None] if group.seconds is not None else np.zeros(group.tokens.shape, bool)
        kinds.append(second.astype(np.int32).ravel())
    return mx.array(np.concatenate(kinds))
