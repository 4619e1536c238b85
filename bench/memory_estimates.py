"""What a model is estimated to take, against what its engine's process took: the context filled by one prompt.

Resident sets, in which libraries count whole, as they do for a machine that runs one engine. On a CPU a model's first
prompt leaves in the process what its steps took for a moment; that is part of both.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.result import Result, Row
from lmx.hub.estimate import Estimate, estimate
from lmx.hub.inventory import EMBEDDED_ID, resolve
from lmx.hub.shape import read_shape
from lmx.protocol import Embed, Pooling, Stats, pack_tokens
from tests.engine_client import Answer, engine
from tests.models import assemble_gemma, build_model, unpack_minilm

CONTEXT = 2048
MOST, LEAST = 1.1, 0.9


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    path: Path
    backend: str
    embedding: Pooling | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    estimate: Estimate
    estimated_bytes: int
    measured_bytes: int
    stats: Stats
    """The engine's own, at that moment."""

    @property
    def ratio(self) -> float:
        return self.estimated_bytes / self.measured_bytes


def compare(case: Case, context: int = CONTEXT) -> Compared:
    """Of a real engine process, which is gone afterwards."""
    shape = read_shape(case.path)
    embeds = case.embedding is not None
    context = min(context, shape.context_length)
    found = estimate(shape, backend=case.backend, gpu=False, context=context, rows=1, embedding=embeds)
    kv_bytes = 0 if embeds else found.kv_bytes(context)
    options = {"kv_budget_bytes": kv_bytes, "context_length": context, "embedding": case.embedding}
    with engine(case.path, backend=case.backend, max_rows=1, **options) as client:
        assert client.ready is not None
        tokens = [10 + i * 7 % (client.ready.vocab_size - 20) for i in range(context - 8)]
        if embeds:
            client.answers[0] = Answer()
            client.send(Embed(0, pack_tokens(tokens), pack_tokens([len(tokens)])))
            client.wait(lambda: any(type(message).__name__ == "Embedded" for message in client.messages))
        else:
            client.run([tokens], 8)
        stats = client.idle_stats()
        measured = int(psutil.Process(client.process.pid).memory_info().rss)
    return Compared(found, found.total(kv_bytes), measured, stats)


def cases(place: Path, quick: bool = False) -> list[Case]:
    """Those that are in every checkout, then those whose weights are packages."""
    own, cache = Path("~/.cache/lmx").expanduser(), place / "cache"
    found = [
        Case("SmolLM2-135M", resolve(EMBEDDED_ID, own, "mlx").path, "mlx"),
        Case("SmolLM2-135M", resolve(EMBEDDED_ID, own, "llama").path, "llama"),
        Case("tiny qwen3_next", build_model("qwen3_next", place / "tiny"), "mlx"),
    ]
    if not quick:
        minilm, gemma = unpack_minilm(place), assemble_gemma(place)
        found += [
            Case("gemma-3-270m", resolve(str(gemma), cache, "mlx").path, "mlx"),
            Case("gemma-3-270m", resolve(str(gemma), cache, "llama").path, "llama"),
            Case("all-MiniLM-L6-v2", minilm, "mlx", Pooling("mean")),
        ]
    return found


def run(quick: bool) -> Result:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        for case in cases(Path(place), quick):
            compared = compare(case)
            rows.append(
                {
                    "model": case.name,
                    "backend": case.backend,
                    "weights MB": round(compared.estimate.weights_bytes / 1e6, 1),
                    "prefill MB": round(compared.estimate.prefill_bytes / 1e6, 1),
                    "estimate MB": round(compared.estimated_bytes / 1e6, 1),
                    "measured MB": round(compared.measured_bytes / 1e6, 1),
                    "ratio": round(compared.ratio, 3),
                    "ok": LEAST <= compared.ratio <= MOST,
                }
            )
    return Result(f"estimate by measured, a context of {CONTEXT} tokens filled", rows)
