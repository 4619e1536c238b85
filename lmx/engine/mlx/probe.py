"""The load probe: may this model run in arenas? Shown by running it, not believed (DESIGN §4).

Rows of different lengths are prefilled and decoded in one lane in which everything outside the rows is poisoned: slots
that a mask must hide hold large foreign values, slots and rows that no kernel may read hold NaN. (A NaN in a slot that
a mask hides would spread through 0 · NaN in any attention kernel; the arena never lets one get there.) Each row's
logits are held against the same tokens run alone on mlx-lm's own caches. It also measures, on the running device,
whether the in-place write of a slot costs more in a larger buffer, and picks the write that does not. Called once, by
the back end's load.
"""

import time
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from lmx.engine.mlx.adapter import LayerKind, LoadedModel, layer_kinds, make_prompt_cache
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.layers import SLOT_QUANTUM, Slots, Write, scatter_write, slice_write

_LENGTHS = (5, 11, 2)
_STEPS = 3
# Batched kernels round otherwise than single-row ones, half precision and packed weights most; what a wrong mask lets
# in is of another order. Relative to the largest logit.
_TOLERANCE = 0.05
_FOREIGN = 100.0


@dataclass(frozen=True, slots=True)
class ProbeResult:
    path: Literal["arena", "single"]
    """"single": one sequence at a time, on mlx-lm's own caches."""
    reason: str
    kinds: tuple[LayerKind, ...]
    write: Write
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int


def run(loaded: LoadedModel, *, force_single: bool = False) -> ProbeResult:
    """Probe the model. What the model does wrong becomes the reason, not an exception."""
    kinds = layer_kinds(loaded.model)
    if force_single:
        kinds = "asked for by [engine] batching"
    if isinstance(kinds, str):
        return _single(loaded, kinds)
    write, why = _choose_write()
    failure = _compare(loaded, kinds, write)
    if failure:
        return _single(loaded, failure)
    return ProbeResult(
        "arena",
        f"ragged rows equal single ones with everything around them poisoned; {why}",
        tuple(kinds),
        write,
        sum(kind.nbytes for kind in kinds if kind.kind == "kv"),
        sum(kind.nbytes for kind in kinds if kind.kind == "state"),
    )


def _single(loaded: LoadedModel, reason: str) -> ProbeResult:
    """KV bytes from what mlx-lm's caches hold after two prompts of different length."""
    held = []
    for tokens in (SLOT_QUANTUM // 2, SLOT_QUANTUM * 5 // 2):
        caches = make_prompt_cache(loaded.model)
        loaded.model(mx.zeros((1, tokens), mx.int32), cache=caches)
        held.append(
            sum(array.nbytes for _, array in tree_flatten([cache.state for cache in caches]) if _is_array(array))
        )
    per_token = max(held[1] - held[0], 0) // (2 * SLOT_QUANTUM)
    kinds = tuple(LayerKind("own", None, (), ()) for _ in make_prompt_cache(loaded.model))
    return ProbeResult("single", reason, kinds, scatter_write, per_token, held[0] - per_token * SLOT_QUANTUM // 2)


def _is_array(value: object) -> bool:
    return isinstance(value, mx.array)


def _compare(loaded: LoadedModel, kinds: list[LayerKind], write: Write) -> str:
    """Why batched rows differ from single ones, or nothing."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, loaded.vocab_size, length).tolist() for length in _LENGTHS]
    forced = rng.integers(0, loaded.vocab_size, (len(prompts), _STEPS)).tolist()
    try:
        alone = [_alone(loaded, prompt, tokens) for prompt, tokens in zip(prompts, forced, strict=True)]
        batched = _ragged(loaded, kinds, write, prompts, forced)
    except Exception as error:
        # Model code is outside our hands: whatever it raises here means that it cannot take arrays of offsets or masks.
        return f"its code refuses rows of different lengths: {type(error).__name__}: {error}"
    for one, row in zip(alone, batched, strict=True):
        off = float(np.max(np.abs(one - row)) / max(np.max(np.abs(one)), 1e-6))
        if not off <= _TOLERANCE:  # NaN, too
            return f"a row's logits differ from the same tokens run alone by {off:.1%} of the largest"
    return ""


def _alone(loaded: LoadedModel, prompt: list[int], forced: list[int]) -> np.ndarray:
    caches = make_prompt_cache(loaded.model)
    rows = [loaded.model(mx.array([prompt]), cache=caches)[:, -1]]
    rows += [loaded.model(mx.array([[token]]), cache=caches)[:, -1] for token in forced]
    return np.array(mx.concatenate(rows).astype(mx.float32))


def _ragged(
    loaded: LoadedModel, kinds: list[LayerKind], write: Write, prompts: list[list[int]], forced: list[list[int]]
) -> list[np.ndarray]:
    lane = Lane(loaded, kinds, len(prompts) + 1, SLOT_QUANTUM, write)
    lane.acquire(-1)
    first: list[mx.array] = []
    rows = [lane.acquire(index) for index in range(len(prompts))]
    cuts = [len(prompt) // 2 for prompt in prompts]
    if lane.prefills_together:
        lane.prefill_whole(rows, [prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)])
    for row, prompt, cut in zip(rows, prompts, cuts, strict=True):
        if not lane.prefills_together:
            lane.prefill(row, prompt[:cut], last=False)
        logits = lane.prefill(row, prompt[cut:], last=True)
        assert logits is not None
        first.append(logits)
    lane.release(0)  # computed as a dummy in every step, on NaN
    lane.poison(inside=_FOREIGN, outside=float("nan"), span=max(_LENGTHS) + _STEPS)
    steps = []
    for step in range(_STEPS):
        tokens = mx.array([[0]] + [[row[step]] for row in forced])
        steps.append(lane.decode(rows, tokens)[1:, 0])
    return [
        np.array(mx.concatenate([first[i], *[step[i : i + 1] for step in steps]]).astype(mx.float32))
        for i in range(len(prompts))
    ]


def _choose_write() -> tuple[Write, str]:
    """The scatter, unless its cost grows with the buffer on this device."""

    def cost_ms(slots: int) -> float:
        buffer = mx.zeros((4, 8, slots, 64), mx.float16)
        new, place = mx.ones((4, 8, 1, 64), mx.float16), Slots(np.full((4, 1), 3, np.int32))
        mx.eval(buffer, new)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            buffer = scatter_write(buffer, place, new)
            mx.eval(buffer)
            times.append(time.perf_counter() - start)
        return sorted(times)[2] * 1e3

    small, large = cost_ms(SLOT_QUANTUM), cost_ms(SLOT_QUANTUM * 64)
    if large > 3 * small + 0.2:
        return (
            slice_write,
            f"slots are written row by row (one scatter: {small:.2f} ms, in a 64× buffer {large:.2f} ms)",
        )
    return scatter_write, f"slots are written by one scatter ({small:.2f} ms, in a 64× buffer {large:.2f} ms)"
