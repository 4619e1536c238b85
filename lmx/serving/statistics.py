"""What an engine's supervisor knows about it at one moment: the record behind ``/admin/status`` and the gauges of
``/metrics``."""

from dataclasses import dataclass

from lmx import protocol


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Answered from state at hand, never by asking the engine, which may be busy or hung."""

    state: str
    """"loading", "ready", "recycling", "restarting", "failed" or "stopped"."""
    pid: int | None
    live_leases: int
    """Leases held by requests: queued, running, or waiting for their KV to be free."""
    waiting: int
    """Leases without a first token yet."""
    live_sequences: int
    """Submitted to the engine and not yet confirmed free. Never above ``live_leases``; equal once the engine is ready
    and none waits for a retry."""
    kv_sequence_bytes: int
    """KV of live sequences: the engine's last account, less what it has freed since."""
    kv_budget_bytes: int
    restarts: int
    recycles: int
    """How often its process was replaced by a fresh one."""
    recycle_due: str | None
    """Why that is to happen, in the next quiet moment: "asked", "age", "growth", "traces" or "handles"."""
    age_s: float
    """Of the process, since it was ready; 0: it is not."""
    growth_bytes: int
    """By how much its memory has grown beyond what lmx accounts for."""
    last_failure: str | None
    generated_per_s_1s: float
    """Tokens a second over the last whole second."""
    generated_per_s_60s: float
    prompt_per_s_60s: float
    ttft_ms: tuple[float, float, float] | None
    """From lease to first token, p50, p95 and p99 of the last thousand; None before the first."""
    itl_ms: tuple[float, float, float] | None
    """Between a sequence's tokens, p50, p95 and p99 of the last ten thousand."""
    engine: protocol.Stats | None
    """The engine's own last figures (queue, arenas, memory)."""
    output_tail: tuple[str, ...] = ()
    """What the process wrote last, while there is a failure to explain."""
