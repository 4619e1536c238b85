"""What KV depends on beside the tokens, in one string: weights, configuration, the libraries that compute, how KV is
held. Two models of one fingerprint may share what is kept on the disk. Pure file reading; called once at load."""

import hashlib
import re
from importlib.metadata import version
from pathlib import Path

FORMAT = 1
"""Of blocks; another one makes what was kept before unknown."""
# Of each file its ends and some places between: weights that differ do so everywhere.
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024
_LIBRARIES = {"mlx": ("mlx", "mlx-lm"), "llama": ("llama-cpp-python",)}


def fingerprint(path: Path, backend: str, kv: str) -> str:
    """Of a model folder or GGUF file; ``kv``: how its KV is held, in words. 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    versions = [f"{name} {version(name)}" for name in _LIBRARIES[backend]]
    digest.update("\n".join([f"lmx {FORMAT}", kv, *versions]).encode())
    if path.is_file():
        part = re.fullmatch(r"(.*)-\d{5}(-of-\d{5}\.gguf)", path.name)
        names = (re.escape(part[1]) + r"-\d{5}" + re.escape(part[2])) if part else re.escape(path.name)
        files = sorted(file for file in path.parent.iterdir() if re.fullmatch(names, file.name))
    else:
        files = sorted([*path.glob("config.json"), *path.glob("*.safetensors")])
    for file in files:
        size = file.stat().st_size
        digest.update(f"\n{file.name if path.is_dir() else ''} {size}\n".encode())
        step = max((size - _SAMPLE_BYTES) // (_SAMPLES - 1), _SAMPLE_BYTES)
        with file.open("rb") as data:
            for place in range(0, size, step):
                data.seek(place)
                digest.update(data.read(_SAMPLE_BYTES))
    return digest.hexdigest()
