"""Drives a real engine process over its socketpair, as the server does, but synchronously: for tests of the engine
alone."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmx.protocol import (
    Canary,
    Cancel,
    Decoder,
    Failed,
    Freed,
    Load,
    Logprobs,
    Message,
    Ready,
    Sampling,
    Shutdown,
    Started,
    Stats,
    Step,
    Submit,
    encode,
    pack_tokens,
)

GREEDY = Sampling(seed=0, temperature=0.0)
_SILENCE_S = 60.0


@dataclass
class Answer:
    """What came back for one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish: str | None = None
    started: int = 0
    failed: Failed | None = None
    freed: Freed | None = None


class EngineClient:
    def __init__(self, process: "subprocess.Popen[bytes]", sock: socket.socket) -> None:
        self.process = process
        self.answers: dict[int, Answer] = {}
        self.ready: Ready | None = None
        self.stats: list[Stats] = []
        self.steps: list[Step] = []
        self.messages: list[Message] = []
        self._sock = sock
        self._decoder = Decoder()
        self._next = 0

    def send(self, message: Any) -> None:
        self._sock.sendall(encode(message))

    def submit(self, prompt: list[int], max_tokens: int = 16, sampling: Sampling = GREEDY, **options: Any) -> int:
        submit = self._new(prompt, max_tokens, sampling, **options)
        self.send(submit)
        return submit.seq

    def submit_together(self, requests: Sequence[tuple[list[int], int, Sampling]]) -> list[int]:
        """All in one piece, so that an idle engine has them all before its first step."""
        submits = [self._new(*request) for request in requests]
        self._sock.sendall(b"".join(map(encode, submits)))
        return [submit.seq for submit in submits]

    def submit_family(self, prompt: list[int], max_tokens: int, samplings: Sequence[Sampling]) -> list[int]:
        """Answers of one prompt, in one piece: the first one's sequence is the others' parent."""
        first = self._new(prompt, max_tokens, samplings[0])
        others = [self._new(prompt, max_tokens, sampling, parent=first.seq) for sampling in samplings[1:]]
        self._sock.sendall(b"".join(map(encode, [first, *others])))
        return [first.seq, *(other.seq for other in others)]

    def _new(self, prompt: list[int], max_tokens: int, sampling: Sampling, **options: Any) -> Submit:
        self._next += 1
        self.answers[self._next] = Answer()
        options.setdefault("ignore_eos", True)
        return Submit(self._next, pack_tokens(prompt), max_tokens, sampling, **options)

    def cancel(self, seq: int) -> None:
        self.send(Cancel(seq))

    def run(self, prompts: list[list[int]], max_tokens: int = 16, sampling: Sampling = GREEDY) -> list[list[int]]:
        """Submit all at once and wait for all; the generated tokens."""
        seqs = self.submit_together([(prompt, max_tokens, sampling) for prompt in prompts])
        self.wait_freed(*seqs)
        return [self.answers[seq].tokens for seq in seqs]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Take messages until the condition holds; fails when the engine dies or says nothing for a minute."""
        while not condition():
            data = self._sock.recv(1 << 20)
            assert data, f"the engine ended: {self.process.wait()}"
            for message in self._decoder.feed(data):
                self._take(message)

    def wait_freed(self, *seqs: int) -> None:
        self.wait(lambda: all(self.answers[seq].freed for seq in seqs))

    def idle_stats(self) -> Stats:
        """The engine's figures, asked for now."""
        count = len(self.stats)
        self.send(Canary())
        self.wait(lambda: len(self.stats) > count)
        return self.stats[-1]

    def _take(self, message: Message) -> None:
        self.messages.append(message)
        match message:
            case Ready():
                self.ready = message
            case Stats():
                self.stats.append(message)
            case Step():
                self.steps.append(message)
                for started in message.started:
                    self._take_started(started)
                for row in message.rows:
                    answer = self.answers[row.seq]
                    assert answer.finish is None
                    assert answer.freed is None
                    answer.tokens += row.tokens
                    answer.logprobs += row.logprobs
                    answer.finish = row.finish
            case Failed(seq=seq) if seq >= 0:
                self.answers[seq].failed = message
            case Freed(seq=seq):
                assert self.answers[seq].freed is None, "freed twice"
                self.answers[seq].freed = message

    def _take_started(self, started: Started) -> None:
        self.answers[started.seq].started += 1


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[EngineClient]:
    """A loaded engine. It must exit 0 when told to shut down."""
    with engine_process(folder, **options) as client:
        client.wait(lambda: client.ready is not None)
        yield client
        client.send(Shutdown())
        assert client.process.wait(_SILENCE_S) == 0


@contextmanager
def engine_process(folder: Path, **options: Any) -> Iterator[EngineClient]:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "lmx.engine", "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
            )
        try:
            ours.settimeout(_SILENCE_S)
            client = EngineClient(process, ours)
            client.send(Load(str(folder), **options))
            yield client
        finally:
            process.kill()
            process.wait()
