"""Decode tok/s through HTTP with 1, 4 and 8 streams of a real server, against the bare batched loop."""

from functools import partial

from bench.bare import bare_loop
from bench.models import NAMES, folder
from bench.result import Result, Row, alternate, median_ratio
from lmx.bench.client import Client, Request
from lmx.bench.figures import decode_tokens_per_s
from lmx.bench.prompts import Prompts
from lmx.bench.server import running_server

TARGETS = {"smollm2": 0.9, "llama-4x128": 0.6}
"""With 8 streams."""
PROMPT_WORDS = 48


def run(quick: bool) -> Result:
    rows: list[Row] = []
    prompts = Prompts(0)
    for name in ("smollm2", "llama-4x128") if quick else NAMES:
        tokens = 32 if name == "smollm2" else 192
        path = folder(name)
        with bare_loop(path) as bare, running_server(str(path)) as server, Client(server.url, path.name) as client:
            [warm_up] = client.run([Request(prompts.words(PROMPT_WORDS), 8)], 1)
            for streams in (1, 8) if quick else (1, 4, 8):
                candidate, baseline = alternate(
                    3 if quick else 5,
                    partial(_through_http, client, prompts, streams, tokens),
                    partial(bare.decode_tokens_per_s, streams, warm_up.prompt_tokens, tokens),
                )
                ratio = median_ratio(candidate, baseline)
                target = TARGETS.get(name) if streams == 8 else None
                rows.append(
                    {
                        "model": name,
                        "streams": streams,
                        "HTTP tok/s": max(candidate),
                        "bare tok/s": max(baseline),
                        "ratio": ratio,
                        "target": target,
                        "ok": None if target is None else ratio >= target,
                    }
                )
    return Result("decode through HTTP against the bare loop (best of each; ratio: median)", rows)


def _through_http(client: Client, prompts: Prompts, streams: int, tokens: int) -> float:
    # The first stream decodes while the last is in prefill, so that it needs more tokens.
    requests = [Request(prompts.words(PROMPT_WORDS), tokens + streams) for _ in range(streams)]
    speed = decode_tokens_per_s(client.run(requests, streams), streams)
    assert speed is not None
    return speed
