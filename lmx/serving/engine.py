"""Supervises the engine process of one model and gives its work out as leases (DESIGN §1 and §2).

``Engine.run`` starts the process, restarts it with back-off when it dies or hangs, and ends it. ``Engine.generate`` is
a lease: a request's resources in the engine live exactly as long as the ``async with`` block. Nothing but a lease's own
task ever waits for the engine, and neither a process nor a lease is left behind. Used by ``lmx.serving.models`` and the
API faces.
"""

import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from copy import copy
from dataclasses import replace
from typing import TypeVar

import trio

from lmx import protocol
from lmx.config import EngineSettings
from lmx.errors import LmxError, ModelLoadingFailed, ModelOverloaded
from lmx.serving.breaker import Breaker
from lmx.serving.failures import Failure, classify, failed_load
from lmx.serving.lease import AnyRequest, Chunk, EmbedRequest, GenerateRequest, Lease, TokenStream, VectorStream
from lmx.serving.ledger import Ledger
from lmx.serving.meter import Meter
from lmx.serving.metrics import Metrics
from lmx.serving.process import EngineProcess
from lmx.serving.statistics import EngineStatistics
from lmx.serving.windows import percentiles

__all__ = ["Chunk", "EmbedRequest", "Engine", "EngineStatistics", "GenerateRequest", "TokenStream", "VectorStream"]

Stream = TypeVar("Stream", TokenStream, VectorStream)

STOP_GRACE_S = 5.0
HANG_STEPS = 4.0
"""An engine whose steps take long (a large model's prefill) is hung only after this many times its longest step."""

logger = logging.getLogger("lmx.engine")


class Engine:
    """The engine process of one model, as the server sees it. ``run`` it in a nursery; any number of tasks may
    ``generate``.

    ``settings``: those that hold now; how it restarts, and what starts it, stays as it was at first.

    ``state``: "loading" until the first process is ready, then "ready"; "restarting" from a death until the next one is
    ready; "failed" while the circuit breaker is open; "stopped" after ``run``.
    """

    def __init__(
        self,
        name: str,
        load: protocol.Load,
        settings: Callable[[], EngineSettings],
        metrics: Metrics,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.name = name
        self.state = "loading"
        self.ready: protocol.Ready | None = None
        """What the last engine that became ready said of itself; kept while the next one loads."""
        self.restarts = 0
        self._load = self._sent = load
        self._settings = settings
        given = settings()
        self._command = given.command or [sys.executable, "-P", "-m", "lmx.engine"]
        self._environment = environment
        self._meter = Meter(name, metrics)
        self._breaker = Breaker(
            backoff_s=given.restart_backoff_s,
            backoff_max_s=given.restart_backoff_max_s,
            max_restarts=given.max_restarts,
            cooldown_s=given.restart_cooldown_s,
        )
        self._ledger = Ledger(name, settings, self._meter, self._breaker.succeed)
        self._process: EngineProcess | None = None
        self._is_ready = trio.Event()
        """Of the running process."""
        self._load_failure: Failure | None = None
        self._last_failure: Failure | None = None
        self._last_tail: tuple[str, ...] = ()
        self._refusal: LmxError | None = None
        """It takes nobody any more."""
        self._wanted = trio.Event()
        """A request asks for one more try after the breaker's cool-down."""
        self._state_changed = trio.Event()
        self._metrics = metrics
        metrics.watch(name, self.statistics)

    # --- leases ----------------------------------------------------------------------------------

    def generate(self, request: GenerateRequest) -> AbstractAsyncContextManager[TokenStream]:
        """A lease on the engine for one request; the block reads its tokens.

        Entering never waits: while the model loads or restarts the lease is held and ``TokenStream.receive`` waits.
        Raises QueueFull, ModelLoadingFailed, ModelOverloaded or RequestCrashesEngine. Cancelled on entry: no lease was
        taken.

        Leaving, for any reason, waits until the engine has confirmed that the sequence's KV is free (or is dead),
        shielded from cancellation; it takes a step, or at worst ``free_timeout_s``, after which the engine is killed
        and restarted.
        """
        return self._hold(request, TokenStream)

    def embed(self, request: EmbedRequest) -> AbstractAsyncContextManager[VectorStream]:
        """As ``generate``, for a model that was loaded to make vectors."""
        return self._hold(request, VectorStream)

    @asynccontextmanager
    async def _hold(self, request: AnyRequest, stream: Callable[[Lease], Stream]) -> AsyncIterator[Stream]:
        await trio.lowlevel.checkpoint()
        self._refuse_if_down()
        lease = self._ledger.take(request)
        reason = "stopped"
        try:
            yield stream(lease)
        except Exception:
            reason = "error"
            raise
        except BaseException:
            reason = "cancelled"
            raise
        finally:
            await self._end_lease(lease, reason)

    def _refuse_if_down(self) -> None:
        if self._refusal is not None:
            raise copy(self._refusal)
        if self.state == "stopped":
            raise ModelOverloaded(f"The model {self.name!r} was stopped.")
        if self.state == "failed":
            wait_s = self._breaker.remaining_s(trio.current_time())
            if wait_s > 0:
                raise self._unavailable(wait_s)
            self._wanted.set()

    def _unavailable(self, wait_s: float) -> LmxError:
        failure = self._last_failure
        assert failure is not None
        what = "cannot be loaded" if failure.loading else "keeps failing"
        kind = ModelLoadingFailed if failure.loading else ModelOverloaded
        return kind(
            f"The model {self.name!r} {what}: {failure}. The next try is in {wait_s:.0f} s.", retry_after_s=wait_s
        )

    async def _end_lease(self, lease: Lease, reason: str) -> None:
        seen = trio.current_time()
        ran = self._ledger.close(lease)
        if lease.submitted:
            with trio.CancelScope(shield=True):
                with trio.move_on_after(self._settings().free_timeout_s) as limit:
                    await lease.freed.wait()
                if limit.cancelled_caught and self._process is not None:
                    self._process.kill(f"it did not free a sequence within {self._settings().free_timeout_s} s")
                    await lease.freed.wait()
            if ran:
                self._meter.cancel_freed(trio.current_time() - seen)
        if ran:
            self._meter.cancelled(lease.cancel_reason or reason)
        self._ledger.give_back(lease)

    # --- supervision -----------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep an engine process running until cancelled.

        Cancelled: the process is asked to end, then made to; it is reaped, and every lease has failed and is free,
        before Cancelled leaves. ``task_status`` is started at once; ``wait_state`` tells when the model is ready.
        """
        try:
            task_status.started()
            while True:
                failure = await self._run_process()
                self._meter.died(failure.cause)
                now = trio.current_time()
                blamed, self._ledger.blamed = self._ledger.blamed, False
                if blamed:
                    delay_s = self._breaker.excuse(now)
                else:
                    delay_s = self._breaker.fail(now, permanent=failure.cause == "model_invalid")
                if delay_s is not None:
                    logger.warning("%s: the engine ended: %s. Restart in %.1f s.", self.name, failure, delay_s)
                    await trio.sleep(delay_s)
                else:
                    await self._wait_until_wanted(failure)
                self.restarts += 1
        finally:
            self._set_state("stopped")
            self._metrics.forget(self.name, self.statistics)
            self._ledger.fail_waiting(ModelOverloaded(f"The model {self.name!r} was stopped."))

    async def _wait_until_wanted(self, failure: Failure) -> None:
        self._wanted = trio.Event()
        self._set_state("failed")
        error = self._unavailable(self._breaker.remaining_s(trio.current_time()))
        logger.error("%s", error.message)
        self._ledger.fail_waiting(error)
        await self._wanted.wait()
        self._set_state("restarting")

    async def _run_process(self) -> Failure:
        """One life of an engine process."""
        try:
            process = await EngineProcess.start(self._command, self._environment, logger)
        except OSError as error:
            self._last_failure = Failure("bug", f"cannot start {self._command[0]}: {error.strerror}", loading=True)
            self._set_state("restarting")
            return self._last_failure
        self._process, self._is_ready, self._load_failure = process, trio.Event(), None
        failure = Failure("shutdown", "", loading=False)
        try:
            self._sent = self._load
            process.send(self._sent)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, process)
                await process.run(self._handle)
                nursery.cancel_scope.cancel()
            failure = self._failure(process)
        finally:
            # While it loads it does not listen.
            await process.stop(ask_s=STOP_GRACE_S if self._is_ready.is_set() else 0.0, terminate_s=STOP_GRACE_S)
            self._process = None
            self._last_failure, self._last_tail = failure, tuple(process.tail)
            self._set_state("restarting")
            self._ledger.detach(failure)
        return failure

    def _failure(self, process: EngineProcess) -> Failure:
        loading = not self._is_ready.is_set()
        if self._load_failure is not None:
            return self._load_failure
        if process.killed_for is not None:
            return Failure("hung", process.killed_for, loading)
        assert process.returncode is not None
        return classify(process.returncode, tuple(process.tail), loading=loading)

    def _handle(self, message: protocol.Message) -> None:
        match message:
            case protocol.Ready():
                self.ready = message
                self._is_ready.set()
                assert self._process is not None
                self._set_state("ready")
                logging.getLogger("lmx").info(
                    "model %s ready (%s, %s on %s, context %d tokens, %s: %s; loaded in %.1f s)",
                    self.name,
                    message.architecture,
                    message.dtype,
                    message.device,
                    message.context_length,
                    message.path,
                    message.path_reason,
                    message.load_s,
                )
                for name, result in message.probes.items():
                    logging.getLogger("lmx").info("model %s: %s: %s", self.name, name, result)
                if self._load is not self._sent:  # trimmed meanwhile
                    self._tell_budget()
                self._ledger.attach(self._process.send, message)
            case protocol.Failed(seq=-1):
                self._load_failure = failed_load(message.code, message.message)
                assert self._process is not None
                self._process.kill("its load failed")
            case _:
                self._ledger.handle(message)

    async def _watch(self, process: EngineProcess) -> None:
        """Kill an engine that is alive and not healthy: it owes steps, and its step counter stands still."""
        with trio.move_on_after(self._settings().load_timeout_s):
            await self._is_ready.wait()
        if not self._is_ready.is_set():
            process.kill(f"it did not load within {self._settings().load_timeout_s} s")
        ledger = self._ledger
        while True:
            await ledger.working.wait()
            limit_s = max(self._settings().hang_timeout_s, HANG_STEPS * ledger.longest_step_s)
            due = ledger.progress_at + limit_s
            if trio.current_time() >= due:
                process.kill(f"no step for {limit_s:.1f} s with work queued")
                return
            await trio.sleep_until(due)

    def fail_all(self, error: LmxError) -> None:
        """End every request with ``error`` now; their tasks give the leases back."""
        self._ledger.fail_all(error)

    def close(self, error: LmxError) -> None:
        """End every request with ``error``, also those that come from now on, whether it ever ran or not."""
        self._refusal = error
        self._ledger.fail_all(error)

    def kill(self) -> None:
        """End the process this instant, whatever runs; for a server that must end at once."""
        if self._process is not None:
            self._process.kill("the server ends at once")

    def _set_state(self, state: str) -> None:
        self.state = state
        self._state_changed.set()
        self._state_changed = trio.Event()

    def grant(self, kv_budget_bytes: int, wired_bytes: int = -1) -> None:
        """Before ``run``: what its KV may take, and how much of its weights may be wired."""
        self._load = replace(self._load, kv_budget_bytes=kv_budget_bytes, wired_bytes=wired_bytes)

    def trim(self, kv_budget_bytes: int) -> None:
        """From now on its KV and prefixes may take only this; a process that starts later begins so."""
        self._load = replace(self._load, kv_budget_bytes=kv_budget_bytes)
        if self.state == "ready":
            self._tell_budget()

    def _tell_budget(self) -> None:
        assert self._process is not None
        assert self.ready is not None
        self._process.send(protocol.Trim(self._load.kv_budget_bytes))
        self.ready = replace(self.ready, kv_budget_bytes=self._load.kv_budget_bytes)

    async def change(self) -> None:
        """Wait for the next change of the state."""
        await self._state_changed.wait()

    async def wait_state(self, *states: str) -> str:
        """Wait until the state is one of ``states``, and return it. Cancelled: nothing changes."""
        await trio.lowlevel.checkpoint()
        while self.state not in states:
            await self._state_changed.wait()
        return self.state

    @property
    def pid(self) -> int | None:
        """Of its process, if there is one."""
        return self._process.pid if self._process is not None else None

    @property
    def figures(self) -> protocol.Stats | None:
        """What that process last said of itself."""
        return self._ledger.stats

    def statistics(self) -> EngineStatistics:
        """The moment's figures, from state at hand."""
        now, ledger, meter = trio.current_time(), self._ledger, self._meter
        return EngineStatistics(
            state=self.state,
            pid=self.pid,
            live_leases=len(ledger.leases),
            waiting=ledger.waiting,
            live_sequences=len(ledger.submitted),
            kv_sequence_bytes=ledger.kv_sequence_bytes,
            kv_budget_bytes=self.ready.kv_budget_bytes if self.ready is not None else 0,
            restarts=self.restarts,
            last_failure=str(self._last_failure) if self._last_failure is not None else None,
            generated_per_s_1s=meter.generated.per_second(now, 1),
            generated_per_s_60s=meter.generated.per_second(now, 60),
            prompt_per_s_60s=meter.computed.per_second(now, 60),
            ttft_ms=percentiles(meter.ttft_ms),
            itl_ms=percentiles(meter.itl_ms),
            engine=ledger.stats,
            output_tail=self._last_tail,
        )
