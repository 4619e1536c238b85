"""A GGUF model as the converter reads it: metadata and tensors, over all parts of a split file.

For the converter process, and for whoever in the server asks what a file is: imports neither MLX nor, but for the
tensors' bytes, NumPy. Refuses what no engine can load, naming the file and the way out; what
MLX alone cannot load is ``lmx.hub.gguf.mlx``'s to say.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmx.errors import ModelInvalid
from lmx.hub.gguf.header import Tensor, read_header
from lmx.hub.gguf.parts import part_paths

if TYPE_CHECKING:
    import numpy as np

_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


class GgufFile:
    """Metadata and tensor table of a checked file; without ``words`` the vocabulary's lists are empty. Raises
    OSError, ModelInvalid."""

    def __init__(self, path: Path, *, words: bool = True) -> None:
        self.path = path
        header = read_header(path, words=words)
        self.fields = header.fields
        self.tensors = header.tensors
        self.parts = [path]
        if self.get("split.count", 1) > 1:
            self._add_parts(self.get("split.no"), self.get("split.count"))
        self.architecture = str(self.get("general.architecture", ""))
        if not self.architecture:
            raise ModelInvalid(f"{path} does not name its architecture (general.architecture); no engine can load it.")
        if not self.tensors:
            raise ModelInvalid(f"{path} holds a vocabulary only and no weights. Name the model's own file.")

    def _add_parts(self, number: int, count: int) -> None:
        paths = part_paths(self.path)
        if len(paths) != count or number >= count or paths[number] != self.path:
            raise ModelInvalid(
                f"{self.path} is part {number + 1} of {count} of a split model; llama.cpp finds the others by name. "
                f"Call the parts NAME-00001-of-{count:05}.gguf to NAME-{count:05}-of-{count:05}.gguf."
            )
        if number != 0:
            raise ModelInvalid(f"{self.path} is part {number + 1} of {count}. Name the first: {paths[0]}")
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ModelInvalid(
                f"{self.path} is split into {count} parts, of which are missing: {', '.join(missing)}. "
                f"Download them into {self.path.parent}."
            )
        self.parts = paths
        for path in paths[1:]:
            self.tensors |= read_header(path, words=False).tensors

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python object."""
        return self.fields.get(key, default)

    def own(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own, for example ``llama.block_count``."""
        return self.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.own(key)
        if value is None:
            raise ModelInvalid(f"{self.path} lacks {self.architecture}.{key}, without which no engine can load it")
        return value

    @property
    def sampling(self) -> dict[str, float]:
        """By the names of generation_config.json, from which llama.cpp's converter has them."""
        found = {name: self.get(f"general.sampling.{key}") for name, key in _SAMPLING.items()}
        return {name: value for name, value in found.items() if isinstance(value, int | float) and value >= 0}

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.parts)

    @property
    def quantization(self) -> str:
        """The type that most matrices have."""
        matrices = [t for t in self.tensors.values() if len(t.shape) > 1 and t.name != "token_embd.weight"]
        kinds = Counter(str(tensor.kind.name) for tensor in matrices or self.tensors.values())
        return kinds.most_common(1)[0][0]


def raw(tensor: Tensor) -> "np.ndarray":
    """The tensor's bytes, mapped from the file: (rows, ..., bytes of a row)."""
    import gguf
    import numpy as np

    data = np.memmap(tensor.path, np.uint8, "r", tensor.offset, tensor.nbytes)
    return np.reshape(data, gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind))
