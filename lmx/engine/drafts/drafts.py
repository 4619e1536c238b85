"""All sequences' sources of drafts, and which of them is asked.

A sequence's prediction comes first, then its own text, then the draft model: the one that costs nothing and is right
for longest. One that has been wrong offers less, so that the next gets its turn. Called by ``lmx.engine.speculation``
on the loop's thread; nothing here waits but for the draft model.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from lmx.engine.backend import Backend, Facts, Sequence
from lmx.engine.drafts.lookup import Lookup
from lmx.engine.drafts.model import Model
from lmx.engine.drafts.prediction import Prediction
from lmx.engine.drafts.source import Source
from lmx.protocol import Load, Submit, unpack_tokens

FREE, MODEL = 0, 1
"""What an offer costs, in the scheduler's words: nothing, or the draft model's passes."""


class Drafts:
    def __init__(self, load: Load, facts: Facts, backend: Backend) -> None:
        self._mode = load.speculation
        self._most = facts.max_depth
        self._model = Model(backend, facts.max_depth) if facts.draft_model else None
        self._sources: dict[int, list[Source]] = {}
        self._asked: dict[int, Source | None] = {}
        """Who made each sequence's last offer; None: the draft model."""

    def enter(self, sequence: Sequence, submit: Submit) -> None:
        """Whether drafts are made for it, the request says, as far as the model's settings allow it."""
        modes = (self._mode, submit.speculation)
        if not self._most or "off" in modes:
            return
        sources: list[Source] = []
        if submit.prediction:
            sources.append(Prediction(unpack_tokens(submit.prediction), self._most))
        sources.append(Lookup(self._most))
        self._sources[sequence.seq] = sources
        if self._model and "lookup" not in modes:
            self._model.enter(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It gets no further token."""
        self._sources.pop(sequence.seq, None)
        if self._model:
            self._model.leave(sequence)
        self._asked.pop(sequence.seq, None)

    def offer(self, sequence: Sequence) -> tuple[int, int]:
        """How many tokens there are for what comes next, and what it costs to have them."""
        for source in self._sources.get(sequence.seq, ()):
            if tokens := source.offer(sequence):
                self._asked[sequence.seq] = source
                return tokens, FREE
        if self._model and (tokens := self._model.offer(sequence)):
            self._asked[sequence.seq] = None
            return tokens, MODEL
        return 0, FREE

    def wants(self, rows: Iterable[Sequence]) -> bool:
        """Whether ``catch_up`` has something to do for one of these decoding rows."""
        return self._model is not None and self._model.wants(rows)

    def catch_up(self, rows: Iterable[Sequence]) -> None:
        """Before the offers for a step of these rows, with no other one running: the draft model reads on in one that
        it is to draft for, if need be."""
        if self._model:
            self._model.catch_up(rows)

    def take(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        """So many drafts of each, or fewer, from whoever made its last offer; the draft model is asked once for all."""
        taken: list[list[int]] = []
        modelled: list[int] = []
        for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            source = self._asked.get(sequence.seq) if count else None
            taken.append(source.take(sequence, count) if source is not None else [])
            if count and source is None:
                modelled.append(index)
        if modelled and self._model:
            found = self._model.take([sequences[i] for i in modelled], [counts[i] for i in modelled])
            for index, tokens in zip(modelled, found, strict=True):
                taken[index] = tokens
        return taken

    def told(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """So many of the drafts taken last were verified, or seen to be right or wrong, and so many were right."""
        source = self._asked.get(sequence.seq)
        if source is not None:
            source.told(drafted, accepted)

    def source_of(self, sequence: Sequence) -> str:
        """Who made its last offer."""
        source = self._asked.get(sequence.seq)
        return source.name if source is not None else "model"
