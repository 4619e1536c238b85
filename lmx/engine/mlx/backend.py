"""The MLX back end: places sequences in arena lanes and turns a planned step into one lazy graph (DESIGN §4, §7).

All of MLX belongs to the thread that loaded the model; every entry asserts it. Decides where a sequence lives (which
lane, which row), never what runs. Called by the step loop only.
"""

import gc
import platform
import threading
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import psutil

from lmx.engine.backend import Block, Chunk, Draw, Facts, MemoryFacts, Scores, Sequence
from lmx.engine.budget import KVCost, chunk_area, fit_context
from lmx.engine.grammar import Masker
from lmx.engine.mlx import adapter, compiled, cpu, device, draft, draws, handles, probe, together
from lmx.engine.mlx.arena import Lane, Seen
from lmx.engine.mlx.blocks import Forms, MLXBlock
from lmx.engine.mlx.draft import Drafter, DraftModel
from lmx.engine.mlx.draws import Batches, Read
from lmx.engine.mlx.placement import Place, Placement
from lmx.engine.mlx.verify import Verification
from lmx.engine.sampling import Drawn, SamplingBatch, as_logprobs, draw_key, penalised, score, traces
from lmx.protocol import Load

# Without a setting, KV may take this share of the memory that is free after the load.
_KV_MEMORY_SHARE = 0.5
# By device (CPU, GPU). On the CPU attention without a fused kernel makes long chunks slower: 2,048 tokens of SmolLM2
# took 10.5 s in chunks of 128, 13.6 s in chunks of 512, 19.6 s in one; 4,096 tokens of a llama of 8 × 512 7.1 s in
# chunks of 128, 7.2 in 192, 11.5 in 256. Of two that are equal the larger: it takes more prompts whole into a wave.
_CHUNK_TOKENS = (192, 2048)
# The share of a prefill pass that may be padding. Four prompts of 85 tokens ran at 1.27 to 1.6 times the speed of one
# (SmolLM2 and a llama of 8 × 512 on a CPU), so this much padding costs about as much as another pass.
_PASS_PADDING_SHARE = 0.25
# Freed buffers that MLX may keep, at most, and of the machine's memory: a step's temporaries are made again in the next
# one, so that those must be kept (a chunk of 2,048 tokens has a few hundred MB); all else is for other processes.
# Metal's own limit is nine tenths of the memory and more.
_POOL_BYTES = 4 * 1024**3
_POOL_SHARE = 1 / 16
# Prompt tokens whose logits are held at once, for their log-probabilities: 40 MB for a vocabulary of 152,000.
_SCORED_TOKENS = 64


class MLXBackend:
    """One loaded model and the KV of its sequences. Make it with ``load``."""

    def __init__(self, loaded: adapter.LoadedModel, options: Load, drafts: DraftModel | None = None) -> None:
        """``drafts``: a draft model that fits ``loaded``."""
        self._thread = threading.get_ident()
        self._loaded = loaded
        write, write_words = device.choose_write()
        self._probe = probe.run(loaded, write, force_single=options.batching == "single", kv_bits=options.kv_bits)
        self._device = device.measure(loaded, self._probe.kinds, self._probe.write)
        self._device.words["write"] = write_words
        if self._probe.kv:
            self._device.words["kv"] = self._probe.kv
        apart = "it has one row" if self._probe.path == "single" else together.check(loaded, self._probe.kinds, write)
        self._device.words["speculation"] = self._probe.speculation
        self._device.words["lanes"] = f"one by one: {apart}" if apart else "in one pass over the weights"
        self._compiled, self._device.words["compiled"] = compiled.choose(loaded, self._probe, options.compile_decode)
        if drafts is not None:
            draft.check_target(drafts, self._probe.max_depth, self._probe.speculation)
            self._device.words["draft model"] = drafts.words
        mx.clear_cache()  # of what the probes left
        free = _free_bytes()
        self.facts = self._facts(options, free, drafts)
        self._masker = Masker(self.facts.vocab_size, self.facts.eos_ids, options.grammar_mask_ms)
        self._placement = Placement(loaded, self._probe, self._share(self._probe.kv_bytes_per_token))
        self._drafter = Drafter(drafts, self._share(drafts.kv_bytes_per_token), free) if drafts else None
        self._decodes_together = not apart
        self._forms = Forms(self._probe.kinds)
        self._stopped: dict[int, dict[int, MLXBlock]] = {}
        """The states of sequences in prefill at those of their ``stops`` that nobody asked for yet."""
        self._own_arrays = 0
        """The model's, which are in no list of the collector's."""
        self._copies: list[mx.array] = []
        """Of blocks that the device may be about to make."""
        self._batches = Batches(self.facts.vocab_size)
        self._verified = Batches(self.facts.vocab_size)
        """Of steps that verify drafts."""

    @classmethod
    def load(cls, options: Load) -> "MLXBackend":
        """Load ``options.path``. Raises ModelInvalid."""
        loaded = adapter.load(Path(options.path))
        drafts = None
        if options.draft_path and options.speculation == "auto":
            drafts = draft.load(options.draft_path, loaded, Path(options.words or options.path), options.kv_bits)
        adapter.wire(options.wired_bytes)
        mx.set_cache_limit(min(_POOL_BYTES, int(_POOL_SHARE * psutil.virtual_memory().total)))
        backend = cls(loaded, options, drafts)
        # The model lives as long as the process: the collector need not look at it again.
        gc.collect()
        backend._own_arrays = handles.arrays()
        gc.freeze()
        cpu.give_back()
        return backend

    def _facts(self, options: Load, free: int, drafts: DraftModel | None) -> Facts:
        """``free``: what the weights leave of the memory."""
        per_token, per_sequence = self._probe.kv_bytes_per_token, self._probe.kv_bytes_per_sequence
        weights_bytes = self._loaded.weights_bytes
        if drafts:
            per_token += drafts.kv_bytes_per_token
            weights_bytes += drafts.loaded.weights_bytes
        budget = options.kv_budget_bytes or max(int(free * _KV_MEMORY_SHARE), 1)
        cost = KVCost(per_token, per_sequence)
        area = chunk_area(self._device.attention_bytes, free, budget)
        probes = dict(self._device.words)
        if area:
            probes["attention"] += f"; a step computes at most {area} of them"
        return Facts(
            architecture=self._loaded.architecture,
            context_length=fit_context(cost, self._loaded.context_length, options.context_length, budget),
            vocab_size=self._loaded.vocab_size,
            eos_ids=tuple(sorted({*self._loaded.eos_ids, *options.eos_ids})),
            kv_bytes_per_token=per_token,
            kv_bytes_per_sequence=per_sequence,
            kv_budget_bytes=budget,
            max_rows=options.max_rows if self._probe.path == "arena" else 1,
            max_chunk_tokens=options.max_chunk_tokens or _CHUNK_TOKENS[mx.default_device() == mx.gpu],
            # MLX's CPU stream takes 10 operations ahead and no more, so a launch there lasts as long as its step:
            # lookahead would deliver each token a step late and gain nothing (480 against 483 tok/s).
            launch_share=self._device.launch_share,
            weights_bytes=weights_bytes,
            device=_device_name(),
            dtype=self._loaded.dtype + (f", {self._probe.kv_bits}-bit KV" if self._probe.kv_bits < 16 else ""),
            path=self._probe.path,
            path_reason=self._probe.reason,
            probes=probes,
            forks=self._probe.path == "arena" and all(kind.kind == "kv" for kind in self._probe.kinds),
            max_chunk_area=area,
            max_depth=self._probe.max_depth,
            draft_model=drafts.path if drafts else "",
            prefixes=_prefixes(self._probe),
            window=max((kind.window or 0 for kind in self._probe.kinds if kind.kind == "kv"), default=0),
        )

    def _share(self, bytes_per_token: int) -> Facts:
        """For the placement of one model's KV, that takes so much a token: its part of the budget."""
        if bytes_per_token == self.facts.kv_bytes_per_token:
            return self.facts
        budget = self.facts.kv_budget_bytes * bytes_per_token // self.facts.kv_bytes_per_token
        return replace(self.facts, kv_bytes_per_token=bytes_per_token, kv_budget_bytes=budget)

    def start(self, sequence: Sequence) -> None:
        self._assert_thread()
        self._placement.enter(sequence)

    def fork(self, sequence: Sequence, parent: Sequence, tokens: int) -> None:
        self.start(sequence)
        place, source = self._placement[sequence], self._placement[parent]
        if source.lane.forks_at(source.row, tokens):
            place.lane.fork(place.row, source.lane, source.row, tokens)
            return
        # The parent was restored further than that, without the windows of its beginning.
        for start in range(0, tokens, self.facts.max_chunk_tokens):
            end = min(start + self.facts.max_chunk_tokens, tokens)
            place.lane.prefill(place.row, sequence.tokens[start:end], last=False)
            known = np.array(place.lane.written(place.row))
            if np.isfinite(known).all():
                place.lane.seen[place.row].found(start, end)

    def limit_kv(self, budget_bytes: int) -> None:
        self.facts = replace(self.facts, kv_budget_bytes=budget_bytes)
        self._placement.facts = self._share(self._probe.kv_bytes_per_token)
        if self._drafter:
            self._drafter.limit(self._share(self._drafter.kv_bytes_per_token))
        mx.clear_cache()
        cpu.give_back()

    def free(self, sequence: Sequence) -> None:
        self._assert_thread()
        self._stopped.pop(sequence.seq, None)
        self._placement.leave(sequence)
        if self._drafter:
            self._drafter.free(sequence)

    def launch(self, decode: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[Seq[int]] = ()) -> "MLXLaunch":
        self._assert_thread()
        places = [self._placement[sequence] for sequence in decode]
        guesses = {sequence.seq: guess for sequence, guess in zip(decode, drafts, strict=True)} if any(drafts) else {}
        for place in places:
            guess = guesses.get(place.sequence.seq, ())
            assert len(guess) <= self.facts.max_depth, (guess, self.facts.max_depth)
            self._placement.make_room(place, 1 + len(guess))
        self._placement.settle()
        launch = MLXLaunch([sequence.seq for sequence in (*decode, *(chunk.sequence for chunk in chunks))])
        decoding: list[tuple[Lane, list[Place]]] = []
        for lane in self._placement.lanes:
            members = [place for place in places if place.lane is lane]
            if members:
                self._placement.compact(lane, members)
                decoding.append((lane, members))
        touched = [lane for lane, _ in decoding]
        if guesses:
            self._verify(launch, decoding, guesses)
        for (lane, members), logits in zip(decoding, self._forward(decoding), strict=True):
            if any(place.sequence.masked for place in members):
                launch.defer(lane, logits, partial(self._decode, launch, lane, members, logits, late=True))
            else:
                self._decode(launch, lane, members, logits)
        launch.begin = partial(self._begin, launch, touched, chunks)
        return launch

    def _verify(
        self, launch: "MLXLaunch", decoding: list[tuple[Lane, list[Place]]], drafts: dict[int, Seq[int]]
    ) -> None:
        """The lanes that have drafts, which ``decoding`` is left without: each by itself, since in one pass the rows of
        the others would be padded as well."""
        for lane, members in list(decoding):
            mine = [drafts[place.sequence.seq] for place in members]
            if any(mine):
                decoding.remove((lane, members))
                self._drop_counts(lane)
                launch.verify(lane, Verification(lane, members, mine, self._verified, self._masker))

    def _begin(self, launch: "MLXLaunch", decoded: list[Lane], chunks: Seq[Chunk]) -> None:
        """Let the device decode, and prefill after that."""
        # What a command in flight reads, the next write copies: all of a lane, for blocks that were copied out of it.
        mx.eval(self._copies)
        self._copies.clear()
        touched = list(decoded)
        if touched and chunks:
            # In one graph MLX may put a chunk's write before the decode's reading of the same buffers, which it then
            # copies (400 instead of 200 ms for a last chunk in a lane of 540 MB).
            launch.compute([array for lane in touched for array in lane.arrays])
        for chunk in chunks:
            self._placement.make_room(self._placement[chunk.sequence], chunk.tokens)
        for lane in self._placement.lanes:
            mine = [chunk for chunk in chunks if self._placement[chunk.sequence].lane is lane]
            if mine:
                self._prefill(lane, mine, launch)
                touched.append(lane)
        launch.compute([array for lane in touched for array in lane.arrays])

    def _forward(self, decoding: list[tuple[Lane, list[Place]]]) -> list[mx.array]:
        """One step of these rows of each lane; the logits of each, (B, V)."""
        parts = [(lane, [place.row for place in members]) for lane, members in decoding]
        if len(parts) > 1 and self._decodes_together:
            return [logits[:, 0] for logits in together.decode(self._loaded, parts)]
        decode = self._compiled.decode if self._compiled else Lane.decode
        return [decode(lane, rows)[:, 0] for lane, rows in parts]

    def _decode(
        self, launch: "MLXLaunch", lane: Lane, members: list[Place], logits: mx.array, *, late: bool = False
    ) -> None:
        """Draw the next token of each; ``logits``: of the lane's rows as far as they were computed. ``late``: rows
        between them may have ended their prefill meanwhile."""
        rows = [place.row for place in members]
        count = max(rows) + 1
        by_row: list[Sequence | None] = [None] * count
        for place in members:
            by_row[place.row] = place.sequence
        batch = self._batches.get(lane, by_row)
        self._drop_counts(lane)
        # The draw fills the position after the one that was just computed.
        keys = [
            draw_key(sequence.sampling.seed, int(lane.lengths[row])) if sequence else 0
            for row, sequence in enumerate(by_row)
        ]
        counts = [array[:count] for array in lane.counts.arrays] if lane.counts and batch.penalised else None
        drawn = batch.draw(logits, keys, counts, self._masker.masks(by_row))
        # Written into, never replaced by, the draw's own array: that one is read later and must not change.
        if late and len(rows) < count:
            index = mx.array(rows)
            lane.last_tokens[index] = drawn.tokens[index]
            lane.add_counts(rows, drawn.tokens[index])
        else:
            lane.last_tokens[:count] = drawn.tokens
            lane.add_counts(range(count), drawn.tokens)
        launch.add(drawn, [(place.row, place.sequence) for place in members])
        launch.watch(lane, rows)

    def _drop_counts(self, lane: Lane) -> None:
        """If none of its rows has penalties any more."""
        if lane.counts is not None and not any(
            penalised(place.sequence.sampling) for place in self._placement.of_lane(lane)
        ):
            lane.counts = None

    def _prefill(self, lane: Lane, chunks: Seq[Chunk], launch: "MLXLaunch") -> None:
        """Prefill chunks of one lane and draw for those that are ``last``."""
        ending: list[Sequence] = []
        logits: list[mx.array] = []
        for group in _passes(chunks, together=lane.prefills_together):
            rows = [self._placement[chunk.sequence].row for chunk in group]
            assert [int(lane.lengths[row]) for row in rows] == [chunk.start for chunk in group], group
            pieces = [chunk.sequence.tokens[chunk.start : chunk.start + chunk.tokens] for chunk in group]
            if len(group) == 1:
                see = partial(self._score, launch, group[0]) if _scored(group[0]) else None
                found = lane.prefill(rows[0], pieces[0], last=group[0].last, see=see)
                if (
                    self.facts.prefixes == "checkpoints"
                    and (end := int(lane.lengths[rows[0]])) in group[0].sequence.stops
                ):
                    self._stopped.setdefault(group[0].sequence.seq, {})[end] = lane.states(rows[0])
            elif group[0].start == 0:
                found = lane.prefill_whole(rows, pieces)
            else:  # the last tokens of forks
                lane.last_tokens[mx.array(rows)] = mx.array([token for (token,) in pieces], mx.int32)
                found = lane.decode(rows)[mx.array(rows), 0]
            if len(group) == 1 or group[0].start == 0:
                for row, chunk in zip(rows, group, strict=True):
                    launch.add_written(lane.written(row), lane.seen[row], chunk)
            if found is not None:
                logits.append(found)
                ending += [chunk.sequence for chunk in group]
        if ending:
            found = mx.concatenate(logits)
            draw = partial(self._draw_first, launch, lane, ending, found)
            if any(sequence.masked for sequence in ending):
                launch.defer(lane, found, draw)
            else:
                draw()

    def _score(self, launch: "MLXLaunch", chunk: Chunk, hidden: mx.array) -> None:
        """The log-probabilities of the tokens after those of the chunk, as far as they are the prompt's: so many at a
        time that their logits take no more memory than is small."""
        following = _scored(chunk)
        for first in range(0, len(following), _SCORED_TOKENS):
            tokens = following[first : first + _SCORED_TOKENS]
            logits = self._loaded.logits(hidden[:, first : first + len(tokens)])[0]
            found = score(mx, logits, mx.array(tokens, mx.int32), chunk.sequence.prompt_logprobs)
            mx.async_eval(*found)  # type: ignore[no-untyped-call]
            launch.add_scores(chunk.sequence, chunk.start + 1 + first, found)

    def _draw_first(self, launch: "MLXLaunch", lane: Lane, sequences: Seq[Sequence], logits: mx.array) -> None:
        """The tokens that follow what was just prefilled; ``logits``: (B, V)."""
        rows = [self._placement[sequence].row for sequence in sequences]
        batch = SamplingBatch(mx, [sequence.sampling for sequence in sequences], self.facts.vocab_size)
        counts = None
        if batch.penalised:
            for row, sequence in zip(rows, sequences, strict=True):
                if penalised(sequence.sampling):
                    prompt, answer = sequence.prompt_tokens, sequence.tokens[sequence.prompt_tokens :]
                    lane.count_tokens(row, sequence.tokens[:prompt], answer)
            assert lane.counts is not None
            counts = [array[mx.array(rows)] for array in lane.counts.arrays]
        keys = [
            draw_key(sequence.sampling.seed, int(lane.lengths[row]))
            for row, sequence in zip(rows, sequences, strict=True)
        ]
        drawn = batch.draw(logits, keys, counts, self._masker.masks(sequences))
        lane.last_tokens[mx.array(rows)] = drawn.tokens
        lane.add_counts(rows, drawn.tokens)
        launch.add(drawn, list(enumerate(sequences)))
        launch.watch(lane, rows)

    def draft(self, sequences: Seq[Sequence], depths: Seq[int]) -> list[list[int]]:
        self._assert_thread()
        assert self._drafter is not None, "there is no draft model"
        return self._drafter.draft(sequences, depths)

    def rewind(self, sequence: Sequence, tokens: int) -> int:
        place = self._placement[sequence]
        length = int(place.lane.lengths[place.row])
        return place.lane.rewind(place.row, tokens) if tokens < length else length

    def copy_out(self, sequence: Sequence, spans: Seq[tuple[int, int]]) -> list[Block]:
        self._assert_thread()
        place = self._placement[sequence]
        blocks = [place.lane.copy_out(place.row, start, end) for start, end in spans]
        self._copies += [array for block in blocks for array in (*block.arrays, *(block.windowed or ()))]
        return list(blocks)

    def checkpoint(self, sequence: Sequence) -> tuple[int, Block] | None:
        place = self._placement[sequence]
        seen, at = place.lane.seen[place.row], sequence.kv_tokens
        stopped = self._stopped.get(sequence.seq, {})
        states = stopped.get(at)
        for passed in [stop for stop in stopped if stop <= at]:
            del stopped[passed]
        if states is None:
            at = int(place.lane.lengths[place.row])
            # Where a step runs ahead, the states are of its end: good for one that is in no step any more.
            if at != sequence.kv_tokens and not sequence.ended:
                return None
            states = place.lane.states(place.row)
            self._copies += states.arrays
        if at > seen.finite:
            raise ValueError(f"the states of {at} tokens: {seen.finite} are known to be finite")
        return at, states

    def copy_in(self, sequence: Sequence, blocks: Seq[Block], tokens: int, checkpoint: Block | None) -> None:
        self.start(sequence)
        place = self._placement[sequence]
        assert all(isinstance(block, MLXBlock) for block in (*blocks, *([checkpoint] if checkpoint else [])))
        place.lane.copy_in(place.row, cast(Seq[MLXBlock], blocks), tokens, cast(MLXBlock | None, checkpoint))

    def from_bytes(self, data: bytes) -> Block:
        self._assert_thread()
        block = MLXBlock.from_bytes(data)
        self._forms.check(block)
        return block

    def parked(self, tokens: Seq[int], salt: str, claimed: Collection[int]) -> tuple[int, int]:
        """None: a row's memory is better used for others, and its blocks are kept."""
        return -1, 0

    def resume(self, sequence: Sequence, row: int, tokens: int) -> None:
        raise AssertionError("no row is parked")

    def canary(self) -> None:
        self._assert_thread()
        caches = adapter.make_prompt_cache(self._loaded.model)
        logits = self._loaded.model(mx.zeros((1, 1), mx.int32), cache=caches)
        if not bool(mx.all(mx.isfinite(mx.max(logits))).item()):
            raise RuntimeError("the canary's logits are not finite: the device or the weights in memory are broken")
        del caches, logits
        if not len(self._placement):
            mx.clear_cache()

    def memory(self) -> MemoryFacts:
        self._assert_thread()
        return MemoryFacts(
            # A sequence has a row of each; one that was not freed shows in either.
            rows=max(len(self._placement), len(self._drafter) if self._drafter else 0),
            arena_bytes=sum(lane.nbytes for lane in self._placement.lanes)
            + (self._drafter.arena_bytes if self._drafter else 0),
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
            cache_bytes=mx.get_cache_memory(),
            live_arrays=(alive := handles.arrays()),
            traces=traces() + compiled.traces(),
            handles=alive + self._own_arrays,
            most_handles=handles.most(),
        )

    def _assert_thread(self) -> None:
        assert threading.get_ident() == self._thread, "MLX arrays are bound to the thread that made them"


class MLXLaunch:
    """A step on the device; see ``backend.Launch``."""

    def __init__(self, order: Seq[int]) -> None:
        self._draws: list[tuple[Drawn, list[tuple[int, Sequence]]]] = []
        self._verifications: list[Verification] = []
        self._written: list[tuple[mx.array, Seen, Chunk]] = []
        self._order = {seq: index for index, seq in enumerate(order)}
        self._watched: list[tuple[Seen, int]] = []
        self._scores: list[tuple[Sequence, int, tuple[mx.array, ...]]] = []
        self._deferred: list[tuple[Lane, mx.array, Callable[[], None]]] = []
        self.begin: Callable[[], None] | None = None
        """Has all of the step computed; not yet called."""

    def add(self, drawn: Drawn, rows: list[tuple[int, Sequence]]) -> None:
        self._draws.append((drawn, rows))

    def verify(self, lane: Lane, verification: Verification) -> None:
        self._verifications.append(verification)
        if verification.masked:
            self.defer(lane, verification.logits, verification.draw)
        else:
            verification.draw()

    def defer(self, lane: Lane, logits: mx.array, draw: Callable[[], None]) -> None:
        """``draw`` from these logits of the lane's rows when the step before was read."""
        self._deferred.append((lane, logits, draw))

    def watch(self, lane: Lane, rows: Seq[int]) -> None:
        """The rows in their lane of what was added last: they are told when their draws are seen to be finite."""
        self._watched += [(lane.seen[row], int(lane.lengths[row])) for row in rows]

    def add_written(self, largest: mx.array, seen: Seen, chunk: Chunk) -> None:
        """What is there when a chunk is computed, and finite if what it wrote is."""
        self._written.append((largest, seen, chunk))

    def add_scores(self, sequence: Sequence, start: int, found: tuple[mx.array, ...]) -> None:
        self._scores.append((sequence, start, found))

    def scores(self) -> list[Scores]:
        scores, self._scores = self._scores, []
        return [Scores(sequence, start, as_logprobs(*map(np.array, found))) for sequence, start, found in scores]

    def start(self) -> None:
        if self.begin is not None:
            begin, self.begin = self.begin, None
            begin()

    def draw(self) -> None:
        deferred, self._deferred = self._deferred, []
        for _, _, draw in deferred:
            draw()
        if deferred:
            self.compute([array for lane in {lane for lane, _, _ in deferred} for array in lane.arrays])

    def compute(self, state: list[mx.array]) -> None:
        """Let the device compute what was added until now, and ``state``."""
        mx.async_eval(self._results(), state)  # type: ignore[no-untyped-call]

    def _results(self) -> list[mx.array]:
        """What there is when the step is done, and not before. (Most arrays of a lane's state are no step's last.)"""
        drawn = [array for drawn, _ in self._draws for array in draws.arrays(drawn)]
        drawn += [array for verification in self._verifications for array in verification.results]
        return drawn + [largest for largest, _, _ in self._written] + [logits for _, logits, _ in self._deferred]

    def wait(self) -> list[Draw]:
        self.start()
        self.draw()
        mx.eval(self._results())
        found = [draw for drawn, rows in self._draws for draw in _read(drawn, rows)]
        for largest, seen, chunk in self._written:
            if np.isfinite(np.array(largest)).all():
                seen.found(chunk.start, chunk.start + chunk.tokens)
        for draw, (seen, length) in zip(found, self._watched, strict=True):
            if not draw.bad:
                seen.found(length - 1, length)
        for verification in self._verifications:
            found += verification.settle()
        # A finished launch must not keep its arrays alive.
        self._draws, self._verifications, self._written, self._watched = [], [], [], []
        return sorted(found, key=lambda draw: self._order[draw.sequence.seq])


def _prefixes(found: probe.ProbeResult) -> str:
    kinds = {kind.kind for kind in found.kinds}
    if found.path != "arena" or not kinds <= {"kv", "state"}:
        return ""
    return "checkpoints" if "state" in kinds else "kv"


def _passes(chunks: Seq[Chunk], *, together: bool) -> list[list[Chunk]]:
    """The forward passes of one lane: whole prompts ``together`` where lengths are so alike that padding stays within
    its share, then each other chunk, and single tokens (of forks) in one. (Those read the lane's buffers, which must
    not be written after that.)"""
    groups: list[list[Chunk]] = []
    apart = [chunk for chunk in chunks if not chunk.last or _scored(chunk) or not together]
    whole = [chunk for chunk in chunks if chunk.start == 0 and chunk not in apart]
    forked = [chunk for chunk in chunks if chunk.start and chunk.tokens == 1 and chunk not in apart]
    others = [[chunk] for chunk in chunks if chunk not in whole and chunk not in forked]
    if forked:
        others.append(forked)
    for chunk in sorted(whole, key=lambda chunk: chunk.tokens, reverse=True):
        padded = (len(groups[-1]) + 1) * groups[-1][0].tokens if groups else 0
        if groups and sum(member.tokens for member in [*groups[-1], chunk]) >= (1 - _PASS_PADDING_SHARE) * padded:
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups + others


def _scored(chunk: Chunk) -> list[int]:
    """The prompt's tokens after those of the chunk, where their log-probabilities are wanted."""
    sequence = chunk.sequence
    if sequence.prompt_logprobs < 0:
        return []
    return sequence.tokens[chunk.start + 1 : min(chunk.start + chunk.tokens + 1, sequence.prompt_tokens)]


def _read(drawn: Drawn, rows: list[tuple[int, Sequence]]) -> list[Draw]:
    read = Read(drawn)
    return [
        Draw(sequence, (read.tokens[row],), read.bad[row], read.logprobs([row], sequence)) for row, sequence in rows
    ]


def _free_bytes() -> int:
    """What the weights leave of the memory."""
    if mx.metal.is_available():
        return max(int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory(), 0)
    return int(psutil.virtual_memory().available)


def _device_name() -> str:
    info: dict[str, Any] = mx.device_info()
    kind = "gpu" if mx.default_device() == mx.gpu else "cpu"
    return f"{kind} ({info.get('device_name') or platform.processor() or info.get('architecture', 'unknown')})"
