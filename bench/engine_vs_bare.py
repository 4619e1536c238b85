"""Decode tok/s of the engine process over its socketpair (scheduler, arena, sampling graph, frames; no server), against
the bare loop on the same model, batch and context length."""

import random
import time
from functools import partial

from bench.bare import bare_loop
from bench.models import NAMES, folder
from bench.result import Result, Row, alternate, median_ratio
from lmx.protocol import Step
from tests.engine_client import GREEDY, EngineClient, engine

PROMPT_TOKENS = 64


def run(quick: bool) -> Result:
    rows: list[Row] = []
    for name in ("smollm2", "llama-4x128") if quick else NAMES:
        tokens = 24 if name == "smollm2" else 128
        with (
            bare_loop(folder(name)) as bare,
            engine(folder(name), max_rows=8) as client,
        ):
            for batch in (1, 8) if quick else (1, 4, 8):
                candidate, baseline = alternate(
                    3 if quick else 5,
                    partial(decode_tokens_per_s, client, batch, tokens),
                    partial(bare.decode_tokens_per_s, batch, PROMPT_TOKENS, tokens),
                )
                rows.append(
                    {
                        "model": name,
                        "batch": batch,
                        "engine tok/s": max(candidate),
                        "bare tok/s": max(baseline),
                        "ratio": median_ratio(candidate, baseline),
                    }
                )
    return Result("decode, engine process against bare loop (best of each; ratio: median)", rows)


def decode_tokens_per_s(client: EngineClient, batch: int, tokens: int) -> float:
    """Between the first and the last step in which all rows decode."""
    vocabulary = client.ready.vocab_size if client.ready else 0
    prompts = [[random.randrange(vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
    # The first rows decode while the last are in prefill, so that they need more tokens.
    seqs = [client.submit(prompt, tokens + batch + 2, GREEDY) for prompt in prompts]
    times: list[float] = []
    client.steps.clear()
    while not all(client.answers[seq].finish for seq in seqs):
        seen = len(client.steps)
        client.wait(partial(_more_than, client.steps, seen))
        now = time.perf_counter()
        times += [now for step in client.steps[seen:] if len(step.rows) == batch]
    client.wait_freed(*seqs)
    return batch * (len(times) - 1) / (times[-1] - times[0])


def _more_than(steps: list[Step], count: int) -> bool:
    return len(steps) > count
