"""The MLX embedder: a step's inputs become groups of like length, the groups' hidden states vectors.

On a CPU an encoder's arrays are NumPy's, and each core takes a share of the step in a thread of its own. Decides
nothing; called by the loop.
"""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from lmx.engine.embedding import families
from lmx.engine.embedding.backend import ENCODERS, Facts, Input, MemoryFacts, read_config
from lmx.engine.embedding.encoder import Group
from lmx.engine.embedding.kernels import Array
from lmx.engine.embedding.pooling import Classifier, Head
from lmx.engine.mlx import handles
from lmx.errors import ModelInvalid
from lmx.protocol import Load, Pooling

Hidden = Callable[[list[Group]], list[Array]]

# Tokens of a step, by device (CPU, GPU): large enough for the matrix products, small enough for a cancel.
_STEP_TOKENS = (2048, 16384)
# The share of a group that may be padding. On a CPU padding costs what it computes and a group nearly nothing.
_PADDING_SHARE = (0.0, 0.15)


class MLXEmbedder:
    """Make it with ``load``."""

    def __init__(self, hidden: Hidden, head: Callable[..., mx.array], facts: Facts, *, threads: int = 1) -> None:
        """``threads`` above 1: ``hidden`` uses NumPy only."""
        self._hidden = hidden
        self._head = head
        self.facts = facts
        self._on_gpu = mx.default_device() == mx.gpu
        self._threads = ThreadPoolExecutor(threads) if threads > 1 else None
        self._shares = threads
        self._own_arrays = handles.arrays()
        """The model's: the collector is told to forget them."""

    @classmethod
    def load(cls, options: Load) -> "MLXEmbedder":
        """Load ``options.path``. Raises ModelInvalid."""
        folder = Path(options.path)
        config = read_config(folder)
        pooling = options.embedding or Pooling()
        if config.get("model_type") in ENCODERS:
            embedder = cls._load_encoder(folder, config, pooling, options)
        else:
            from lmx.engine.embedding.decoder import load_decoder

            # mlx-lm's code keeps arrays of its own, made by one thread and good for it alone.
            decoder = load_decoder(folder, options.wired_bytes)
            head, loaded = Head(pooling, "last", decoder.width), decoder.loaded
            facts = _facts(
                config, options, head, loaded.context_length, loaded.vocab_size, loaded.weights_bytes, loaded.dtype
            )
            embedder = cls(decoder.hidden, head, facts)
        return embedder

    @classmethod
    def _load_encoder(cls, folder: Path, config: dict[str, Any], pooling: Pooling, options: Load) -> "MLXEmbedder":
        try:
            encoder, weights = families.load_encoder(folder, config)
            head: Head | Classifier
            if pooling.mode == "rank":
                head = families.load_classifier(weights, config, sigmoid=pooling.normalize)
            else:
                head = Head(pooling, "mean", encoder.width)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelInvalid(f"{folder} cannot be loaded: {type(error).__name__}: {error}", param="model") from error
        shape, on_gpu = encoder.shape, mx.default_device() == mx.gpu
        arrays = [*_arrays(encoder), *_arrays(tuple(head.layers))]
        mx.eval(arrays)
        size, dtype = sum(array.nbytes for array in arrays), str(encoder.words.dtype).removeprefix("mlx.core.")
        facts = _facts(config, options, head, shape.context_length, shape.vocab_size, size, dtype)
        if on_gpu:
            return cls(encoder.hidden, head, facts)
        return cls(_in_numpy(encoder).hidden, head, facts, threads=_cores())

    def embed(self, inputs: Sequence[Input]) -> npt.NDArray[np.float32]:
        order = sorted(range(len(inputs)), key=lambda index: len(inputs[index].tokens))
        shares = _shares([len(inputs[index].tokens) for index in order], self._shares)
        parts = [
            list(_groups([inputs[i] for i in order[start:end]], _PADDING_SHARE[self._on_gpu])) for start, end in shares
        ]
        states = map(self._hidden, parts) if self._threads is None else self._threads.map(self._hidden, parts)
        vectors = np.empty((len(inputs), self.facts.dimension), np.float32)
        found = [
            self._head(hidden if isinstance(hidden, mx.array) else mx.array(hidden), group.lengths)
            for groups, state in zip(parts, states, strict=True)
            for group, hidden in zip(groups, state, strict=True)
        ]
        vectors[order] = np.array(mx.concatenate(found))
        return vectors

    def memory(self) -> MemoryFacts:
        alive = handles.arrays()
        return MemoryFacts(
            mx.get_active_memory(),
            mx.get_peak_memory(),
            mx.get_cache_memory(),
            alive,
            handles=alive + self._own_arrays,
            most_handles=handles.most(),
        )


def _facts(
    config: dict[str, Any],
    options: Load,
    head: Head | Classifier,
    context: int,
    vocab_size: int,
    weights_bytes: int,
    dtype: str,
) -> Facts:
    gpu = mx.default_device() == mx.gpu
    return Facts(
        architecture=str(config.get("model_type", "unknown")),
        context_length=min(context, options.context_length or context),
        vocab_size=vocab_size,
        dimension=head.dimension,
        weights_bytes=weights_bytes,
        device=f"gpu ({mx.device_info().get('device_name', platform.processor())})" if gpu else "cpu",
        dtype=dtype,
        path_reason=head.words,
        step_tokens=_STEP_TOKENS[gpu],
    )


def _arrays(part: Any) -> Iterator[mx.array]:
    """Every array in records and tuples of records."""
    if isinstance(part, mx.array):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from _arrays(item)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _arrays(getattr(part, field.name))


def _in_numpy(part: Any) -> Any:
    """A record, with the arrays in it and in its records as NumPy's: the same memory."""
    if isinstance(part, mx.array):
        return np.asarray(part)
    if isinstance(part, tuple):
        return tuple(_in_numpy(item) for item in part)
    if is_dataclass(part) and not isinstance(part, type):
        return type(part)(*(_in_numpy(getattr(part, field.name)) for field in fields(part)))
    return part


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(lengths: list[int], count: int) -> list[tuple[int, int]]:
    """Ranges of ascending ``lengths`` of about the same work each."""
    total, start, done = sum(lengths), 0, 0
    ranges: list[tuple[int, int]] = []
    for index, length in enumerate(lengths):
        done += length
        if done * count >= total * (len(ranges) + 1) or index == len(lengths) - 1:
            ranges.append((start, index + 1))
            start = index + 1
    return ranges


def _groups(inputs: list[Input], padding_share: float) -> Iterator[Group]:
    """Of inputs in ascending order of length."""
    start, tokens = 0, 0
    for index, item in enumerate(inputs):
        length = len(item.tokens)
        padded = length * (index - start + 1)
        if index > start and padded - (tokens + length) > padding_share * padded:
            yield _group(inputs[start:index])
            start, tokens = index, 0
        tokens += length
    yield _group(inputs[start:])


def _group(inputs: list[Input]) -> Group:
    lengths = np.array([len(item.tokens) for item in inputs], np.int32)
    tokens = np.zeros((len(inputs), int(lengths[-1])), np.int32)
    for row, item in zip(tokens, inputs, strict=True):
        row[: len(item.tokens)] = item.tokens
    seconds = np.array([item.second or len(item.tokens) for item in inputs], np.int32)
    return Group(tokens, lengths, seconds if (seconds < lengths).any() else None)
