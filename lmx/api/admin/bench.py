"""POST /admin/bench: how fast a model is, measured in the server (``lmx.serving.bench``) and kept for
/admin/models/{name}."""

from typing import Annotated, Any

from pydantic import Field
from quart import Blueprint, Response
from quart_schema import document_request

from lmx.api.admin.bodies import receive
from lmx.api.admin.progress import Tell, streamed, unheard
from lmx.api.core.call import current_call
from lmx.api.core.schemas import Request
from lmx.config.live import Live
from lmx.errors import InvalidRequest
from lmx.serving.bench import Benches, Sweep
from lmx.serving.models import Models, Served

MOST_LOADS = 16
MOST_STREAMS = 64
MOST_LENGTH = 2**24
MOST_TOKENS = 2**22
"""Of a whole sweep: an hour at 1,000 tokens a second."""

Length = Annotated[int, Field(ge=1, le=MOST_LENGTH)]
Streams = Annotated[int, Field(ge=1, le=MOST_STREAMS)]


class BenchRequest(Request):
    prompt_tokens: Annotated[list[Length], Field(fail_fast=True, min_length=1, max_length=MOST_LOADS)] = Field(
        [512], description="Lengths of prompts."
    )
    generate_tokens: Length = Field(128, description="Length of each answer.")
    concurrency: Annotated[list[Streams], Field(fail_fast=True, min_length=1, max_length=MOST_LOADS)] = Field(
        [1, 4], description="Numbers of requests at a time."
    )
    stream: bool | None = Field(None, description="Server-sent events: what is measured, each row, the result.")


def blueprint(models: Models, benches: Benches, live: Live) -> Blueprint:
    """The route over ``benches``."""
    routes = Blueprint("admin_bench", __name__)

    @routes.post("/admin/bench")
    @document_request(BenchRequest)
    async def bench() -> Response | dict[str, Any]:
        """Measure a model: prompt and generation speed, time to first token, time between tokens. Loads it if need
        be; other requests go first. The result is kept."""
        body = await receive(BenchRequest)
        sweep = _sweep(body)
        call = current_call()
        call.face = routes.name  # a model works for it: /admin/requests shows it, and may end it

        async def work(tell: Tell) -> dict[str, Any]:
            async with models.use(body.model) as served:
                assert isinstance(served, Served)
                call.model = served.id
                status = models.status(served.id)
                applied = status.settings if status is not None else {}
                return await benches.run(
                    served,
                    sweep,
                    settings={name: setting.value for name, setting in applied.items()},
                    client=call.client(None),
                    request_id=call.id,
                    tell=tell,
                )

        return streamed(work, live.now.server.sse_comment_s) if body.stream else await work(unheard)

    return routes


def _sweep(body: BenchRequest) -> Sweep:
    sweep = Sweep(body.prompt_tokens, body.generate_tokens, body.concurrency)
    if sweep.tokens > MOST_TOKENS:
        raise InvalidRequest(
            f"prompt_tokens, generate_tokens and concurrency make {sweep.tokens} tokens to compute; a measurement "
            f"takes {MOST_TOKENS} at most.",
            param="prompt_tokens",
        )
    return sweep
