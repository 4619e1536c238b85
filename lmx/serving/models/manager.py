"""Every model that the server offers: loaded when somebody asks for it, gone when its memory is needed.

``take`` gives a request a lease on a model under any of its names; the model's *slot* has one owner task, which reads
its files, waits for memory (``admission``), runs its engine, and ends with the process gone and the bytes given back.
A slot that leaves takes nobody any more: who comes then gets a new one, behind it. Run by ``lmx.serve``, used by every
API face.
"""

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import trio

from lmx.config import Settings
from lmx.config.live import Live
from lmx.errors import InvalidRequest, LmxError, ModelInvalid, ModelLoadingFailed, ModelNotFound, ModelOverloaded
from lmx.hub.backends import Wanted
from lmx.hub.conversion import ConversionNeeded
from lmx.hub.draft import check_draft
from lmx.hub.inventory import ModelFolder, find, identify
from lmx.hub.library import Entry, Library
from lmx.hub.state import State
from lmx.serving.converter import run_converter
from lmx.serving.jobs import Jobs
from lmx.serving.measure import Measured, measure
from lmx.serving.memory import Memory
from lmx.serving.metrics import Metrics
from lmx.serving.models.admission import Admission
from lmx.serving.models.demand import demand
from lmx.serving.models.names import is_embedding_placeholder, is_placeholder, spellings
from lmx.serving.models.options import LoadOptions, options_of
from lmx.serving.models.read import read_embedding, read_writer
from lmx.serving.models.served import AnyServed, Served, ServedEmbedding
from lmx.serving.models.slot import Signal, Slot
from lmx.serving.models.status import ModelStatus, Unloaded, status_of
from lmx.serving.readers import Readers

Report = Callable[[str, str], None]

NO_EMBEDDING = "This server has no model for embeddings: set [model] embedding in lmx.toml"
LAST_WORDS_S = 2.0
"""How long requests have to send the error that ends them."""
FIRST_LOOK_S = 2.0
"""How long the first of all looks at the disks may keep the server from answering. It goes on; but the default model,
named by a path, may then have another id than from the next start on."""
USES_S = 30.0
"""Between two looks at who was used, for the state's table of uses."""

logger = logging.getLogger("lmx")


class Target(NamedTuple):
    """A model that can be loaded."""

    id: str
    path: str
    """Or another name that ``lmx.hub.inventory.find`` takes."""
    kind: type[AnyServed]
    names: tuple[str, ...] = ()


class ModelLease:
    """A hold on a model: while it lasts, the model is not unloaded for others."""

    def __init__(self, slot: Slot, released: Callable[[Slot], None]) -> None:
        self.slot = slot
        self._released = released
        self._held = True
        slot.hold()

    async def served(self) -> AnyServed:
        """The model, as soon as its words are there; its engine may still be loading, and leases on it wait.

        Raises what keeps it from being served. Cancelled: the lease is still held.
        """
        slot = self.slot
        while slot.served is None and slot.error is None:
            await slot.change()
        if slot.error is not None:
            raise copy(slot.error)
        assert slot.served is not None
        return slot.served

    def release(self) -> None:
        """Give it up; a second time does nothing."""
        if self._held:
            self._held = False
            self.slot.give_back()
            self._released(self.slot)


class Models:
    """All models. ``run`` it in a nursery."""

    def __init__(self, live: Live, metrics: Metrics) -> None:
        settings = live.now
        self.draining = False
        """The server is about to stop: nothing new is taken."""
        self.presentable = trio.Event()
        """The server may listen: the default model was found, even if it must be converted first."""
        self.looked = trio.Event()
        """All disks were looked through since the start."""
        self.changes = Signal()
        """Of any model's state or leases."""
        self.state = State(settings.hub.data_path / "state.sqlite3")
        self.library = Library(settings, self.state)
        self.jobs = Jobs(lambda: live.now.hub, self.state, lambda job: self.library.nudge())
        self.memory = Memory.of_system(settings.memory)
        self.live = live
        self._metrics = metrics
        self._slots: dict[str, Slot] = {}
        """Those that take requests, by id."""
        self._leaving: set[Slot] = set()
        self._failures: dict[str, LmxError] = {}
        """Why a model that was to stay could not be loaded, until the next try."""
        self._admission = Admission(
            lambda: live.now.memory, self.memory, self._all, self.changes, self._retire, metrics
        )
        self._nursery: trio.Nursery | None = None
        self.readers = Readers(lambda: [served.source for served in self.listing() if isinstance(served, Served)])
        """Processes for large request bodies."""
        live.watch(self._follow_settings)

    @property
    def _settings(self) -> Settings:
        return self.live.now

    def _follow_settings(self, settings: Settings) -> None:
        """What those hold who do not ask each time."""
        if self.library.settings.hub != settings.hub:
            self.library.nudge()
        self.library.settings = settings
        self.memory.settings = settings.memory
        for slot in self._slots.values():
            if slot.options is not None:
                new = options_of(settings, [slot.id, *slot.names], slot.asked, jit=not slot.kept)
                applied = {name: new.applied[name] for name in ("ttl_s", "pin")}
                slot.options = replace(
                    slot.options, ttl_s=new.ttl_s, pin=new.pin, applied={**slot.options.applied, **applied}
                )
                slot.notify()
        self.changes.send()

    # --- the server's life ---------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after all models until cancelled. ``task_status`` is started when the words of the first ones are there.

        Raises ModelNotFound, ModelInvalid or ConfigError where the default model, or the one for embeddings, can never
        be served. Cancelled: no process is left when Cancelled leaves.
        """
        try:
            if not self.library.entries:  # at the very first start
                with trio.move_on_after(FIRST_LOOK_S):
                    await trio.to_thread.run_sync(self.library.scan, abandon_on_cancel=True)
            wanted = [await self._at_start(name, Served) for name in self._first()]
            if self._settings.model.embedding:
                wanted.append(await self._at_start(self._settings.model.embedding, ServedEmbedding))
        finally:
            self.presentable.set()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._watch_library)
                await nursery.start(self.jobs.run)
                nursery.start_soon(self._note_uses)
                nursery.start_soon(measure, self.memory, self.measured)
                slots = [self._begin(target, LoadOptions(), kept=True) for target in wanted]
                for slot in slots:
                    while slot.served is None and slot.error is None:
                        await slot.change()
                    if slot.error is not None and not self.draining:
                        raise slot.error
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            await self.readers.aclose()
            self.state.close()

    def _first(self) -> list[str]:
        """The models that write, to be loaded at the start."""
        return list(dict.fromkeys(filter(None, (self._settings.model.default, *self._settings.model.preload))))

    async def _at_start(self, name: str, kind: type[AnyServed]) -> Target:
        """Refuses at once what can never be served. All disks are looked through only where that takes it."""

        def look() -> Target:
            try:
                return self._checked(name, kind)
            except ModelNotFound:
                if not self.library.scan():
                    raise
                return self._checked(name, kind)

        return await trio.to_thread.run_sync(look, abandon_on_cancel=True)

    def _checked(self, name: str, kind: type[AnyServed]) -> Target:
        target = self._target(name, kind)
        backend = options_of(self._settings, [target.id, *target.names], LoadOptions(), jit=False).backend
        with suppress(ConversionNeeded):
            find(target.path, self._settings.model.cache_path, backend)
        return target

    async def _watch_library(self) -> None:
        try:
            await trio.to_thread.run_sync(self.library.scan, abandon_on_cancel=True)
        except Exception:
            logger.exception("looking for models failed; it is tried again")
        self.looked.set()
        self.changes.send()
        await self.library.watch(self.changes.send)

    async def _note_uses(self) -> None:
        """Remember when each model was last used, also beyond a restart."""
        noted: dict[str, float] = {}
        while True:
            await trio.sleep(USES_S)
            uses = {slot.id: slot.last_used for slot in self._slots.values() if slot.served is not None}
            changed = {model: at for model, at in uses.items() if noted.get(model) != at}
            if changed:
                await trio.to_thread.run_sync(self.state.note_uses, changed)
                noted |= changed

    def measured(self) -> list[Measured]:
        """Those that have a process, or had one."""
        return [
            Measured(slot.id, slot.served.engine, self._admission.fixed_bytes(slot))
            for slot in self._all()
            if slot.reserved and slot.served is not None
        ]

    def stop_loading(self) -> None:
        """Give up models whose words are not there yet, and with them those who wait for them."""
        for slot in list(self._slots.values()):
            if slot.served is None:
                self._retire(slot, 0.0, "The server is shutting down.")

    def fail_all(self, error: LmxError) -> None:
        """End every running request with ``error``."""
        for slot in self._all():
            slot.refuse(error)

    def kill(self) -> None:
        """End every engine process this instant."""
        for slot in self._all():
            if slot.served is not None:
                slot.served.engine.kill()

    # --- what there is -------------------------------------------------------------------------------

    def listing(self) -> list[AnyServed]:
        """The models that are loaded, or will be; first those of the settings."""
        return [slot.served for slot in self._slots.values() if slot.served is not None]

    def available(self) -> list[Entry]:
        """Those on the disk besides, which a request would load."""
        if not self._settings.model.jit:
            return []
        loaded = [slot.path for slot in self._all()]
        whole = (entry for entry in self.library.entries if not entry.problem)
        return [entry for entry in whole if not any(map(entry.is_called, loaded))]

    def states(self) -> dict[str, str]:
        """Each model's state that is loaded, on its way there or out, or failed to get there."""
        failed = dict.fromkeys(self._failures, "failed")
        return failed | {slot.id: slot.state for slot in (*self._leaving, *self._slots.values())}

    @property
    def ready(self) -> bool:
        """Every model that was asked for by the settings or by hand takes requests."""
        kept = [slot for slot in self._slots.values() if slot.kept]
        return not self.draining and not self._failures and all(slot.ready for slot in kept)

    def statuses(self) -> list[ModelStatus]:
        """Of all that ``states`` tells."""
        return [status_of(slot, self.memory) for slot in self._all()]

    def failure(self, model_id: str) -> LmxError | None:
        """Why a model that was to stay is not there."""
        return self._failures.get(model_id)

    def status(self, name: str) -> ModelStatus | None:
        """Of a model that is loaded or on its way; None: it is not."""
        slot = self._find(name, Served)
        return status_of(slot, self.memory) if slot is not None else None

    def look_up(self, requested: str) -> AnyServed | Entry:
        """The model that ``requested`` means, loaded or not. Raises ModelNotFound."""
        slot = self._find(requested, Served)
        if slot is not None and slot.served is not None:
            return slot.served
        return self._on_disk(requested)

    def _all(self) -> Iterator[Slot]:
        yield from list(self._slots.values())
        yield from list(self._leaving)

    # --- leases --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def use(self, requested: str | None, kind: type[AnyServed] = Served) -> AsyncIterator[AnyServed]:
        """``take``, for those who have a block to hold it in."""
        lease = await self.take(requested, kind)
        try:
            yield await lease.served()
        finally:
            lease.release()

    async def take(
        self,
        requested: str | None,
        kind: type[AnyServed] = Served,
        ttl_s: float | None = None,
        draft_model: str | None = None,
    ) -> ModelLease:
        """A lease on the model that ``requested`` means: its id, its path, an alias, or a placeholder for the default
        one; None means the default one of its kind. What is on the disk is loaded if need be, for ``ttl_s`` seconds
        without a request, and with that draft model. (One that is loaded stays as it is: no answer depends on it.)

        Raises ModelNotFound, which lists the models, InvalidRequest for a model of the other kind, and ModelOverloaded
        while the server shuts down. Cancelled: there is no lease.
        """
        await trio.lowlevel.checkpoint()
        if self._find(requested, kind) is None:
            await self.looked.wait()  # what is not there may not have been seen yet
        if self.draining:
            raise ModelOverloaded("The server is shutting down.", retry_after_s=5.0)
        slot = self._find(requested, kind)
        if slot is None:
            target = self._wanted(requested, kind)
            slot = self._begin(target, LoadOptions(ttl_s=ttl_s, draft_model=draft_model or None), kept=False)
        elif slot.kind is not kind:
            raise self._of_other_kind(slot.id, kind)
        elif ttl_s is not None and not slot.kept:
            slot.take_over(LoadOptions(ttl_s=ttl_s))
        return ModelLease(slot, self._given_back)

    def peek(self, requested: str | None, kind: type[AnyServed]) -> AnyServed | None:
        """The model that ``requested`` means, if its words are there."""
        slot = self._find(requested, kind)
        return slot.served if slot is not None and slot.kind is kind else None

    def _given_back(self, slot: Slot) -> None:
        if not slot.leases and not slot.kept and slot.load_s == 0.0 and not slot.leaving:
            self._retire(slot, 0.0, "nobody waits for it any more")

    def _find(self, requested: str | None, kind: type[AnyServed]) -> Slot | None:
        """Among those that are loaded or on their way; of two rather one of ``kind``."""
        settings = self._settings.model
        default = settings.default if kind is Served else settings.embedding
        is_default = is_placeholder if kind is Served else is_embedding_placeholder
        for name in spellings(settings, default if requested is None else requested):
            found = [slot for slot in self._slots.values() if slot.is_called(name)]
            if not found and is_default(settings, name):
                found = self._defaults(default, kind)
            if found:
                return next((slot for slot in found if slot.kind is kind), found[0])
        return None

    def _defaults(self, default: str, kind: type[AnyServed]) -> list[Slot]:
        named = [slot for slot in self._slots.values() if slot.is_called(default)]
        same = [slot for slot in self._slots.values() if slot.kind is kind]
        return [slot for slot in named if slot.kind is kind] or (same if kind is ServedEmbedding else [])

    def _wanted(self, requested: str | None, kind: type[AnyServed]) -> Target:
        """What to load for it. Raises as ``take`` does."""
        settings = self._settings.model
        default = settings.default if kind is Served else settings.embedding
        is_default = is_placeholder if kind is Served else is_embedding_placeholder
        names = spellings(settings, default if requested is None else requested)
        if any(name == default or is_default(settings, name) for name in names) or not requested:
            if not default:
                raise ModelNotFound(
                    NO_EMBEDDING
                    if kind is ServedEmbedding
                    else "This server has no default model: name one, or set "
                    f"[model] default in lmx.toml. There are: {self._known()}.",
                    param="model",
                )
            return self._target(default, kind)
        if not settings.jit:
            raise self._unknown(requested)
        entry = self._on_disk(requested)
        if (entry.kind == "embeddings") is not (kind is ServedEmbedding):
            raise self._of_other_kind(entry.id, kind)
        return self._target(entry.id, kind)

    def _on_disk(self, requested: str) -> Entry:
        invalid: ModelInvalid | None = None
        for name in spellings(self._settings.model, requested):
            try:
                return self.library.find(name)
            except ModelNotFound:
                continue
            except ModelInvalid as error:
                invalid = error
        raise invalid or self._unknown(requested)

    def _unknown(self, requested: str) -> ModelNotFound:
        return ModelNotFound(
            f"The model {requested[:200]!r} does not exist. There are: {self._known()}.", param="model"
        )

    def _known(self) -> str:
        names = [slot.id for slot in self._slots.values()] + [entry.id for entry in self.available()]
        return ", ".join(dict.fromkeys(names)) or "none"

    def _of_other_kind(self, model_id: str, kind: type[AnyServed]) -> InvalidRequest:
        others = [slot.id for slot in self._slots.values() if slot.kind is kind]
        listed = ", ".join(map(repr, others))
        if kind is Served:
            text = (
                f"The model {model_id!r} makes embeddings and does not write text. Ask it at /v1/embeddings, or ask "
                f"{listed or 'another one'} here."
            )
        else:
            there = f"Ask {listed} for that" if others else NO_EMBEDDING
            text = f"The model {model_id!r} writes text and makes no embeddings. {there}."
        return InvalidRequest(text, param="model")

    # --- loading and unloading -----------------------------------------------------------------------

    async def load(self, name: str, options: LoadOptions, report: Report = lambda state, message: None) -> ModelStatus:
        """Load a model, or change how it is loaded; returns when it takes requests. ``report`` hears of each state.

        Raises ModelNotFound, ModelInvalid, InsufficientMemory with the numbers, or ModelLoadingFailed. Cancelled: the
        load goes on only if somebody else waits for it.
        """
        lease = ModelLease(await self.begin_load(name, options, kept=False), self._given_back)
        slot = lease.slot
        try:
            told = ("", "")
            while True:
                if slot.error is not None:
                    raise copy(slot.error)
                if (slot.state, slot.message) != told:
                    told = (slot.state, slot.message)
                    report(*told)
                if slot.state == "ready":
                    slot.kept = True
                    return status_of(slot, self.memory)
                if slot.state == "failed":
                    assert slot.served is not None
                    failure = slot.served.engine.statistics().last_failure
                    raise ModelLoadingFailed(f"The model {slot.id!r} cannot be loaded: {failure}.")
                await slot.change()
        finally:
            lease.release()

    async def begin_load(self, name: str, options: LoadOptions, *, kept: bool = True) -> Slot:
        """As ``load``, but returns at once; ``kept``: the load goes on whether anybody waits or not."""
        if self._find(name, Served) is None or options.draft_model:
            await self.looked.wait()
        if options.draft_model:
            await trio.to_thread.run_sync(self._draft_path, options.draft_model, abandon_on_cancel=True)
        if self.draining:
            raise ModelOverloaded("The server is shutting down.", retry_after_s=5.0)
        slot = self._find(name, Served)
        if slot is None:
            target = await trio.to_thread.run_sync(self._named, name, abandon_on_cancel=True)
            slot = self._slots.get(target.id)
            if slot is None:
                return self._begin(target, options, kept=kept)
        if slot.options is not None and slot.reloads_for(options):
            self._retire(slot, self._settings.memory.drain_s, "it is loaded anew with other settings")
            target = Target(slot.id, slot.path, slot.kind, slot.names)
            return self._begin(target, options.over(slot.asked), kept=kept or slot.kept)
        slot.take_over(options)
        slot.kept = slot.kept or kept
        return slot

    def _named(self, name: str) -> Target:
        """What an operator may name: any model on this machine, by path too. Blocking."""
        try:
            entry = self._on_disk(name)
        except ModelNotFound:
            if not os.path.exists(os.path.expanduser(name)):  # pathlib raises on names that cannot be paths
                raise
            return self._target(name, Served)
        return self._target(entry.id, ServedEmbedding if entry.kind == "embeddings" else Served)

    async def unload(self, name: str, drain_s: float | None = None) -> Unloaded:
        """Unload a model: its requests have ``drain_s`` seconds, then end with an error; returns when its process is
        gone. Cancelled: it is unloaded all the same.

        Raises ModelNotFound when it is not loaded.
        """
        slot = self._find(name, Served) or next((slot for slot in self._leaving if slot.is_called(name)), None)
        if slot is None and self._failures.pop(name, None) is not None:
            return Unloaded(name, 0, 0.0)
        if slot is None:
            raise self._not_loaded(name)
        began, held = trio.current_time(), self.memory.held(slot.id).measured_bytes
        self._retire(slot, self._settings.memory.drain_s if drain_s is None else drain_s, "it is unloaded by hand")
        await slot.gone.wait()
        return Unloaded(slot.id, held, trio.current_time() - began)

    def in_memory(self, name: str) -> AnyServed:
        """The model of that name, loaded or about to be. Raises ModelNotFound when it is not."""
        slot = self._find(name, Served)
        if slot is None or slot.served is None:
            raise self._not_loaded(name)
        return slot.served

    def _not_loaded(self, name: str) -> ModelNotFound:
        loaded = ", ".join(slot.id for slot in self._slots.values()) or "none"
        return ModelNotFound(f"The model {name[:200]!r} is not loaded; loaded are: {loaded}.", param="model")

    def _target(self, name: str, kind: type[AnyServed]) -> Target:
        try:
            entry = self.library.find(name)
        except (ModelNotFound, ModelInvalid):
            return Target(identify(name), name, kind, (name,))
        return Target(entry.id, entry.loadable, kind, (*entry.aliases, str(entry.path), name))

    def _begin(self, target: Target, asked: LoadOptions, *, kept: bool) -> Slot:
        """A slot for the model, and its owner."""
        assert self._nursery is not None
        model_id = target.id
        if model_id in self._slots:  # a model that writes, and makes vectors besides
            model_id += "-embedding"
        before = tuple(slot for slot in self._leaving if slot.id == model_id)
        slot = Slot(
            model_id, target.path, target.kind, asked, self.changes, kept=kept, names=target.names, before=before
        )
        self._slots[model_id] = slot
        self._failures.pop(model_id, None)
        self._nursery.start_soon(self._own, slot)
        return slot

    async def _own(self, slot: Slot) -> None:
        """A slot's whole life. Whatever happens in it, nothing of it is left, and no other model notices."""
        try:
            with slot.scope:
                await self._serve(slot)
        except LmxError as error:
            if slot.kept:
                self._failures[slot.id] = error
            logger.error("model %s: %s", slot.id, error.message)
            self._count(slot, "failed")
            slot.refuse(error)
        except Exception as error:
            logger.exception("model %s", slot.id)
            self._count(slot, "failed")
            slot.refuse(ModelLoadingFailed(f"The model {slot.id!r} cannot be served: {error!r}. The log says more."))
        finally:
            self._count(slot, "cancelled")
            slot.refuse(ModelOverloaded(f"The model {slot.id!r} was stopped.", retry_after_s=5.0))
            self._admission.give_back(slot)
            self._leaving.discard(slot)
            if self._slots.get(slot.id) is slot:
                del self._slots[slot.id]
            slot.gone.set()
            slot.notify()

    def _count(self, slot: Slot, outcome: str) -> None:
        """How a load ended; the first word holds."""
        if not slot.outcome:
            slot.outcome = outcome
            self._metrics.loads.labels(slot.id, outcome).inc()

    async def _serve(self, slot: Slot) -> None:
        for earlier in slot.before:
            await earlier.gone.wait()
        slot.before = ()
        options = options_of(self._settings, [slot.id, *slot.names], slot.asked, jit=not slot.kept)
        slot.options = options
        slot.enter("reading")
        folder = await self._folder(slot, slot.path, options.backend)
        draft = await self._draft(slot, folder, options.draft_model) if options.draft_model else None
        reckon = partial(demand, folder, options, self._settings, embeds=slot.kind is ServedEmbedding, draft=draft)
        slot.demand = await trio.to_thread.run_sync(reckon, abandon_on_cancel=True)
        self._admission.check(slot)
        read = partial(read_writer, draft=draft) if slot.kind is Served else read_embedding
        slot.serve(
            await trio.to_thread.run_sync(
                read, slot.id, folder, options, self.live, self._metrics, abandon_on_cancel=True
            )
        )
        assert slot.served is not None
        engine = slot.served.engine
        await self._admission.admit(slot)
        engine.grant(slot.kv_bytes, slot.wired_bytes)
        slot.enter("running")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run)
            nursery.start_soon(self._follow, slot)
            await self._until_expired(slot)

    def _draft_path(self, name: str) -> str:
        """Where a draft model is. Blocking. Raises ModelNotFound, ModelInvalid."""
        try:
            return self._target(self._on_disk(name).id, Served).path
        except ModelNotFound as error:
            if os.path.exists(os.path.expanduser(name)):
                return name
            raise ModelNotFound(f"draft_model: {error.message}", param="draft_model") from None

    async def _draft(self, slot: Slot, folder: ModelFolder, name: str) -> ModelFolder:
        """Of the draft model, which the same engine runs. Raises ModelNotFound, ModelInvalid."""
        path = await trio.to_thread.run_sync(self._draft_path, name, abandon_on_cancel=True)
        draft = await self._folder(slot, path, folder.backend)
        await trio.to_thread.run_sync(check_draft, folder, draft, abandon_on_cancel=True)
        return draft

    async def _folder(self, slot: Slot, path: str, backend: Wanted) -> ModelFolder:
        made: set[Path] = set()
        look = partial(find, path, self._settings.model.cache_path, backend)
        while True:
            try:
                # Abandoned: what a thread reads harms nobody.
                return await trio.to_thread.run_sync(look, abandon_on_cancel=True)
            except ConversionNeeded as needed:
                conversion = needed.conversion
            conversion.refuse_if_made(made)
            slot.enter("converting", f"making the {conversion.what} of {conversion.source}, once: {conversion.folder}")
            await run_converter(conversion)

    async def _follow(self, slot: Slot) -> None:
        """Tell of the engine's states, and count what it really has."""
        assert slot.served is not None
        engine, began = slot.served.engine, trio.current_time()
        while True:
            if engine.state == "ready" and engine.ready is not None and not slot.load_s:
                slot.load_s = trio.current_time() - began
                self._count(slot, "ready")
                self._metrics.load.labels(slot.id).observe(slot.load_s)
                self._admission.settle(slot)
            elif engine.state == "failed":
                self._count(slot, "failed")
            slot.notify()
            await engine.change()

    async def _until_expired(self, slot: Slot) -> None:
        while trio.current_time() < slot.expires_at:
            with trio.move_on_at(slot.expires_at):
                await slot.change()
        assert slot.options is not None
        self._retire(slot, 0.0, f"it was not used for {slot.options.ttl_s:g} s")

    def _retire(self, slot: Slot, drain_s: float, why: str) -> None:
        """Take it out of service: nobody gets it any more, and when its requests have ended it goes."""
        assert self._nursery is not None
        if slot.leaving:
            slot.drain.deadline = min(slot.drain.deadline, trio.current_time() + drain_s)
            return
        if self._slots.get(slot.id) is slot:
            del self._slots[slot.id]
        self._leaving.add(slot)
        slot.drain.deadline = trio.current_time() + drain_s
        slot.enter("draining" if slot.leases and slot.load_s else "unloading", why)
        self._nursery.start_soon(self._end, slot, why)

    async def _end(self, slot: Slot, why: str) -> None:
        if slot.state == "draining":
            with slot.drain:
                while slot.leases:
                    await slot.change()
            slot.enter("unloading", why)
        slot.refuse(ModelOverloaded(f"The model {slot.id!r} is being unloaded: {why}.", retry_after_s=5.0))
        with trio.move_on_after(LAST_WORDS_S):
            while slot.leases:
                await slot.change()
        slot.scope.cancel()
