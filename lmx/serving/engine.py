"""Supervises the engine process of one model and gives its work out as leases (DESIGN §1 and §2).

``Engine.run`` starts the process, restarts it with back-off when it dies or hangs, replaces it by a fresh one when that
is due (``lmx.serving.recycling``), and ends it. ``Engine.generate`` is a lease: a request's resources in the engine
live exactly as long as the ``async with`` block. Nothing but a lease's own task ever waits for the engine, and neither
a process nor a lease is left behind. Used by ``lmx.serving.models`` and the API faces.
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
from lmx.errors import Conflict, LmxError, ModelLoadingFailed, ModelOverloaded
from lmx.serving.breaker import Breaker
from lmx.serving.failures import Failure, classify, failed_load
from lmx.serving.lease import AnyRequest, Chunk, EmbedRequest, GenerateRequest, Lease, TokenStream, VectorStream
from lmx.serving.ledger import Ledger
from lmx.serving.meter import Meter
from lmx.serving.metrics import Metrics
from lmx.serving.process import EngineProcess
from lmx.serving.recycling import Figures, Reason, Recycling
from lmx.serving.statistics import EngineStatistics
from lmx.serving.windows import percentiles

__all__ = ["Chunk", "EmbedRequest", "Engine", "EngineStatistics", "GenerateRequest", "TokenStream", "VectorStream"]

Stream = TypeVar("Stream", TokenStream, VectorStream)

STOP_GRACE_S = 5.0
SAVE_S = 10.0
"""How long an engine that is replaced may write prefixes to the disk: the fresh one has no others."""
LOOK_S = 1.0
"""Between two looks at whether it is to be replaced."""
HANG_STEPS = 4.0
"""An engine whose steps take long (a large model's prefill) is hung only after this many times its longest step."""

logger = logging.getLogger("lmx.engine")


class Engine:
    """The engine process of one model, as the server sees it. ``run`` it in a nursery; any number of tasks may
    ``generate``.

    ``settings``: those that hold now; how it restarts, and what starts it, stays as it was at first.

    ``state``: "loading" until the first process is ready, then "ready"; "restarting" from a death until the next one is
    ready; "recycling" while a process is replaced, from when it gets nobody any more until the fresh one is ready;
    "failed" while the circuit breaker is open; "stopped" after ``run``.
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
        self.recycles = 0
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
        self._recycling: Recycling | None = None
        """Of the running process, once it is ready."""
        self._asked = trio.Event()
        """Somebody asks for a fresh one."""
        self._drains_until: float | None = None
        """The running process is to be replaced, and its requests have so long to finish."""
        self._replaced: Reason | None = None
        """The running process holds nothing any more, and goes for this reason."""
        self._births = 0
        """Processes that became ready."""
        self._unaccounted_bytes: int | None = None
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
                if failure is None:
                    continue
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

    async def _run_process(self) -> Failure | None:
        """One life of an engine process; None: it was replaced."""
        try:
            process = await EngineProcess.start(self._command, self._environment, logger)
        except OSError as error:
            self._last_failure = Failure("bug", f"cannot start {self._command[0]}: {error.strerror}", loading=True)
            self._set_state("restarting")
            return self._last_failure
        self._process, self._is_ready, self._load_failure = process, trio.Event(), None
        self._recycling, self._asked, self._replaced = None, trio.Event(), None
        self._unaccounted_bytes = None
        failure: Failure | None = Failure("shutdown", "", loading=False)
        try:
            self._sent = self._load
            process.send(self._sent)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, process)
                nursery.start_soon(self._recycle, nursery.cancel_scope)
                await process.run(self._handle)
                nursery.cancel_scope.cancel()
            failure = None if self._replaced else self._failure(process)
        finally:
            # While it loads it does not listen.
            ask_s = STOP_GRACE_S if self._is_ready.is_set() else 0.0
            if failure is None:
                await process.stop(
                    ask_s=2 * SAVE_S + ask_s, terminate_s=STOP_GRACE_S, shutdown=protocol.Shutdown(SAVE_S)
                )
            else:
                await process.stop(ask_s=ask_s, terminate_s=STOP_GRACE_S)
            self._process, self._recycling, self._drains_until = None, None, None
            if failure is None:
                self._count_replaced()
                self._ledger.hand_over()
            else:
                self._last_failure, self._last_tail = failure, tuple(process.tail)
                self._set_state("restarting")
                self._ledger.detach(failure)
        return failure

    # --- recycling -------------------------------------------------------------------------------

    async def _recycle(self, life: trio.CancelScope) -> None:
        """Replace the process when that is due: it gets nobody any more, what runs may finish or comes back with the
        tokens that it has, and then its ``life`` ends. Until that it may die as ever."""
        await self._is_ready.wait()
        recycling, ledger = Recycling(trio.current_time()), self._ledger
        self._recycling = recycling
        while not recycling.begins(self._settings(), trio.current_time(), ledger.idle_since):
            with trio.move_on_after(LOOK_S):
                await self._asked.wait()
            now = trio.current_time()
            if self._asked.is_set():
                recycling.ask(now)
            recycling.look(self._figures_of_process(), self._settings(), now)
        drain_s = self._settings().recycle_drain_s
        self._drains_until = trio.current_time() + drain_s
        self._set_state("recycling")
        ledger.hold()
        logger.info(
            "%s: its engine (pid %d) is replaced by a fresh one (%s, after %.1f h); %d requests run, for at most %g s.",
            self.name,
            self.pid,
            recycling.reason,
            recycling.age_s(trio.current_time()) / 3600,
            len(ledger.submitted),
            drain_s,
        )
        with trio.move_on_after(drain_s):
            await ledger.rested.wait()
        ledger.withdraw_all()
        with trio.move_on_after(self._settings().free_timeout_s):
            await ledger.rested.wait()
        self._replaced = recycling.reason
        life.cancel()

    def _figures_of_process(self) -> Figures:
        stats = self._ledger.stats
        if stats is None:
            return Figures(self._unaccounted_bytes)
        return Figures(self._unaccounted_bytes, stats.traces, stats.handles, stats.most_handles)

    def _count_replaced(self) -> None:
        assert self._replaced is not None
        self.recycles += 1
        self._meter.recycled(self._replaced)
        self._set_state("recycling")  # now it waits for something else

    async def recycle(self) -> None:
        """Replace the process by a fresh one, at once; returns when that is ready. Running requests have
        ``recycle_drain_s`` to finish, and go on in the fresh one from their own tokens otherwise; none is lost.

        Raises Conflict where there is no process to replace, and ModelLoadingFailed, ModelOverloaded where no fresh one
        becomes ready. Cancelled: it is replaced all the same.
        """
        if self.state == "ready":
            self._asked.set()
        elif self.state != "recycling":
            raise Conflict(f"The model {self.name!r} is {self.state}: it has no engine that could be replaced.")
        births = self._births
        while self._births == births:
            await self.change()
            if self.state == "failed":
                raise self._unavailable(self._breaker.remaining_s(trio.current_time()))
            if self.state == "stopped":
                raise ModelOverloaded(f"The model {self.name!r} was stopped.")

    @property
    def recycling_waits_for(self) -> str:
        """In words, while a process is being replaced; else ""."""
        if self.state != "recycling":
            return ""
        if self._process is None or self._drains_until is None:
            return "the fresh engine to load"
        left_s, requests = self._drains_until - trio.current_time(), len(self._ledger.submitted)
        if left_s > 0 and requests:
            return f"requests to finish: {requests}, for {left_s:.0f} s at most"
        return "the old engine to end, and to save its prefixes"

    def note_memory(self, unaccounted_bytes: int) -> None:
        """What the system measures of the process beyond what lmx accounts for (negative: less)."""
        self._unaccounted_bytes = unaccounted_bytes

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
                self._births += 1
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
        now, ledger, meter, recycling = trio.current_time(), self._ledger, self._meter, self._recycling
        return EngineStatistics(
            state=self.state,
            pid=self.pid,
            live_leases=len(ledger.leases),
            waiting=ledger.waiting,
            live_sequences=len(ledger.submitted),
            kv_sequence_bytes=ledger.kv_sequence_bytes,
            kv_budget_bytes=self.ready.kv_budget_bytes if self.ready is not None else 0,
            restarts=self.restarts,
            recycles=self.recycles,
            recycle_due=recycling.reason if recycling is not None else None,
            age_s=recycling.age_s(now) if recycling is not None else 0.0,
            growth_bytes=recycling.growth_bytes if recycling is not None else 0,
            last_failure=str(self._last_failure) if self._last_failure is not None else None,
            generated_per_s_1s=meter.generated.per_second(now, 1),
            generated_per_s_60s=meter.generated.per_second(now, 60),
            prompt_per_s_60s=meter.computed.per_second(now, 60),
            ttft_ms=percentiles(meter.ttft_ms),
            itl_ms=percentiles(meter.itl_ms),
            engine=ledger.stats,
            output_tail=self._last_tail,
        )
