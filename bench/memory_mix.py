"""KV buffers against the KV in them, in a mix of short and long sequences that never idles, and what that costs.

Eight at a time, 100 to 8,000 tokens each, log-uniform, as many arrivals as leave. The figures are the engine's own
accounts after every step. The baseline of the decode speed is the same engine with eight sequences of one length, which
share one lane: as many rows and as many tokens of KV in sum.
"""

import contextlib
import math
import random
import statistics

from bench.models import folder
from bench.result import Result, Row
from tests.engine_client import EngineClient, engine

MODELS = ("llama-4x128", "llama-8x512")
ROWS = 8
LENGTHS = (100, 8000)
ANSWER = (30, 200)
WARM_UP_ARRIVALS = 2 * ROWS


def run(quick: bool) -> Result:
    rows: list[Row] = []
    for model in MODELS[:1] if quick else MODELS:
        with engine(folder(model), max_rows=ROWS, stats_interval_s=0.0) as client:
            rows.append({"model": model, **_mix(client, 40 if quick else 150)})
    return Result("KV buffers ÷ KV in use, 100 to 8,000 tokens, never idle", rows)


def _mix(client: EngineClient, arrivals: int) -> dict[str, float | bool]:
    draw = random.Random(5)
    assert client.ready is not None
    vocabulary = client.ready.vocab_size
    live: list[int] = []
    submitted = 0

    def arrive() -> None:
        total = int(math.exp(draw.uniform(*map(math.log, LENGTHS))))
        answer = min(draw.randint(*ANSWER), total // 2)
        live.append(client.submit([draw.randrange(vocabulary) for _ in range(total - answer)], answer))

    first_stats = first_step = 0
    while submitted < arrivals:
        while len(live) < ROWS:
            arrive()
            submitted += 1
        client.wait(lambda: any(client.answers[seq].freed for seq in live))
        live[:] = [seq for seq in live if not client.answers[seq].freed]
        if submitted <= WARM_UP_ARRIVALS:
            first_stats, first_step = len(client.stats), len(client.steps)
    accounts = [stats for stats in client.stats[first_stats:] if stats.kv_used_bytes]
    held = [stats.kv_used_bytes for stats in accounts]
    buffers = [stats.arena_bytes for stats in accounts]
    mixed = _decode_tokens_per_s(client, first_step)
    for seq in live:
        client.cancel(seq)
    client.wait_freed(*live)
    per_row = int(statistics.mean(held) / ROWS / client.ready.kv_bytes_per_token)
    first_step = len(client.steps)
    client.run([[draw.randrange(vocabulary) for _ in range(per_row)] for _ in range(ROWS)], 64)
    alike = _decode_tokens_per_s(client, first_step)
    return {
        "ratio": sum(buffers) / sum(held),
        # Between a long one's end and the next step, which gives its room back.
        "worst": max(pair[0] / pair[1] for pair in zip(buffers, held, strict=True)),
        "target": 1.5,
        "decode tok/s": mixed,
        "of like lengths": alike,
        "ok": sum(buffers) <= 1.5 * sum(held),
    }


def _decode_tokens_per_s(client: EngineClient, first: int) -> float:
    """Of the steps in which all rows decode and nothing else runs."""
    steps = [step for step in client.steps[first:] if not step.prefills and len(step.rows) == ROWS]
    with contextlib.suppress(statistics.StatisticsError):
        return ROWS / statistics.median(step.elapsed_ms for step in steps) * 1e3
    return math.nan
