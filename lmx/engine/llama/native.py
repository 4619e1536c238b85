"""Everything taken from llama-cpp-python, and nothing else of lmx imports it: a model, its KV, one batch at a time.

The bindings are ctypes over llama.cpp's C API, which changes between versions, so the tested one is pinned
(``lmx[gguf]``). Knows slots (llama.cpp's sequence ids) and cells of KV; no scheduler, no sampling. Called by
``lmx.engine.llama.backend`` on the engine's one thread. A ``GGML_ASSERT`` in here aborts the process: the server tells
the reason from the last lines.
"""

import ctypes
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lmx.engine.budget import KVCost
from lmx.engine.llama.state import Bytes, allocate_bytes
from lmx.errors import ModelInvalid

# llama.cpp would start a debugger to print a backtrace when it aborts; Python's fault handler tells enough.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
# On Linux its threads meet at hundreds of barriers a step, where GNU OpenMP spins for milliseconds before it sleeps.
# When others wanted the cores too, that made of a step of 5 ms one of 50 to 4,000; with this it takes 20, and on idle
# cores nothing changes.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
import llama_cpp as C

KV_TYPES = {16: C.GGML_TYPE_F16, 8: C.GGML_TYPE_Q8_0, 4: C.GGML_TYPE_Q4_0}
MAX_SLOTS = int(C.llama_max_parallel_sequences())
OUTPUTS = 32
"""Tokens of a batch whose logits can be had, at least (one of each slot, and some of prompts whose log-probabilities
are wanted): what is held is so many times the vocabulary."""
# GCC 12 takes most of the tile configuration that ggml's AMX kernels load for dead stores and drops them: the first
# product with quantised weights faults (a Sapphire Rapids under Debian 12). A build does not say what compiled it, so
# none of them gets weights laid out for AMX.
AMX = b"AMX_INT8 = 1" in C.llama_print_system_info()
_KEPT_ERRORS = 3
# enum ggml_log_level, which the bindings lack.
_WARN, _ERROR, _CONT = 3, 4, 5
_LEVELS = {_WARN: "warning", _ERROR: "error"}
# The cells of all sequences together may well be more than the model's context, which each one keeps within.
_NO_CONCERN = "n_ctx_train"


class _Log:
    """llama.cpp's log: warnings and errors (or everything) go to this process's output, which is the engine's log in
    the server. The last errors are kept, to explain a load that fails."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=_KEPT_ERRORS)
        self.everything = False
        self._level = 0
        self._line = ""
        self._callback = C.llama_log_callback(self._take)
        C.llama_log_set(self._callback, None)

    def _take(self, level: int, text: bytes, _: Any) -> None:
        if level != _CONT:
            self._level = level
        *lines, self._line = (self._line + text.decode(errors="replace")).split("\n")
        for line in filter(str.strip, lines):
            if self._level == _ERROR:
                self.errors.append(line.strip())
            if self.everything or (self._level in _LEVELS and _NO_CONCERN not in line):
                print(f"llama.cpp: {_LEVELS.get(self._level, 'info')}: {line}")


_log = _Log()


class Model:
    """The weights of one GGUF file. Raises ModelInvalid with llama.cpp's own reason."""

    def __init__(self, path: str, *, gpu_layers: int, mmap: bool, log_everything: bool = False) -> None:
        _log.everything = log_everything
        _log.errors.clear()
        C.llama_backend_init()
        parameters = C.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        parameters.load_mode = C.LLAMA_LOAD_MODE_MMAP if mmap else C.LLAMA_LOAD_MODE_NONE
        parameters.use_extra_bufts = not AMX
        self.pointer = C.llama_model_load_from_file(path.encode(), parameters)
        if not self.pointer:
            raise ModelInvalid(f"llama.cpp cannot load {path}: {_reason()}.")
        weakref.finalize(self, C.llama_model_free, self.pointer)
        if C.llama_model_has_encoder(self.pointer) or not C.llama_model_has_decoder(self.pointer):
            raise ModelInvalid(f"{path} is an encoder; lmx generates text with decoder-only models.")
        vocabulary = C.llama_model_get_vocab(self.pointer)
        self.vocab_size = int(C.llama_vocab_n_tokens(vocabulary))
        named = (C.llama_vocab_eos(vocabulary), C.llama_vocab_eot(vocabulary))
        self.eos_ids = tuple(int(token) for token in named if token >= 0)
        self.context_length = int(C.llama_model_n_ctx_train(self.pointer))
        if self.context_length < 1:
            raise ModelInvalid(f"{path} names no context length.")
        self.heads = int(C.llama_model_n_head(self.pointer))
        self.window = int(C.llama_model_n_swa(self.pointer))
        self.recurrent = bool(C.llama_model_is_recurrent(self.pointer) or C.llama_model_is_hybrid(self.pointer))
        self.weights_bytes = int(C.llama_model_size(self.pointer))
        self.quantization = str(C.llama_ftype_name(C.llama_model_ftype(self.pointer)).decode())
        self.architecture = self._metadata("general.architecture")
        self.on_gpu = bool(C.llama_supports_gpu_offload()) and gpu_layers != 0

    def _metadata(self, key: str) -> str:
        text = ctypes.create_string_buffer(256)
        length = C.llama_model_meta_val_str(self.pointer, key.encode(), text, len(text))
        return text.value.decode(errors="replace") if length >= 0 else ""

    def vocabulary(self) -> list[bytes]:
        """The tokens' texts, as the file has them."""
        vocabulary = C.llama_model_get_vocab(self.pointer)
        return [C.llama_vocab_get_text(vocabulary, token) for token in range(self.vocab_size)]

    def pads_from(self, token: int) -> bool:
        """Whether no text has a token of that id or a higher one."""
        vocabulary = C.llama_model_get_vocab(self.pointer)
        attributes = (C.llama_vocab_get_attr(vocabulary, each) for each in range(token, self.vocab_size))
        return all(each & C.LLAMA_TOKEN_ATTR_UNUSED for each in attributes)

    def measure_kv(self, context: "Context", forward_tokens: int) -> KVCost:
        """By llama.cpp's own measure, its copy of a sequence's state (a few bytes a cell of bookkeeping included): what
        two tokens in an empty ``context`` add to it. Sliding layers hold a window and what one forward may bring."""
        whole, partial = [], []
        for position in range(2):
            context.decode([0], [position], [0], [False])
            whole.append(C.llama_state_seq_get_size(context.pointer, 0))
            partial.append(C.llama_state_seq_get_size_ext(context.pointer, 0, C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY))
        context.forget(0)
        per_token, in_window = whole[1] - whole[0], 0
        if self.window:
            in_window = partial[1] - partial[0]
            per_token -= in_window
        constant = partial[0] if self.recurrent else 0
        return KVCost(max(per_token, 1), constant + in_window * (self.window + forward_tokens))


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def _reason() -> str:
    """llama.cpp's first word on a failure says what is wrong, the next ones what it meant for its callers."""
    return _log.errors[0].removeprefix("llama_model_load: error loading model: ") if _log.errors else "no reason given"


class Context:
    """KV of ``cells`` tokens for ``slots`` sequences, and the buffers of a batch.

    With ``streams`` each slot has an equal share of the cells to itself, otherwise all share them (llama.cpp's unified
    KV). A batch of at most ``batch_tokens`` is computed ``forward_tokens`` at a time; only the latter costs memory.
    Raises ModelInvalid when llama.cpp cannot make it, for want of memory above all.
    """

    def __init__(
        self,
        model: Model,
        *,
        cells: int,
        slots: int,
        streams: bool,
        batch_tokens: int,
        forward_tokens: int,
        kv_bits: int,
        threads: int,
        outputs: int = OUTPUTS,
        fused: bool = True,
    ) -> None:
        """``outputs``: tokens of a batch whose logits can be wanted, at most. ``fused``: attention keeps no scores, if
        llama.cpp finds that the device has such a kernel; a quantised V needs it."""
        parameters = C.llama_context_default_params()
        parameters.n_ctx = cells
        parameters.n_batch = batch_tokens
        parameters.n_ubatch = forward_tokens
        parameters.n_seq_max = slots
        # Otherwise buffers are made for logits of every token of a batch.
        self.outputs = min(max(slots, outputs, OUTPUTS), batch_tokens)
        parameters.n_outputs_max = self.outputs
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = KV_TYPES[kv_bits]
        kind = C.LLAMA_FLASH_ATTN_TYPE_AUTO if fused else C.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.flash_attn_type = kind if kv_bits == 16 else C.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.kv_unified = not streams
        parameters.swa_full = False
        parameters.no_perf = True
        _log.errors.clear()
        self.pointer = C.llama_init_from_model(model.pointer, parameters)
        if not self.pointer:
            raise ModelInvalid(f"llama.cpp cannot make a context of {cells} tokens: {_reason()}.")
        # The model is an argument only to be kept alive as long as this.
        weakref.finalize(self, lambda pointer, _: C.llama_free(pointer), self.pointer, model)
        self.slots = slots
        self.batch_tokens = int(C.llama_n_batch(self.pointer))  # no more than the context
        self._memory = C.llama_get_memory(self.pointer)
        self._vocab_size = model.vocab_size
        self._window = model.window
        self._make_batch()

    def _make_batch(self) -> None:
        """llama.cpp's batch over NumPy arrays, so that filling it costs no call a token."""
        size = self.batch_tokens
        self._tokens, self._positions, self._slots = (np.zeros(size, np.int32) for _ in range(3))
        self._one = np.ones(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        self._slot_pointers = self._slots.ctypes.data + 4 * np.arange(size, dtype=np.uintp)

        self._batch = C.llama_batch(
            n_tokens=0,
            token=_pointer(self._tokens, C.llama_token),
            pos=_pointer(self._positions, C.llama_pos),
            n_seq_id=_pointer(self._one, ctypes.c_int32),
            seq_id=_pointer(self._slot_pointers, ctypes.POINTER(C.llama_seq_id)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], wanted: Sequence[bool]
    ) -> npt.NDArray[np.float32]:
        """At most ``batch_tokens`` tokens, each of one slot at its position; their KV is kept. Slots with cells or a
        recurrent state of their own are computed in one forward as far as they ascend by one in the batch.

        The logits (n, V) of the n ``wanted`` tokens, in their order: a view that the next call overwrites.
        """
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._slots[:count] = slots
        self._wanted[:count] = wanted
        self._batch.n_tokens = count
        status = C.llama_decode(self.pointer, self._batch)
        if status != 0:
            problem = "found no free KV cells, though the scheduler counted some" if status == 1 else "failed"
            raise RuntimeError(f"llama_decode of {count} tokens {problem} (status {status}): {_reason()}")
        rows = int(self._wanted[:count].sum())
        if not rows:
            return np.empty((0, self._vocab_size), np.float32)
        return np.ctypeslib.as_array(C.llama_get_logits(self.pointer), (rows, self._vocab_size))

    def forget(self, slot: int, start: int = 0) -> bool:
        """Free the slot's cells from position ``start`` on. False: its cache cannot go back to ``start`` (a recurrent
        state, a window that has moved on) and is good for nothing but to be forgotten whole."""
        if not C.llama_memory_seq_rm(self._memory, slot, start, -1):
            return False
        # llama.cpp lets new positions overwrite those that left the window, and does not say that they would be needed.
        needed = max(start - self._window + 1, 0)
        return not (self._window and start) or 0 <= C.llama_memory_seq_pos_min(self._memory, slot) <= needed

    def last_position(self, slot: int) -> int:
        """The highest position whose KV the slot holds; -1: none."""
        return int(C.llama_memory_seq_pos_max(self._memory, slot))

    def share(self, source: int, target: int, start: int, end: int) -> None:
        """Give an empty slot positions [start, end) of another one. Only shared cells: they are then both's, until one
        forgets them."""
        C.llama_memory_seq_cp(self._memory, source, target, start, end)

    def wipe(self) -> None:
        """Forget every slot and zero every cell."""
        C.llama_memory_clear(self._memory, True)

    def export_slot(
        self, slot: int, *, partial: bool = False, allocate: Callable[[int], Bytes] = allocate_bytes
    ) -> Bytes:
        """A copy of all that the slot holds; ``partial``: only of what stands for all its tokens, recurrent states and
        the windows of sliding layers (of a model with neither: all the same)."""
        flags = C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial else 0
        size = self.state_bytes(slot, partial=partial)
        data = allocate(size)
        written = C.llama_state_seq_get_data_ext(self.pointer, _pointer(data, ctypes.c_uint8), size, slot, flags)
        if written != size:
            raise RuntimeError(f"llama.cpp gave out {written} of the {size} bytes of a sequence's state")
        return data

    def import_slot(self, slot: int, data: Bytes) -> bool:
        """Fill a slot; False for data that do not fit this model and KV type, or its cells, and then it is empty."""
        if C.llama_state_seq_set_data(self.pointer, _pointer(data, ctypes.c_uint8), len(data), slot):
            return True
        self.forget(slot)  # whatever was read before the fault
        return False

    def state_bytes(self, slot: int, *, partial: bool = False) -> int:
        flags = C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial else 0
        return int(C.llama_state_seq_get_size_ext(self.pointer, slot, flags))


POOLING = {
    "mean": C.LLAMA_POOLING_TYPE_MEAN,
    "cls": C.LLAMA_POOLING_TYPE_CLS,
    "last": C.LLAMA_POOLING_TYPE_LAST,
    "": C.LLAMA_POOLING_TYPE_UNSPECIFIED,
}
"""By ``protocol.Pooling.mode``; "": what the file says."""


class EmbeddingContext:
    """What makes vectors: at most ``tokens`` of at most ``slots`` inputs in one forward. Raises ModelInvalid."""

    def __init__(self, model: Model, *, tokens: int, slots: int, pooling: str, threads: int) -> None:
        parameters = C.llama_context_default_params()
        # An encoder sees an input whole: all of a batch is one forward.
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = tokens
        parameters.n_seq_max = slots
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.embeddings = True
        parameters.pooling_type = POOLING[pooling]
        parameters.kv_unified = True
        parameters.no_perf = True
        _log.errors.clear()
        self.pointer = C.llama_init_from_model(model.pointer, parameters)
        if not self.pointer:
            raise ModelInvalid(f"llama.cpp cannot make a context of {tokens} tokens: {_reason()}.")
        weakref.finalize(self, lambda pointer, _: C.llama_free(pointer), self.pointer, model)
        kind = C.llama_pooling_type(self.pointer)
        self.pooling = next((name for name, value in POOLING.items() if value == kind), "")
        """The one in use; "": none that makes a vector of a text."""
        self.dimension = int(C.llama_model_n_embd(model.pointer))
        self._memory = C.llama_get_memory(self.pointer)
        self._batch = C.llama_batch_init(tokens, 0, 1)
        weakref.finalize(self, C.llama_batch_free, self._batch)

    def embed(self, inputs: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float32]:
        """The vectors (n, dimension), as they come out of the pooling."""
        batch, place = self._batch, 0
        for slot, tokens in enumerate(inputs):
            for position, token in enumerate(tokens.tolist()):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, slot
                batch.logits[place] = 1
                place += 1
        batch.n_tokens = place
        if self._memory:
            C.llama_memory_clear(self._memory, True)
        status = C.llama_decode(self.pointer, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {place} tokens failed (status {status}): {_reason()}")
        vectors = np.empty((len(inputs), self.dimension), np.float32)
        for slot in range(len(inputs)):
            found = C.llama_get_embeddings_seq(self.pointer, slot)
            vectors[slot] = np.ctypeslib.as_array(found, (self.dimension,))
        return vectors
