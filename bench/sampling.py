"""What a draw of 8 rows costs: in NumPy a row after the other, as behind llama.cpp, and in MLX together. The logits lie
so close that nearly all tokens can win; with a real model's NumPy has less to do.

    python -m bench sampling
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from bench.result import Result, Row
from lmx.engine.sampling import SamplingBatch
from lmx.protocol import Sampling

ROWS = 8
VOCABULARIES = (49_152, 151_936)
PENALTY_TARGET = 1.3
"""NumPy: with penalties over 500 seen tokens, by without."""
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "Qwen's": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "top-p": {"top_p": 0.9},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.1},
    "bias": {"logit_bias": dict.fromkeys(range(50), 1.0)},
    "logprobs": {"logprobs": 5},
}


def _median_ms(draw: Callable[[], None], times: int) -> float:
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        draw()
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken[1:])


def run(quick: bool) -> Result:
    rows: list[Row] = []
    for vocab_size in VOCABULARIES:
        rng = np.random.default_rng(0)
        logits = rng.normal(0, 3, (ROWS, vocab_size)).astype(np.float32)
        seen = np.zeros((ROWS, vocab_size), np.int32)
        seen[:, rng.integers(0, vocab_size, 500)] = 1
        on_device, seen_on_device = mx.array(logits), mx.array(seen)
        plain = 0.0
        for name, fields in DRAWS.items():
            samplings = [Sampling(seed, **fields) for seed in range(ROWS)]
            single = [SamplingBatch(np, [sampling], vocab_size) for sampling in samplings]
            together = SamplingBatch(mx, samplings, vocab_size)

            def in_turn(single: list[SamplingBatch] = single, logits: Any = logits, seen: Any = seen) -> None:
                for row, batch in enumerate(single):
                    part = slice(row, row + 1)
                    batch.draw(logits[part], [row], [seen[part], seen[part]] if batch.penalised else None)

            def at_once(batch: SamplingBatch = together, logits: Any = on_device, seen: Any = seen_on_device) -> None:
                drawn = batch.draw(logits, range(ROWS), [seen, seen] if batch.penalised else None)
                mx.eval([array for array in (drawn.tokens, drawn.bad, drawn.top_ids) if array is not None])

            times = 5 if quick else 20
            numpy_ms, mlx_ms = _median_ms(in_turn, times), _median_ms(at_once, times)
            plain = numpy_ms if name == "temperature 1" else plain
            penalised = name == "penalties"
            rows.append(
                {
                    "vocabulary": vocab_size,
                    "draw": name,
                    "numpy ms": numpy_ms,
                    "mlx ms": mlx_ms,
                    "ratio": numpy_ms / plain if plain else None,
                    "target": PENALTY_TARGET if penalised else None,
                    "ok": numpy_ms <= PENALTY_TARGET * plain if penalised else None,
                }
            )
    return Result(f"milliseconds to draw for {ROWS} rows (ratio: NumPy, by temperature 1)", rows)
