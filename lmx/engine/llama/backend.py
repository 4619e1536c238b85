"""The llama.cpp back end: a planned step becomes one batch over a unified KV, its logits are drawn from in NumPy
(DESIGN §7).

A sequence is a slot, llama.cpp's sequence id; decoding rows and prefill chunks go through one forward together. The KV
buffer is made whole at load, so freeing gives cells back to the other sequences and not memory to the system. Decides
nothing; called by the step loop only, on its one thread.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import psutil

from lmx.engine.backend import Chunk, Draw, Facts, MemoryFacts, Sequence
from lmx.engine.budget import QUANTUM_TOKENS, KVCost, fit_context
from lmx.engine.llama.native import MAX_SLOTS, Context, Model
from lmx.engine.sampling import SamplingBatch, draw_key, penalised
from lmx.errors import ModelInvalid
from lmx.protocol import Load, Logprobs

# The KV buffer is allocated and zeroed at load. Without a setting it holds the whole context once, or this many tokens
# for every row, and takes no more than a share of the free memory.
_DEFAULT_ROW_TOKENS = 1024
_KV_MEMORY_SHARE = 0.5
# A second thread is not worth its barriers in a smaller model, and hurts where the cores are busy.
_SMALL_BYTES = 32 * 1024 * 1024
_CHUNK_TOKENS = 512  # llama.cpp's own default for one forward


@dataclass(slots=True)
class _Row:
    """A sequence's place in the KV, and what its draws need."""

    sequence: Sequence
    slot: int
    sampling: SamplingBatch
    counts: list[npt.NDArray[np.int32]] | None
    """Two of (1, V): how often a token stands in prompt and answer, and in the answer; for rows with penalties."""
    tokens: list[int] = field(default_factory=list)
    """Those whose KV is computed."""
    next_token: int = -1
    """Drawn, and to be decoded next."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What a step adds to one row."""

    row: _Row
    tokens: Seq[int]
    draws: bool


@dataclass(frozen=True, slots=True)
class LlamaLaunch:
    """A step that is done: llama.cpp returns when it has computed, and the draws need the logits on the host."""

    draws: list[Draw]

    def wait(self) -> list[Draw]:
        return self.draws


class LlamaBackend:
    """One loaded model and the KV of its sequences. Make it with ``load``."""

    def __init__(self, model: Model, options: Load, free_bytes: int) -> None:
        """``free_bytes``: the memory that the weights leave."""
        rows = min(options.max_rows, MAX_SLOTS - 1) if options.batching == "auto" else 1  # one is the canary's
        threads = options.threads or (1 if model.weights_bytes < _SMALL_BYTES else default_threads())
        cost = model.measure_kv(options.kv_bits)
        budget, context_length = _budget(model, options, cost, rows, free_bytes)
        chunk_tokens = options.max_chunk_tokens or _CHUNK_TOKENS
        cells = min(budget // cost.bytes_per_token, rows * _whole_quanta(context_length))
        self._context = Context(
            model,
            cells=cells + QUANTUM_TOKENS,  # for the canary, and because llama.cpp rounds
            slots=rows + 1,
            chunk_tokens=chunk_tokens,
            kv_bits=options.kv_bits,
            threads=threads,
        )
        self._canary_slot = rows
        self._free_slots = list(range(rows - 1, -1, -1))
        self._rows: dict[int, _Row] = {}
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
            weights_bytes=model.weights_bytes,
            device=_device_name(model),
            dtype=f"{model.quantization}, {options.kv_bits}-bit KV",
            path="unified" if rows > 1 else "single",
            path_reason=f"one llama_batch a step over {cells} shared KV cells, {threads} threads",
            probes={},
        )
        self.canary()

    @classmethod
    def load(cls, options: Load) -> "LlamaBackend":
        """Load the GGUF file ``options.path``. Raises ModelInvalid."""
        # Asked before: whether mapped weights count as available afterwards depends on the system.
        available = psutil.virtual_memory().available
        model = Model(
            options.path,
            gpu_layers=options.gpu_layers,
            mmap=options.mmap,
            log_everything=options.log_level == "debug",
        )
        # At least an eighth: mapped weights need not all be in memory, and some are in the GPU's own.
        return cls(model, options, max(available - model.weights_bytes, available // 8))

    def start(self, sequence: Sequence) -> None:
        counts = None
        if penalised(sequence.sampling):
            answer = self._count(sequence.tokens[sequence.prompt_tokens :])
            counts = [self._count(sequence.tokens), answer]
        sampling = SamplingBatch(np, [sequence.sampling], self.facts.vocab_size)
        self._rows[sequence.seq] = _Row(sequence, self._free_slots.pop(), sampling, counts)

    def _count(self, tokens: Seq[int]) -> npt.NDArray[np.int32]:
        return np.bincount(np.asarray(tokens, np.int64), minlength=self.facts.vocab_size).astype(np.int32)[None]

    def launch(self, decode: Seq[Sequence], chunks: Seq[Chunk]) -> LlamaLaunch:
        rows = (self._rows[sequence.seq] for sequence in decode)
        parts = [_Part(row, [row.next_token], True) for row in rows]
        for chunk in chunks:
            row = self._rows[chunk.sequence.seq]
            assert len(row.tokens) == chunk.start, (len(row.tokens), chunk)
            parts.append(_Part(row, chunk.sequence.tokens[chunk.start : chunk.start + chunk.tokens], chunk.last))
        draws = [self._draw(part.row, logits) for part, logits in self._forward(parts)]
        if any(draw.bad for draw in draws):
            draws = self._isolate(parts)
        for draw in draws:
            row = self._rows[draw.sequence.seq]
            row.next_token = draw.token
            for counts in row.counts or ():
                counts[0, draw.token] += 1
        return LlamaLaunch(draws)

    def _forward(self, parts: Seq[_Part]) -> Iterator[tuple[_Part, npt.NDArray[np.float32]]]:
        """Compute all parts together, in as few forwards as llama.cpp's batch allows; for each part that draws, the
        logits (V,) of its last token, good until the next one is asked for."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[bool] = []
        for part in parts:
            row, count = part.row, len(part.tokens)
            tokens += part.tokens
            positions += range(len(row.tokens), len(row.tokens) + count)
            slots += [row.slot] * count
            wanted += [False] * (count - 1) + [part.draws]
            row.tokens += part.tokens
        drawing = (part for part in parts if part.draws)
        for start in range(0, len(tokens), self._context.batch_tokens):
            span = slice(start, start + self._context.batch_tokens)
            for logits in self._context.decode(tokens[span], positions[span], slots[span], wanted[span]):
                yield next(drawing), logits

    def _isolate(self, parts: Seq[_Part]) -> list[Draw]:
        """A step again, after it gave logits that are not finite.

        A non-finite value in one sequence's KV may reach all that share the cells, since no mask stops a NaN, and their
        KV then. So everything is computed anew in zeroed cells, one sequence at a time: who is bad now is bad itself.
        """
        bad: set[int] = set()
        while True:
            self._context.wipe()
            draws: dict[int, Draw] = {}
            for seq, row in self._rows.items():
                if seq in bad:
                    continue
                everything, row.tokens = row.tokens, []
                [draw] = [self._draw(row, logits) for _, logits in self._forward([_Part(row, everything, True)])]
                if draw.bad:
                    bad.add(seq)
                    break
                draws[seq] = draw
            else:
                break
        wanted = [part.row.sequence.seq for part in parts if part.draws]
        return [draws[seq] for seq in wanted if seq in draws] + [Draw(self._rows[seq].sequence, 0, True) for seq in bad]

    def _draw(self, row: _Row, logits: npt.NDArray[np.float32]) -> Draw:
        """One row at a time: the arrays of one fit the processor's cache and malloc's pool (8 rows of 49,152 together
        took 5.9 ms, one after the other 1.4)."""
        wanted = row.sequence.sampling.logprobs
        drawn = row.sampling.draw(logits[None], [draw_key(row.sequence.sampling.seed, len(row.tokens))], row.counts)
        logprobs = None
        if drawn.logprobs is not None:
            assert drawn.top_ids is not None
            assert drawn.top_logprobs is not None
            ids, values = drawn.top_ids[0, :wanted], drawn.top_logprobs[0, :wanted]
            logprobs = Logprobs(float(drawn.logprobs[0]), tuple(ids.tolist()), tuple(values.tolist()))
        return Draw(row.sequence, int(drawn.tokens[0]), bool(drawn.bad[0]), logprobs)

    def free(self, sequence: Sequence) -> None:
        row = self._rows.pop(sequence.seq, None)
        if row is not None:
            self._context.forget(row.slot)
            self._free_slots.append(row.slot)

    def canary(self) -> None:
        logits = self._context.decode([0], [0], [self._canary_slot], [True])
        finite = bool(np.isfinite(logits.max()))
        self._context.forget(self._canary_slot)
        if not finite:
            raise RuntimeError("the canary's logits are not finite: the device or the weights in memory are broken")

    def rewind(self, sequence: Sequence, tokens: int) -> int:
        row = self._rows[sequence.seq]
        if tokens < len(row.tokens) and not self._context.forget(row.slot, tokens):
            self._context.forget(row.slot)
            tokens = 0
        del row.tokens[tokens:]
        return len(row.tokens)

    def export_kv(self, sequence: Sequence) -> bytes:
        return self._context.export_slot(self._rows[sequence.seq].slot)

    def import_kv(self, sequence: Sequence, data: bytes) -> int:
        row = self._rows[sequence.seq]
        if not self._context.import_slot(row.slot, data):
            self._context.forget(row.slot)  # whatever was read before the fault
            raise ValueError(f"{len(data)} bytes are no state of this model's KV")
        row.tokens = sequence.tokens[: self._context.last_position(row.slot) + 1]
        return len(row.tokens)

    def memory(self) -> MemoryFacts:
        return MemoryFacts(
            # As llama.cpp sees it, not as this module does: a cell that was not freed shows.
            rows=sum(self._context.last_position(slot) >= 0 for slot in range(self.facts.max_rows)),
            arena_bytes=self.facts.kv_budget_bytes,
            active_bytes=0,
            peak_bytes=0,
            cache_bytes=0,
            live_arrays=0,
        )


def _whole_quanta(tokens: int) -> int:
    return -(-tokens // QUANTUM_TOKENS) * QUANTUM_TOKENS


def _budget(model: Model, options: Load, cost: KVCost, rows: int, free: int) -> tuple[int, int]:
    """(KV bytes, context length). Raises ModelInvalid when they do not fit the memory that is free."""
    wanted = _whole_quanta(min(model.context_length, options.context_length or model.context_length))
    budget = options.kv_budget_bytes
    if not budget:
        tokens = min(rows * wanted, max(wanted, rows * _DEFAULT_ROW_TOKENS))
        budget = tokens * cost.bytes_per_token + rows * cost.bytes_per_sequence
        budget = min(budget, max(int(free * _KV_MEMORY_SHARE), 1))
    context_length = fit_context(cost, model.context_length, options.context_length, budget)
    # More than every row's longest sequence is of no use.
    most = rows * (_whole_quanta(context_length) * cost.bytes_per_token + cost.bytes_per_sequence)
    budget = min(budget, most)
    if budget > free:
        raise ModelInvalid(
            f"a KV buffer of {budget} bytes (a context of {context_length} tokens, {rows} rows) does not fit the "
            f"{free} bytes of free memory; lower [engine] kv_budget_bytes or max_rows, or [model] context_length.",
            param="engine.kv_budget_bytes",
        )
    return budget, context_length


def default_threads() -> int:
    """One for each core that computes: hyper-threads and efficiency cores only slow the others down."""
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        return int(found) if found.isdigit() else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))


def _device_name(model: Model) -> str:
    return f"{'gpu' if model.on_gpu else 'cpu'} ({platform.processor() or platform.machine()})"
