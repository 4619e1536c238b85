"""An engine process without a model: it speaks ``lmx.protocol`` and draws tokens in a circle.

For two callers only: ``bench/`` measures the HTTP path with it, and tests drive the server into states and faults that
a real engine cannot be asked for. It is chosen with ``[engine] command``. Where it can, it keeps the real engine's
promises: one Step frame for each step, one prefill chunk a step, at most ``max_rows`` rows, cancels honoured between
steps, ``Running`` before a forward, exactly one ``Freed`` for each ``Submit``, a last ``Stats`` when it goes idle. KV
is counted at 1,024 bytes a token.

Environment, all optional:
    LMX_NULL_STEP_MS=5           time of one step (default 0: as fast as frames go)
    LMX_NULL_FIRST_TOKEN=100     answers are 100, 101, ... around the vocabulary, EOS ids left out (default 0)
    LMX_NULL_VOCAB=32000         vocabulary size, where the folder's config.json does not say
    LMX_NULL_LOAD=model_invalid  the load fails with this code; "exit": exit 3; "hang": never ready;
                                 "wait:PATH": loads until PATH exists
    LMX_NULL_CRASH_TOKEN=7       a prompt holding this token aborts the process in its first prefill step
    LMX_NULL_CRASH_AFTER=3       ... or after so many tokens drawn; -1: as soon as it is submitted
    LMX_NULL_CRASH_FLAG=PATH     ... but only while PATH does not exist; it is made before the crash
    LMX_NULL_CRASH_TEXT=TEXT     the last line on stderr before such a crash
    LMX_NULL_HANG_TOKEN=8        a prompt holding it stops the loop for ever in its first prefill step
    LMX_NULL_FAIL_TOKEN=9        such a sequence fails alone, with the code
    LMX_NULL_FAIL_CODE=CODE      (default "non_finite")
    LMX_NULL_KEEP_TOKEN=10       such a sequence is never freed
    LMX_NULL_SCRIPT=PATH         what each sequence that comes from now on says, while PATH exists: {"steps": [[5, 6],
                                 [7]], "finish": "stop"}, the tokens of each step and how it ends ("stop": with an EOS)
    LMX_NULL_SUBMITS=PATH        each Submit adds a line of JSON to it: its grammar and sampling
"""

import argparse
import json
import os
import resource
import select
import socket
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lmx import protocol

KV_BYTES_PER_TOKEN = 1024
KV_BUDGET_BYTES = 1 << 30
CHUNK_TOKENS = 512


@dataclass(slots=True)
class Row:
    submit: protocol.Submit
    prompt: list[int]
    deadline: float
    done: int = 0
    """Prompt tokens computed."""
    drawn: int = 0
    finish: str | None = None
    ended: bool = False
    logprobs: tuple[protocol.Logprobs, ...] = field(default=())
    script: deque[tuple[int, ...]] | None = None
    """What is left to say, a step each."""
    script_finish: str = "stop"

    @property
    def kv_bytes(self) -> int:
        return (self.done + self.drawn) * KV_BYTES_PER_TOKEN


def _fault_token(name: str) -> int:
    return int(os.environ.get(f"LMX_NULL_{name}_TOKEN", "-1"))


class NullEngine:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.decoder = protocol.Decoder()
        self.queue: deque[Row] = deque()
        self.rows: dict[int, Row] = {}
        """Admitted and not freed, in order of admission."""
        self.step = 0
        self.running: tuple[int, ...] = ()
        self.step_s = float(os.environ.get("LMX_NULL_STEP_MS", "0")) / 1000
        self.next_stats = 0.0
        self.crash_after = int(os.environ.get("LMX_NULL_CRASH_AFTER", "0"))
        self.crash, self.hang = _fault_token("CRASH"), _fault_token("HANG")
        self.fail, self.keep = _fault_token("FAIL"), _fault_token("KEEP")

    def send(self, message: protocol.Message) -> None:
        try:
            self.sock.sendall(protocol.encode(message))
        except ConnectionError:
            sys.exit(0)  # the server is gone

    # --- loading ---------------------------------------------------------------------------------

    def load(self) -> None:
        started = time.monotonic()
        messages: list[protocol.Message] = []
        while not messages:
            messages = list(self.decoder.feed(self._receive()))
        first, *rest = messages
        assert isinstance(first, protocol.Load), f"the first frame is {first}, not Load"
        self.options = first
        fault = os.environ.get("LMX_NULL_LOAD", "")
        if fault == "exit":
            print("null engine: told to exit at load", file=sys.stderr)
            sys.exit(3)
        elif fault == "hang":
            time.sleep(1e9)
        elif fault.startswith("wait:"):
            while not os.path.exists(fault[5:]):
                time.sleep(0.01)
        elif fault:
            self.send(protocol.Failed(-1, fault, f"null engine: told to fail with {fault}"))
            sys.exit(1)
        config = Path(first.path, "config.json")
        facts = json.loads(config.read_text()) if config.exists() else {}
        vocab = int(facts.get("vocab_size", os.environ.get("LMX_NULL_VOCAB", "32000")))
        self.budget = first.kv_budget_bytes or KV_BUDGET_BYTES
        limits = (first.context_length, facts.get("max_position_embeddings"), self.budget // KV_BYTES_PER_TOKEN)
        start = int(os.environ.get("LMX_NULL_FIRST_TOKEN", "0"))
        self.cycle = [(start + i) % vocab for i in range(vocab) if (start + i) % vocab not in first.eos_ids]
        self.send(
            protocol.Ready(
                backend="none",
                architecture=facts.get("model_type", "null"),
                context_length=min(limit for limit in limits if limit),
                vocab_size=vocab,
                eos_ids=first.eos_ids,
                kv_bytes_per_token=KV_BYTES_PER_TOKEN,
                kv_budget_bytes=self.budget,
                weights_bytes=0,
                device="none",
                dtype="none",
                path="single",
                path_reason="the null engine runs no model",
                probes={},
                load_s=time.monotonic() - started,
            )
        )
        for message in rest:
            self.take(message)

    # --- messages --------------------------------------------------------------------------------

    def _receive(self) -> bytes:
        try:
            data = self.sock.recv(1 << 18)
        except ConnectionError:
            data = b""
        if not data:
            sys.exit(0)  # the server is gone
        return data

    def read(self, *, wait: bool) -> None:
        while select.select([self.sock], [], [], None if wait else 0)[0]:
            wait = False
            for message in self.decoder.feed(self._receive()):
                self.take(message)

    def take(self, message: protocol.Message) -> None:
        match message:
            case protocol.Submit(seq=seq):
                prompt = protocol.unpack_tokens(message.prompt)
                if self.crash in prompt and self.crash_after < 0:
                    self.abort()
                needed = len(prompt) * KV_BYTES_PER_TOKEN
                if needed > self.budget:
                    text = f"the prompt needs {needed} bytes of KV, the budget is {self.budget}"
                    self.send(protocol.Failed(seq, "never_fits", text))
                    self.send(protocol.Freed(seq, 0))
                    return
                deadline = float("inf") if message.deadline_s is None else time.monotonic() + message.deadline_s
                row = Row(message, prompt, deadline, drawn=len(message.answer) // 4)
                if message.sampling.logprobs >= 0:
                    top = min(message.sampling.logprobs, len(self.cycle))
                    likeliest = tuple(self.cycle[:top])
                    row.logprobs = (protocol.Logprobs(-1.0, likeliest, tuple(-1.0 - i for i in range(top))),)
                self.direct(row)
                self.queue.append(row)
            case protocol.Cancel(seq=seq):
                for row in (*self.rows.values(), *self.queue):
                    if row.submit.seq == seq:
                        row.ended = True
            case protocol.Trim(kv_budget_bytes=budget):
                self.budget = budget
                self.send(self.stats())
            case protocol.Canary():
                self.send(self.stats())
            case protocol.Shutdown():
                sys.exit(0)
            case _:
                raise ValueError(f"{message} is not for an engine")

    def direct(self, row: Row) -> None:
        """What the test has written down for it, and what it asks for."""
        if submits := os.environ.get("LMX_NULL_SUBMITS"):
            with open(submits, "a", encoding="utf-8") as file:
                told = {"grammar": row.submit.grammar, "sampling": asdict(row.submit.sampling)}
                file.write(json.dumps(told) + "\n")
        path = Path(os.environ.get("LMX_NULL_SCRIPT", "/nonexistent"))
        if path.exists():
            told = json.loads(path.read_text())
            row.script_finish = told["finish"]
            steps = [tuple(tokens) for tokens in told["steps"]]
            if row.script_finish == "stop":
                steps.append((self.options.eos_ids[0],))
            said = row.drawn
            while said:  # to an engine before this one
                first, *rest = steps
                steps = [first[said:], *rest] if said < len(first) else rest
                said = max(said - len(first), 0)
            row.script = deque(steps)

    def stats(self) -> protocol.Stats:
        live = [row for row in self.rows.values() if not row.ended]
        prefilling = sum(row.done < len(row.prompt) for row in live)
        used = sum(row.kv_bytes for row in self.rows.values())
        # ru_maxrss is bytes on macOS and KiB elsewhere.
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return protocol.Stats(
            step=self.step,
            queued=len(self.queue),
            prefilling=prefilling,
            decoding=len(live) - prefilling,
            ending=len(self.rows) - len(live),
            kv_used_bytes=used,
            kv_budget_bytes=self.budget,
            arena_bytes=used,
            preemptions=0,
            mlx_active_bytes=used,
            mlx_peak_bytes=used,
            mlx_cache_bytes=0,
            rss_bytes=rss,
            live_arrays=len(self.rows),
        )

    # --- the step loop ---------------------------------------------------------------------------

    def run(self) -> None:
        self.load()
        self.send(self.stats())
        while True:
            self.sweep()
            idle = not self.queue and all(row.ended for row in self.rows.values())
            if idle:
                self.report_idle()
            self.read(wait=idle)
            self.sweep()
            started = self.admit()
            if all(row.ended for row in self.rows.values()):
                continue
            if tuple(self.rows) != self.running:
                self.running = tuple(self.rows)
                self.send(protocol.Running(self.running))
            self.forward(started)
            if time.monotonic() >= self.next_stats:
                self.next_stats = time.monotonic() + self.options.stats_interval_s
                self.send(self.stats())

    def report_idle(self) -> None:
        if self.running:
            self.running = ()
            self.send(protocol.Running(()))
            self.send(self.stats())

    def sweep(self) -> None:
        """Free what has ended, give up what is late."""
        now = time.monotonic()
        for row in (*self.rows.values(), *self.queue):
            if not row.ended and now >= row.deadline:
                row.ended = True
                self.send(protocol.Failed(row.submit.seq, "timeout", "the deadline passed"))
        for row in [row for row in self.queue if row.ended]:
            self.queue.remove(row)
            self.send(protocol.Freed(row.submit.seq, 0))
        for seq in [seq for seq, row in self.rows.items() if row.ended and self.keep not in row.prompt]:
            row = self.rows.pop(seq)
            self.send(protocol.Freed(seq, row.kv_bytes, row.done, row.drawn))

    def admit(self) -> tuple[protocol.Started, ...]:
        started = []
        while self.queue and len(self.rows) < self.options.max_rows:
            row = self.queue.popleft()
            self.rows[row.submit.seq] = row
            started.append(protocol.Started(row.submit.seq, 0))
        return tuple(started)

    def forward(self, started: tuple[protocol.Started, ...]) -> None:
        began = time.monotonic()
        live = [row for row in self.rows.values() if not row.ended]
        prefill = next((row for row in live if row.done < len(row.prompt)), None)
        if prefill is not None:
            if prefill.done == 0:
                self.misbehave(prefill)
            chunk_tokens = self.options.max_chunk_tokens or CHUNK_TOKENS
            done, prefill.done = prefill.done, min(len(prefill.prompt), prefill.done + chunk_tokens)
            self.score(prefill, done)
        time.sleep(self.step_s)
        if any(self.crash in row.prompt and 0 < self.crash_after == row.drawn for row in live):
            self.abort()
        drawn = tuple(self.draw(row) for row in live if row.done == len(row.prompt) and not row.ended)
        self.step += 1
        elapsed_ms = (time.monotonic() - began) * 1000
        prefills = ((prefill.submit.seq, prefill.done),) if prefill is not None else ()
        self.send(protocol.Step(self.step, elapsed_ms, drawn, started, prefills))

    def draw(self, row: Row) -> protocol.Tokens:
        if row.script is not None:
            return self.speak(row, row.script)
        token = self.cycle[row.drawn % len(self.cycle)]
        row.drawn += 1
        stopped = token in row.submit.stop_ids and row.drawn > row.submit.min_tokens
        row.ended = stopped or row.drawn >= row.submit.max_tokens
        finish = "stop" if stopped else "length" if row.ended else None
        return protocol.Tokens(row.submit.seq, (token,), finish, row.logprobs)

    def speak(self, row: Row, script: deque[tuple[int, ...]]) -> protocol.Tokens:
        tokens = script.popleft()[: row.submit.max_tokens - row.drawn]
        row.drawn += len(tokens)
        row.ended = not script or row.drawn >= row.submit.max_tokens
        finish = None if not row.ended else "length" if script else row.script_finish
        return protocol.Tokens(row.submit.seq, tokens, finish, row.logprobs * len(tokens))

    def score(self, row: Row, done: int) -> None:
        """What comes after the prompt's tokens from ``done`` on, as if each were the likeliest."""
        following = row.prompt[done + 1 : row.done + 1]
        if row.submit.prompt_logprobs >= 0 and following and not row.ended:
            top = row.submit.prompt_logprobs
            values = tuple(-1.0 - i for i in range(top))
            scores = (protocol.Logprobs(-1.0, (token, *self.cycle[: top - 1])[:top], values) for token in following)
            self.send(protocol.PromptLogprobs(row.submit.seq, tuple(scores)))

    def misbehave(self, row: Row) -> None:
        if self.crash in row.prompt and self.crash_after == 0:
            self.abort()
        if self.hang in row.prompt:
            time.sleep(1e9)
        if self.fail in row.prompt:
            row.ended = True
            code = os.environ.get("LMX_NULL_FAIL_CODE", "non_finite")
            self.send(protocol.Failed(row.submit.seq, code, "null engine: told to fail this sequence"))

    def abort(self) -> None:
        flag = os.environ.get("LMX_NULL_CRASH_FLAG")
        if flag is None or not os.path.exists(flag):
            if flag is not None:
                Path(flag).touch()
            print(os.environ.get("LMX_NULL_CRASH_TEXT", "null engine: told to crash"), file=sys.stderr, flush=True)
            os.abort()


def main() -> None:
    parser = argparse.ArgumentParser(description="lmx engine without a model")
    parser.add_argument("--fd", type=int, required=True, help="inherited end of the socketpair")
    NullEngine(socket.socket(fileno=parser.parse_args().fd)).run()


if __name__ == "__main__":
    main()
