"""What KV in 8 and 4 bits changes on MLX: a real model's distributions of the next token over a real text, against KV
as the model gives it (KL divergence in nats, and how often the most likely token is the same); bytes of a token; and
the milliseconds of a decode step (ratio: to those of whole KV).

    python -m bench kv_quality
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

import lmx.bench
from bench.models import folder
from bench.result import Result, Row, alternate, median_ratio
from lmx.engine.mlx import adapter
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.device import choose_write
from lmx.engine.mlx.layers import round_slots

MODEL = "smollm2"
BITS = (16, 8, 4)
TEXT = Path(lmx.bench.__file__).parent / "text.txt"
CHUNK = 256
ROWS, STEPS = 4, 3


def run(quick: bool) -> Result:
    loaded = adapter.load(folder(MODEL))
    ids = Tokenizer.from_file(str(folder(MODEL) / "tokenizer.json")).encode(TEXT.read_text(encoding="utf-8")).ids
    ids = ids[: 300 if quick else 1000]
    lanes = {bits: _lane(loaded, bits, len(ids)) for bits in BITS}
    found = {bits: _log_probabilities(loaded, lane, ids) for bits, lane in lanes.items()}
    measures: list[Callable[[], float]] = [partial(_step_ms, lane) for lane in lanes.values()]
    steps = dict(zip(BITS, alternate(2 if quick else 3, *measures), strict=True))
    rows: list[Row] = []
    for bits in BITS:
        divergence = np.sum(np.exp(found[16]) * (found[16] - found[bits]), axis=-1)
        rows.append(
            {
                "bits": bits,
                "bytes a token": sum(kind.nbytes for kind in lanes[bits].kinds),
                "mean KL": float(divergence.mean()),
                "p99 KL": float(np.quantile(divergence, 0.99)),
                "same top-1": float(np.mean(found[bits].argmax(-1) == found[16].argmax(-1))),
                "perplexity": float(np.exp(-np.mean(found[bits][np.arange(len(ids) - 1), ids[1:]]))),
                "step ms": statistics.median(steps[bits]),
                "ratio": median_ratio(steps[bits], steps[16]),
            }
        )
    title = f"{MODEL}, {loaded.dtype}: {len(ids)} tokens of text; steps of {ROWS} rows behind them"
    return Result(title, rows, {"device": mx.default_device().type.name})


def _lane(loaded: adapter.LoadedModel, bits: int, tokens: int) -> Lane:
    kinds = adapter.layer_kinds(loaded.model)
    assert not isinstance(kinds, str), kinds
    return Lane(
        loaded, [replace(kind, bits=bits) for kind in kinds], ROWS, round_slots(tokens + 100), choose_write()[0]
    )


def _log_probabilities(loaded: adapter.LoadedModel, lane: Lane, ids: list[int]) -> np.ndarray:
    """Of every token after each of the ids but the last, in float64. Computed in chunks, which see what decode steps
    see."""
    rows = [lane.acquire(row) for row in range(ROWS)]
    found: list[np.ndarray] = []

    def see(hidden: mx.array) -> None:
        logits = loaded.logits(hidden)[0]
        found.append(np.array((logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(mx.float32)))

    for start in range(0, len(ids), CHUNK):
        lane.prefill(rows[0], ids[start : start + CHUNK], last=start + CHUNK >= len(ids), see=see)
    for row in rows[1:]:
        lane.fork(row, lane, rows[0], len(ids))
    return np.concatenate(found)[:-1].astype(np.float64)


def _step_ms(lane: Lane) -> float:
    """The median of a few decode steps, which are taken back."""
    length = int(lane.lengths[0])
    taken = []
    for _ in range(STEPS):
        started = time.perf_counter()
        logits = lane.decode(range(ROWS), mx.ones((ROWS, 1), mx.int32))
        mx.eval(logits, lane.arrays)
        taken.append((time.perf_counter() - started) * 1e3)
    for row in range(ROWS):
        lane.rewind(row, length)
    return statistics.median(taken)
