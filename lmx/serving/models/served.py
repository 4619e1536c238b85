"""A model that is being served: its words, and the engine that runs it. What the API faces see of a model."""

from dataclasses import dataclass
from typing import ClassVar

from lmx.chat.encoder import TextEncoder
from lmx.chat.model import ChatModel, Source
from lmx.hub.inventory import ModelFolder
from lmx.serving.engine import Engine


@dataclass(frozen=True, slots=True)
class Served:
    """A model that writes."""

    id: str
    folder: ModelFolder
    chat: ChatModel
    engine: Engine
    created: int
    """Unix time of its start."""
    asked_context: int = 0
    """What its settings limit the context to; 0: nothing."""
    names: tuple[str, ...] = ()
    """By any of which the settings may call it."""
    kind: ClassVar = "llm"

    @property
    def source(self) -> Source:
        """Of its words, for another process."""
        return self.chat.source

    @property
    def context_length(self) -> int:
        """Longest prompt plus answer. While the model loads only its folder and its settings can tell; 0 where they do
        not."""
        if self.engine.ready:
            return self.engine.ready.context_length
        return min(filter(None, (self.folder.context_length, self.asked_context)), default=0)


@dataclass(frozen=True, slots=True)
class ServedEmbedding:
    """A model that makes vectors of texts."""

    id: str
    folder: ModelFolder
    encoder: TextEncoder
    engine: Engine
    created: int
    kind: ClassVar = "embeddings"

    @property
    def source(self) -> Source:
        """Of its words, for another process."""
        return Source(str(self.folder.words))

    @property
    def dimension(self) -> int:
        """Of its vectors; 0 until the engine has been ready."""
        return self.engine.ready.dimension if self.engine.ready else 0

    @property
    def ranks(self) -> bool:
        """A cross-encoder: it scores pairs of texts, and makes no vectors."""
        return self.encoder.sentence.pooling.mode == "rank"

    @property
    def context_length(self) -> int:
        """Longest input: what its files say, as far as the engine can. 0: nobody can tell yet."""
        limits = [self.encoder.sentence.max_tokens, self.engine.ready.context_length if self.engine.ready else 0]
        return min(filter(None, limits), default=0)


AnyServed = Served | ServedEmbedding
