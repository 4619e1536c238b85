"""``python -m bench.memory_table``: what large models take, from their configurations alone, for docs/memory.md.

The configurations are in tests/data/configs, written from public figures: how many parameters there are, and how many
of them are not packed but numbers of 16 bits. No weight is needed; a test compares them with mlx-lm's own classes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lmx.hub.estimate import estimate
from lmx.hub.shape import Shape
from lmx.serving.budget import model_bytes

CONFIGS = Path(__file__).parents[1] / "tests" / "data" / "configs"
CONTEXT = 32768
MACHINES_GB = (48, 512)


class Model(NamedTuple):
    name: str
    config: dict[str, Any]
    weights_bytes: int


def models() -> Iterator[Model]:
    for path in sorted(CONFIGS.glob("*.json"), key=lambda path: path.name.lower()):
        told = json.loads(path.read_text("utf-8"))
        packed = told["parameters"] - told["unpacked_parameters"]
        quantization = told["config"]["quantization"]
        # Of each group a scale and a bias of 16 bits; of MXFP4 a scale of 8.
        shared = 1 if quantization.get("mode") == "mxfp4" else 4
        weights = packed * (quantization["bits"] / 8 + shared / quantization["group_size"])
        yield Model(path.stem, told["config"], int(weights + 2 * told["unpacked_parameters"]))


def lines() -> Iterator[str]:
    yield "| model | weights GB | KV MB per 1k tokens | 32k × 1 GB | 32k × 8 GB | fits 48 GB | fits 512 GB |"
    yield "|---|---|---|---|---|---|---|"
    for model in models():
        shape = Shape.from_config(model.config, model.weights_bytes)
        found = [estimate(shape, backend="mlx", gpu=True, context=CONTEXT, rows=rows) for rows in (1, 8)]
        totals = [one.total(one.kv_bytes(CONTEXT, one.rows)) for one in found]
        fits = [_fits(totals, size_gb * 1024**3) for size_gb in MACHINES_GB]
        kv = found[0].kv_bytes_per_token * 1000 / 1e6
        numbers = (f"{model.weights_bytes / 1e9:.1f}", f"{kv:.0f}", *(f"{total / 1e9:.1f}" for total in totals), *fits)
        yield f"| {model.name} | {' | '.join(numbers)} |"


def _fits(totals: list[int], machine_bytes: int) -> str:
    budget = model_bytes(machine_bytes, "darwin", lambda name: 0)
    return "8 rows" if totals[1] <= budget else "1 row" if totals[0] <= budget else "no"


if __name__ == "__main__":
    print("\n".join(lines()))
