"""The llama.cpp embedder, for GGUF files: a step's inputs are one ``llama_batch``, pooled by llama.cpp itself.

Decides nothing; called by the loop on the engine's one thread.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lmx.engine.embedding.backend import Facts, Input, MemoryFacts
from lmx.engine.llama.backend import default_threads
from lmx.engine.llama.native import POOLING, EmbeddingContext, Model
from lmx.errors import ModelInvalid
from lmx.protocol import Load, Pooling

_SLOTS = 64
_STEP_TOKENS = 2048
# A context makes buffers for its longest forward; no input may be longer.
_MOST_TOKENS = 8192


class LlamaEmbedder:
    """Make it with ``load``."""

    def __init__(self, model: Model, options: Load) -> None:
        pooling = options.embedding or Pooling()
        if pooling.dense or pooling.mode not in POOLING:
            raise ModelInvalid(
                f"llama.cpp pools by {', '.join(filter(None, POOLING))} and without further layers, and not by "
                f"{pooling.mode!r} with {len(pooling.dense)} of them.",
                param="model.embedding",
            )
        context = min(model.context_length, options.context_length or _MOST_TOKENS, _MOST_TOKENS)
        threads = options.threads or default_threads()
        tokens = max(_STEP_TOKENS, context)
        made = EmbeddingContext(model, tokens=tokens, slots=_SLOTS, pooling=pooling.mode, threads=threads)
        if not made.pooling:  # a model that writes: its file says nothing of it
            made = EmbeddingContext(model, tokens=tokens, slots=_SLOTS, pooling="last", threads=threads)
        self._context = made
        self._normalize = pooling.normalize
        self._tokens = tokens
        self.facts = Facts(
            architecture=model.architecture,
            context_length=context,
            vocab_size=model.vocab_size,
            dimension=made.dimension,
            weights_bytes=model.weights_bytes,
            device="gpu" if model.on_gpu else "cpu",
            dtype=model.quantization,
            path_reason=f"{made.pooling} pooling" + (", normalised" if self._normalize else ""),
            step_tokens=_STEP_TOKENS,
        )

    @classmethod
    def load(cls, options: Load) -> "LlamaEmbedder":
        """Load ``options.path``. Raises ModelInvalid."""
        everything = options.log_level == "debug"
        model = Model(options.path, gpu_layers=options.gpu_layers, mmap=options.mmap, log_everything=everything)
        return cls(model, options)

    def embed(self, inputs: Sequence[Input]) -> npt.NDArray[np.float32]:
        parts = [self._context.embed([item.tokens for item in part]) for part in self._parts(inputs)]
        vectors = np.concatenate(parts)
        if self._normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _parts(self, inputs: Sequence[Input]) -> Iterator[list[Input]]:
        """As many as a forward takes."""
        part: list[Input] = []
        for item in inputs:
            if part and (len(part) == _SLOTS or sum(len(i.tokens) for i in part) + len(item.tokens) > self._tokens):
                yield part
                part = []
            part.append(item)
        yield part

    def memory(self) -> MemoryFacts:
        return MemoryFacts(0, 0, 0, 0)
