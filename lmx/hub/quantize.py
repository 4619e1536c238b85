"""The quantising child: ``python -P -m lmx.hub.quantize REQUEST`` makes MLX weights of a folder of plain safetensors.

mlx-lm does it (``mlx_lm.convert``'s own steps), shard by shard; what is not weights is copied as it is, which that
command leaves to transformers. A process of its own, because it needs MLX and much memory. It writes into
``models/.downloads``, and the folder appears whole or not at all. Started by ``lmx.serving.jobs``; for its lines see
``lmx.hub.child``. The server imports only ``Request`` and ``check``.
"""

import fnmatch
import hashlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmx.errors import InvalidRequest, ModelInvalid
from lmx.hub.download.land import RECORD
from lmx.hub.download.request import staging_folder
from lmx.hub.folder import inspect_folder, read_json

if TYPE_CHECKING:
    from lmx.hub.child import Voice

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
MODES: Mapping[str, tuple[int, int]] = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
"""With the group size and bits that each has, where affine has a choice."""
DTYPES = ("float16", "bfloat16", "float32")
PUBLISHER = "local"
"""Of what was made of a folder without one."""
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_WRITTEN = ("config.json", "*.safetensors.index.json")
_NOT_CONTENT = ("models_path", "low_disk_bytes", "promised_bytes")
_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Request:
    """The child's one argument."""

    model: str
    """Of the inventory: "publisher/name" or a name."""
    source: str
    models_path: str
    bits: int
    """0: not quantised, only made ``dtype``."""
    group_size: int
    mode: str
    dtype: str
    """"": as it is."""
    name: str
    """Of the folder to be made."""
    low_disk_bytes: int
    promised_bytes: int = 0
    """What other jobs will still write to the disk."""

    @property
    def folder(self) -> Path:
        publisher = self.model.partition("/")[0] if self.model.count("/") == 1 else PUBLISHER
        if not _NAME.fullmatch(publisher):
            publisher = PUBLISHER
        return Path(self.models_path) / publisher / self.name

    @property
    def staging(self) -> Path:
        key = hashlib.sha256(f"{self.source}\0{self.folder}".encode()).hexdigest()[:24]
        return staging_folder(Path(self.models_path), key)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check(
    model: str,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """What was left open filled in: bits, group_size, mode, dtype and name for a ``Request``. Raises InvalidRequest."""
    mode = mode or "affine"
    if mode not in MODES:
        raise InvalidRequest(f"mode {mode!r} is none of {', '.join(MODES)}.", param="mode")
    if dtype is not None and dtype not in DTYPES:
        raise InvalidRequest(f"dtype {dtype!r} is none of {', '.join(DTYPES)}.", param="dtype")
    default_group, default_bits = MODES[mode]
    whole = dtype is not None and bits in (None, 0) and mode == "affine" and group_size is None
    if bits == 0 and not whole:
        raise InvalidRequest("bits 0 (not quantised) needs a dtype, and no mode or group_size.", param="bits")
    bits = 0 if whole else bits or default_bits
    group_size = group_size or default_group
    if not whole and mode == "affine":
        if bits not in BITS:
            raise InvalidRequest(f"bits {bits} is none of {', '.join(map(str, BITS))}.", param="bits")
        if group_size not in GROUP_SIZES:
            raise InvalidRequest(
                f"group_size {group_size} is none of {', '.join(map(str, GROUP_SIZES))}.", param="group_size"
            )
    elif not whole and (group_size, bits) != MODES[mode]:
        raise InvalidRequest(
            f"{mode} has {default_bits} bits in groups of {default_group}; leave them out.", param="mode"
        )
    if name is None:
        ending = (dtype or "").replace("bfloat", "bf").replace("float", "f") if whole else f"{bits}bit"
        name = f"{_plain_name(model)}-{ending if mode == 'affine' else mode}"
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"name {name[:100]!r} is no name for a folder: letters, digits, '.', '_', '-'.", param="name"
        )
    return {"bits": bits, "group_size": group_size, "mode": mode, "dtype": dtype or "", "name": name}


def _plain_name(model: str) -> str:
    """Of an id, what a folder may be called: without publisher, place ("@lmstudio") and the type of its numbers."""
    name = re.split(r"[@:]", model)[0].rpartition("/")[2]
    return re.sub(r"[-_.](bf16|fp?16|fp?32)$", "", re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII), flags=re.IGNORECASE)


def quantize(request: Request, voice: "Voice") -> Path:
    """Raises LmxError."""
    from lmx.hub import child

    source, folder, staging = Path(request.source), request.folder, request.staging
    made_of = {name: value for name, value in request.as_json().items() if name not in _NOT_CONTENT}
    try:
        with child.staged(staging, voice.tell):
            if folder.exists():
                shutil.rmtree(staging, ignore_errors=True)
                with suppress(OSError, ValueError):
                    if json.loads((folder / RECORD).read_text(encoding="utf-8")).get("converted") == made_of:
                        voice.tell("it was there already")
                        return folder
                raise ModelInvalid(f"{folder} is there already. Delete that model, or give this one another name.")
            for leftover in staging.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            _refuse_quantized(source)
            voice.tell("reading the weights")
            _write_weights(request, staging, voice)
            voice.tell("checking the result")
            _copy_rest(source, staging)
            (staging / RECORD).write_text(json.dumps({"converted": made_of}, indent=1), encoding="utf-8")
            inspect_folder(staging)
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging.rename(folder)
            return folder
    except OSError as error:
        raise child.disk_error(error, folder, "Then convert again.") from error


def _refuse_quantized(source: Path) -> None:
    if source.suffix.lower() == ".gguf":
        raise ModelInvalid(
            f"{source} is a GGUF file: lmx runs it as it is, and converts it by itself where that is better."
        )
    facts = inspect_folder(source)
    config = read_json(source / "config.json", why="it says whether the weights are quantised")
    if "quantization" in config or "quantization_config" in config:
        raise ModelInvalid(f"{source} is quantised already ({facts.quantization}). Convert the weights it was made of.")


def _write_weights(request: Request, staging: Path, voice: "Voice") -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map_with_path
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    from lmx.hub import child

    try:
        model, config = load_model(Path(request.source), lazy=True)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ModelInvalid(f"mlx-lm cannot read {request.source}: {error}") from error
    # As mlx_lm.convert chooses it.
    dtype = request.dtype or config.get("torch_dtype") or config.get("dtype")
    dtype = dtype or (config.get("text_config") or {}).get("dtype")
    if dtype in DTYPES:
        casts = getattr(model, "cast_predicate", lambda _: True)

        def cast(name: str, value: Any) -> Any:
            return (
                value.astype(getattr(mx, dtype)) if casts(name) and mx.issubdtype(value.dtype, mx.floating) else value
            )

        model.update(tree_map_with_path(cast, model.parameters()))
        config = {**config, "torch_dtype": dtype}
    if request.bits:
        model, config = quantize_model(model, config, request.group_size, request.bits, mode=request.mode)
    # Nothing is computed yet, but the sizes are known.
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    child.check_disk(request.folder.name, total, request.low_disk_bytes, request.promised_bytes, staging)
    voice.expect(total)
    what = "quantising" if request.bits else "writing"
    voice.tell(what)
    with _watched(staging, lambda n: voice.came(n, what)):
        save_model(staging, model, donate_model=True)
    save_config(config, staging / "config.json")


class _watched:
    """Counts what is written to a folder, since mlx-lm's loop over the shards tells nobody."""

    def __init__(self, folder: Path, count: Callable[[int], None]) -> None:
        self._folder = folder
        self._count = count
        self._seen = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self._look()

    def _look(self) -> None:
        size = sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        self._count(size - self._seen)
        self._seen = size


def _copy_rest(source: Path, folder: Path) -> None:
    """Tokenizer, template, sampling, and an embedding model's further modules."""
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        if not path.is_file() or any(part.startswith(".") for part in inner.parts):
            continue
        copied = any(fnmatch.fnmatch(path.name, pattern) for pattern in _COPIED)
        if len(inner.parts) == 1:
            copied = copied and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _WRITTEN)
        elif not re.match(r"\d+_\w+", inner.parts[0]):
            continue
        else:
            copied = copied or path.suffix == ".safetensors"
        if copied:
            target = folder / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def main() -> None:
    from lmx.hub import child

    child.run(lambda voice: quantize(Request(**json.loads(sys.argv[1])), voice))


if __name__ == "__main__":
    main()
