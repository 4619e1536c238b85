"""From a validated request to its answer's pieces: leases, text, stop strings, deadlines; the same for every face.

A ``Job`` holds one ``GenerateRequest`` for each choice. ``run`` holds their leases in one nursery and hands each piece
to a ``Sink`` that knows the face's wire format. It must never return, or raise, with a lease held. Called by
``lmx.api.openai.chat`` and ``lmx.api.openai.completions``.
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol, TypeVar

import structlog
import trio

from lmx.api.core.answer_events import AnswerEvents, merged
from lmx.api.core.call import Call
from lmx.api.core.schemas import GenerationFields
from lmx.api.errors import raise_single
from lmx.chat.events import Event, Malformed
from lmx.chat.plan import Plan
from lmx.chat.text import TextStream
from lmx.config import Settings
from lmx.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest
from lmx.protocol import Logprobs, Sampling, Started
from lmx.serving.engine import Chunk, GenerateRequest
from lmx.serving.models import Served

T = TypeVar("T")

SEED_STEP = 0x9E3779B97F4A7C15
"""Distance of two choices' seeds: 2^64 divided by the golden ratio, so that no two of n are near (Knuth, TAOCP 6.4)."""
UINT64 = 2**64 - 1
LEAST_TEMPERATURE = 1e-4
"""Below it only the likeliest token is ever drawn, and float32 loses the rest: it means 0. Clients send 1e-5."""
LEAST_SHARE = 1e-6
"""The same for top_p (0 is OpenAI's word for the likeliest token) and min_p."""
MOST_TOP_K = 2**31 - 1
CLIENT_CHARACTERS = 256
"""Of ``user`` that tell clients apart."""
RANDOM_SEED = -1
"""vLLM's and llama-server's word for none."""
ECHOED_TOKENS = 256
"""Of a prompt, whose log-probabilities are written in one go."""
_NEAR = 40
"""Characters told of where a prefix broke, before and after; no more tokens than that have them."""
SEED_BITS = 53
"""Of the seeds we draw: a JavaScript client can then repeat the one it was told."""

logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("lmx.api")


@dataclass(frozen=True, slots=True)
class Job:
    served: Served
    requests: tuple[GenerateRequest, ...]
    """One for each choice: n for the first prompt, then n for the next."""
    n: int
    """Choices made of each prompt."""
    best: int
    """As many of them are sent: those of the highest mean log-probability."""
    stop: tuple[str, ...]
    seed: int
    """What the client gave or we drew; choice i of a prompt samples with a seed derived from it."""
    deadline: float
    """On Trio's clock."""
    call: Call
    plan: Plan
    keeps_stop: bool = False
    """What ends an answer (a stop string, a stop token's text) stays at its end."""
    continues: bool = False
    """The answer goes on with a text."""
    returns_ids: bool = False
    scores: bool = False
    """The prompt's own log-probabilities are wanted."""
    echoes_logprobs: bool = False
    """The log-probabilities of the prompt's tokens come before the answer's."""
    shows_end: bool = False
    """The log-probability of a token that ends the answer is told, too."""
    only_prompt: bool = False
    """``max_tokens`` is 0: the one token that the engine draws does not count."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice gained."""

    text: str
    logprobs: tuple[tuple[int, Logprobs | None], ...]
    """Of each token that counts into the text, when asked for; the first of a prompt has none."""
    finish: str | None
    events: Sequence[Event] = ()
    """Instead of ``text``, of an answer in which more than text is told apart."""
    tokens: tuple[int, ...] = ()
    """All that count, an end token too."""


@dataclass(slots=True)
class Choice:
    """The account of one sequence of a job while it runs. Pure: chunks in, deltas out, whatever the chunks' borders."""

    index: int
    text: TextStream
    has_stop: bool
    wants_logprobs: bool
    min_tokens: int = 0
    """No stop string begins in so many tokens."""
    keeps_stop: bool = False
    """The text of a token that ends the answer counts."""
    shows_end: bool = False
    only_prompt: bool = False
    completion_tokens: int = 0
    logprob: float = 0.0
    """Of all its tokens, where log-probabilities come."""
    cached_tokens: int = 0
    predicted: tuple[int, int] = (0, 0)
    """Tokens of the client's prediction that were verified, and those that were right."""
    finish: str | None = None
    stopped: bool = False
    """Ended by a stop string: the engine does not know it yet."""
    prompt_logprobs: Sequence[Logprobs] = ()
    """Of its prompt's tokens but the first, when asked for."""
    told: AnswerEvents | None = None
    """Of an answer in which more than text is told apart."""

    @property
    def reasoning_tokens(self) -> int:
        return self.told.reasoning_tokens if self.told is not None else 0

    def feed(self, chunk: Chunk) -> Delta:
        if self.only_prompt:
            self.finish = "length"
            return Delta("", (), self.finish)
        if self.told is not None:
            return self._feed_events(self.told, chunk)
        logprobs: tuple[tuple[int, Logprobs], ...] = ()
        before, tokens = self.completion_tokens, chunk.tokens
        if self.has_stop or self.wants_logprobs:
            text, logprobs = self._feed_each(chunk)
            tokens = tokens[: self.completion_tokens - before]
        else:
            text = self.text.feed(tokens[:-1] if self._hides_end(chunk) else tokens)
            self.completion_tokens += len(tokens)
        if chunk.finish and not self.stopped:
            text += self.text.finish()
            self.finish = "stop" if self.text.stopped or chunk.finish == "complete" else chunk.finish
        return Delta(text, logprobs, self.finish, tokens=tokens)

    def _hides_end(self, chunk: Chunk) -> bool:
        """The last token is an end token, which is no part of the answer."""
        return chunk.finish == "stop" and not self.keeps_stop

    def _feed_each(self, chunk: Chunk) -> tuple[str, tuple[tuple[int, Logprobs], ...]]:
        """Token by token: what follows a stop string in the same chunk must not count, however tokens were merged."""
        text, logprobs = "", []
        for position, token in enumerate(chunk.tokens):
            is_end = self._hides_end(chunk) and position == len(chunk.tokens) - 1
            text += self.text.feed(() if is_end else (token,), stops=self.completion_tokens >= self.min_tokens)
            self.completion_tokens += 1
            if self.wants_logprobs:
                self.logprob += chunk.logprobs[position].drawn
                if self.shows_end or not is_end:
                    logprobs.append((token, chunk.logprobs[position]))
            if self.text.stopped:
                self.stopped, self.finish = True, "stop"
                break
        return text, tuple(logprobs)

    def _feed_events(self, told: AnswerEvents, chunk: Chunk) -> Delta:
        events: list[Event] = []
        logprobs: list[tuple[int, Logprobs]] = []
        before = self.completion_tokens
        if self.has_stop or self.wants_logprobs or told.counts:
            self._feed_each_event(told, chunk, events, logprobs)
        else:
            last = chunk.tokens[-1]
            hidden = self._hides_end(chunk) and last not in told.end_markers
            events += told.feed(self.text.feed(chunk.tokens[:-1] if hidden else chunk.tokens))
            self.completion_tokens += len(chunk.tokens)
        if chunk.finish and not self.stopped:
            events += told.finish(self.text.finish())
            self.finish = "stop" if told.stopped or chunk.finish == "complete" else chunk.finish
        if self.finish == "stop" and told.calls:
            self.finish = "tool_calls"
        tokens = chunk.tokens[: self.completion_tokens - before]
        return Delta("", tuple(logprobs), self.finish, merged(events), tokens)

    def _feed_each_event(
        self, told: AnswerEvents, chunk: Chunk, events: list[Event], logprobs: list[tuple[int, Logprobs]]
    ) -> None:
        for position, token in enumerate(chunk.tokens):
            is_end = self._hides_end(chunk) and position == len(chunk.tokens) - 1
            text = self.text.feed((token,) if not is_end or token in told.end_markers else ())
            events += told.feed(text, stops=self.completion_tokens >= self.min_tokens)
            self.completion_tokens += 1
            if self.wants_logprobs:
                self.logprob += chunk.logprobs[position].drawn
                if not is_end:
                    logprobs.append((token, chunk.logprobs[position]))
            if told.stopped:
                self.stopped, self.finish = True, "stop"
                break


def batched(values: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """``itertools.batched``, which Python 3.11 has not."""
    rest = iter(values)
    while piece := tuple(islice(rest, size)):
        yield piece


class Sink(Protocol):
    """Where a job's pieces go. All methods may be cancelled; ``delta`` runs concurrently for n > 1."""

    async def begin(self) -> None:
        """Every choice has its lease: nothing more can be refused."""

    async def delta(self, choice: Choice, delta: Delta) -> None:
        """Tokens came for ``choice``; their text may be held back."""


async def run(job: Job, sink: Sink) -> list[Choice]:
    """Generate all choices of ``job`` into ``sink``; returns them finished.

    Raises what the leases raise, or DeadlineExceeded. Cancelled: every lease has been given back first.
    """
    choices: list[Choice] = []
    with trio.CancelScope(deadline=job.deadline) as limit:
        try:
            async with trio.open_nursery() as nursery:
                leased = trio.Event()
                first, scored = -1, _Scored()
                for index, request in enumerate(job.requests):  # not all at once: there may be a thousand
                    choices.append(_choice(job, index, request))
                    if index % job.n == 0:
                        scored = _Scored()
                    else:  # the others of a prompt take over what the first one has computed of it
                        request = replace(request, parent=first)
                    seq = await nursery.start(_run_choice, request, job, choices[-1], sink, leased, scored)
                    first = first if index % job.n else seq
                await sink.begin()
                leased.set()
        except BaseExceptionGroup as group:
            raise_single(group)
    if limit.cancelled_caught:
        raise DeadlineExceeded(
            "The request's time (field `timeout`, header x-request-timeout or the server's limit) is up."
        )
    job.call.finish = choices[0].finish or ""
    job.call.cached_tokens = sum(choice.cached_tokens for choice in choices[:: job.n])
    return choices


def _choice(job: Job, index: int, request: GenerateRequest) -> Choice:
    chat, plan = job.served.chat, job.plan
    wants_logprobs = request.sampling.logprobs >= 0
    parser = chat.parser(plan)
    told = None
    if parser is None:
        text = chat.text_stream(job.stop, continues=job.continues, keep_stop=job.keeps_stop)
    else:
        text = chat.text_stream(continues=job.continues, markers=chat.markers(plan))
        ends = chat.special.values()
        told = AnswerEvents(parser, job.stop, plan, keep_stop=job.keeps_stop, end_markers=ends)
    return Choice(
        index,
        text,
        bool(job.stop),
        wants_logprobs,
        request.min_tokens,
        job.keeps_stop,
        job.shows_end,
        job.only_prompt,
        told=told,
    )


class _Scored:
    """The log-probabilities of one prompt, which the first of its choices brings."""

    def __init__(self) -> None:
        self.logprobs: Sequence[Logprobs] = ()
        self.known = trio.Event()


async def _run_choice(
    request: GenerateRequest,
    job: Job,
    choice: Choice,
    sink: Sink,
    leased: trio.Event,
    scored: _Scored,
    *,
    task_status: trio.TaskStatus[int],
) -> None:
    async with job.served.engine.generate(request) as tokens:
        job.call.streams.append(tokens)
        task_status.started(tokens.seq)
        await leased.wait()
        while choice.finish is None:
            chunk = await tokens.receive()
            if request.prompt_logprobs >= 0:
                scored.logprobs = tokens.prompt_logprobs
                scored.known.set()
            if job.scores and not choice.prompt_logprobs:
                await scored.known.wait()
                choice.prompt_logprobs = scored.logprobs
                await _echo_logprobs(job, choice, sink)
            job.call.took(len(chunk.tokens), trio.current_time())
            delta = choice.feed(chunk)
            if choice.index % job.n == 0 and job.call.broke is None:
                job.call.broke = _broke(job, request, tokens.started)
            choice.cached_tokens = tokens.cached_tokens
            choice.predicted = tokens.drafts.get("prediction", (0, 0))
            for event in delta.events:
                if isinstance(event, Malformed):
                    logger.info("what looked like a tool call is none", request_id=job.call.id, reason=event.reason)
            if choice.stopped:
                break
            await sink.delta(choice, delta)
    if choice.stopped:  # only now: the lease ends before a slow client takes its last piece
        await sink.delta(choice, delta)


def _broke(job: Job, request: GenerateRequest, started: Started | None) -> dict[str, object]:
    """Where and why the kept KV of the prompt's first tokens ended, for the log; the text around only where prompts may
    be logged."""
    if started is None or not started.why:
        return {}
    at = started.broke_at
    told: dict[str, object] = {"cache_broke_at": at if at >= 0 else started.cached_tokens, "cache_broke": started.why}
    if job.call.prompt is not None and at >= 0:
        spelled = job.served.chat.spelled
        before, after = (spelled(request.prompt[max(at - _NEAR, 0) : at]), spelled(request.prompt[at : at + _NEAR]))
        told |= {"cache_broke_before": before[-_NEAR:], "cache_broke_after": after[:_NEAR]}
    return told


async def _echo_logprobs(job: Job, choice: Choice, sink: Sink) -> None:
    """Those of the prompt, so many at a time that others get their turn between."""
    if not job.echoes_logprobs:
        return
    tokens = zip(job.requests[choice.index].prompt, (None, *choice.prompt_logprobs), strict=True)
    for piece in batched(tokens, ECHOED_TOKENS):
        await sink.delta(choice, Delta("", piece, None))
        await trio.lowlevel.checkpoint()


def make_job(
    served: Served,
    fields: GenerationFields,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    logprobs: int,
    prompt_param: str,
    call: Call,
    settings: Settings,
    plan: Plan,
    stop_ids: Sequence[int] = (),
    prediction: Sequence[int] = (),
    continues: bool = False,
    echoes_logprobs: bool = False,
    shows_end: bool = False,
) -> Job:
    """The engine requests for n choices of each prompt. ``max_tokens`` -1: as many as there is room for.

    Raises ContextLengthExceeded, or InvalidRequest for a logit_bias outside the vocabulary or a bad x-request-timeout.
    """
    seed = secrets.randbits(SEED_BITS) if fields.seed in (None, RANDOM_SEED) else int(fields.seed or 0)
    best = fields.n or 1
    n = fields.best_of or best
    if n > best:
        logprobs = max(logprobs, 0)
    bias = _logit_bias(fields, served.chat.vocab_size)
    deadline = call.deadline(fields.timeout, settings.server)
    remaining_s = deadline - trio.current_time()
    call.model, call.route = served.id, fields.model or "default"
    call.choices = n * len(prompts)
    call.prompt_tokens = sum(map(len, prompts))
    if settings.server.log_prompts:
        call.prompt = lambda: "\n".join(map(served.chat.spelled, prompts))
    defaults = {**served.folder.sampling, **settings.named(served.names).sampling}
    requests = []
    for prompt in prompts:
        room = _room(served, len(prompt), prompt_param)
        for index in range(n):
            requests.append(
                GenerateRequest(
                    prompt=prompt,
                    max_tokens=room if max_tokens == -1 else min(max(max_tokens, 1), room),
                    sampling=_sampling(fields, (seed + index * SEED_STEP) & UINT64, bias, logprobs, defaults),
                    client=call.client((fields.user or "")[:CLIENT_CHARACTERS]),
                    priority=fields.priority or 0,
                    deadline_s=None if remaining_s == float("inf") else max(remaining_s, 0.0),
                    ignore_eos=bool(fields.ignore_eos),
                    grammar=plan.grammar,
                    stop_ids=(*stop_ids, *_stop_ids(fields, served.chat.vocab_size)),
                    min_tokens=min(fields.least_tokens, room),
                    prompt_logprobs=fields.scores if index == 0 else -1,
                    salt=fields.salt,
                    session=call.session(fields.prompt_cache_key),
                    request_id=call.id,
                    speculation=fields.sources,
                    prediction=prediction,
                )
            )
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    return Job(
        served,
        tuple(requests),
        n,
        best,
        stop,
        seed,
        deadline,
        call,
        plan,
        keeps_stop=fields.keeps_stop,
        continues=continues,
        returns_ids=bool(fields.return_token_ids),
        scores=fields.scores >= 0,
        echoes_logprobs=echoes_logprobs,
        shows_end=shows_end,
        only_prompt=max_tokens == 0,
    )


def _stop_ids(fields: GenerationFields, vocab_size: int) -> Sequence[int]:
    for token in fields.stop_token_ids or ():
        if token >= vocab_size:
            raise InvalidRequest(
                f"stop_token_ids: {token} is not a token id of this model (0 to {vocab_size - 1}).",
                param="stop_token_ids",
            )
    return fields.stop_token_ids or ()


def _room(served: Served, prompt_tokens: int, param: str) -> int:
    context = served.context_length or 2**31 - 1  # where nobody can tell yet, the engine refuses what never fits
    if prompt_tokens >= context:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. However, your {param} resulted in "
            f"{prompt_tokens} tokens. Please reduce the length of the {param}.",
            param=param,
        )
    return context - prompt_tokens


def _sampling(
    fields: GenerationFields, seed: int, bias: dict[int, float] | None, logprobs: int, defaults: Mapping[str, float]
) -> Sampling:
    """``defaults``: the settings' for this model, then its makers', for what the request leaves open (as vLLM does)."""
    penalty = fields.repetition_penalty if fields.repetition_penalty is not None else fields.repeat_penalty

    def choose(name: str, asked: float | None, otherwise: float) -> float:
        return defaults.get(name, otherwise) if asked is None else asked

    temperature = choose("temperature", fields.temperature, 1.0)
    top_p = choose("top_p", fields.top_p, 1.0)
    min_p = choose("min_p", fields.min_p, 0.0)
    greedy = temperature < LEAST_TEMPERATURE or top_p < LEAST_SHARE
    return Sampling(
        seed=seed,
        temperature=0.0 if greedy else min(temperature, 2.0),
        top_k=min(max(int(choose("top_k", fields.top_k, 0)), 0), MOST_TOP_K),
        top_p=1.0 if greedy else min(top_p, 1.0),
        min_p=min(min_p, 1.0) if min_p >= LEAST_SHARE else 0.0,
        repetition_penalty=min(max(choose("repetition_penalty", penalty, 1.0), 0.01), 10.0),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=bias,
        logprobs=logprobs,
    )


def _logit_bias(fields: GenerationFields, vocab_size: int) -> dict[int, float] | None:
    bias = {}
    for key, value in (fields.logit_bias or {}).items():
        # Python refuses to read thousands of digits.
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise InvalidRequest(
                f"logit_bias: {key[:40]!r} is not a token id of this model (0 to {vocab_size - 1}).", param="logit_bias"
            )
        bias[int(key)] = value
    return bias or None


def best(job: Job, choices: Sequence[Choice]) -> list[Choice]:
    """Those to be sent, of each prompt in order: with ``best_of``, the best first."""
    if job.best == job.n:
        return list(choices)

    def mean_logprob(choice: Choice) -> float:
        return choice.logprob / max(choice.completion_tokens, 1)

    kept: list[Choice] = []
    for start in range(0, len(choices), job.n):
        kept += sorted(choices[start : start + job.n], key=mean_logprob, reverse=True)[: job.best]
    return kept


def usage(job: Job, choices: Sequence[Choice]) -> dict[str, object]:
    """OpenAI's usage object. A prompt that several choices share counts once."""
    prompts = choices[:: job.n]
    prompt_tokens = sum(len(job.requests[choice.index].prompt) for choice in prompts)
    completion_tokens = sum(choice.completion_tokens for choice in choices)
    details = {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)}
    if any(request.prediction for request in job.requests):
        accepted = sum(min(choice.predicted[1], choice.completion_tokens) for choice in choices)
        details["accepted_prediction_tokens"] = accepted
        details["rejected_prediction_tokens"] = sum(choice.predicted[0] for choice in choices) - accepted
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in prompts)},
        "completion_tokens_details": details,
    }
