"""One forward pass for the decoding rows of several lanes: the weights are read once, attention goes lane by lane.

mlx-lm's model code gets views that show all rows as one batch (``_Views``). What they return of keys, values and masks
is one array for each lane (``Parts``), which model code passes on to mlx-lm's ``scaled_dot_product_attention``;
``install`` lets that function take them. Models that do something else with them raise, and are decoded lane by lane:
``check`` finds out, at load. Called by the MLX back end; decides nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np

from lmx.engine.mlx.adapter import ArraysCache, LayerKind, LoadedModel, scaled_dot_product_attention, whole
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.layers import SLOT_QUANTUM, Write, round_slots
from lmx.engine.mlx.views import DecodeView, Seen

_ATTENTION = scaled_dot_product_attention
# As in ``probe``: other shapes round otherwise.
_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Parts:
    """One array for each lane, where model code expects one for all rows."""

    arrays: tuple[Any, ...]
    """Masks may be None."""


class _Views:
    """One layer of several lanes, as one cache."""

    def __init__(self, views: Sequence[DecodeView], cuts: list[int], offset: mx.array) -> None:
        self.offset = offset
        self._views = views
        self._cuts = cuts
        if hasattr(views[0], "bits"):
            self.bits, self.group_size = views[0].bits, views[0].group_size

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Parts | None:
        masks = tuple(view.make_mask(N, return_array, window_size) for view in self._views)
        return None if all(mask is None for mask in masks) else Parts(masks)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Parts, Parts]:
        found = [
            view.update_and_fetch(k, v)
            for view, k, v in zip(self._views, mx.split(keys, self._cuts), mx.split(values, self._cuts), strict=True)
        ]
        return Parts(tuple(k for k, _ in found)), Parts(tuple(v for _, v in found))

    @property
    def state(self) -> tuple[tuple[Seen | None, Seen | None], ...]:
        return tuple((view.keys, view.values) for view in self._views)

    def empty(self) -> bool:
        return False

    def is_trimmable(self) -> bool:
        return False


def attention(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, **options: Any
) -> mx.array:
    """mlx-lm's function of that name, which also takes ``Parts``."""
    if not isinstance(keys, Parts):
        return cast(mx.array, _ATTENTION(queries, keys, values, cache=cache, scale=scale, mask=mask, **options))
    masks = mask.arrays if isinstance(mask, Parts) else (mask,) * len(keys.arrays)
    found = []
    start = 0
    for key, value, part in zip(keys.arrays, values.arrays, masks, strict=True):
        end = start + (key[0] if isinstance(key, tuple) else key).shape[0]
        found.append(_ATTENTION(queries[start:end], key, value, cache=cache, scale=scale, mask=part, **options))
        start = end
    return mx.concatenate(found)


def install(loaded: LoadedModel) -> None:
    """Let the modules that the model is made of call ``attention`` instead."""
    for name in {type(module).__module__ for module in loaded.model.modules()}:
        module = sys.modules[name]
        if getattr(module, "scaled_dot_product_attention", None) is _ATTENTION:
            module.scaled_dot_product_attention = attention  # type: ignore[attr-defined]


def decode(loaded: LoadedModel, parts: Sequence[tuple[Lane, Sequence[int]]]) -> list[mx.array]:
    """One step of the active rows of each lane, as ``Lane.decode`` does it; the logits of each."""
    caches = [lane.begin_decode(active, 1, [1] * len(active)) for lane, active in parts]
    counts = [max(active) + 1 for _, active in parts]
    cuts = np.cumsum(counts)[:-1].tolist()
    offsets: mx.array | None = None
    joined: list[Any] = []
    for layer in zip(*caches, strict=True):
        if isinstance(layer[0], DecodeView):
            if offsets is None:
                offsets = mx.concatenate([view.offset for view in layer])
            joined.append(_Views(layer, cuts, offsets))
        else:
            cache = ArraysCache(len(layer[0].cache))
            cache.cache = [mx.concatenate(list(arrays)) for arrays in zip(*(one.cache for one in layer), strict=True)]
            joined.append(cache)
    tokens = mx.concatenate([lane.last_tokens[:count] for (lane, _), count in zip(parts, counts, strict=True)])
    logits = loaded.logits(loaded.hidden(tokens[:, None], whole(parts[0][0].kinds, joined)))
    for one, *apart in zip(joined, *caches, strict=True):
        if not isinstance(one, _Views):
            split = [mx.split(array, cuts) for array in one.cache]
            for index, cache in enumerate(apart):
                cache.cache = [pieces[index] for pieces in split]
    for (lane, active), mine in zip(parts, caches, strict=True):
        lane.end_decode(active, mine, [1] * len(active))
    return list(mx.split(logits, cuts))


def check(loaded: LoadedModel, kinds: Sequence[LayerKind], write: Write) -> str:
    """Why the model's lanes cannot decode together, or nothing: two lanes are decoded one by one and at once."""
    install(loaded)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, loaded.vocab_size, length).tolist() for length in (3, 9, 5)]
    found: list[list[mx.array]] = []
    try:
        for at_once in (False, True):
            # The single row is computed under a mask in one, and alone in the other.
            lanes = [
                Lane(loaded, kinds, rows, slots, write) for rows, slots in ((2, SLOT_QUANTUM), (1, round_slots(300)))
            ]
            for lane, prompt in zip((lanes[0], lanes[0], lanes[1]), prompts, strict=True):
                lane.prefill(lane.acquire(0), prompt, last=True)
            parts = [(lane, lane.in_use) for lane in lanes]
            for _ in range(2):
                for lane in lanes:
                    lane.last_tokens = mx.arange(lane.rows, dtype=mx.int32) + 1
                logits = decode(loaded, parts) if at_once else [lane.decode(active) for lane, active in parts]
            mx.eval(logits)
            found.append(logits)
    except Exception as error:
        # Whatever model code raises that does something else with what it got.
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    for one, together in zip(*found, strict=True):
        largest = float(mx.max(mx.abs(one)))
        off = float(mx.max(mx.abs(one - together))) / max(largest, 1e-6)
        if not off <= _TOLERANCE:  # NaN, too
            return f"logits differ by {off:.1%} of the largest"
    return ""
