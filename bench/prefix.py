"""What the prefix store gives and costs, on the embedded model with both engines.

TTFT of a prompt whose first 4,000 tokens are in memory against the TTFT of its suffix alone; of one whose prefix comes
from the disk after a restart against a cold one; decode and prefill tok/s with the store against without; and the
longest time that the engine spent in the store at once.
"""

import tempfile
from functools import partial

from bench.models import folder
from bench.result import Result, Row, alternate, median_ratio
from lmx.bench.client import Client, Request
from lmx.bench.figures import decode_tokens_per_s
from lmx.bench.prompts import Prompts
from lmx.bench.server import running_server
from lmx.hub.inventory import EMBEDDED_ID

PREFIX_TOKENS, SUFFIX_TOKENS = 4000, 400
RAM_TARGET, DISK_TARGET, DECODE_TARGET, PREFILL_TARGET = 1.1, 0.15, 0.97, 0.95
NO_STORE = {"LMX_ENGINE_PREFIX_CACHE": "false"}


def run(quick: bool) -> Result:
    times = 2 if quick else 5
    rows: list[Row] = []
    path = folder("smollm2")
    for engine, model, environment in (
        ("MLX", str(path), {}),
        ("llama.cpp", EMBEDDED_ID, {"LMX_MODEL_BACKEND": "llama"}),
    ):
        name = path.name if engine == "MLX" else model
        rows += _ram(engine, model, name, environment, times)
        rows += _disk(engine, model, name, environment)
        rows += _cost(engine, model, name, environment, times)
    return Result("the prefix store: TTFT seconds (less is better) and tok/s (more is)", rows)


def _ttft(client: Client, prompt: str) -> float:
    [stream] = client.run([Request(prompt, 1)], 1)
    return stream.event_times[0] - stream.sent_at


def _prefix(client: Client, prompts: Prompts) -> str:
    [stream] = client.run([Request(prompts.calibration(), 1)], 1)
    prompts.calibrate(stream.prompt_tokens)
    return prompts.tokens(PREFIX_TOKENS)


def _ram(engine: str, model: str, name: str, environment: dict[str, str], times: int) -> list[Row]:
    with running_server(model, environment) as server, Client(server.url, name) as client:
        prompts = Prompts(5)
        prefix = _prefix(client, prompts)
        cold = _ttft(client, prefix)
        ours, alone = alternate(
            times,
            lambda: _ttft(client, f"{prefix} {prompts.tokens(SUFFIX_TOKENS)}"),
            lambda: _ttft(client, prompts.tokens(SUFFIX_TOKENS)),
        )
        return [
            _row(engine, "TTFT, prefix in memory", "the suffix alone", ours, alone, RAM_TARGET, less=True),
            _row(engine, "TTFT, prefix in memory", "cold prefix", ours, [cold] * len(ours), None, less=True),
        ]


def _disk(engine: str, model: str, name: str, environment: dict[str, str]) -> list[Row]:
    with tempfile.TemporaryDirectory() as place:
        # Servers of benchmarks keep nothing on the disk otherwise.
        environment = environment | {"LMX_ENGINE_PREFIX_DIR": place, "LMX_ENGINE_PREFIX_DISK_BYTES": "-1"}
        prompts = Prompts(6)
        with running_server(model, environment) as server, Client(server.url, name) as client:
            prefix = _prefix(client, prompts)
            cold = _ttft(client, prefix)
        with running_server(model, environment) as server, Client(server.url, name) as client:
            client.run([Request(prompts.words(30), 4)], 1)
            warm = _ttft(client, prefix)
    return [_row(engine, "TTFT after a restart", "cold", [warm], [cold], DISK_TARGET, less=True)]


def _cost(engine: str, model: str, name: str, environment: dict[str, str], times: int) -> list[Row]:
    tokens = 300  # a block and more
    with (
        running_server(model, environment) as server,
        running_server(model, environment | NO_STORE) as bare,
        Client(server.url, name) as ours,
        Client(bare.url, name) as theirs,
    ):
        prompts = Prompts(7)

        def decode(client: Client) -> float:
            found = decode_tokens_per_s(client.run([Request(prompts.words(40), tokens) for _ in range(4)], 4), 4)
            assert found is not None
            return found

        def prefill(client: Client) -> float:
            [stream] = client.run([Request(prompts.words(700), 1)], 1)
            return stream.prompt_tokens / (stream.event_times[0] - stream.sent_at)

        rows = []
        for what, measure, target in (("decode", decode, DECODE_TARGET), ("prefill", prefill, PREFILL_TARGET)):
            found = alternate(times, partial(measure, ours), partial(measure, theirs))
            rows.append(_row(engine, f"{what} tok/s, storing", "no store", *found, target))
        return rows


def _row(
    engine: str,
    what: str,
    baseline: str,
    ours: list[float],
    theirs: list[float],
    target: float | None,
    less: bool = False,
) -> Row:
    ratio = median_ratio(ours, theirs)
    return {
        "engine": engine,
        "what": what,
        "baseline": baseline,
        "ours": sorted(ours)[len(ours) // 2],
        "theirs": sorted(theirs)[len(theirs) // 2],
        "ratio": ratio,
        "target": target,
        "ok": None if target is None else ratio <= target if less else ratio >= target,
    }
