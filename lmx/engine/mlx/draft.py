"""The draft model: a second, smaller model in the engine's process, which says what a sequence's next tokens may be.

Whatever it says, the text stays the target's: drafts only decide how many tokens a step verifies (``verify``). It keeps
KV of its own, on lanes like the target's, of those sequences only that it is asked about, and keeps it in step by
itself: each call compares what a row holds with the sequence's tokens, forgets the drafts that were wrong, and computes
what is missing. Rows draft together, a token of each in a pass, greedily; the tokens stay on the device and are read
once. A row that is far behind (a long prompt) catches up over several calls, so that no step waits for all of it, and
drafts nothing before. Its KV is counted by the scheduler (``Facts.kv_bytes_per_token`` holds both models'). Called by
the MLX back end only; it must never change what a sequence is.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from lmx.engine.backend import BLOCKS_SHARE, Facts, Sequence
from lmx.engine.budget import chunk_area
from lmx.engine.mlx import adapter, device, probe, together
from lmx.engine.mlx.adapter import LoadedModel
from lmx.engine.mlx.arena import Lane
from lmx.engine.mlx.placement import Placement
from lmx.engine.mlx.probe import ProbeResult
from lmx.errors import ModelInvalid

# By device (CPU, GPU): how many tokens of all rows are caught up in one call. A call is part of a step, and everybody's
# next token waits for it.
_CATCH_UP_TOKENS = (64, 512)
# Rows that miss no more than this, the last token with it, get there in the first pass that drafts: after drafts that
# were all right a row misses two.
_FEW = 4


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A draft model that fits its target."""

    path: str
    loaded: LoadedModel
    probe: ProbeResult
    together: bool
    """Whether its lanes decode in one pass over the weights."""
    waits: bool
    """Whether a pass is waited for before the next is made: where one in flight makes the next copy what it writes
    into, or launching takes so long that this was not measured."""
    attention_bytes: float
    words: str

    @property
    def kv_bytes_per_token(self) -> int:
        return self.probe.kv_bytes_per_token


def load(path: str, target: LoadedModel, words: Path, kv_bits: int) -> DraftModel:
    """A draft model for ``target``, whose tokenizer.json is in the folder ``words``. Raises ModelInvalid where it is
    none."""
    loaded = adapter.load(Path(path))
    _check_vocabulary(path, loaded, target, words)
    write, _ = device.choose_write()
    found = probe.run(loaded, write, kv_bits=kv_bits)
    if found.path == "single":
        raise _refused(path, f"its sequences cannot share a step: {found.reason}")
    if any(kind.kind != "kv" for kind in found.kinds):
        raise _refused(path, "it keeps a recurrent state, which cannot forget a draft that was wrong")
    measured = device.measure(loaded, found.kinds, found.write)
    apart = together.check(loaded, found.kinds, found.write)
    mx.clear_cache()  # of what the probes left
    text = (
        f"{loaded.architecture}, {loaded.dtype}, {loaded.weights_bytes} bytes, {found.kv_bytes_per_token} bytes of KV "
        f"a token; {measured.words['launch']}; lanes " + (f"one by one: {apart}" if apart else "in one pass")
    )
    waits = measured.launch_share > BLOCKS_SHARE
    return DraftModel(path, loaded, found, not apart, waits, measured.attention_bytes, text)


def check_target(model: DraftModel, max_depth: int, words: str) -> None:
    """Raises ModelInvalid where the target verifies no drafts, and ``words`` says why."""
    if not max_depth:
        raise _refused(model.path, words)


def _refused(path: str, reason: str) -> ModelInvalid:
    return ModelInvalid(
        f"{path} cannot draft for this model: {reason}. Choose another draft_model, or leave it out.",
        param="model.draft_model",
    )


def _check_vocabulary(path: str, loaded: LoadedModel, target: LoadedModel, words: Path) -> None:
    """One tokenizer, or drafts are noise. Sizes may differ where that is known: heads are padded (Qwen2.5's of 0.5B to
    151,936, of 7B to 152,064)."""
    own, others = (_ids(folder) for folder in (Path(path), words))
    if own is None or others is None:
        if loaded.vocab_size != target.vocab_size:
            raise _refused(path, f"it has {loaded.vocab_size} tokens, the model {target.vocab_size}")
        return
    if own != others:
        odd = min(token for token in {*own, *others} if own.get(token) != others.get(token))
        ids = " and ".join(str(ids.get(odd, "none")) for ids in (own, others))
        raise _refused(path, f"it has another tokenizer: the token {odd!r} has the ids {ids}")
    if max(own.values()) >= loaded.vocab_size:
        raise _refused(path, f"its head has {loaded.vocab_size} tokens, its tokenizer has id {max(own.values())}")


def _ids(folder: Path) -> dict[str, int] | None:
    """The tokens of the tokenizer there, if there is one."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise ModelInvalid(f"{file} cannot be read: {error}.", param="model.draft_model") from error


@dataclass(slots=True)
class _Row:
    """What is known of a sequence's row: it holds ``agreed`` of its first tokens, then these drafts."""

    sequence: Sequence
    agreed: int = 0
    guessed: list[int] = field(default_factory=list)
    depth: int = 0
    """Drafts that are asked for."""
    unfit: bool = False
    """It has no row any more: it has a token that the draft model does not know, or was not finite."""

    @property
    def missing(self) -> int:
        """Tokens to compute before it can draft, the last one with them."""
        return len(self.sequence.tokens) - self.agreed


class Drafter:
    """The draft model's KV. What no sequence asked for is not there, and costs nothing."""

    def __init__(self, model: DraftModel, facts: Facts, free_bytes: int) -> None:
        """``facts``: of its part of the KV; ``free_bytes``: what the weights leave of the memory."""
        self._model = model
        self._vocab_size = min(model.loaded.vocab_size, facts.vocab_size)
        self._placement = Placement(model.loaded, model.probe, facts)
        self._chunk_tokens = _CATCH_UP_TOKENS[mx.default_device() == mx.gpu]
        self._chunk_area = chunk_area(model.attention_bytes, free_bytes, facts.kv_budget_bytes)
        self._few = min(_FEW, 1 + model.probe.max_depth)
        self._rows: dict[int, _Row] = {}

    def __len__(self) -> int:
        """Rows in use."""
        return len(self._placement)

    @property
    def kv_bytes_per_token(self) -> int:
        return self._model.kv_bytes_per_token

    @property
    def arena_bytes(self) -> int:
        return sum(lane.nbytes for lane in self._placement.lanes)

    def limit(self, facts: Facts) -> None:
        """Another part of the KV."""
        self._placement.facts = facts

    def free(self, sequence: Sequence) -> None:
        """Drop what is kept of the sequence, which may be unknown."""
        self._rows.pop(sequence.seq, None)
        self._placement.leave(sequence)

    def draft(self, sequences: Seq[Sequence], depths: Seq[int]) -> list[list[int]]:
        """See ``backend.Backend.draft``."""
        asked = [self._ask(sequence, depth) for sequence, depth in zip(sequences, depths, strict=True)]
        rows = [row for row in asked if row is not None]
        for row in rows:
            self._placement.make_room(self._placement[row.sequence], row.missing + row.depth - 1)
        self._placement.settle()
        ready = self._catch_up(rows)
        drafts = self._draft(ready) if ready else {}
        return [drafts.get(sequence.seq, []) for sequence in sequences]

    def _ask(self, sequence: Sequence, depth: int) -> _Row | None:
        """Its row, which holds nothing wrong any more; None: there is nothing to draft, or it cannot be."""
        most = min(self._model.loaded.context_length, self._placement.facts.context_length)
        depth = min(depth, most + 1 - len(sequence.tokens))
        if depth < 1:
            return None
        row = self._rows.get(sequence.seq)
        if row is None:
            row = self._rows[sequence.seq] = _Row(sequence)
            self._placement.enter(sequence)
        if row.unfit:
            return None
        tokens = sequence.tokens
        right = 0
        for guess, token in zip(row.guessed, tokens[row.agreed :], strict=False):
            if guess != token:
                break
            right += 1
        # The last token is always computed (again): what follows it is what is asked.
        kept = min(row.agreed + right, len(tokens) - 1)
        if kept < row.agreed + len(row.guessed):
            place = self._placement[sequence]
            left = place.lane.rewind(place.row, kept)
            assert left == kept, (left, kept)
        row.agreed, row.guessed, row.depth = kept, [], depth
        if max(tokens[kept:]) >= self._model.loaded.vocab_size:
            self._give_up(row)
            return None
        return row

    def _give_up(self, row: _Row) -> None:
        row.unfit = True
        self._placement.leave(row.sequence)

    def _catch_up(self, rows: Seq[_Row]) -> list[_Row]:
        """Compute a part of what is missing, first of those who miss least; who can draft."""
        left = self._chunk_tokens
        ready = []
        for row in sorted(rows, key=lambda row: row.missing):
            if row.missing > self._few and left:
                left -= self._prefill(row, left)
            if not row.unfit and row.missing <= self._few:
                ready.append(row)
        return ready

    def _prefill(self, row: _Row, most: int) -> int:
        """So many of its next tokens; the last one is left to ``_draft``. How many were computed."""
        place, tokens = self._placement[row.sequence], row.sequence.tokens
        if self._chunk_area:
            most = max(min(most, self._chunk_area // len(tokens)), 1)
        start, end = row.agreed, min(row.agreed + most, len(tokens) - 1)
        place.lane.prefill(place.row, tokens[start:end], last=False)
        largest = place.lane.written(place.row)
        # Waited for: what a pass in flight reads, the next one's writes would copy.
        mx.eval(largest, place.lane.arrays)
        row.agreed = end
        if np.isfinite(np.array(largest)).all():
            place.lane.seen[place.row].found(start, end)
        else:
            self._give_up(row)
        return end - start

    def _draft(self, rows: Seq[_Row]) -> dict[int, list[int]]:
        """The drafts of each; all but the last are then in its row."""
        for lane, members in self._by_lane(rows):
            self._placement.compact(lane, [self._placement[row.sequence] for row in members])
        made: list[_Drawn] = []
        for step in range(max(row.depth for row in rows)):
            parts = self._by_lane([row for row in rows if row.depth > step])
            drawn = self._pass(parts, step == 0)
            made += drawn
            results = [[one.tokens, one.largest] for one in drawn], [lane.arrays for lane, _ in parts]
            if self._model.waits:
                mx.eval(*results)
            else:
                mx.async_eval(*results)  # type: ignore[no-untyped-call]
        drafts: dict[int, list[int]] = {row.sequence.seq: [] for row in rows}
        for one in made:
            self._read(one, drafts)
        return drafts

    def _by_lane(self, rows: Seq[_Row]) -> list[tuple[Lane, list[_Row]]]:
        found = [
            (lane, [row for row in rows if self._placement[row.sequence].lane is lane])
            for lane in self._placement.lanes
        ]
        return [(lane, members) for lane, members in found if members]

    def _pass(self, parts: Seq[tuple[Lane, list[_Row]]], first: bool) -> list["_Drawn"]:
        """One more draft of each row; ``first``: after what it misses."""
        places = [[self._placement[row.sequence].row for row in rows] for _, rows in parts]
        counts = [[row.missing if first else 1 for row in rows] for _, rows in parts]
        if max(map(max, counts)) > 1:
            found = [
                lane.decode_each(at, [row.sequence.tokens[row.agreed :] for row in rows])
                for (lane, rows), at in zip(parts, places, strict=True)
            ]
        else:
            if first:
                for (lane, rows), at in zip(parts, places, strict=True):
                    lane.last_tokens[mx.array(at)] = mx.array([row.sequence.tokens[-1] for row in rows], mx.int32)
            work = [(lane, at) for (lane, _), at in zip(parts, places, strict=True)]
            if len(work) > 1 and self._model.together:
                decoded = together.decode(self._model.loaded, work)
            else:
                decoded = [lane.decode(at) for lane, at in work]
            found = [logits[mx.array(at), 0] for logits, at in zip(decoded, places, strict=True)]
        drawn = []
        for (lane, rows), at, own, logits in zip(parts, places, counts, found, strict=True):
            ends = mx.array(np.cumsum(own) - 1)
            tokens = mx.argmax(logits[ends, : self._vocab_size], axis=-1).astype(mx.int32)
            lane.last_tokens[mx.array(at)] = tokens
            drawn.append(_Drawn(rows, own, tokens, mx.max(logits, axis=-1).astype(mx.float32)))
        return drawn

    def _read(self, drawn: "_Drawn", drafts: dict[int, list[int]]) -> None:
        """Add a pass's drafts; a row that was not finite has none."""
        finite = np.isfinite(np.array(drawn.largest))
        ends = np.cumsum(drawn.counts).tolist()
        for row, count, end, token in zip(drawn.rows, drawn.counts, ends, np.array(drawn.tokens).tolist(), strict=True):
            own = drafts[row.sequence.seq]
            if row.unfit:
                continue
            if not finite[end - count : end].all():
                self._give_up(row)
                own.clear()
                continue
            place = self._placement[row.sequence]
            start = row.agreed + len(row.guessed)
            place.lane.seen[place.row].found(start, start + count)
            if own:
                row.guessed.append(own[-1])
            else:
                row.agreed = start + count
            own.append(token)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What a pass made of one lane's rows."""

    rows: list[_Row]
    counts: list[int]
    """Positions that were computed of each."""
    tokens: mx.array
    """The likeliest after the last of them, of each row."""
    largest: mx.array
    """The largest logit at each position, row by row: finite if they all are."""
