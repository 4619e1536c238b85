"""What the deaths of an engine tell of the requests that ran in it: who is suspected, who is refused.

A request is known by its content, so that a client's retry is the same request. At a death everybody whose forward ran
is suspected. A suspect that comes again (or never left: nothing of its answer was out) runs alone until it is past the
point at which the engine died; if the engine then dies again, the request is proven to be the cause and refused, and
those who were suspected with it are cleared. Pure; owned by one ``lmx.serving.ledger.Ledger``.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from lmx.protocol import pack_tokens
from lmx.serving.lease import AnyRequest, EmbedRequest

MEMORY_S = 3600.0
KILLED_MEMORY_S = 120.0
"""For an engine that was killed from outside: by the kernel for want of memory, or by a person, who proves nothing."""
MANY_DEATHS = 3
"""Who was there so often, and oftener than anybody else who was there the last time, is the cause."""
MOST = 4096


def content_key(request: AnyRequest) -> bytes:
    """Equal for requests that ask for the same: the seed aside, which we draw anew for each retry."""
    if isinstance(request, EmbedRequest):
        lengths = pack_tokens([len(tokens) for tokens in request.inputs])
        return hashlib.sha256(
            lengths + b"".join(map(pack_tokens, request.inputs)) + repr(request.seconds).encode()
        ).digest()
    sampling = replace(request.sampling, seed=0)
    rest = replace(request, prompt=(), sampling=sampling, client="", priority=0, deadline_s=None, request_id="")
    rest = replace(rest, parent=-1, salt="", session="", speculation="auto", prediction=())
    return hashlib.sha256(pack_tokens(request.prompt) + repr(rest).encode()).digest()


def _size(request: AnyRequest) -> tuple[int, int]:
    if isinstance(request, EmbedRequest):
        return sum(map(len, request.inputs)), -len(request.inputs)
    return len(request.prompt), request.max_tokens


@dataclass(slots=True)
class _Entry:
    death: int
    """Number of the death that it was suspected of last."""
    tokens: int
    """It must run alone until it has so many tokens."""
    until: float
    deaths: int = 1
    refusal: str = ""
    """Why it is refused; empty while it is only suspected."""


class Suspects:
    def __init__(self) -> None:
        self._entries: dict[bytes, _Entry] = {}
        self._sizes: set[tuple[int, int]] = set()
        """Of those in ``_entries`` (and of some that were): a long prompt's key takes milliseconds, and most requests
        are of no suspect's size."""
        self._deaths = 0

    def tokens_alone(self, request: AnyRequest, now: float) -> int:
        """How many tokens ``request`` must get alone before others join it; 0: nothing is known against it."""
        entry = self._find(request, now)
        return entry.tokens if entry is not None else 0

    def refusal(self, request: AnyRequest, now: float) -> str:
        """Why ``request`` must not run again; empty: it may."""
        entry = self._find(request, now)
        return entry.refusal if entry is not None else ""

    def _find(self, request: AnyRequest, now: float) -> _Entry | None:
        if _size(request) not in self._sizes:
            return None
        key = content_key(request)
        entry = self._entries.get(key)
        if entry is not None and entry.until <= now:
            del self._entries[key]
            return None
        return entry

    def accuse(
        self, running: Collection[tuple[AnyRequest, int]], now: float, *, killed: bool, probe: bool
    ) -> bytes | None:
        """The engine died with these requests running, each with the tokens it had drawn. ``probe``: it is one that ran
        alone for suspicion.

        Returns the content that is proven to be the cause: the only one, suspected before; or one that was there at
        every one of many deaths.
        """
        self._deaths += 1
        # A kill says nothing of those who decoded.
        accused = [(request, drawn) for request, drawn in running if not killed or probe or drawn == 0]
        drawn_tokens = {content_key(request): drawn for request, drawn in accused}
        self._sizes.update(_size(request) for request, _ in accused)
        before = {key: self._known(key, now) for key in drawn_tokens}
        guilty = self._guilty(before, certain=probe or not killed)
        if guilty is not None:
            last = self._entries[guilty].death
            self._entries = {key: e for key, e in self._entries.items() if e.death != last or e.refusal}
            return guilty
        memory_s = KILLED_MEMORY_S if killed else MEMORY_S
        for key, drawn in drawn_tokens.items():
            self._remember(key, _Entry(self._deaths, drawn + 1, now + memory_s, before[key] + 1))
        return None

    def _guilty(self, before: Mapping[bytes, int], *, certain: bool) -> bytes | None:
        if not before or not certain:
            return None
        first, *others = sorted(before, key=lambda key: -before[key])
        if not others:
            return first if before[first] else None
        return first if before[first] + 1 >= MANY_DEATHS and before[first] > before[others[0]] else None

    def _known(self, key: bytes, now: float) -> int:
        """How many deaths it was suspected of."""
        entry = self._entries.get(key)
        return entry.deaths if entry is not None and entry.until > now else 0

    def refuse(self, key: bytes, why: str, now: float, *, killed: bool) -> None:
        """From now on ``refusal`` answers for requests of this content."""
        memory_s = KILLED_MEMORY_S if killed else MEMORY_S
        self._remember(key, _Entry(self._deaths, 1, now + memory_s, refusal=why))

    def _remember(self, key: bytes, entry: _Entry) -> None:
        self._entries.pop(key, None)
        self._entries[key] = entry
        if len(self._entries) > MOST:
            self._entries.clear()
            self._sizes.clear()

    def clear(self, request: AnyRequest) -> None:
        """It is past the point at which an engine died with it."""
        self._entries.pop(content_key(request), None)
