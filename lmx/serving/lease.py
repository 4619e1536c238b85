"""One request's place in the engine, seen from both sides: what the engine gave, and what the reader has taken.

``Lease`` is the account that ``lmx.serving.engine`` keeps of a sequence (it alone writes to it); ``TokenStream``, and
``VectorStream`` of an embedding model, are the faces that the request's task reads. Adding tokens costs an append and
at most one wake-up, never an await: one Step frame carries every row, and no reader may hold up another.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import trio

from lmx import protocol
from lmx.errors import DeadlineExceeded, LmxError


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What to generate. The engine clamps ``max_tokens`` to the room its context leaves."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: protocol.Sampling
    client: str = ""
    """Whom fair scheduling counts the tokens for."""
    priority: int = 0
    deadline_s: float | None = None
    """Seconds from taking the lease, loading and queueing included."""
    ignore_eos: bool = False
    grammar: str = ""
    """This and the following as in ``protocol.Submit``."""
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    prompt_logprobs: int = -1
    parent: int = -1
    salt: str | None = ""
    """This and the following as in ``protocol.Submit``; no key of the answer's content."""
    session: str = ""
    request_id: str = ""
    """The client's or ours, for logs."""
    speculation: str = "auto"
    """This and the following change no answer."""
    prediction: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts, as token ids, to make a vector of each."""

    inputs: Sequence["array[int]"]
    seconds: Sequence[int] = ()
    """For pairs of texts: where the second one of each begins."""
    client: str = ""
    """This and the following as in ``GenerateRequest``."""
    priority: int = 0
    deadline_s: float | None = None
    request_id: str = ""


AnyRequest = GenerateRequest | EmbedRequest

State = Literal["queued", "prefill", "decode"]

Drafted = dict[str, tuple[int, int]]
"""By their source: drafts that were verified, and those of them that were right."""


class Stream(Protocol):
    """What is told of a lease, whatever it brings."""

    @property
    def state(self) -> State: ...

    @property
    def cached_tokens(self) -> int: ...

    @property
    def drafts(self) -> Drafted: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """All tokens that waited for the reader, merged."""

    tokens: tuple[int, ...]
    logprobs: tuple[protocol.Logprobs, ...]
    """One for each token if the request asked for them, else none."""
    finish: str | None
    """As in ``protocol.Tokens``: nothing follows. None: more follows."""


class Lease:
    """The account of one sequence."""

    __slots__ = (
        "alone_tokens",
        "answer",
        "cancel_reason",
        "closed",
        "deadline",
        "drafts",
        "drawn_tokens",
        "error",
        "finish",
        "first_token_at",
        "forwarded",
        "freed",
        "last_token_at",
        "logprobs",
        "prompt_logprobs",
        "request",
        "seq",
        "started",
        "submitted",
        "taken_at",
        "tokens",
        "vectors",
        "wake",
        "withdrawn",
    )

    def __init__(self, seq: int, request: AnyRequest, now: float) -> None:
        self.seq = seq
        self.request = request
        self.taken_at = now
        self.deadline = math.inf if request.deadline_s is None else now + request.deadline_s
        self.tokens: list[int] = []
        """Not yet read."""
        self.logprobs: list[protocol.Logprobs] = []
        self.vectors: list[protocol.Embedded] = []
        self.prompt_logprobs: list[protocol.Logprobs] = []
        self.finish: str | None = None
        self.error: LmxError | None = None
        self.cancel_reason: str | None = None
        """Why the server ended it, where neither the engine nor the reader did: "deadline", "slow_reader",
        "shutdown"."""
        self.started: protocol.Started | None = None
        """How it began in the engine."""
        self.first_token_at: float | None = None
        self.last_token_at = now
        self.forwarded = False
        """A forward of its engine has had a part of it."""
        self.submitted = False
        """An engine process knows it and has not confirmed it free."""
        self.alone_tokens = 0
        """An engine died over it: it must get so many tokens alone before others join it."""
        self.drawn_tokens = 0
        """Or vectors made."""
        self.answer = array("I")
        """All tokens so far, read or not, for an engine that goes on after them."""
        self.withdrawn = False
        """It was taken back from its engine, which has not freed it yet, to go on in the next one."""
        self.drafts: Drafted = {}
        self.closed = False
        """The reader has left."""
        self.freed = trio.Event()
        """The engine has confirmed it free, or has died."""
        self.wake = trio.Event()
        """Something has changed for the reader; replaced by the reader before it waits."""

    @property
    def cached_tokens(self) -> int:
        return self.started.cached_tokens if self.started else 0

    @property
    def state(self) -> State:
        """How far it is, or was at its end."""
        if self.first_token_at is not None:
            return "decode"
        return "prefill" if self.forwarded else "queued"

    @property
    def over(self) -> bool:
        """No further token is wanted."""
        return self.closed or self.finish is not None or self.error is not None

    def feed(self, row: protocol.Tokens) -> None:
        """Take one step's tokens."""
        self.tokens += row.tokens
        self.answer.extend(row.tokens)
        self.drawn_tokens += len(row.tokens)
        if row.drafted:
            drafted, accepted = self.drafts.get(row.source, (0, 0))
            self.drafts[row.source] = (drafted + row.drafted, accepted + row.accepted)
        if row.logprobs:
            self.logprobs += row.logprobs
        if row.finish is not None:
            self.finish = row.finish
        self.wake.set()

    def feed_vectors(self, message: protocol.Embedded) -> None:
        """Take one step's vectors."""
        assert isinstance(self.request, EmbedRequest)
        self.vectors.append(message)
        self.drawn_tokens += len(message.inputs) // 4
        if self.drawn_tokens == len(self.request.inputs):
            self.finish = "stop"
            self.wake.set()

    def begin_again(self) -> bool:
        """Whether the next engine may do it from the start: of tokens some may be with the client, of vectors none is
        before the last has come."""
        if self.over or (self.first_token_at is not None and isinstance(self.request, GenerateRequest)):
            return False
        self.vectors.clear()
        self.drawn_tokens, self.first_token_at, self.forwarded = 0, None, False
        return True

    async def changed(self) -> None:
        """For the reader: wait for news, at most until the deadline, which fails it. Cancelled: nothing changes."""
        self.wake = trio.Event()
        with trio.move_on_at(self.deadline) as limit:
            await self.wake.wait()
        if limit.cancelled_caught:
            self.fail(DeadlineExceeded("The request's time is up."), cancel_reason="deadline")

    def fail(self, error: LmxError, *, cancel_reason: str | None = None) -> None:
        """Nothing more comes: tokens that wait may still be read, then ``error`` is raised. The first error counts."""
        if not self.over:
            self.error = error
            self.cancel_reason = cancel_reason
            self.wake.set()


class TokenStream:
    """What a lease gives to read. For one task at a time."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._ended = False
        """The finish was told."""

    @property
    def seq(self) -> int:
        """For other requests' ``parent``."""
        return self._lease.seq

    @property
    def prompt_logprobs(self) -> list[protocol.Logprobs]:
        """Of the prompt's tokens but the first, if the request asked for them; whole from the first chunk on."""
        return self._lease.prompt_logprobs

    @property
    def state(self) -> State:
        return self._lease.state

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was found and not computed; known from the first chunk on."""
        return self._lease.cached_tokens

    @property
    def drafts(self) -> Drafted:
        """Until now."""
        return self._lease.drafts

    @property
    def started(self) -> protocol.Started | None:
        """How it began in the engine; known from the first chunk on."""
        return self._lease.started

    async def receive(self) -> Chunk:
        """Wait for tokens and take all there are. Cancelled: nothing was taken.

        Raises trio.EndOfChannel after the chunk with the finish, and what ended the sequence otherwise: EngineDied,
        SequenceFailed, DeadlineExceeded, ContextLengthExceeded, ModelLoadingFailed or ModelOverloaded.
        """
        lease = self._lease
        await trio.lowlevel.checkpoint()
        while not lease.tokens:
            if lease.error is not None:
                raise lease.error
            if self._ended:
                raise trio.EndOfChannel
            if lease.finish is not None:
                break  # without a further token: an engine with less room was to go on with it
            await lease.changed()
        self._ended = lease.finish is not None
        chunk = Chunk(tuple(lease.tokens), tuple(lease.logprobs), lease.finish)
        lease.tokens.clear()
        lease.logprobs.clear()
        return chunk

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> Chunk:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


class VectorStream:
    """What the lease of an ``EmbedRequest`` gives to read. For one task at a time."""

    cached_tokens = 0

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    @property
    def drafts(self) -> Drafted:
        """None: nothing is drawn."""
        return self._lease.drafts

    @property
    def state(self) -> State:
        return self._lease.state

    async def receive(self) -> list[protocol.Embedded]:
        """Wait for the vectors of all inputs, in the pieces they came in. Cancelled: nothing was taken.

        Raises as ``TokenStream.receive`` does.
        """
        lease = self._lease
        await trio.lowlevel.checkpoint()
        while lease.finish is None:
            if lease.error is not None:
                raise lease.error
            await lease.changed()
        return lease.vectors
