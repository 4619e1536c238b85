"""Side by side with ``mlx_lm.server``: the same requests, client, weights and BLAS, in turn; and one stream against
``mlx_lm.stream_generate`` without any server.

Two clients: one that costs little and sends what it has at once, and one of asyncio and httpx, whose requests come one
after the other, as those of bots do."""

import statistics
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from bench.asyncio_client import AsyncioClient
from bench.bare import bare_loop
from bench.models import folder, folder_without_eos
from bench.peer import mlx_lm_server
from bench.result import Result, Row, alternate, median_ratio
from lmx.bench.client import Client, Request
from lmx.bench.figures import Figures, figures
from lmx.bench.prompts import Prompts
from lmx.bench.server import running_server

TARGETS = {"smollm2": 1.15, "llama-8x512": 1.3}
"""Whole-run tok/s with 8 streams, ours by theirs."""
ASYNCIO_TARGET = 1.05
"""The same with the asyncio client, which takes part of the processor."""
GAP_TARGET = 0.3
"""Worst gap with 8 streams, ours by theirs."""
SINGLE_TARGET = 0.95
PROMPT_WORDS = 60
REQUESTS = 16
EQUAL = (64,)
MIXED = (32, 96, 48, 80, 64, 40, 88, 56, 72)
"""Answer lengths, in turn; 64 on average. With equal ones all streams of a wave end together and no prompt ever arrives
beside running streams, which is mlx-lm's best case; with mixed ones they join and leave as in real use."""


@dataclass
class _Contestant:
    client: Client | AsyncioClient
    runs: list[Figures] = field(default_factory=list)

    def measure(self, streams: int, prompts: Prompts, lengths: tuple[int, ...], count: int) -> float:
        requests = [Request(prompts.words(PROMPT_WORDS), tokens) for tokens in islice(cycle(lengths), count)]
        finished = self.client.run(requests, streams)
        assert all(s.completion_tokens == s.request.max_tokens for s in finished), "an answer ended early"
        found = figures(finished, streams)
        self.runs.append(found)
        return found.generation_tokens_per_s

    def worst_gap_ms(self) -> float:
        """The median over the runs of each run's worst."""
        return statistics.median(run.itl_ms.max for run in self.runs if run.itl_ms)


def run(quick: bool) -> Result:
    rows: list[Row] = []
    for name in ("smollm2",) if quick else ("smollm2", "llama-8x512"):
        rows += _servers(name, quick)
        rows.append(_single_stream(name, quick))
    return Result("whole-run tok/s and worst gap; theirs: mlx_lm.server, last rows: mlx_lm.stream_generate", rows)


def _servers(name: str, quick: bool) -> list[Row]:
    rows: list[Row] = []
    path, prompts = folder(name), Prompts(0)
    with (
        running_server(str(path)) as server,
        mlx_lm_server(folder_without_eos(name)) as peer_url,
        Client(server.url, path.name) as our_client,
        Client(peer_url, "default_model") as their_client,
    ):
        pairs = {
            "selectors": (_Contestant(our_client), _Contestant(their_client)),
            "asyncio": (
                _Contestant(AsyncioClient(server.url, path.name)),
                _Contestant(AsyncioClient(peer_url, "default_model")),
            ),
        }
        for contestant in pairs["selectors"]:
            contestant.measure(8, prompts, (8,), 8)  # warm-up
        loads = [(8, "equal", EQUAL, "selectors"), (8, "mixed", MIXED, "selectors"), (8, "equal", EQUAL, "asyncio")]
        if not quick:
            loads = [(1, "equal", EQUAL, "selectors"), (4, "mixed", MIXED, "selectors"), *loads]
        for streams, kind, lengths, client in loads:
            ours, theirs = pairs[client]
            ours.runs.clear()
            theirs.runs.clear()
            requests = REQUESTS if streams == 8 else 2 * streams
            repeats = 3 if streams == 8 and not quick else 1
            ours_speed, theirs_speed = alternate(
                repeats,
                partial(ours.measure, streams, prompts, lengths, requests),
                partial(theirs.measure, streams, prompts, lengths, requests),
            )
            ratio = median_ratio(ours_speed, theirs_speed)
            gaps = ours.worst_gap_ms(), theirs.worst_gap_ms()
            target = (ASYNCIO_TARGET if client == "asyncio" else TARGETS[name]) if streams == 8 else None
            rows.append(
                {
                    "model": name,
                    "streams": streams,
                    "answers": kind,
                    "client": client,
                    "ours tok/s": statistics.median(ours_speed),
                    "theirs tok/s": statistics.median(theirs_speed),
                    "ratio": ratio,
                    "target": target,
                    "our gap ms": gaps[0],
                    "their gap ms": gaps[1],
                    "gap ratio": gaps[0] / gaps[1],
                    "gap target": GAP_TARGET if streams == 8 else None,
                    "ok": None if target is None else ratio >= target and gaps[0] <= GAP_TARGET * gaps[1],
                }
            )
    return rows


def _single_stream(name: str, quick: bool) -> Row:
    """Generation after the first token."""
    path: Path = folder(name)
    prompts = Prompts(1)
    tokens = 32 if quick else 64
    with (
        running_server(str(path)) as server,
        Client(server.url, path.name) as client,
        bare_loop(folder_without_eos(name)) as bare,
    ):

        def ours() -> float:
            [stream] = client.run([Request(prompts.words(PROMPT_WORDS), tokens)], 1)
            return (tokens - 1) / (stream.event_times[-1] - stream.event_times[0])

        def theirs() -> float:
            return bare.stream_tokens_per_s(prompts.words(PROMPT_WORDS), tokens)

        ours(), theirs()
        our_speed, their_speed = alternate(3 if quick else 5, ours, theirs)
    ratio = median_ratio(our_speed, their_speed)
    return {
        "model": name,
        "streams": 1,
        "answers": "no server",
        "client": "selectors",
        "ours tok/s": statistics.median(our_speed),
        "theirs tok/s": statistics.median(their_speed),
        "ratio": ratio,
        "target": SINGLE_TARGET,
        "our gap ms": None,
        "their gap ms": None,
        "gap ratio": None,
        "gap target": None,
        "ok": ratio >= SINGLE_TARGET,
    }
