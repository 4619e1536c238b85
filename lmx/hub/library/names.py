"""What models are called, and which one a name means. Pure: over what was found, nothing is read.

An id is where the model lies; ``assemble`` makes ids unique and gives out the other names that can mean one model only.
"""

import difflib
import heapq
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lmx.errors import ModelInvalid, ModelNotFound
from lmx.hub.gguf.parts import quantization_of
from lmx.hub.inventory import EMBEDDED_ID
from lmx.hub.library.entry import Entry
from lmx.hub.library.facts import Facts
from lmx.hub.library.places import Found, harmless

_HUBS = ("https://huggingface.co/", "huggingface.co/", "https://hf.co/", "hf.co/", "hf://")
_FORMATS = re.compile(r"-(?:GGUF|MLX)$", re.IGNORECASE)
_LATEST = ":latest"
"""Ollama's word for whichever is preferred."""
_MOST_NAME, _MOST_WORD = 1000, 100
_LIKELY = 20
"""So many names are looked at closely for one that was misspelt."""


def assemble(
    models: Iterable[tuple[Found, Facts]], quantizations: Sequence[str], called: Mapping[Path, str]
) -> tuple[Entry, ...]:
    """An entry for each, in the order in which they came; of the same id the first has it as it is. ``quantizations``:
    in the order preferred. ``called``: how the settings call paths."""
    there = [(found, facts) for found, facts in models if facts.is_model]
    groups: dict[tuple[Path, str], list[int]] = defaultdict(list)
    for number, (found, _) in enumerate(there):
        groups[found.place, found.repository].append(number)
    names: dict[int, list[str]] = {}
    for numbers in groups.values():
        _name_group(there, numbers, quantizations, names)

    ids: list[str] = []
    taken: set[str] = set()
    for number, (found, _) in enumerate(there):
        wanted = names[number][0]
        model_id, count = wanted, 1
        while model_id in taken:
            model_id = f"{wanted}@{found.source}" + (f"-{count}" if count > 1 else "")
            count += 1
        taken.add(model_id)
        ids.append(model_id)
        names[number][:0] = [called[found.path]] if found.path in called else []

    aliases = _share_out(ids, [names[number] for number in range(len(there))])
    return tuple(
        Entry(
            id=model_id,
            aliases=also,
            path=found.path,
            source=found.source,
            format=facts.format,
            kind=facts.kind,
            architecture=harmless(facts.architecture)[:_MOST_WORD],
            quantization=harmless(facts.quantization)[:_MOST_WORD],
            parameters=facts.parameters,
            size_bytes=found.size_bytes,
            context_length=facts.context_length,
            capabilities=facts.capabilities,
            modified=found.modified,
            problem=harmless(facts.problem),
        )
        for model_id, also, (found, facts) in zip(ids, aliases, there, strict=True)
    )


def _name_group(
    there: Sequence[tuple[Found, Facts]],
    numbers: Sequence[int],
    quantizations: Sequence[str],
    names: dict[int, list[str]],
) -> None:
    """Of the models of one repository: the id that each should have, then its other names."""
    several = len(numbers) > 1
    words = {number: _word(there[number]) for number in numbers}
    counts = Counter(words.values())
    first = min(numbers, key=lambda number: _rank(*there[number], quantizations))
    for number in numbers:
        found = there[number][0]
        repository = found.repository
        if found.source == "embedded":
            names[number] = [EMBEDDED_ID, repository]
            continue
        word = words[number] if counts[words[number]] == 1 else found.file
        tagged = f"{repository}:{word}" if word else repository
        own = [tagged if several else repository, tagged]
        own += [repository] if number == first else []
        short = [name.rpartition("/")[2] for name in own]
        shorter = [f"{_FORMATS.sub('', name)}{colon}{tag}" for name, colon, tag in (n.partition(":") for n in short)]
        names[number] = list(dict.fromkeys(filter(None, (*own, *short, *shorter, found.file, *found.names))))


def _word(model: tuple[Found, Facts]) -> str:
    found, facts = model
    return (quantization_of(found.file) or facts.quantization or found.file) if found.file else ""


def _rank(found: Found, facts: Facts, quantizations: Sequence[str]) -> tuple[object, ...]:
    """Smaller is better: for whoever names the repository alone."""
    preferred = [word.upper() for word in quantizations]
    word = _word((found, facts)).upper().removeprefix("UD-")
    place = preferred.index(word) if word in preferred else len(preferred)
    return bool(facts.problem), found.is_gguf, place, found.size_bytes, os.fsencode(found.path)


def _share_out(ids: Sequence[str], wanted: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Each one's other names: those that only models of the same id before "@" want; the first of these has it."""
    bases = [model_id.rpartition("@")[0] or model_id for model_id in ids]
    known = {_key(model_id) for model_id in ids}
    owners: dict[str, list[int]] = defaultdict(list)
    for number, names in enumerate(wanted):
        for name in {_key(name) for name in names} - known:
            owners[name].append(number)
    own = {name: numbers[0] for name, numbers in owners.items() if len({bases[number] for number in numbers}) == 1}
    shared = []
    for number, names in enumerate(wanted):
        mine = {_key(name): name for name in reversed(names) if own.get(_key(name)) == number}
        shared.append(tuple(name for name in dict.fromkeys(names) if mine.get(_key(name)) == name))
    return shared


class Names:
    """Which entry a name means."""

    def __init__(self, entries: Sequence[Entry], twins: Mapping[Path, Path]) -> None:
        """``twins``: other paths of entries' paths."""
        self._exact = {name: entry for entry in reversed(entries) for name in (*entry.aliases, entry.id)}
        self._exact |= {entry.id: entry for entry in entries}
        self._any_case: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            for name in {_key(name) for name in (entry.id, *entry.aliases)}:
                self._any_case[name].append(entry)
        self._grams = {name: _grams(name) for name in self._any_case}
        paths = {entry.path: entry for entry in entries}
        self._paths = {str(path): entry for path, entry in paths.items()}
        self._paths |= {str(path): paths[first] for path, first in twins.items() if first in paths}

    def find(self, name: str) -> Entry:
        """Raises ModelNotFound, which lists near names, or ModelInvalid with the reason."""
        entry = self.look_up(name)
        if entry.problem:
            raise ModelInvalid(entry.problem, param="model")
        return entry

    def look_up(self, name: str) -> Entry:
        """Also a broken one. Raises ModelNotFound."""
        if "\0" in name or len(name) > _MOST_NAME:
            raise ModelNotFound(f"No model is called {name[:100]!r}: it has NULs, or is too long.", param="model")
        spellings = [name, name.removesuffix(_LATEST)]
        spellings += [spelt.removeprefix(hub) for spelt in spellings for hub in _HUBS if spelt.startswith(hub)]
        for spelt in spellings:
            if (entry := self._exact.get(spelt)) is not None:
                return entry
            found = self._any_case.get(_key(spelt), [])
            if len(found) == 1:
                return found[0]
            if found:
                raise ModelNotFound(
                    f"{name!r} may mean {' or '.join(entry.id for entry in found)}: write one as it stands here.",
                    param="model",
                )
        if ".." in re.split(r"[/\\]", name):
            raise ModelNotFound(f"No model is called {name!r}: names have no .. in them.", param="model")
        if name.startswith(("/", "~")) and (entry := self._paths.get(_absolute(name))) is not None:
            return entry
        raise ModelNotFound(f"There is no model {name[:200]!r} on this machine.{self._near(name)}", param="model")

    def _near(self, name: str) -> str:
        wanted = _key(name[:200])
        grams = _grams(wanted)
        # difflib takes 0.1 ms for each, and the event loop asks.
        likely = heapq.nlargest(_LIKELY, self._grams, key=lambda known: len(grams & self._grams[known]))
        near = difflib.get_close_matches(wanted, likely, 3, cutoff=0.5)
        if near:
            return f" Did you mean {' or '.join(dict.fromkeys(self._any_case[known][0].id for known in near))}?"
        some = sorted({entry.id for entry in self._exact.values()})
        return f" There are: {', '.join(some[:10])}{', ...' if len(some) > 10 else ''}." if some else " There is none."


def _key(name: str) -> str:
    """The same for all spellings: file systems differ in how they write an ü."""
    return unicodedata.normalize("NFC", name).casefold()


def _grams(name: str) -> set[str]:
    return {name[start : start + 3] for start in range(len(name) - 2)}


def _absolute(name: str) -> str:
    return os.path.abspath(os.path.expanduser(name))
