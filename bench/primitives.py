"""How many operations MLX is given for one decode step: lmx with up to 8 rows, against mlx-lm's ``generate_step`` with
one, on the same model.

Each is a dispatch, or at least work for the host, so on a GPU this decides about small models' speed; and it can be
counted without one. MLX's fused operations (norms, RoPE, attention), which the CPU back end spells out, stand as one
node each, as they do on Metal; sampling graphs are compiled, as there. Nothing that is counted is run.

    python -m bench primitives
"""

import contextlib
import itertools
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from bench.models import folder
from bench.result import Result, Row
from lmx.engine.backend import Chunk, Sequence
from lmx.engine.mlx import adapter
from lmx.engine.mlx.backend import MLXBackend
from lmx.engine.mlx.placement import Placement
from lmx.protocol import Load, Sampling
from tests.models import build_model

TARGET = 1.05
LAYERS = 24
BUILT: dict[str, dict[str, Any]] = {"llama": {}, "qwen3_moe": {}, "gemma3_text": {"sliding_window": 8}}
LENGTHS = (10, 15, 9, 13, 16, 11, 14, 12)
"""All beyond the window of the sliding model."""
ROWS = {"8 of 8": range(8), "8 of 8, one length": range(8), "5 of 8": (0, 1, 2, 3, 5)}
DRAWS = {
    "greedy": (Sampling(0, temperature=0.0), {}),
    "Qwen's": (Sampling(0, temperature=0.7, top_k=20, top_p=0.8), {"temp": 0.7, "top_k": 20, "top_p": 0.8}),
}
# They describe the same memory in other words. (A reshape may copy; those counted here do not.)
_VIEWS = {
    *("Broadcast", "ExpandDims", "Squeeze", "Slice", "Reshape", "Flatten", "Unflatten", "Transpose", "Split"),
    "StopGradient",
}


class _Counted(Exception):
    """Ends a step before it runs."""


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """What is run only to get there needs no kernels from g++."""
    mx.disable_compile()
    try:
        yield
    finally:
        if shutil.which("g++") is not None:
            mx.enable_compile()


@_uncompiled()
def built(kind: str, scratch: Path) -> adapter.LoadedModel:
    """A small model of a kind in BUILT."""
    return adapter.load(build_model(kind, scratch / kind, num_hidden_layers=LAYERS, **BUILT[kind]))


@_uncompiled()
def back_end(loaded: adapter.LoadedModel) -> MLXBackend:
    return MLXBackend(loaded, Load(path="", max_rows=8))


@_uncompiled()
def count_ours(backend: MLXBackend, rows: str, sampling: Sampling) -> Counter[str]:
    """The operations of a step in which these of 8 rows decode."""
    lengths = [12] * 8 if "one length" in rows else LENGTHS
    sequences = [
        Sequence(seq, [5 + seq] * length, length, 99, sampling, ignore_eos=True) for seq, length in enumerate(lengths)
    ]
    for sequence in sequences:
        backend.start(sequence)
    chunks = [Chunk(sequence, 0, len(sequence.tokens), last=True) for sequence in sequences]
    backend.launch([], chunks).wait()
    decoding = [sequences[seq] for seq in ROWS[rows]]
    for sequence in sequences:
        if sequence not in decoding:
            backend.free(sequence)
    with _as_on_metal() as counted:
        backend.launch(decoding, []).start()
    # What was never run goes with its lane.
    backend._placement = Placement(backend._loaded, backend._probe, backend.facts, backend._placement.costs)
    return counted


@_uncompiled()
def count_theirs(loaded: adapter.LoadedModel, sampler: dict[str, Any]) -> Counter[str]:
    """The operations of a step of ``generate_step``."""
    drawn = itertools.count()
    chosen = make_sampler(**sampler)

    def sample(logprobs: mx.array) -> mx.array:
        # What draws after the prompt is run.
        return chosen(logprobs) if next(drawn) else mx.argmax(logprobs, axis=-1)

    counted: Counter[str] = Counter()
    run = mx.async_eval

    def first(*results: Any) -> None:
        """Of the step after the prompt; the next is counted."""
        run(*results, mx.random.state)
        stack.enter_context(_as_on_metal(counted))

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(mx, "async_eval", first))
        next(generate_step(mx.array([5] * 12), loaded.model, sampler=sample))
    return counted


@contextlib.contextmanager
def _as_on_metal(counted: Counter[str] | None = None) -> Iterator[Counter[str]]:
    """The operations that the block wants evaluated are counted instead, which ends it."""
    counted = Counter() if counted is None else counted

    def count(*results: Any) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            graph = Path(scratch, "graph.dot")
            mx.export_to_dot(str(graph), *(a for _, a in tree_flatten(list(results)) if isinstance(a, mx.array)))
            counted.update(re.findall(r'\[label ="([^"]+)", shape=rectangle\]', graph.read_text(encoding="utf-8")))
        raise _Counted

    mx.enable_compile()
    try:
        with (
            patch.object(mx, "async_eval", count),
            patch.object(mx.fast, "rms_norm", lambda x, weight, eps: _one_node(x, weight)),
            patch.object(mx.fast, "layer_norm", lambda x, weight, bias, eps: _one_node(x, weight, bias)),
            patch.object(mx.fast, "rope", lambda x, *args, offset, **kwargs: _one_node(x, offset)),
            patch.object(mx.fast, "scaled_dot_product_attention", _attention),
            patch("lmx.engine.sampling.compiles", lambda xp: True),
            contextlib.suppress(_Counted),
        ):
            yield counted
    finally:
        mx.disable_compile()


def _one_node(x: mx.array, *inputs: Any) -> mx.array:
    [found] = mx.depends([x], [array for array in inputs if isinstance(array, mx.array)])
    return found


def _attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any = None, sinks: Any = None
) -> mx.array:
    """With what MLX does around its kernel on Metal: a mask is broadcast, and copied if it is not one for each head."""
    if isinstance(mask, mx.array):
        shape = (*queries.shape[:3], keys.shape[2])
        if mask.shape != shape:
            mask = mx.broadcast_to(mask, shape)
            if math.prod(shape[:2]) > max(shape[:2]):
                mask = mx.contiguous(mask)
    result = queries if queries.shape[3] == values.shape[3] else mx.zeros((*queries.shape[:3], values.shape[3]))
    return _one_node(result, queries, keys, values, mask, sinks)


def kernels(counted: Counter[str]) -> int:
    """Those that compute or copy."""
    return sum(count for name, count in counted.items() if name not in _VIEWS)


def measure(name: str, loaded: adapter.LoadedModel) -> Iterator[Row]:
    backend = back_end(loaded)
    for draw, (sampling, sampler) in DRAWS.items():
        theirs = count_theirs(loaded, sampler)
        for rows in ROWS:
            ours = count_ours(backend, rows, sampling)
            ratio = ours.total() / theirs.total()
            kernel_ratio = kernels(ours) / kernels(theirs)
            yield {
                "model": name,
                "rows": rows,
                "draw": draw,
                "ours": ours.total(),
                "theirs": theirs.total(),
                "ratio": ratio,
                "our kernels": kernels(ours),
                "their kernels": kernels(theirs),
                "kernel ratio": kernel_ratio,
                "target": TARGET,
                "ok": max(ratio, kernel_ratio) <= TARGET,
            }


def run(quick: bool) -> Result:
    rows: list[Row] = []
    for kind in BUILT:
        with tempfile.TemporaryDirectory() as scratch:
            rows += measure(f"{kind}, {LAYERS} layers", built(kind, Path(scratch)))
    rows += measure("smollm2", adapter.load(folder("smollm2")))
    return Result("operations of a decode step (kernels: without mere views), by those of mlx-lm's for one row", rows)
