"""llama.cpp's own tokenizer over a GGUF file's vocabulary: the judge of ``lmx.hub.gguf.tokenizer``.

Tests use it. It loads no weights, and reads the library through its low-level API.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


class LlamaVocabulary:
    """``pre_tokenizer`` stands in for the one that the file names."""

    def __init__(self, path: Path, pre_tokenizer: str | None = None) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        if pre_tokenizer is not None:
            overrides = (llama_cpp.llama_model_kv_override * 2)()
            overrides[0].key = b"tokenizer.ggml.pre"
            overrides[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            overrides[0].value.val_str = pre_tokenizer.encode()
            parameters.kv_overrides = overrides
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self._model, f"llama.cpp cannot load {path}"
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        tokens = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, parse_special)
        assert count >= 0, (count, text)
        return tokens[:count]

    def piece(self, token: int, *, special: bool) -> bytes:
        room = ctypes.create_string_buffer(1024)
        count = llama_cpp.llama_token_to_piece(self._vocab, token, room, len(room), 0, special)
        assert count >= 0, (token, count)
        return room.raw[:count]

    def ends(self) -> set[int]:
        """The tokens that llama.cpp takes for the end of a generation."""
        return {token for token in range(self.size) if llama_cpp.llama_vocab_is_eog(self._vocab, token)}


@contextmanager
def llama_vocabulary(path: Path, pre_tokenizer: str | None = None) -> Iterator[LlamaVocabulary]:
    vocabulary = LlamaVocabulary(path, pre_tokenizer)
    try:
        yield vocabulary
    finally:
        vocabulary.close()
