"""No conversation ever sees another's tokens: 200 joins over all kinds of models, 10,000 in ``make soak``."""

import os
from pathlib import Path

import pytest

from tests.engine_client import engine
from tests.prefix_soak import soak
from tests.test_prefix import MODELS, load

# llama.cpp's logits move by hundredths with the rows that share a batch: KV and products of 16 bits.
TIE = {"mlx": 0.0, "llama": 0.1}
JOINS = int(os.environ.get("LMX_SOAK_JOINS", "100")) // len(MODELS)
CONTEXT = 1536


@pytest.mark.parametrize("kind", MODELS)
def test_conversations_never_see_each_other(kind: str, tmp_path: Path) -> None:
    path, backend = load(kind, tmp_path)
    base = {"backend": backend, "max_rows": 4, "max_chunk_tokens": 128, "context_length": CONTEXT}
    with engine(path, **base, prefix_cache=False) as alone:
        assert alone.ready is not None
        per_token = alone.ready.kv_bytes_per_token
        small = {
            "kv_budget_bytes": (CONTEXT + 512) * per_token + 2**20,
            "prefix_ram_bytes": 1000 * per_token + 2**18,
            "prefix_disk_bytes": 2**28,
            "prefix_dir": str(tmp_path / "prefixes"),
        }
        # The second engine has what the first one left on the disk.
        for seed in (1, 2):
            with engine(path, **base, **small) as client:
                soak(client, alone, JOINS // 2, seed, most_tokens=CONTEXT, tie=TIE[backend])
                stats = client.idle_stats()
                assert (stats.queued, stats.prefilling, stats.decoding, stats.ending, stats.kv_used_bytes) == (0,) * 5
                assert max(stats.prefix.ram_bytes for stats in client.stats) <= small["prefix_ram_bytes"]
                hits = stats.prefix.row_hit_tokens + stats.prefix.ram_hit_tokens + stats.prefix.disk_hit_tokens
                assert hits > 0
