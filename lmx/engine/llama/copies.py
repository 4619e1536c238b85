"""Copies of what sequences hold in a llama.cpp context: out of a slot, into a slot, from one slot to another.

KV of plain attention is cut by the token (``state``). What stands for all tokens of a sequence (recurrent states, the
windows of sliding layers) is copied as it is, a checkpoint; a state of unknown format is nothing but that. Which of it
is true of a model is not believed but tried, at load. Decides nothing; called by ``lmx.engine.llama.backend``.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmx.engine.llama import state
from lmx.engine.llama.native import Context, Model
from lmx.engine.llama.state import Bytes, Layout

_NOTHING = np.empty(0, np.uint8)
_BLOCK = struct.Struct("<4s16s?I")
_MAGIC = b"lmx1"
# Memory that is new to the process takes as long to get as to fill, so this much is kept for states on their way. (In
# a warm 92 MB a copy takes 25 ms, otherwise 48.)
_SCRATCH_BYTES = 128 * 1024 * 1024
# What the proof computes: so many tokens, then one.
_PROOF_TOKENS = 3
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class LlamaBlock:
    """The KV of ``tokens`` positions, or a checkpoint made at so many."""

    data: Bytes
    tokens: int
    checkpoint: bool
    signature: bytes
    """Of the states that it was copied from."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def window_bytes(self) -> int:
        return 0

    def drop_window(self) -> None:
        pass

    def to_bytes(self) -> bytes:
        head = _BLOCK.pack(_MAGIC, self.signature, self.checkpoint, self.tokens)
        return b"".join((head, self.data.data))


class Copies:
    def __init__(self, context: Context, model: Model, *, slots: int, streams: bool) -> None:
        """``slots``: those of sequences. A context of shared cells may have one more, to be used here."""
        self._context = context
        self._streams = slots if streams else 1
        self._spare = slots if context.slots > slots else -1
        self._layout: Layout | None = None
        """None: states cannot be cut."""
        self._partial = bool(model.window or model.recurrent)
        """The KV is not all of a state."""
        self._checkpoints = self._partial
        self._signatures = (b"", b"")
        self._scratch = _NOTHING
        self.prefixes = ""
        """As ``Facts.prefixes``."""
        if self._proves(slots - 1, cut=True):
            self.prefixes = "checkpoints" if self._checkpoints else "kv"
        else:
            self._layout, self._partial, self._checkpoints = None, False, True
            self.prefixes = "checkpoints" if self._proves(slots - 1, cut=False) else ""
        known = (repr(self._layout), repr((self._layout, self._partial, self._streams)))
        self._signatures = (_digest(known[0]), _digest(known[1]))

    @property
    def publishes(self) -> str:
        """As ``Facts.publishes``."""
        # A checkpoint that was not made when its tokens were the last is never made.
        return "chunks" if self._checkpoints or self._spare >= 0 else "end"

    def copy_out(self, slot: int, spans: Sequence[tuple[int, int]]) -> list[LlamaBlock]:
        """Raises ValueError where a position holds nothing."""
        if self._layout is None:
            return [self._block(_NOTHING, end - start) for start, end in spans]
        cells: state.Cells | None = None
        blocks = []
        for start, end in spans:
            # Of shared cells a copy costs what it copies, otherwise all of the slot.
            if cells is None or self._spare >= 0:
                cells = self._read(slot, start, end)
            blocks.append(self._block(cells.cut(start, end), end - start))
        return blocks

    def checkpoint(self, slot: int, tokens: int) -> LlamaBlock | None:
        if not self._checkpoints:
            return None
        data = self._context.export_slot(slot, partial=self._partial)[len(state.HEAD) :]
        return LlamaBlock(data, tokens, True, self._signatures[1])

    def copy_in(self, slot: int, blocks: Sequence[LlamaBlock], tokens: int, checkpoint: LlamaBlock | None) -> bool:
        """Fill an empty slot with the first ``tokens`` of the blocks; False: llama.cpp refuses, and it is empty."""
        return self._fill(slot, self._join(blocks, tokens, checkpoint), tokens)

    def from_bytes(self, data: bytes) -> LlamaBlock:
        """Raises ValueError for bytes that are no block of such states."""
        if len(data) < _BLOCK.size:
            raise ValueError(f"{len(data)} bytes are no block of KV")
        magic, signature, checkpoint, tokens = _BLOCK.unpack_from(data)
        if magic != _MAGIC or signature != self._signatures[checkpoint]:
            raise ValueError(f"{len(data)} bytes are no block of this model's KV")
        block = LlamaBlock(np.frombuffer(data, np.uint8, offset=_BLOCK.size), tokens, checkpoint, signature)
        wanted = tokens * (self._layout.token_bytes if self._layout else 0)
        if not checkpoint and block.nbytes != wanted:
            raise ValueError(f"a block of {tokens} tokens with {block.nbytes} bytes, not {wanted}")
        return block

    def copy_slot(self, source: int, target: int, tokens: int) -> bool:
        """Give an empty slot the first ``tokens`` of another one. Shared cells are then both's."""
        if self._streams == 1:
            self._context.share(source, target, 0, tokens)
            return True
        assert self._layout is not None
        data = self._context.export_slot(source, allocate=self._allocate)
        cells = state.read(data, 0)
        if 2 * tokens < cells.count:
            part = self._layout.columns(cells.cut(0, tokens), tokens)
            data = self._layout.join([part], tokens, self._streams, _NOTHING)
        if not self._context.import_slot(target, data):
            return False
        self._context.forget(target, tokens)
        return self._holds(target, tokens)

    def _block(self, data: Bytes, tokens: int) -> LlamaBlock:
        return LlamaBlock(data, tokens, False, self._signatures[False])

    def _join(self, blocks: Sequence[LlamaBlock], tokens: int, checkpoint: LlamaBlock | None) -> Bytes:
        rest = checkpoint.data if checkpoint else _NOTHING
        if self._layout is None:
            return np.concatenate([np.frombuffer(state.HEAD, np.uint8), rest])
        parts = [self._layout.columns(block.data, block.tokens) for block in blocks]
        return self._layout.join(parts, tokens, self._streams, rest, self._allocate)

    def _read(self, slot: int, start: int, end: int) -> state.Cells:
        """A copy of at least these positions."""
        if self._spare < 0:
            rest = self._context.state_bytes(slot, partial=True) - len(state.HEAD) if self._partial else 0
            return state.read(self._context.export_slot(slot, allocate=self._allocate), rest)
        self._context.share(slot, self._spare, start, end)
        data = self._context.export_slot(self._spare, allocate=self._allocate)
        self._context.forget(self._spare)
        return state.read(data, 0)

    def _fill(self, slot: int, data: Bytes, tokens: int) -> bool:
        return self._context.import_slot(slot, data) and self._holds(slot, tokens)

    def _holds(self, slot: int, tokens: int) -> bool:
        """So many; otherwise none any more."""
        if self._context.last_position(slot) == tokens - 1:
            return True
        self._context.forget(slot)
        return False

    def _allocate(self, size: int) -> Bytes:
        """Good until the next one is asked for."""
        if size > _SCRATCH_BYTES:
            return state.allocate_bytes(size)
        if len(self._scratch) < size:
            self._scratch = state.allocate_bytes(size)
        return self._scratch[:size]

    # --- at load --------------------------------------------------------------------------------------

    def _proves(self, last_slot: int, *, cut: bool) -> bool:
        """Whether a few tokens computed in the first slot come back in the last one, and the next follows from them."""
        tokens = range(_PROOF_TOKENS)
        self._context.decode(tokens, tokens, [0] * _PROOF_TOKENS, [False] * _PROOF_TOKENS)
        try:
            whole = self._context.export_slot(0)
            if cut:
                rest = self._context.state_bytes(0, partial=True) - len(state.HEAD) if self._partial else 0
                self._layout = state.read(whole, rest).layout
            blocks = self.copy_out(0, [(0, 1), (1, _PROOF_TOKENS)])
            checkpoint = self.checkpoint(0, _PROOF_TOKENS)
            joined = self._join(blocks, _PROOF_TOKENS, checkpoint)
            if not np.array_equal(joined, whole):
                return False
            expected = self._next_logits(0)
            self._context.forget(0)
            if not self.copy_in(last_slot, blocks, _PROOF_TOKENS, checkpoint):
                return False
            return bool(np.abs(self._next_logits(last_slot) - expected).max() <= _TOLERANCE * np.abs(expected).max())
        except ValueError:
            return False
        finally:
            self._context.forget(0)
            self._context.forget(last_slot)

    def _next_logits(self, slot: int) -> npt.NDArray[np.float32]:
        return self._context.decode([_PROOF_TOKENS], [_PROOF_TOKENS], [slot], [True]).copy()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
