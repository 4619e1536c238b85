"""All sequences' sources of drafts, and which of them is asked.

A sequence's prediction comes first, then its own text, then the draft model: the one that costs nothing and is right
for longest. One that has been wrong offers less, so that the next gets its turn. Called by ``lmx.engine.speculation``
on the loop's thread; nothing here waits but for the draft model.
"""

from collections.abc import Sequence as Seq

from lmx.engine.backend import Backend, Facts, Sequence
from lmx.engine.drafts.lookup import Lookup
from lmx.engine.drafts.prediction import Prediction
from lmx.engine.drafts.source import Source
from lmx.protocol import Load, Submit, unpack_tokens

FREE, MODEL = 0, 1
"""What an offer costs, in the scheduler's words: nothing, or the draft model's passes."""


class Drafts:
    def __init__(self, load: Load, facts: Facts, backend: Backend) -> None:
        self._mode = load.speculation
        self._most = facts.max_depth
        self._backend = backend
        self._has_model = bool(facts.draft_model)
        self._sources: dict[int, list[Source]] = {}
        self._modelled: set[int] = set()
        """Sequences that the draft model may be asked for."""
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
        if self._has_model and "lookup" not in modes:
            self._modelled.add(sequence.seq)

    def leave(self, sequence: Sequence) -> None:
        """It gets no further token."""
        self._sources.pop(sequence.seq, None)
        self._modelled.discard(sequence.seq)
        self._asked.pop(sequence.seq, None)

    def offer(self, sequence: Sequence) -> tuple[int, int]:
        """How many tokens there are for what comes next, and what it costs to have them."""
        for source in self._sources.get(sequence.seq, ()):
            if tokens := source.offer(sequence):
                self._asked[sequence.seq] = source
                return tokens, FREE
        if sequence.seq in self._modelled:
            self._asked[sequence.seq] = None
            return self._most, MODEL
        return 0, FREE

    def take(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        """So many drafts of each, or fewer, from whoever made its last offer; the draft model is asked once for all."""
        taken: list[list[int]] = []
        modelled: list[int] = []
        for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            source = self._asked.get(sequence.seq) if count else None
            taken.append(source.take(sequence, count) if source is not None else [])
            if count and source is None:
                modelled.append(index)
        if modelled:
            found = self._backend.draft([sequences[i] for i in modelled], [counts[i] for i in modelled])
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
