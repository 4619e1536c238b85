"""A long prompt arrives while four streams decode: the largest gap between tokens of the running streams."""

import random
import statistics
import time
from itertools import pairwise

from bench.bare import bare_loop
from bench.models import folder
from bench.result import Result, Row
from lmx.bench.client import Client, Request, Stream
from lmx.bench.prompts import Prompts
from lmx.bench.server import running_server
from lmx.config import EngineSettings

MODEL = "llama-8x512"
STREAMS = 4
RUNNING_TOKENS = 8000
"""Of each running stream at most; they are closed when the long prompt has its first token."""


def run(quick: bool) -> Result:
    itl_target_ms = EngineSettings().itl_target_ms
    prompt_tokens, repeats = (2000, 1) if quick else (4000, 5)
    path, prompts = folder(MODEL), Prompts(random.randrange(2**32))
    worst: list[float] = []
    bare_ms: list[float] = []
    ttft_ms: list[float] = []
    context_tokens = 0
    # With logprobs every token has its event, also one that completes no character.
    with (
        bare_loop(path) as bare,
        running_server(str(path)) as server,
        Client(server.url, path.name, {"logprobs": 0}) as client,
    ):
        [calibration] = client.run([Request(prompts.calibration(), 8)], 1)
        prompts.calibrate(calibration.prompt_tokens)
        for _ in range(repeats):
            bare_ms.append(bare.step_ms(STREAMS, 64))
            running, long_prompt = _arrival(client, prompts, prompt_tokens)
            context_tokens = long_prompt.prompt_tokens or prompt_tokens
            ttft_ms.append((long_prompt.event_times[0] - long_prompt.sent_at) * 1e3)
            window = [[time for time in stream.event_times if time >= long_prompt.sent_at - 0.5] for stream in running]
            worst.append(max((b - a) * 1e3 for times in window for a, b in pairwise(times)))
    limit_ms = max(3 * itl_target_ms, 2 * statistics.median(bare_ms))
    gap_ms = statistics.median(worst)
    row: Row = {
        "prompt tokens": context_tokens,
        "streams": STREAMS,
        "worst gap ms": gap_ms,
        "of all runs": max(worst),
        "long TTFT ms": statistics.median(ttft_ms),
        "bare step ms": statistics.median(bare_ms),
        "itl_target_ms": itl_target_ms,
        "ratio": gap_ms / itl_target_ms,
        "limit ms": limit_ms,
        "ok": gap_ms <= limit_ms,
    }
    return Result("gap of running streams while a long prompt is read (limit: 3 × target, or 2 bare steps)", [row])


def _arrival(client: Client, prompts: Prompts, prompt_tokens: int) -> tuple[list[Stream], Stream]:
    running = [client.start(Request(prompts.words(40), RUNNING_TOKENS)) for _ in range(STREAMS)]
    client.wait(lambda: all(len(stream.event_times) > 16 for stream in running))
    long_prompt = client.start(Request(prompts.tokens(prompt_tokens), 8))
    client.wait(lambda: bool(long_prompt.event_times))
    after = time.perf_counter()
    client.wait(lambda: long_prompt.done and all(stream.event_times[-1] > after for stream in running))
    for stream in running:
        client.close(stream)
    return running, long_prompt
