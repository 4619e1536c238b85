"""Measures a loaded model from inside the server, through the same leases as everybody's requests.

Every prompt is real text in the model's own tokens, cut to its exact length, and begins as no other does; nothing is
taken from the prefix store and nothing left there. A sweep comes after everybody else's requests (the lowest priority),
and says how many of those there were. Called by the admin face; ``python -m lmx.bench`` measures over HTTP, with the
same prompts and figures.
"""

import json
import secrets
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import trio

from lmx import __version__
from lmx.bench.figures import Spread, figures
from lmx.bench.prompts import Prompts
from lmx.chat.model import ChatModel
from lmx.errors import Conflict, ContextLengthExceeded
from lmx.hub.state import State
from lmx.protocol import Sampling
from lmx.serving.lease import GenerateRequest
from lmx.serving.models import Served

LEAST_PRIORITY = -1000
WARM_UP_TOKENS = 8
KEPT = 20
"""Results of a model."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Every length with every number of streams; ``concurrency`` requests each, all at once."""

    prompt_tokens: Sequence[int]
    generate_tokens: int
    concurrency: Sequence[int]

    @property
    def tokens(self) -> int:
        """All that it computes, the warm-up aside."""
        return sum(self.concurrency) * sum(length + self.generate_tokens for length in self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class Row:
    """One load."""

    prompt_tokens: int
    generate_tokens: int
    concurrency: int
    prefill_tokens_per_s: float
    """All prompt tokens by the time in which some request waited for its first token."""
    decode_tokens_per_s: float | None
    """Of all streams together, while all of them decode; None: they never did, so many do not fit at once."""
    ttft_ms: Spread
    itl_ms: Spread | None
    """None: one token each was generated."""
    others: int
    """Other requests on the engine when it began or ended, whichever were more; above 0 the figures are too low."""


@dataclass(frozen=True, slots=True)
class _Seen:
    sent_at: float
    event_times: Sequence[float]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


async def measure(
    served: Served, sweep: Sweep, *, client: str, request_id: str, tell: Callable[[dict[str, Any]], None]
) -> list[Row]:
    """The rows of ``sweep``, once the model is loaded; ``tell`` as in ``Benches.run``.

    Raises ContextLengthExceeded for what the context does not hold, before anything runs, and what a lease raises.
    Cancelled: every lease has been given back.
    """
    prompts = Prompts(secrets.randbits(32))

    async def run(length: int, tokens: int, streams: int) -> Row:
        made = [await trio.to_thread.run_sync(_prompt, served.chat, prompts, length) for _ in range(streams)]
        requests = [
            GenerateRequest(
                prompt=prompt,
                max_tokens=tokens,
                sampling=Sampling(seed=0, temperature=0.0),
                client=client,
                priority=LEAST_PRIORITY,
                ignore_eos=True,
                salt=None,
                request_id=request_id,
            )
            for prompt in made
        ]
        return await _row(served, requests)

    if served.engine.state != "ready":
        tell({"state": "loading", "message": served.id})
        await run(1, 1, 1)  # a lease waits for the load, and learns why it fails
    _refuse_long(served, sweep)
    tell({"state": "warming up", "message": served.id})
    await run(min(sweep.prompt_tokens), min(sweep.generate_tokens, WARM_UP_TOKENS), 1)
    rows: list[Row] = []
    for length, streams in product(sweep.prompt_tokens, sweep.concurrency):
        message = f"{length} + {sweep.generate_tokens} tokens, {streams} at a time"
        tell({"state": "measuring", "message": message})
        rows.append(await run(length, sweep.generate_tokens, streams))
        tell({"state": "measured", "message": message, "row": asdict(rows[-1])})
    return rows


def _refuse_long(served: Served, sweep: Sweep) -> None:
    context = served.context_length
    longest = max(sweep.prompt_tokens) + sweep.generate_tokens
    if context and longest > context:
        raise ContextLengthExceeded(
            f"prompt_tokens {max(sweep.prompt_tokens)} and generate_tokens {sweep.generate_tokens} make {longest}; the "
            f"context of {served.id} as it is loaded holds {context}.",
            param="prompt_tokens",
        )


def _prompt(chat: ChatModel, prompts: Prompts, length: int) -> "array[int]":
    """Blocking."""
    words = length
    while len(tokens := chat.encode_text(prompts.words(words))) < length:  # a word is rarely less than a token
        words *= 2
    return array("I", tokens[:length])  # a list would take nine times the memory


class Benches:
    """Measures models, one sweep of each at a time, and keeps the last results."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._running: set[str] = set()

    async def run(
        self,
        served: Served,
        sweep: Sweep,
        *,
        settings: Mapping[str, Any],
        client: str,
        request_id: str,
        tell: Callable[[dict[str, Any]], None],
    ) -> dict[str, Any]:
        """The result of ``sweep``, once it is kept. ``settings``: what the model was loaded with; ``tell`` gets what
        comes next, and the rows as they come.

        Raises Conflict while another sweep of the model runs, and what ``measure`` raises. Cancelled: every lease has
        been given back; nothing is kept.
        """
        if served.id in self._running:
            raise Conflict(f"{served.id} is being measured; two at a time would measure each other.", param="model")
        self._running.add(served.id)
        try:
            rows = await measure(served, sweep, client=client, request_id=request_id, tell=tell)
        finally:
            self._running.discard(served.id)
        ready = served.engine.ready
        assert ready is not None
        result = {
            "model": served.id,
            "at": time.time(),
            "version": __version__,
            "device": ready.device,
            "settings": {
                **settings,
                "backend": ready.backend,
                "dtype": ready.dtype,
                "context_length": ready.context_length,
            },
            "rows": [asdict(row) for row in rows],
        }
        await trio.to_thread.run_sync(self._keep, result)
        return result

    def _keep(self, result: dict[str, Any]) -> None:
        with self._state.connection() as db:
            db.execute("INSERT INTO benches VALUES (?, ?, ?)", (result["model"], result["at"], json.dumps(result)))
            db.execute(
                "DELETE FROM benches WHERE model = ?1 AND at NOT IN "
                "(SELECT at FROM benches WHERE model = ?1 ORDER BY at DESC LIMIT ?2)",
                (result["model"], KEPT),
            )

    def of(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The results of the model that has these names, the last one first. Blocking."""
        marks = ", ".join("?" * len(names))
        with self._state.connection() as db:
            found = db.execute(
                f"SELECT result FROM benches WHERE model IN ({marks}) ORDER BY at DESC", tuple(names)
            ).fetchall()
        return [json.loads(result) for (result,) in found]


async def _row(served: Served, requests: Sequence[GenerateRequest]) -> Row:
    others = served.engine.statistics().live_leases
    seen: list[_Seen] = []

    async def stream(request: GenerateRequest) -> None:
        sent_at = trio.current_time()
        times: list[float] = []
        drawn = 0
        async with served.engine.generate(request) as tokens:
            async for chunk in tokens:
                times.append(trio.current_time())
                drawn += len(chunk.tokens)
        seen.append(_Seen(sent_at, times, len(request.prompt), tokens.cached_tokens, drawn))

    async with trio.open_nursery() as nursery:
        for request in requests:
            nursery.start_soon(stream, request)
    others = max(others, served.engine.statistics().live_leases)
    result = figures(seen, len(requests))
    return Row(
        prompt_tokens=len(requests[0].prompt),
        generate_tokens=requests[0].max_tokens,
        concurrency=len(requests),
        prefill_tokens_per_s=result.prompt_tokens_per_s,
        decode_tokens_per_s=result.decode_tokens_per_s,
        ttft_ms=result.ttft_ms,
        itl_ms=result.itl_ms,
        others=others,
    )
