"""What the HTTP path costs: 8 streams of a server whose engine draws tokens at no cost.

Events a second by the clock, and, steadier on a shared machine, by the server process's own CPU time. The baseline is
the same server's Python doing nothing but what an event cannot do without: one ``send`` on a socket for each.
"""

import socket
import threading
import time

import psutil

from bench.models import folder, null_engine
from bench.result import Result, Row, alternate, median_ratio
from lmx.bench.client import Client, Request
from lmx.bench.prompts import Prompts
from lmx.bench.server import running_server

STREAMS = 8
TARGET = 3000.0
"""Events for each second of the server's CPU time (lmx.api.openai.chunks)."""
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
PACED_STEP_MS = 4
"""Slow enough that no two tokens of a stream are merged into one event."""


def run(quick: bool) -> Result:
    rows: list[Row] = []
    path = folder("llama-4x128")
    for label, step_ms in (("as fast as it goes", 0), (f"a step each {PACED_STEP_MS} ms", PACED_STEP_MS)):
        with running_server(str(path), null_engine(step_ms)) as server:
            for words, fields in (("", {}), (", a chat with tools", {"tools": TOOLS})):
                with Client(server.url, path.name, fields, chat=bool(fields)) as client:
                    tokens, repeats = (256, 3) if quick else (1024, 5)
                    rows.append(_measure(label + words, client, psutil.Process(server.pid), tokens, repeats))
    return Result(f"{STREAMS} streams through the server, with the null engine", rows)


def _measure(label: str, client: Client, server: psutil.Process, tokens: int, repeats: int) -> Row:
    prompts = Prompts(0)
    per_cpu_s: list[float] = []
    client_us: list[float] = []
    tokens_per_event: list[float] = []

    def events_per_s() -> float:
        cpu, own_cpu, started = _cpu_s(server), time.process_time(), time.perf_counter()
        finished = client.run([Request(prompts.words(8), tokens) for _ in range(STREAMS)], STREAMS)
        elapsed_s = time.perf_counter() - started
        events = sum(len(stream.event_times) for stream in finished)
        per_cpu_s.append(events / (_cpu_s(server) - cpu))
        client_us.append(1e6 * (time.process_time() - own_cpu) / events)
        tokens_per_event.append(sum(stream.completion_tokens for stream in finished) / events)
        return events / elapsed_s

    events_per_s()  # warm-up
    per_cpu_s.clear()
    by_clock, floor = alternate(repeats, events_per_s, _bare_sends_per_s)
    best = max(per_cpu_s)
    return {
        "engine": label,
        "events/s": max(by_clock),
        "tokens/event": min(tokens_per_event),
        "events/server CPU s": best,
        "client CPU us/event": min(client_us),
        "bare sends/s": max(floor),
        "ratio": median_ratio(per_cpu_s, floor),
        "target": TARGET,
        "ok": best >= TARGET,
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _bare_sends_per_s(count: int = 20_000) -> float:
    """``send`` of an event's bytes on a TCP socket that somebody reads, for each second of this thread's CPU time."""
    event = b"data: " + b"x" * 200 + b"\n\n"
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sender:
        receiver, _ = listener.accept()

        def drain() -> None:
            with receiver:
                while receiver.recv(1 << 16):
                    pass

        thread = threading.Thread(target=drain)
        thread.start()
        started = time.thread_time()
        for _ in range(count):
            sender.sendall(event)
        elapsed_s = time.thread_time() - started
        sender.shutdown(socket.SHUT_WR)
        thread.join()
    return count / elapsed_s
