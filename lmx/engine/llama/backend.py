"""The llama.cpp back end: a planned step becomes one batch, its logits are drawn from in NumPy (DESIGN §7).

A sequence is a slot, llama.cpp's sequence id, with cells of its own where memory allows (streams), otherwise among
cells that all share (unified). Decoding rows and prefill chunks go through one batch together. The KV buffer is made
whole at load, so freeing gives cells back to other sequences and not memory to the system. Between two steps no cell
holds a non-finite value. Decides nothing; called by the step loop only, on its one thread.
"""

import os
import platform
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import psutil

from lmx.engine.backend import Block, Chunk, Draw, Facts, MemoryFacts, Scores, Sequence
from lmx.engine.budget import QUANTUM_TOKENS, KVCost, fit_context
from lmx.engine.grammar import Masker, Masks
from lmx.engine.llama import draft, verify
from lmx.engine.llama.batch import Batches, Run
from lmx.engine.llama.copies import Copies, LlamaBlock
from lmx.engine.llama.draft import Drafter
from lmx.engine.llama.native import AMX, MAX_SLOTS, Context, Model
from lmx.engine.llama.parked import Parked
from lmx.engine.llama.verify import MAX_DEPTH, RowDraws, Unread
from lmx.engine.sampling import SamplingBatch, as_logprobs, penalised, score
from lmx.errors import ModelInvalid
from lmx.protocol import Load, Logprobs

# The KV buffer is allocated and zeroed at load. Without a setting it holds the whole context for every row, if that
# takes no more than the first share of the free memory; otherwise the whole context once, or this many tokens for every
# row, and no more than the second.
_STREAMS_MEMORY_SHARE = 0.25
_DEFAULT_ROW_TOKENS = 1024
_KV_MEMORY_SHARE = 0.5
# A second thread is not worth its barriers in a smaller model, and hurts where the cores are busy.
_SMALL_BYTES = 32 * 1024 * 1024
_CHUNK_TOKENS = 512  # llama.cpp's own default for one forward
# With rows in cells of their own, a CPU computes the products of attention faster one by one than in llama.cpp's fused
# kernel: four rows of 1,050 tokens of SmolLM2 decode in 41 instead of 78 ms, a chunk of 45 tokens takes 170 instead of
# 610, one of 137 the same, one of 262 a tenth more. But all scores are kept for a moment: no more than so many bytes.
_SCORES_BYTES = 512 * 1024**2
_WAVE_TOKENS = 2048  # what prompts that start together may bring in a step
# A parked row that would lose so many tokens to a sequence that shares only its beginning is copied, if there is room.
_KEPT_TOKENS = 256
# Attention passes over all shared cells in use: a parked token costs each token of others 0.5 us on SmolLM2, and to
# restore it from a copy 10.
_SHARED_KEPT_TOKENS = 20
# A further forward reads the weights once a step. Moving a row reads and writes it twice, once; a token of no use in a
# parked row reads that, on CPUs far more slowly than weights (1,500 tokens of SmolLM2 take 36 ms, a forward 11).
_MOVED_SHARE = 1.0
_FILLED_SHARE = 1 / 32


@dataclass(slots=True)
class _Row:
    """A sequence's place in the KV, and what its draws need."""

    sequence: Sequence
    slot: int
    counts: list[npt.NDArray[np.int32]] | None
    """Two of (1, V): how often a token stands in prompt and answer, and in the answer; for rows with penalties."""
    sampling: SamplingBatch | None = None
    """Made at the first draw."""
    tokens: list[int] = field(default_factory=list)
    """Those whose KV is computed."""
    next_token: int = -1
    """Drawn, and to be decoded next."""
    bad: bool = False
    """It failed; nothing is computed for it any more."""

    def samples(self, vocab_size: int) -> SamplingBatch:
        self.sampling = self.sampling or SamplingBatch(np, [self.sequence.sampling], vocab_size)
        return self.sampling


@dataclass(frozen=True, slots=True)
class _Part:
    """What a step adds to one row."""

    row: _Row
    tokens: Seq[int]
    draws: bool
    scored: bool = False
    """Log-probabilities of the tokens after these are wanted."""
    drafts: Seq[int] = ()
    """The last of the tokens, which may be what it draws before."""
    masks: Masks | None = None
    """Of each draw."""


class LlamaLaunch:
    """A step; started means done: llama.cpp returns when it has computed, and the draws need the logits on the host."""

    def __init__(self, compute: Callable[[dict[int, Scores]], list[Draw]]) -> None:
        self._compute = compute
        self._scores: dict[int, Scores] = {}
        self._draws: list[Draw] | None = None

    def scores(self) -> list[Scores]:
        return list(self._scores.values())

    def start(self) -> None:
        self._draws = self._compute(self._scores)

    def draw(self) -> None:
        """Done: there is no lookahead, so the tokens of the step before were known."""

    def wait(self) -> list[Draw]:
        if self._draws is None:
            self.start()
        assert self._draws is not None
        return self._draws


class LlamaBackend:
    """One loaded model and the KV of its sequences. Make it with ``load``."""

    def __init__(self, model: Model, options: Load, free_bytes: int, drafts: Model | None = None) -> None:
        """``free_bytes``: the memory that the weights leave. ``drafts``: a model that can draft for this one."""
        rows = min(options.max_rows, MAX_SLOTS - 1) if options.batching == "auto" else 1
        threads = _threads(model, options)
        chunk_tokens = options.max_chunk_tokens or _CHUNK_TOKENS
        forward_tokens = chunk_tokens + rows
        self._canary = Context(
            model,
            cells=QUANTUM_TOKENS,
            slots=1,
            streams=False,
            batch_tokens=1,
            forward_tokens=1,
            kv_bits=options.kv_bits,
            threads=threads,
        )
        cost = model.measure_kv(self._canary, forward_tokens)
        self._token_bytes = cost.bytes_per_token
        if drafts:
            beside = draft.measure(drafts, rows, options.kv_bits, threads)
            cost = KVCost(
                cost.bytes_per_token + beside.bytes_per_token, cost.bytes_per_sequence + beside.bytes_per_sequence
            )
        budget, context_length, self._streams = _budget(model, options, cost, rows, free_bytes)
        most = rows * _whole_quanta(context_length)
        # In shared cells there must be room for the tokens of no use, too.
        cells = most if self._streams else min(budget // cost.bytes_per_token, most) + QUANTUM_TOKENS
        plain = not model.window and not model.recurrent
        speculation = ""
        if model.recurrent:
            speculation = "no drafts: a recurrent state stands for all tokens and forgets none of them"
        elif options.speculation == "off":
            speculation = "no drafts: switched off by [model] speculation"
        depth = 0 if speculation else MAX_DEPTH
        self._context = Context(
            model,
            cells=cells,
            slots=rows if self._streams or not plain else rows + 1,
            streams=self._streams,
            batch_tokens=max(chunk_tokens, _WAVE_TOKENS) + (2 + depth) * rows,
            forward_tokens=forward_tokens,
            kv_bits=options.kv_bits,
            threads=threads,
            outputs=verify.outputs(rows, depth, model.vocab_size),
            fused=_fused(model, self._streams, forward_tokens, cells // rows),
        )
        # Such memories are computed by equal parts of slots that follow each other (``Context.decode``).
        self._gaps_cost = self._streams or model.recurrent
        self._weights_bytes = model.weights_bytes
        self._cuts = plain
        """Rows can go back to any of their tokens."""
        self._slot_cells = cells // rows if self._streams else cells
        self._batches = Batches(
            self._context,
            equal_parts=self._gaps_cost,
            pads=plain,
            slot_cells=self._slot_cells,
            on_gpu=model.on_gpu,
            free_from=self._free_from,
        )
        self._copies = Copies(self._context, model, slots=rows, streams=self._streams)
        self._parked = Parked(cuts=plain)
        self._rows: dict[int, _Row] = {}
        if depth and (refused := verify.refusal(self._context)):
            depth, speculation = 0, f"no drafts: {refused}"
        self._drafter: Drafter | None = None
        if drafts and speculation:
            raise draft.refused(options.draft_path, speculation)
        if drafts:
            self._drafter = Drafter(
                drafts,
                vocab_size=model.vocab_size,
                context_length=context_length,
                rows=rows,
                streams=self._streams,
                cells=cells,
                kv_bits=options.kv_bits,
                threads=_threads(drafts, options),
                fused=_fused(drafts, self._streams, forward_tokens, cells // rows),
            )
        probes = {"speculation": speculation} if speculation else {}
        if AMX:
            probes["amx"] = "not used: some compilers break llama.cpp's kernels for it"
        self.facts = Facts(
            architecture=model.architecture,
            context_length=context_length,
            vocab_size=model.vocab_size,
            eos_ids=tuple(sorted({*model.eos_ids, *options.eos_ids})),
            kv_bytes_per_token=cost.bytes_per_token,
            kv_bytes_per_sequence=cost.bytes_per_sequence,
            kv_budget_bytes=budget,
            max_rows=rows,
            max_chunk_tokens=chunk_tokens,
            launch_share=1.0,
            forks=rows > 1 and self._copies.prefixes == "kv",
            prefixes=self._copies.prefixes,
            publishes=self._copies.publishes,
            weights_bytes=model.weights_bytes + (drafts.weights_bytes if drafts else 0),
            device=_device_name(model),
            dtype=f"{model.quantization}, {options.kv_bits}-bit KV",
            path="single" if rows == 1 else "streams" if self._streams else "unified",
            path_reason=f"one llama_batch a step, {threads} threads, "
            + (
                f"{cells // rows} KV cells for each of {rows} rows"
                if self._streams
                else f"{cells} shared KV cells: {rows} rows of {context_length} tokens each are more than the budget"
            ),
            probes=probes,
            max_depth=depth,
            draft_model=options.draft_path if drafts else "",
        )
        self._masker = Masker(model.vocab_size, self.facts.eos_ids, options.grammar_mask_ms)
        self.canary()

    @classmethod
    def load(cls, options: Load) -> "LlamaBackend":
        """Load the GGUF file ``options.path``. Raises ModelInvalid."""
        # Asked before: whether mapped weights count as available afterwards depends on the system.
        available = psutil.virtual_memory().available

        def read(path: str) -> Model:
            debug = options.log_level == "debug"
            return Model(path, gpu_layers=options.gpu_layers, mmap=options.mmap, log_everything=debug)

        model, drafts = read(options.path), None
        weights_bytes = model.weights_bytes
        if options.draft_path and options.speculation == "auto":
            drafts = read(options.draft_path)
            draft.check(drafts, model, options.draft_path)
            weights_bytes += drafts.weights_bytes
        # At least an eighth: mapped weights need not all be in memory, and some are in the GPU's own.
        return cls(model, options, max(available - weights_bytes, available // 8), drafts)

    def start(self, sequence: Sequence) -> None:
        self._enter(sequence, self._take_slot(), [])

    def fork(self, sequence: Sequence, parent: Sequence, tokens: int) -> None:
        source = self._rows[parent.seq]
        if source.bad:
            self.start(sequence)
            self._rows[sequence.seq].bad = True  # and so would this one be, of the same prompt
        else:
            self._enter(sequence, self._copy_slot(source.slot, tokens), sequence.tokens[:tokens])

    def _enter(self, sequence: Sequence, slot: int, tokens: list[int]) -> None:
        """The sequence has this slot, which holds the KV of those tokens."""
        counts = None
        if penalised(sequence.sampling):
            answer = self._count(sequence.tokens[sequence.prompt_tokens :])
            counts = [self._count(sequence.tokens), answer]
        self._rows[sequence.seq] = _Row(sequence, slot, counts, tokens=tokens)

    def _take_slot(self) -> int:
        """An empty one, that with most neighbours in use, so that few gaps arise; otherwise that of the row parked
        longest."""
        free = self._empty_slots()
        if not free:
            return self._move_near(self._drop_oldest(), 0)
        taken = {row.slot for row in self._rows.values()}
        return max(free, key=lambda slot: (len(taken & {slot - 1, slot + 1}), -slot))

    def _empty_slots(self) -> list[int]:
        taken = {row.slot for row in self._rows.values()}
        return [slot for slot in range(self.facts.max_rows) if slot not in taken and slot not in self._parked]

    def _copy_slot(self, source: int, tokens: int) -> int:
        slot = self._take_slot()
        if not self._copies.copy_slot(source, slot, tokens):
            raise RuntimeError("llama.cpp does not copy the KV of a sequence")
        return slot

    def _count(self, tokens: Seq[int]) -> npt.NDArray[np.int32]:
        return np.bincount(np.asarray(tokens, np.int64), minlength=self.facts.vocab_size).astype(np.int32)[None]

    def draft(self, sequences: Seq[Sequence], depths: Seq[int]) -> list[list[int]]:
        assert self._drafter is not None, "there is no draft model"
        return self._drafter.draft(sequences, depths)

    def launch(self, decode: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[Seq[int]] = ()) -> LlamaLaunch:
        assert all(len(each) <= self.facts.max_depth for each in drafts), (self.facts.max_depth, drafts)
        return LlamaLaunch(partial(self._step, decode, chunks, drafts or [()] * len(decode)))

    def _step(
        self, decode: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[Seq[int]], scores: dict[int, Scores]
    ) -> list[Draw]:
        rows = (self._rows[sequence.seq] for sequence in decode)
        parts = [self._decoding(row, its) for row, its in zip(rows, drafts, strict=True)]
        parts += map(self._prefilling, chunks)
        computed = sum(len(part.tokens) for part in parts)
        self._parked.computed_tokens += computed
        self._make_room(computed + self.facts.max_rows)  # with as many tokens of no use as there may be
        sound = [part for part in parts if not part.row.bad]
        draws = self._settled(sound, scores) | {
            part.row.slot: Draw(part.row.sequence, (0,), True) for part in parts if part.row.bad
        }
        for part in parts:
            part.row.next_token = draws[part.row.slot].tokens[-1]
        return [draws[part.row.slot] for part in parts if part.draws or draws[part.row.slot].bad]

    def _decoding(self, row: _Row, drafts: Seq[int]) -> _Part:
        drafts, masks = self._masked(row, drafts)
        return _Part(row, [row.next_token, *drafts], True, drafts=drafts, masks=masks)

    def _prefilling(self, chunk: Chunk) -> _Part:
        row, sequence = self._rows[chunk.sequence.seq], chunk.sequence
        assert row.bad or len(row.tokens) == chunk.start, (len(row.tokens), chunk)
        tokens = sequence.tokens[chunk.start : chunk.start + chunk.tokens]
        scored = sequence.prompt_logprobs >= 0 and chunk.start + 1 < sequence.prompt_tokens
        masks = self._masked(row, ())[1] if chunk.last else None
        return _Part(row, tokens, chunk.last, scored, masks=masks)

    def _masked(self, row: _Row, drafts: Seq[int]) -> tuple[Seq[int], Masks | None]:
        """The drafts that its grammar lets be, and the masks of its draws."""
        if row.bad:
            return (), None
        try:
            if drafts and row.sequence.masked:
                masks = self._masker.along(row.sequence, drafts)
                return drafts[: verify.allowed(drafts, masks)], masks
            return drafts, self._masker.masks([row.sequence])
        except Exception:
            # Nobody else's business, as what is wrong with a draw.
            print(f"request {row.sequence.request_id}: its masks failed: {traceback.format_exc()}", file=sys.stderr)
            self._fail(row)
            return (), None

    def _settled(self, parts: Seq[_Part], scores: dict[int, Scores]) -> dict[int, Draw]:
        """Compute all parts; afterwards their rows hold what counts and nothing else."""
        draws, tainted = self._compute(parts, scores)
        bad: list[_Part] = []
        lost: list[tuple[_Row, list[int]]] = []
        for part in parts:
            row, draw = part.row, draws[part.row.slot]
            held, wrong = row.tokens, len(part.drafts) - (len(draw.tokens) - 1)
            if draw.bad:
                bad.append(part)
            elif wrong and not self._rewind(row, len(held) - wrong):
                lost.append((row, held[:-wrong]))
        # With a draft of its own, or in cells with others, a row may be bad by what it is not to blame for.
        if any(part.drafts for part in bad) or (len(bad) > 1 and not self._streams):
            draws |= self._compute_alone(bad, scores)
        elif bad:
            self._give_up(bad)
        elif tainted:
            self._clean()
        for row, tokens in lost:  # a window that moved on, which is rare: it has room for a whole forward
            row.tokens = tokens
            deque(self._batches.compute([Run(row.slot, 0, tokens, 0)]), 0)
        return draws

    def _compute(self, parts: Seq[_Part], scores: dict[int, Scores]) -> tuple[dict[int, Draw], bool]:
        """All parts together, but for those to be scored: draws by slot, and whether what drafts left that do not count
        is not finite."""
        made = {part.row.slot: self._draws(part) for part in parts}
        for part in parts:
            if part.scored:
                made[part.row.slot].take(self._score(part, scores))
        runs = []
        for part in parts:
            if not part.scored:
                runs.append(Run(part.row.slot, len(part.row.tokens), part.tokens, 1 + len(part.drafts)))
                part.row.tokens += part.tokens
        for run, logits in self._batches.compute(runs):
            made[run.slot].take(logits)
        return {slot: each.result() for slot, each in made.items()}, any(each.tainted for each in made.values())

    def _draws(self, part: _Part) -> RowDraws | Unread:
        """One row at a time: the arrays of one fit the processor's cache and malloc's pool (8 rows of 49,152 together
        took 5.9 ms, one after the other 1.4)."""
        row = part.row
        if not part.draws:
            return Unread(row.sequence)
        position = len(row.tokens) + len(part.tokens) - len(part.drafts)
        samples = partial(row.samples, self.facts.vocab_size)
        return RowDraws(row.sequence, samples, row.counts or (), position, part.drafts, part.masks)

    def _score(self, part: _Part, scores: dict[int, Scores]) -> npt.NDArray[np.float32]:
        """Compute a part by itself, as many tokens at a time as there is room for their logits; those of its last."""
        row, sequence = part.row, part.row.sequence
        start = len(row.tokens)
        found: list[Logprobs] = []
        logits = np.empty((0, 0), np.float32)
        for first in range(0, len(part.tokens), self._context.outputs):
            tokens = part.tokens[first : first + self._context.outputs]
            position, count = start + first, len(tokens)
            logits = self._context.decode(tokens, range(position, position + count), [row.slot] * count, [True] * count)
            following = sequence.tokens[position + 1 : min(position + count + 1, sequence.prompt_tokens)]
            if following:
                ids = np.asarray(following, np.int32)
                found += as_logprobs(*score(np, logits[: len(ids)], ids, sequence.prompt_logprobs))
        row.tokens += part.tokens
        scores[sequence.seq] = Scores(sequence, start + 1, tuple(found))
        last: npt.NDArray[np.float32] = logits[-1]
        return last

    def _free_from(self, slot: int, tokens: int) -> int:
        """The position from which so many tokens of no use may be computed there, -1: none may. What is parked must not
        suffer."""
        if any(row.slot == slot for row in self._rows.values()):
            return -1
        held = self._parked.length(slot)
        read = held * self._token_bytes
        fits = self._cuts and held + tokens <= self._slot_cells and read <= _FILLED_SHARE * self._weights_bytes
        return held if fits or not held else -1

    def _compute_alone(self, parts: Seq[_Part], scores: dict[int, Scores]) -> dict[int, Draw]:
        """Parts of a step again that came out bad, one at a time and without their drafts.

        No mask stops a NaN, so one token's reaches all that share the cells, and with it the KV that they write in that
        step. Who is bad alone and in clean cells is bad itself.
        """
        again = [self._take_back(part) for part in parts]
        self._clean()
        draws: dict[int, Draw] = {}
        for part in again:
            draws |= self._compute([part], scores)[0]
            if draws[part.row.slot].bad:
                self._give_up([part])
        return draws

    def _take_back(self, part: _Part) -> _Part:
        """Forget what the part added; the part that adds it again, but for its drafts."""
        row = part.row
        start = len(row.tokens) - len(part.tokens)
        if start and not self._context.forget(row.slot, start):
            start = 0
        if not start:
            self._context.forget(row.slot)
        tokens = row.tokens[start : len(row.tokens) - len(part.drafts)]
        del row.tokens[start:]
        return _Part(row, tokens, part.draws, part.scored, masks=part.masks)

    def _give_up(self, parts: Seq[_Part]) -> None:
        """Rows that are bad themselves."""
        for part in parts:
            self._fail(part.row)
        self._clean()

    def _fail(self, row: _Row) -> None:
        row.bad = True
        row.tokens = []
        self._context.forget(row.slot)

    def _clean(self) -> None:
        """Zero all cells but those of sequences, since who gets a cell with a NaN in it would turn bad as well.
        llama.cpp only clears everything, so the sequences' KV is copied out and in again, some gigabytes a second;
        that of parked rows is not worth it."""
        while len(self._parked):
            self._drop_oldest()
        kept = [(row.slot, self._context.export_slot(row.slot)) for row in self._rows.values() if row.tokens]
        self._context.wipe()
        for slot, data in kept:
            if not self._context.import_slot(slot, data):
                raise RuntimeError("llama.cpp does not take back the KV that it gave out")

    def free(self, sequence: Sequence) -> None:
        if self._drafter:
            self._drafter.free(sequence)
        row = self._rows.pop(sequence.seq, None)
        if row is None:
            return
        self._end_with(row)
        if row.tokens and sequence.salt is not None and self.facts.prefixes:
            self._parked.put(row.slot, row.tokens, sequence.salt)
        else:
            self._context.forget(row.slot)

    def _end_with(self, row: _Row) -> None:
        """Where the answer ended at a draft, forget what the row holds of the others, and as ever of its last token."""
        answered, held = row.sequence.generated_tokens, len(row.sequence.tokens) - 1
        if self.facts.max_depth and answered and len(row.tokens) > held:
            self.rewind(row.sequence, held)

    # --- prefixes -------------------------------------------------------------------------------------

    def copy_out(self, sequence: Sequence, spans: Seq[tuple[int, int]]) -> list[Block]:
        row = self._rows[sequence.seq]
        for start, end in spans:
            if not 0 <= start < end <= len(row.tokens):
                raise ValueError(f"positions [{start}, {end}) of a row that holds {len(row.tokens)}")
        return list(self._copies.copy_out(row.slot, spans))

    def checkpoint(self, sequence: Sequence) -> tuple[int, Block] | None:
        row = self._rows[sequence.seq]
        if not row.tokens:
            raise ValueError("a checkpoint of a row that holds nothing")
        self._end_with(row)
        made = self._copies.checkpoint(row.slot, len(row.tokens))
        return (made.tokens, made) if made else None

    def copy_in(self, sequence: Sequence, blocks: Seq[Block], tokens: int, checkpoint: Block | None) -> None:
        slot = self._take_slot()
        self._make_room(tokens)
        ours = [block for block in blocks if isinstance(block, LlamaBlock)]
        assert len(ours) == len(blocks)
        assert checkpoint is None or isinstance(checkpoint, LlamaBlock)
        if not self._copies.copy_in(slot, ours, tokens, checkpoint):
            raise RuntimeError(f"llama.cpp does not take a copy of the KV of {tokens} tokens")
        self._enter(sequence, slot, sequence.tokens[:tokens])

    def from_bytes(self, data: bytes) -> Block:
        return self._copies.from_bytes(data)

    def parked(self, tokens: Seq[int], salt: str, claimed: Collection[int]) -> tuple[int, int]:
        return self._parked.longest(tokens, salt, claimed)

    def resume(self, sequence: Sequence, row: int, tokens: int) -> None:
        kept = sequence.tokens[:tokens]
        parked = self._parked[row]
        if self._cuts and len(parked.tokens) >= tokens + _KEPT_TOKENS and self._empty_slots():
            self._parked.use(row)
            self._enter(sequence, self._copy_slot(parked.slot, tokens), kept)
            return
        slot = self._parked.remove(row)
        if not self._context.forget(slot, tokens):
            raise RuntimeError(f"a parked row does not go back to {tokens} tokens")
        self._enter(sequence, self._move_near(slot, tokens), kept)

    def _move_near(self, slot: int, tokens: int) -> int:
        """Where what the slot holds for a sequence that begins is afterwards: beside a live row, with which it is then
        computed in one forward; what is parked there changes places with it."""
        live = {row.slot for row in self._rows.values()}
        if not self._gaps_cost or not live or any(abs(slot - other) == 1 for other in live):
            return slot
        near = [
            beside
            for other in live
            for beside in (other - 1, other + 1)
            if 0 <= beside < self.facts.max_rows and beside not in live
        ]
        if not near:
            return slot
        target = min(near, key=self._parked.length)
        cost = (tokens + self._parked.length(target)) * self._token_bytes
        if cost + 2 * self.facts.kv_bytes_per_sequence > _MOVED_SHARE * self._weights_bytes:
            return slot
        states = [(target, self._context.export_slot(slot))] if tokens else []
        if target in self._parked:
            states.append((slot, self._context.export_slot(target)))
            self._context.forget(target)
            self._parked.move(target, slot)
        self._context.forget(slot)
        for place, data in states:
            if not self._context.import_slot(place, data):
                raise RuntimeError("llama.cpp does not take back the KV that it gave out")
        return target

    def _drop_oldest(self) -> int:
        """The slot that is empty now."""
        slot = self._parked.remove(self._parked.oldest)
        self._context.forget(slot)
        return slot

    def _make_room(self, tokens: int) -> None:
        """In shared cells, drop parked rows until so many more tokens have some (the scheduler knows nothing of them),
        and those that have cost more than a copy does."""
        if self._streams:
            return
        room = self._slot_cells - sum(len(row.tokens) for row in self._rows.values()) - tokens
        while len(self._parked):
            kept = self._parked.computed_tokens - self._parked[self._parked.oldest].since
            if self._parked.tokens <= room and kept <= _SHARED_KEPT_TOKENS:
                break
            self._drop_oldest()

    def canary(self) -> None:
        finite = bool(np.isfinite(self._canary.decode([0], [0], [0], [True]).max()))
        self._canary.forget(0)
        if not finite:
            raise RuntimeError("the canary's logits are not finite: the device or the weights in memory are broken")

    def rewind(self, sequence: Sequence, tokens: int) -> int:
        row = self._rows[sequence.seq]
        self._rewind(row, tokens)
        return len(row.tokens)

    def _rewind(self, row: _Row, tokens: int) -> bool:
        """Keep its first tokens. False: that could not be, and none are left."""
        if tokens < len(row.tokens) and not self._context.forget(row.slot, tokens):
            self._context.forget(row.slot)
            row.tokens = []
            return False
        del row.tokens[tokens:]
        return True

    def limit_kv(self, budget_bytes: int) -> None:
        """Its buffer stays."""

    def memory(self) -> MemoryFacts:
        slots = range(self._context.slots)
        held = sum(self._context.last_position(slot) + 1 != self._parked.length(slot) for slot in slots)
        return MemoryFacts(
            # As llama.cpp sees it, not as this module does: a cell that was not freed shows.
            rows=max(held, self._drafter.rows if self._drafter else 0),
            arena_bytes=self.facts.kv_budget_bytes,
            active_bytes=0,
            peak_bytes=0,
            cache_bytes=0,
            live_arrays=0,
        )


def _whole_quanta(tokens: int) -> int:
    return -(-tokens // QUANTUM_TOKENS) * QUANTUM_TOKENS


def _budget(model: Model, options: Load, cost: KVCost, rows: int, free: int) -> tuple[int, int, bool]:
    """(KV bytes, context length, whether that is the whole context for every row). Raises ModelInvalid when they do not
    fit the memory that is free."""
    wanted = _whole_quanta(min(model.context_length, options.context_length or model.context_length))
    budget = options.kv_budget_bytes
    if not budget:
        budget = rows * (wanted * cost.bytes_per_token + cost.bytes_per_sequence)
        if budget > free * _STREAMS_MEMORY_SHARE:
            tokens = min(rows * wanted, max(wanted, rows * _DEFAULT_ROW_TOKENS))
            budget = tokens * cost.bytes_per_token + rows * cost.bytes_per_sequence
            budget = min(budget, max(int(free * _KV_MEMORY_SHARE), 1))
    context_length = fit_context(cost, model.context_length, options.context_length, budget)
    # More than every row's longest sequence is of no use.
    most = rows * (_whole_quanta(context_length) * cost.bytes_per_token + cost.bytes_per_sequence)
    streams = budget >= most
    budget = min(budget, most)
    if budget > free:
        raise ModelInvalid(
            f"a KV buffer of {budget} bytes (a context of {context_length} tokens, {rows} rows) does not fit the "
            f"{free} bytes of free memory; lower [engine] kv_budget_bytes or max_rows, or [model] context_length.",
            param="engine.kv_budget_bytes",
        )
    return budget, context_length, streams


def _threads(model: Model, options: Load) -> int:
    return options.threads or (1 if model.weights_bytes < _SMALL_BYTES else default_threads())


def _fused(model: Model, streams: bool, forward_tokens: int, cells: int) -> bool:
    """Whether a context whose rows look at so many cells keeps no scores of attention."""
    return model.on_gpu or not streams or 4 * model.heads * forward_tokens * cells > _SCORES_BYTES


def default_threads() -> int:
    """One for each core that computes: hyper-threads and efficiency cores only slow the others down."""
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        return int(found) if found.isdigit() else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))


def _device_name(model: Model) -> str:
    return f"{'gpu' if model.on_gpu else 'cpu'} ({platform.processor() or platform.machine()})"
