"""From a disconnect to freed KV, beside running streams, against one engine step.

The engine's figure is the server's own ``lmx_cancel_free_seconds``, read once a trial when the sequence is gone:
whoever asks the server again and again takes the cores away from the engine and measures that (120 instead of 80 ms
here). What lies before it, from the client's closing its socket to the disconnect seen, is in the first row: the whole
way from the outside, through a null engine whose steps cost nothing, polled every POLL_MS.
"""

import http.client
import random
import re
import statistics
import time
from functools import partial
from urllib.parse import urlsplit

from bench.models import CACHE, folder, null_engine
from bench.result import Result, Row
from lmx.bench.client import Client, Request, Stream
from lmx.bench.figures import Spread, spread
from lmx.bench.prompts import Prompts
from lmx.bench.server import running_server
from lmx.hub.inventory import EMBEDDED_ID, resolve

MODEL = "llama-8x512"
LLAMA = "smollm2 GGUF on llama.cpp"
ALLOWANCE_MS = 20.0
POLL_MS = 3
PAUSE_S = 0.2
NULL_STEP_MS = 1.0
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
    trials = 30 if quick else 100
    path = folder(MODEL)
    rows: list[Row] = []
    with running_server(str(path), null_engine(NULL_STEP_MS)) as server, Client(server.url, path.name) as client:
        rows.append(_through_the_server(client, _Metrics(server.url), trials))
    for name in ("llama-8x512", LLAMA) if quick else ("llama-8x512", "smollm2", LLAMA):
        path = resolve(EMBEDDED_ID, CACHE, "llama").path if name == LLAMA else folder(name)
        backend = {"LMX_MODEL_BACKEND": "llama" if name == LLAMA else "mlx"}
        with running_server(str(path), backend) as server, Client(server.url, path.stem, {"logprobs": 0}) as client:
            for streams in (3,) if quick else (0, 3, 7):
                rows.append(_measure(name, client, _Metrics(server.url), streams, trials))
    return Result("milliseconds from a disconnect to freed KV (target: p99 within one step + 20 ms)", rows)


def _through_the_server(client: Client, metrics: _Metrics, trials: int) -> Row:
    prompts = Prompts(random.randrange(2**32))
    latencies_ms: list[float] = []
    for _ in range(trials):
        victim = client.start(Request(prompts.words(20), RUNNING_TOKENS))
        client.wait(partial(_all_have, [victim], 3))
        client.close(victim)
        closed = time.perf_counter()
        while metrics.read()["lmx_live_leases"]:
            time.sleep(POLL_MS / 1e3)
        latencies_ms.append((time.perf_counter() - closed) * 1e3)
    found = spread(latencies_ms)
    return {"model": "null engine, from the client's close", "beside": 0, "trials": trials} | _row(found, NULL_STEP_MS)


def _row(found: Spread, step_ms: float) -> Row:
    limit_ms = step_ms + ALLOWANCE_MS
    return {
        "p50 ms": found.p50,
        "p99 ms": found.p99,
        "step ms": step_ms,
        "ratio": found.p99 / step_ms,
        "limit ms": limit_ms,
        "ok": found.p99 <= limit_ms,
    }


def _measure(name: str, client: Client, metrics: _Metrics, beside: int, trials: int) -> Row:
    prompts, rng = Prompts(random.randrange(2**32)), random.Random(0)
    latencies_ms: list[float] = []
    steps_ms: list[float] = []
    running: list[Stream] = []
    for _ in range(trials):
        running = [stream for stream in running if not stream.done]
        while len(running) < beside:
            running.append(client.start(Request(prompts.words(20), RUNNING_TOKENS)))
        victim = client.start(Request(prompts.words(20), RUNNING_TOKENS))
        client.wait(partial(_all_have, [victim], rng.randrange(2, 12)))
        client.wait(partial(_all_have, running, 1))
        before = metrics.read()
        client.close(victim)
        while (after := metrics.read())["lmx_live_leases"] > beside:
            time.sleep(PAUSE_S)
        latencies_ms.append(_mean_ms(before, after, "lmx_cancel_free_seconds"))
        if _count(before, after, "lmx_step_seconds"):
            steps_ms.append(_mean_ms(before, after, "lmx_step_seconds"))
    for stream in running:
        client.close(stream)
    while metrics.read()["lmx_live_leases"]:
        time.sleep(PAUSE_S)
    row: Row = {"model": name, "beside": beside, "trials": trials}
    return row | _row(spread(latencies_ms), statistics.median(steps_ms))


def _all_have(streams: list[Stream], events: int) -> bool:
    return all(len(stream.event_times) >= events for stream in streams)


def _count(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after[f"{name}_count"] - before.get(f"{name}_count", 0.0)


def _mean_ms(before: dict[str, float], after: dict[str, float], name: str) -> float:
    total_s = after[f"{name}_sum"] - before.get(f"{name}_sum", 0.0)
    return 1e3 * total_s / _count(before, after, name)
