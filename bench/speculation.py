"""Decode tok/s with speculation against without, the same requests in turn, on real text.

Two kinds: a text that is written once more with one change (greedy), as an agent edits a file, and text that does not
repeat (sampled at temperature 1, since small models repeat themselves when they are greedy), which must lose nothing.
With a draft model: a target that costs three times as much, and the same weights in 4 bits as its draft.
"""

import json
import statistics
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from bench.models import deep_folder, draft_folder, folder
from bench.result import Result, Row, alternate, median_ratio
from lmx.bench.client import Client, Request, Stream
from lmx.bench.prompts import Prompts
from lmx.bench.server import RunningServer, running_server
from lmx.hub.inventory import EMBEDDED_ID

WORDS, GIVEN_WORDS, ANSWER_TOKENS = 220, 30, 160
REPEAT_TARGETS = {1: 2.0, 4: 1.5}
PLAIN_TARGET = 0.97
SAMPLED = {"temperature": 1.0, "seed": 1}
ENGINES = {"MLX": {}, "llama.cpp": {"LMX_MODEL_BACKEND": "llama"}}


def _edits(prompts: Prompts, count: int) -> list[Request]:
    """A text, and the beginning of the same with one word changed: the model copies the rest."""
    requests = []
    for _ in range(count):
        text = prompts.words(WORDS)
        words = text.split()
        begun = [*words[: GIVEN_WORDS // 2], "changed", *words[GIVEN_WORDS // 2 + 1 : GIVEN_WORDS]]
        requests.append(Request(f"{text}\n\n{' '.join(begun)}", ANSWER_TOKENS))
    return requests


def _plain(prompts: Prompts, count: int) -> list[Request]:
    return [Request(prompts.words(WORDS // 2), ANSWER_TOKENS) for _ in range(count)]


def _rate(streams: list[Stream]) -> float:
    """Tokens a second of all streams, from each one's first token to its last."""
    return sum((s.completion_tokens - 1) / (s.event_times[-1] - s.event_times[0]) for s in streams)


@contextmanager
def _clients(url: str, model: str, fields: Mapping[str, Any]) -> Iterator[tuple[Client, Client]]:
    with (
        Client(url, model, {**fields, "speculation": "auto"}) as on,
        Client(url, model, {**fields, "speculation": "off"}) as off,
    ):
        yield on, off


def _drafts(server: RunningServer) -> tuple[float, float]:
    """Drafts that were verified since the start, and those that were right."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    sums = [0.0, 0.0]
    for line in lines:
        for index, name in enumerate(("lmx_draft_tokens_total{", "lmx_accepted_draft_tokens_total{")):
            if line.startswith(name):
                sums[index] += float(line.rsplit(" ", 1)[1])
    return sums[0], sums[1]


def _load(server: RunningServer, model: str, draft: str) -> None:
    """Once more, with a draft model."""
    body = json.dumps({"model": model, "draft_model": draft}).encode()
    asked = urllib.request.Request(f"{server.url}/admin/load", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=600) as answer:
        answer.read()


def run(quick: bool) -> Result:
    times = 3 if quick else 7
    rows: list[Row] = []
    for engine, environment in ENGINES.items():
        model = str(folder("smollm2")) if engine == "MLX" else EMBEDDED_ID
        with ExitStack() as stack:
            server = stack.enter_context(running_server(model, environment))
            for batch, target in REPEAT_TARGETS.items():
                rows.append(_row(server, model, engine, "repeats, one change", batch, {}, target, times))
            for batch in (1, 4, 8):
                rows.append(_row(server, model, engine, "does not repeat", batch, SAMPLED, PLAIN_TARGET, times))
    with ExitStack() as stack:
        model = str(deep_folder())
        server = stack.enter_context(running_server(model))
        _load(server, model, str(draft_folder()))
        for what, batch, fields in (("draft model, greedy", 1, {}), ("draft model, sampled", 1, SAMPLED)):
            rows.append(_row(server, model, "MLX", what, batch, fields, PLAIN_TARGET, times, make=_plain))
    return Result("decode tok/s with speculation and without (ratio: median of pairs)", rows)


def _row(
    server: RunningServer,
    model: str,
    engine: str,
    what: str,
    batch: int,
    fields: Mapping[str, Any],
    target: float,
    times: int,
    make: Callable[[Prompts, int], list[Request]] | None = None,
) -> Row:
    make = make or (_plain if fields else _edits)
    prompts = Prompts(batch)
    with _clients(server.url, model.rsplit("/", 1)[-1], fields) as (on, off):
        requests = [make(prompts, batch) for _ in range(times + 1)]
        on.run(requests[0], batch)  # what is measured is the steady state, depths included
        off.run(requests[0], batch)
        before = _drafts(server)
        turns = [iter(requests[1:]), iter(requests[1:])]
        ours, theirs = alternate(
            times,
            lambda: _rate(on.run(next(turns[0]), batch)),
            lambda: _rate(off.run(next(turns[1]), batch)),
        )
        drafted, accepted = (after - since for after, since in zip(_drafts(server), before, strict=True))
    ratio = median_ratio(ours, theirs)
    return {
        "engine": engine,
        "text": what,
        "batch": batch,
        "on tok/s": statistics.median(ours),
        "off tok/s": statistics.median(theirs),
        "ratio": ratio,
        "target": target,
        "drafts a token": drafted / (times * batch * ANSWER_TOKENS),
        "accepted": accepted / drafted if drafted else None,
        "ok": ratio >= target,
    }
