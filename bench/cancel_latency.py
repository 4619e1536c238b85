"""From the client's closing its socket to freed KV, beside running streams, against one engine step.

Seen from outside: the client notes when it closes, then reads /metrics until the sequence is gone, so the figure
includes that reading (2 to 4 ms). Beside it the mean of the server's own ``lmx_cancel_free_seconds``, which counts from
the disconnect seen.
"""

import http.client
import random
import re
import statistics
import time
from functools import partial
from urllib.parse import urlsplit

from bench.models import folder
from bench.result import Result, Row
from lmx.bench.client import Client, Request, Stream
from lmx.bench.figures import spread
from lmx.bench.prompts import Prompts
from lmx.bench.server import running_server

MODEL = "llama-8x512"
ALLOWANCE_MS = 20.0
RUNNING_TOKENS = 8000


class _Metrics:
    """One kept connection to /metrics."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc)

    def read(self) -> dict[str, float]:
        """Every sample by its name, labels left out (there is one model)."""
        self._connection.request("GET", "/metrics")
        text = self._connection.getresponse().read().decode()
        samples = re.findall(r"^(\w+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in samples}


def run(quick: bool) -> Result:
    path = folder(MODEL)
    rows: list[Row] = []
    with running_server(str(path)) as server, Client(server.url, path.name) as client:
        for streams in (3,) if quick else (0, 3, 7):
            rows.append(_measure(client, _Metrics(server.url), streams, 30 if quick else 100))
    return Result("milliseconds from a client's close to freed KV (target: p99 within one step + 20 ms)", rows)


def _measure(client: Client, metrics: _Metrics, beside: int, trials: int) -> Row:
    prompts, rng = Prompts(random.randrange(2**32)), random.Random(0)
    before = metrics.read()
    latencies_ms: list[float] = []
    running: list[Stream] = []
    for _ in range(trials):
        running = [stream for stream in running if not stream.done]
        while len(running) < beside:
            running.append(client.start(Request(prompts.words(20), RUNNING_TOKENS)))
        victim = client.start(Request(prompts.words(20), RUNNING_TOKENS))
        events = rng.randrange(2, 12)
        client.wait(partial(_all_have, [victim], events))
        client.wait(partial(_all_have, running, 1))
        client.close(victim)
        closed = time.perf_counter()
        while metrics.read()["lmx_live_sequences"] > beside:
            pass
        latencies_ms.append((time.perf_counter() - closed) * 1e3)
    after = metrics.read()
    for stream in running:
        if not stream.done:
            client.close(stream)
    while metrics.read()["lmx_live_sequences"]:
        time.sleep(0.01)
    step_ms = _mean_ms(before, after, "lmx_step_seconds")
    found = spread(latencies_ms)
    return {
        "streams beside": beside,
        "trials": trials,
        "p50 ms": found.p50,
        "p99 ms": found.p99,
        "mean ms": statistics.mean(latencies_ms),
        "server's mean ms": _mean_ms(before, after, "lmx_cancel_free_seconds"),
        "step ms": step_ms,
        "ratio": found.p99 / step_ms,
        "limit ms": step_ms + ALLOWANCE_MS,
        "ok": found.p99 <= step_ms + ALLOWANCE_MS,
    }


def _all_have(streams: list[Stream], events: int) -> bool:
    return all(len(stream.event_times) >= events for stream in streams)


def _mean_ms(before: dict[str, float], after: dict[str, float], name: str) -> float:
    def total(suffix: str) -> float:
        return after[f"{name}_{suffix}"] - before.get(f"{name}_{suffix}", 0.0)

    return 1e3 * total("sum") / total("count")
