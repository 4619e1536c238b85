"""The load probe: may this model run in arenas? Shown by running it, not believed (DESIGN §4).

Rows of different lengths are prefilled and decoded in one lane in which everything outside the rows is poisoned: slots
that a mask must hide hold large foreign values, slots and rows that no kernel may read hold NaN. (A NaN in a slot that
a mask hides would spread through 0 · NaN in any attention kernel; the arena never lets one get there.) The lane has
holes, and is computed in part and whole. A model with sliding windows also runs at positions beyond each window. Each
row's logits are held against the same tokens run alone on mlx-lm's own caches. Packed KV, where it is asked for, must
say the same read packed as unpacked; how much the packing itself changes is the user's choice (``bench.kv_quality``).
Where steps may verify drafts, several tokens of a row in one pass must say the same as single ones. Called once, by the
back end's load.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import psutil
from mlx.utils import tree_flatten

from lmx.engine.mlx.adapter import CacheList, LayerKind, LoadedModel, layer_kinds, make_prompt_cache, parts, refusal
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.layers import DUMMY_SLOTS, SLOT_QUANTUM, Write, round_slots, scatter_write

_LENGTHS = (5, 11, 2)
_STEPS = 4
# Of the decode steps, so many compute some of the lane's rows, the others all: another write, where there are two.
_PARTIAL_STEPS = 2
# Tokens of a row that a step may verify together: the most that a lane has room for, or those up to which MLX's kernels
# are others than for more.
_WIDTHS = (DUMMY_SLOTS, 8)
# Beyond a window: so many tokens in a chunk, then so many decode steps together with a short row and alone.
_CHUNK, _TOGETHER, _ALONE = 4, 2, 2
# A window is exercised if the keys and values up to its end take no more than this share of the free memory.
_WINDOW_MEMORY_SHARE = 0.1
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
    kv: str
    """How keys and values are held and why, where packing them was asked for."""
    max_depth: int = 0
    """Most drafts of a row in one pass, beside the token before them."""
    speculation: str = ""
    """Why not more."""

    @property
    def kv_bits(self) -> int:
        return min((kind.bits for kind in self.kinds), default=16)


def run(loaded: LoadedModel, write: Write, *, force_single: bool = False, kv_bits: int = 16) -> ProbeResult:
    """Probe the model, with the ``write`` that suits the device. What the model does wrong becomes the reason, not an
    exception."""
    found = _packed(loaded, write, _probe(loaded, write, force_single), kv_bits)
    width, words = compare_widths(loaded, found)
    return replace(found, max_depth=width - 1, speculation=words)


def _packed(loaded: LoadedModel, write: Write, found: ProbeResult, kv_bits: int) -> ProbeResult:
    """The same with packed KV, where that is asked for and can be."""
    if kv_bits == 16:
        return found
    if found.path == "single":
        return replace(found, kv=f"not packed: one sequence at a time runs on mlx-lm's caches ({found.reason})")
    kinds = [replace(kind, bits=kv_bits) if kind.kind == "kv" else kind for kind in found.kinds]
    if failure := compare_packed(loaded, kinds, write):
        return replace(found, kv=f"not packed: {failure}")
    words = f"{kv_bits} bits, a scale and a bias for each {_group_sizes(kinds)} values"
    return replace(found, kinds=tuple(kinds), kv_bytes_per_token=_kv_bytes(kinds), kv=words)


def _group_sizes(kinds: Sequence[LayerKind]) -> str:
    return " or ".join(str(size) for size in sorted({kind.group_size for kind in kinds if kind.kind == "kv"}))


def _kv_bytes(kinds: Sequence[LayerKind]) -> int:
    """Of a token."""
    return sum(kind.nbytes for kind in kinds if kind.kind == "kv")


def _probe(loaded: LoadedModel, write: Write, force_single: bool) -> ProbeResult:
    kinds = layer_kinds(loaded.model)
    if force_single:
        kinds = "asked for by [engine] batching"
    if isinstance(kinds, str):
        return _single(loaded, kinds)
    failure = compare(loaded, kinds, write)
    if failure and not loaded.attention:
        grouped = [replace(kind, grouped=kind.kind == "kv") for kind in kinds]
        if not compare(loaded, grouped, write):
            kinds, failure = grouped, ""
    if failure:
        return _single(loaded, failure)
    failure, beyond = compare_windows(loaded, kinds, write)
    if failure:
        return _single(loaded, failure)
    return ProbeResult(
        "arena",
        f"ragged rows equal single ones with everything around them poisoned{beyond}",
        tuple(kinds),
        write,
        _kv_bytes(kinds),
        sum(kind.nbytes for kind in kinds if kind.kind == "state"),
        "",
    )


def _single(loaded: LoadedModel, reason: str) -> ProbeResult:
    """KV bytes from what mlx-lm's caches hold after two prompts of different length."""
    try:
        held = [_held_bytes(loaded, tokens) for tokens in (SLOT_QUANTUM // 2, SLOT_QUANTUM * 5 // 2)]
    except Exception as error:
        raise refusal("the model does not run, not even alone", error) from error
    per_token = max(held[1] - held[0], 0) // (2 * SLOT_QUANTUM)
    kinds = tuple(
        LayerKind("own", None, (), (), list_of=index if isinstance(cache, CacheList) else None)
        for index, cache in enumerate(make_prompt_cache(loaded.model))
        for _ in parts([cache])
    )
    return ProbeResult("single", reason, kinds, scatter_write, per_token, held[0] - per_token * SLOT_QUANTUM // 2, "")


def _held_bytes(loaded: LoadedModel, tokens: int) -> int:
    caches = make_prompt_cache(loaded.model)
    loaded.model(mx.zeros((1, tokens), mx.int32), cache=caches)
    state = tree_flatten([cache.state for cache in caches])
    return sum(array.nbytes for _, array in state if isinstance(array, mx.array))


def compare(loaded: LoadedModel, kinds: list[LayerKind], write: Write) -> str:
    """Why batched rows differ from single ones, or nothing."""
    prompts, forced = _tokens(loaded)
    try:
        alone = [_alone(loaded, prompt, tokens) for prompt, tokens in zip(prompts, forced, strict=True)]
        batched = _ragged(loaded, kinds, write, prompts, forced)
    except Exception as error:
        # Model code is outside our hands: whatever it raises here means that it cannot take arrays of offsets or masks.
        return f"its code refuses rows of different lengths: {type(error).__name__}: {error}"
    off = max(map(_difference, alone, batched))
    return f"a row's logits differ from the same tokens run alone by {off:.1%} of the largest" if off else ""


def compare_packed(loaded: LoadedModel, kinds: list[LayerKind], write: Write) -> str:
    """Why the model cannot do with packed KV, or nothing. Beyond windows the views are those of other KV, which were
    compared."""
    packed = [kind for kind in kinds if kind.kind == "kv" and kind.shapes[0][-1]]
    if not packed:
        return "the model keeps no keys and values"
    odd = {kind.shapes[0][-1] for kind in packed if not kind.group_size}
    if odd:
        return f"its heads are {' and '.join(map(str, sorted(odd)))} wide, not a multiple of 32"
    prompts, forced = _tokens(loaded)
    try:
        alone = [_unpacked(loaded, kinds, write, *row) for row in zip(prompts, forced, strict=True)]
        batched = _ragged(loaded, kinds, write, prompts, forced)
    except Exception as error:
        return f"its code refuses packed keys and values: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    off = max(map(_difference, alone, batched))
    return f"logits with packed KV differ from those with the same unpacked by {off:.1%} of the largest" if off else ""


def compare_widths(loaded: LoadedModel, found: ProbeResult) -> tuple[int, str]:
    """How many tokens of a row one pass may compute so that each is as if alone, and that in words."""
    if found.path == "single":
        return 1, f"no drafts are verified: one sequence at a time runs on mlx-lm's caches ({found.reason})"
    if any(kind.kind != "kv" for kind in found.kinds):
        return 1, "no drafts are verified: a recurrent state cannot go back to where a draft was wrong"
    try:
        width, limit = _widest(loaded, list(found.kinds), found.write)
    except Exception as error:
        width, limit = 1, f"its code refuses more tokens ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    what = f"up to {width - 1} drafts of a row are verified" if width > 1 else "no drafts are verified"
    return width, f"{what}: {limit}" if limit else f"{what}, as if they were single tokens"


def _widest(loaded: LoadedModel, kinds: list[LayerKind], write: Write) -> tuple[int, str]:
    """The width that is right, and what is wrong with more: two rows, one of which has few tokens, are held against
    the same tokens in a chunk, and so are single ones."""
    rng = np.random.default_rng(2)
    lane = Lane(loaded, kinds, 2, SLOT_QUANTUM, write)
    prompts, forced = (
        [rng.integers(0, loaded.vocab_size, length).tolist() for length in lengths]
        for lengths in ((5, 2), (max(_WIDTHS), 3))
    )
    rows = [lane.acquire(index) for index in range(len(prompts))]
    for row, prompt in zip(rows, prompts, strict=True):
        lane.prefill(row, prompt, last=False)
    expected = [_unpacked(loaded, kinds, write, *row)[1:] for row in zip(prompts, forced, strict=True)]

    def off(width: int) -> float:
        """How far so many tokens in one pass are from that."""
        pieces = [own[:width] for own in forced]
        lane.poison(inside=_FOREIGN, outside=float("nan"), span=max(map(len, prompts)) + max(_WIDTHS))
        logits = np.array(lane.decode_each(rows, pieces).astype(mx.float32))
        for row, prompt in zip(rows, prompts, strict=True):
            lane.rewind(row, len(prompt))
        return _difference(np.concatenate([own[:width] for own in expected]), logits)

    for few in (1, 2):
        if most := off(few):
            return 1, f"{few} at once differ from the same in a chunk by {most:.1%} of the largest logit"
    wrong = ""
    for width in _WIDTHS:
        most = off(width)
        if not most:
            return width, wrong
        wrong = wrong or f"of {width} tokens one differs from single ones by {most:.1%} of the largest logit"
    return 2, wrong


def _unpacked(
    loaded: LoadedModel, kinds: list[LayerKind], write: Write, prompt: list[int], forced: list[int]
) -> np.ndarray:
    """The logits after the prompt and after each forced token, all computed in one chunk, which unpacks what it
    reads."""
    lane = Lane(loaded, kinds, 1, SLOT_QUANTUM, write)
    hidden: list[mx.array] = []
    lane.prefill(lane.acquire(0), [*prompt, *forced], last=False, see=hidden.append)
    return np.array(loaded.logits(hidden[0][:, len(prompt) - 1 :])[0].astype(mx.float32))


def _tokens(loaded: LoadedModel) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and the tokens that are forced after each."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, loaded.vocab_size, length).tolist() for length in _LENGTHS]
    return prompts, rng.integers(0, loaded.vocab_size, (len(prompts), _STEPS)).tolist()


def _difference(alone: np.ndarray, batched: np.ndarray) -> float:
    """Of the largest logit, if it is more than rounding."""
    off = float(np.max(np.abs(alone - batched)) / max(np.max(np.abs(alone)), 1e-6))
    return 0.0 if off <= _TOLERANCE else off if off < np.inf else np.inf  # NaN, too


def _alone(loaded: LoadedModel, prompt: list[int], forced: list[int]) -> np.ndarray:
    return _go_on(loaded, make_prompt_cache(loaded.model), prompt, forced)


def _go_on(loaded: LoadedModel, caches: list[Any], chunk: list[int], forced: list[int]) -> np.ndarray:
    """The logits after the chunk and after each forced token, on mlx-lm's caches."""
    rows = [loaded.model(mx.array([chunk]), cache=caches)[:, -1]]
    rows += [loaded.model(mx.array([[token]]), cache=caches)[:, -1] for token in forced]
    return np.array(mx.concatenate(rows).astype(mx.float32))


def _ragged(
    loaded: LoadedModel, kinds: list[LayerKind], write: Write, prompts: list[list[int]], forced: list[list[int]]
) -> list[np.ndarray]:
    lane = Lane(loaded, kinds, len(prompts) + 2, SLOT_QUANTUM, write)
    first: list[mx.array] = []
    rows = [lane.acquire(index) for index in range(len(prompts) + 1)]
    hole = rows.pop(1)
    cuts = [len(prompt) // 2 for prompt in prompts]
    if lane.prefills_together:
        lane.prefill_whole(rows, [prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)])
    for row, prompt, cut in zip(rows, prompts, cuts, strict=True):
        if not lane.prefills_together:
            lane.prefill(row, prompt[:cut], last=False)
        logits = lane.prefill(row, prompt[cut:], last=True)
        assert logits is not None
        first.append(logits)
    lane.release(hole)  # computed as a dummy in every step, on NaN
    lane.poison(inside=_FOREIGN, outside=float("nan"), span=max(_LENGTHS) + _STEPS)
    steps: list[list[mx.array]] = []
    for step in range(_STEPS):
        if step == _PARTIAL_STEPS:
            lane.move(rows[-1], lane.rows - 1)
            rows[-1] = lane.rows - 1
            lane.poison(inside=_FOREIGN, outside=float("nan"), span=max(_LENGTHS) + _STEPS)
        tokens = np.zeros((max(rows) + 1, 1), np.int32)
        tokens[rows, 0] = [row[step] for row in forced]
        logits = lane.decode(rows, mx.array(tokens))
        steps.append([logits[row] for row in rows])
    return [
        np.array(mx.concatenate([first[i], *(step[i] for step in steps)]).astype(mx.float32))
        for i in range(len(prompts))
    ]


def compare_windows(loaded: LoadedModel, kinds: list[LayerKind], write: Write) -> tuple[str, str]:
    """Why a row beyond a sliding window differs from the same row alone, or nothing; and what was compared.

    A prompt of that length could take minutes. So both get a past that nobody computed: the keys and values of a few
    real tokens, over and over. Around the end of the window the values are so large that one position more or less in
    it changes the logits, in whatever step.
    """
    beyond = ""
    for window in sorted({kind.window for kind in kinds if kind.window is not None}):
        length = window + 2 * _CHUNK
        needed = 4 * length * sum(kind.nbytes for kind in kinds if kind.kind == "kv")
        if needed > _WINDOW_MEMORY_SHARE * psutil.virtual_memory().available:
            beyond += f"; a window of {window} was not exercised, which takes {needed >> 20} MB"
            continue
        try:
            off = _beyond(loaded, kinds, write, window, length)
        except Exception as error:
            return f"its code refuses rows beyond its window of {window}: {type(error).__name__}: {error}", ""
        if off:
            return f"beyond its window of {window} a row's logits differ from the same row alone by {off:.1%}", ""
        beyond += f"; beyond a window of {window} too"
    return "", beyond


def _beyond(loaded: LoadedModel, kinds: list[LayerKind], write: Write, window: int, length: int) -> float:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, loaded.vocab_size, _CHUNK + _TOGETHER + _ALONE).tolist()
    chunk, forced = tokens[:_CHUNK], tokens[_CHUNK:]
    sample = make_prompt_cache(loaded.model)
    loaded.model(mx.array([rng.integers(0, loaded.vocab_size, max(_LENGTHS)).tolist()]), cache=sample)
    loud = np.ones((length, 1), np.float32)
    loud[: length - window + len(tokens)] = max(window / 4, 1.0)
    caches = make_prompt_cache(loaded.model)
    arrays: list[mx.array] = []
    for kind, source, cache in zip(kinds, parts(sample), parts(caches), strict=True):
        if kind.kind == "state":
            cache.state = source.state
            arrays += cache.cache
            continue
        keys, values = (_repeated(array[:, :, : max(_LENGTHS)], length) for array in (source.keys, source.values))
        limit = float(mx.finfo(values.dtype).max) / 2
        values = mx.clip(values * mx.array(loud), -limit, limit).astype(values.dtype)
        cache.update_and_fetch(keys, values)
        arrays += [keys, values]
    lane = Lane(loaded, kinds, 2, round_slots(length + len(tokens)), write)
    long, short = lane.acquire(0), lane.acquire(1)
    lane.restore(long, length, arrays)
    del arrays
    lane.prefill(short, chunk, last=True)
    first = lane.prefill(long, chunk, last=True)
    assert first is not None
    rows = [first]
    for step, token in enumerate(forced):
        active = [long, short] if step < _TOGETHER else [long]
        rows.append(lane.decode(active, mx.array([[token]] * len(active)))[long])
    found = np.array(mx.concatenate(rows).astype(mx.float32))
    alone = _go_on(loaded, caches, chunk, forced)
    # What overflows alone, too, says nothing about the window.
    return _difference(alone, found) if np.isfinite(alone).all() else 0.0


def _repeated(array: mx.array, length: int) -> mx.array:
    """(1, H, n, D) → (1, H, length, D)"""
    return mx.tile(array, (1, 1, -(-length // array.shape[2]), 1))[:, :, :length]
