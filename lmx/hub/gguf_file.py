"""Opens a GGUF file and checks that lmx can convert it, before anything is loaded.

Part of the converter process. Every refusal names the file, what it holds, and the way out. Facts about the format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections import Counter
from pathlib import Path
from typing import Any

import gguf

from lmx.errors import ModelInvalid

ARCHITECTURES = ("llama",)
TENSOR_TYPES = ("F32", "F16", "Q4_0", "Q4_1", "Q8_0")
"""What ``mx.load`` takes over bit for bit. The K- and IQ-quants have no packed form in MLX."""


class GgufFile:
    """Metadata and tensor list of a checked file. Raises ModelInvalid."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ModelInvalid(f"{path} is no GGUF file: it begins with {magic!r} where b'GGUF' is expected.")
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise ModelInvalid(
                f"{path} is truncated or damaged: its {path.stat().st_size} bytes end before the metadata or the "
                f"tensor data that its header announces ({error}). Download the file again."
            ) from None
        self._fields = reader.fields
        self.tensor_types: dict[str, str] = {t.name: t.tensor_type.name for t in reader.tensors}
        self.architecture = str(self.get("general.architecture", ""))
        self._check(reader.tensors)

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python object."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def own(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own, for example ``llama.block_count``."""
        return self.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.own(key)
        if value is None:
            raise ModelInvalid(f"{self.path} lacks the metadata {self.architecture}.{key}; it cannot be converted.")
        return value

    @property
    def quantization(self) -> str:
        """The type that most matrices have."""
        matrices = Counter(
            kind for name, kind in self.tensor_types.items() if kind != "F32" and "token_embd" not in name
        )
        return matrices.most_common(1)[0][0] if matrices else "F32"

    def _check(self, tensors: list[Any]) -> None:
        path = self.path
        if self.get("split.count", 1) > 1:
            raise ModelInvalid(
                f"{path} is one of {self.get('split.count')} parts of a split model. Join them first: "
                "llama-gguf-split --merge FIRST-PART OUTPUT.gguf"
            )
        if self.architecture not in ARCHITECTURES:
            raise ModelInvalid(
                f"{path} is of the architecture {self.architecture!r}; lmx converts {', '.join(ARCHITECTURES)}. "
                "Take the model as an MLX folder (mlx-community on Hugging Face has most)."
            )
        if not tensors:
            raise ModelInvalid(f"{path} holds a vocabulary only and no weights. Name the model's own file.")
        if self.own("expert_count", 0) > 0:
            raise ModelInvalid(f"{path} is a mixture of experts, which lmx converts from MLX folders only.")
        unread = Counter(kind for kind in self.tensor_types.values() if kind not in TENSOR_TYPES)
        if unread:
            found = ", ".join(f"{kind} ({count} tensors)" for kind, count in unread.most_common())
            raise ModelInvalid(
                f"{path} holds tensors of type {found}; MLX reads {', '.join(TENSOR_TYPES)}. "
                "Take a file in one of these, or the model as an MLX folder."
            )
