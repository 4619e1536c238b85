"""The draft model: a second, smaller GGUF file in the same process, which says what a sequence's next tokens may be.

Whatever it says, the text stays the target's: drafts only decide how many tokens a step verifies. It keeps KV of its
own, of those sequences only that it is asked about, and keeps it in step by itself: each call compares what a row holds
with the sequence's tokens, forgets the drafts that were wrong, and computes what is missing. Rows draft together, a
token of each in a forward, greedily. A row that is far behind (a long prompt) catches up over several calls, so that no
step waits for all of it, and drafts nothing before. Its KV is counted by the scheduler with the target's
(``Facts.kv_bytes_per_token``). Called by ``lmx.engine.llama.backend`` only; it must never change what a sequence is.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from lmx.engine.backend import Sequence, verified
from lmx.engine.budget import KVCost
from lmx.engine.llama.batch import Batches, Run
from lmx.engine.llama.native import Context, Model
from lmx.errors import ModelInvalid

# How many tokens of all rows are caught up in one call. A call is part of a step, and everybody's next token waits.
_CATCH_UP_TOKENS, _GPU_CATCH_UP_TOKENS = 64, 512


def check(draft: Model, target: Model, path: str) -> None:
    """Raises ModelInvalid where ``draft``, the file ``path``, cannot draft for ``target``."""
    if draft.recurrent:
        raise refused(path, "it keeps a recurrent state, which cannot forget a draft that was wrong")
    ours, theirs = target.vocabulary(), draft.vocabulary()
    # What one has beyond the other pads its output: Qwen2.5's of 0.5B to 151,936 tokens, of 7B to 152,064.
    shared = min(len(ours), len(theirs))
    padded = target.pads_from(shared) and draft.pads_from(shared)
    if ours[:shared] != theirs[:shared]:
        odd = next(token for token in range(shared) if ours[token] != theirs[token])
        raise refused(path, f"it has another tokenizer: its token {odd} is {theirs[odd]!r}, the model's {ours[odd]!r}")
    if not padded:
        raise refused(path, f"it has another tokenizer, of {len(theirs)} tokens, the model's has {len(ours)}")


def refused(path: str, reason: str) -> ModelInvalid:
    return ModelInvalid(
        f"{path} cannot draft for this model: {reason}. Choose another draft_model, or leave it out.",
        param="model.draft_model",
    )


@dataclass(slots=True)
class _Row:
    slot: int
    agreed: int = 0
    """It holds so many of the sequence's first tokens,"""
    guessed: list[int] = field(default_factory=list)
    """then these, which it said itself."""
    unfit: bool = False
    """It has a token that the draft model does not know, or was not finite."""


@dataclass(slots=True)
class _Asked:
    """What one call is to say of one sequence."""

    row: _Row
    sequence: Sequence
    depth: int
    computed: bool = False
    """There are tokens of it in the first batch,"""
    ready: bool = False
    """and its last one with them."""
    drafts: list[int] = field(default_factory=list)


class Drafter:
    """The draft model's KV, as much of it as the target's."""

    def __init__(
        self,
        model: Model,
        *,
        vocab_size: int,
        context_length: int,
        rows: int,
        streams: bool,
        cells: int,
        kv_bits: int,
        threads: int,
        fused: bool,
    ) -> None:
        """``vocab_size``: the target's."""
        self._catch_up = catch_up_tokens(model)
        self._context = Context(
            model,
            cells=cells,
            slots=rows,
            streams=streams,
            batch_tokens=self._catch_up + 2 * rows,
            forward_tokens=self._catch_up + rows,
            kv_bits=kv_bits,
            threads=threads,
            fused=fused,
        )
        self._batches = Batches(
            self._context,
            equal_parts=streams,
            pads=not model.window,
            slot_cells=cells // rows if streams else cells,
            on_gpu=model.on_gpu,
            free_from=lambda slot, _: 0 if slot in self._free else -1,
        )
        self._vocab_size = min(vocab_size, model.vocab_size)
        self._context_length = min(context_length, model.context_length)
        self._rows: dict[int, _Row] = {}
        self._free = set(range(rows))

    @property
    def rows(self) -> int:
        """Slots that hold something, as llama.cpp sees it."""
        return sum(self._context.last_position(slot) >= 0 for slot in range(self._context.slots))

    def free(self, sequence: Sequence) -> None:
        """Unknown sequences are ignored."""
        row = self._rows.pop(sequence.seq, None)
        if row is not None:
            self._context.forget(row.slot)
            self._free.add(row.slot)

    def draft(self, sequences: Seq[Sequence], depths: Seq[int]) -> list[list[int]]:
        """What comes next, at most so many tokens for each; [] for those that are still behind, or at its end."""
        asked = [
            _Asked(self._row(sequence), sequence, min(depth, self._context_length + 1 - len(sequence.tokens)))
            for sequence, depth in zip(sequences, depths, strict=True)
        ]
        by_slot = {each.row.slot: each for each in asked}
        runs = self._missing(asked)
        while runs:
            following = []
            for run, logits in self._batches.compute(runs):
                each, token = by_slot[run.slot], int(logits[: self._vocab_size].argmax())
                if not np.isfinite(logits[token]):
                    each.row.unfit = True
                elif each.ready and len(each.drafts) < each.depth:
                    each.drafts.append(token)
                    if len(each.drafts) < each.depth:
                        following.append(Run(run.slot, run.start + len(run.tokens), [token]))
            if any(each.row.unfit for each in asked if each.computed):
                self._start_over()
                return [[] for _ in asked]
            for run in following:
                by_slot[run.slot].row.guessed += run.tokens
            runs = following
        return [each.drafts for each in asked]

    def _missing(self, asked: Seq["_Asked"]) -> list[Run]:
        """What the rows need before they can draft, as much of it as one call computes; of those that miss least all,
        so that they draft whoever catches up beside them."""
        left = self._catch_up
        runs = []
        for each in sorted(asked, key=lambda each: len(each.sequence.tokens) - each.row.agreed):
            row, tokens = each.row, each.sequence.tokens
            piece = tokens[row.agreed : row.agreed + left]
            if row.unfit or each.depth < 1 or not piece:
                continue
            if max(piece) >= self._vocab_size:
                row.unfit, row.agreed = True, 0
                self._cut(row)
                continue
            runs.append(Run(row.slot, row.agreed, piece))
            row.agreed += len(piece)
            left -= len(piece)
            each.computed, each.ready = True, row.agreed == len(tokens)
        return runs

    def _row(self, sequence: Sequence) -> _Row:
        """Its row, which holds nothing any more but first tokens of the sequence, and not the last one of all."""
        row = self._rows.get(sequence.seq)
        if row is None:
            row = self._rows[sequence.seq] = _Row(min(self._free))
            self._free.remove(row.slot)
        held = row.agreed + len(row.guessed)
        came = sequence.tokens[row.agreed : held]
        agreed = row.agreed + verified(row.guessed[: len(came)], came)
        row.agreed, row.guessed = min(agreed, len(sequence.tokens) - 1), []
        if row.agreed < held:
            self._cut(row)
        return row

    def _cut(self, row: _Row) -> None:
        """Forget what follows the agreed tokens."""
        if not self._context.forget(row.slot, row.agreed):  # a window that moved on
            self._context.forget(row.slot)
            row.agreed = 0

    def _start_over(self) -> None:
        """After what is not finite, which no cell may hold: who gets it next would turn bad as well."""
        self._context.wipe()
        for row in self._rows.values():
            row.agreed, row.guessed = 0, []


def catch_up_tokens(model: Model) -> int:
    return _GPU_CATCH_UP_TOKENS if model.on_gpu else _CATCH_UP_TOKENS


def measure(model: Model, rows: int, kv_bits: int, threads: int) -> KVCost:
    """What a sequence's KV in the draft model costs."""
    forward_tokens = catch_up_tokens(model) + rows
    context = Context(
        model,
        cells=forward_tokens,
        slots=1,
        streams=False,
        batch_tokens=1,
        forward_tokens=1,
        kv_bits=kv_bits,
        threads=threads,
    )
    return model.measure_kv(context, forward_tokens)
