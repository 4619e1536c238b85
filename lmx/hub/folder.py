"""Reads what an MLX model folder says about itself and checks that it is whole, without loading any weights.

Called by the inventory (in the server) and by the GGUF converter on its own result. It must stay cheap (file headers
only, also for models of hundreds of gigabytes) and must never import MLX.
"""

import json
import re
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx.errors import ModelInvalid

_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit
_MAX_JSON_BYTES = 64 * 1024 * 1024
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "max_sequence_length",
    "model_max_length",
    "n_positions",
    "n_ctx",
    "seq_length",
)
_PART = re.compile(r"(?P<stem>model[\w.-]*)-\d{5}-of-(?P<count>0\d{4})\.safetensors", re.ASCII)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_DTYPE_NAMES = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


@dataclass(frozen=True, slots=True)
class FolderFacts:
    architecture: str
    context_length: int
    """0: the configuration names none (recurrent models have no limit of their own)."""
    quantization: str
    size_bytes: int
    """Of the weight files."""
    sampling: Mapping[str, float]
    """How the model's makers want it sampled: what generation_config.json sets of _SAMPLING."""


def inspect_folder(folder: Path) -> FolderFacts:
    """Check config.json, the weight files and tokenizer.json. Raises ModelInvalid, naming the file at fault."""
    config = read_json(folder / "config.json", why="lmx reads MLX folders: config.json, *.safetensors, tokenizer.json")
    architecture = config.get("model_type")
    if not isinstance(architecture, str) or not architecture:
        raise ModelInvalid(
            f"{folder / 'config.json'} has no model_type, so its architecture is unknown. "
            "Is it the configuration of a language model in Hugging Face's or MLX's format?"
        )
    shards = _shards(folder)
    dtypes: Counter[str] = Counter()
    for shard in shards:
        dtypes.update(check_safetensors(shard))
    if not (folder / "tokenizer.json").is_file():
        raise ModelInvalid(
            f"{folder} has no tokenizer.json. Download the whole repository, or make the file with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    return FolderFacts(
        architecture=architecture,
        context_length=context_length(config),
        quantization=quantization(config, dtypes),
        size_bytes=sum(shard.stat().st_size for shard in shards),
        sampling=_read_sampling(folder / "generation_config.json"),
    )


def _read_sampling(path: Path) -> dict[str, float]:
    config = read_json(path, why="it says how to sample") if path.is_file() else {}
    found = {name: config.get(name) for name in _SAMPLING}
    return {name: value for name, value in found.items() if isinstance(value, int | float) and value >= 0}


def read_json(path: Path, *, why: str) -> dict[str, Any]:
    """A JSON object from a file of the model. ``why`` tells the reader of the error what the file is for."""
    try:
        if (size := file_size(path)) > _MAX_JSON_BYTES:
            raise ModelInvalid(f"{path} has {size} bytes; such a file ({why}) has thousands. Download the file again.")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelInvalid(f"{path} does not exist ({why}).") from None
    except OSError as error:
        raise ModelInvalid(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ModelInvalid(f"{path} is not valid JSON: {error}. Download the file again.") from None
    if not isinstance(value, dict):
        raise ModelInvalid(f"{path} holds a JSON {type(value).__name__} where an object is expected ({why}).")
    return value


def file_size(path: Path) -> int:
    """Raises OSError, or ModelInvalid for what is no file, since who opens a pipe may wait forever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ModelInvalid(f"{path} is no file. Put the model's own there.")
    return status.st_size


def check_safetensors(path: Path) -> Counter[str]:
    """Compare a safetensors header with the file's size; bytes for each dtype. Raises ModelInvalid."""
    again = "Download the file again."
    try:
        size = file_size(path)
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelInvalid(
                    f"{path} is truncated or no safetensors file: it has {size} bytes, its header alone should have "
                    f"{header_bytes}. {again}"
                )
            tensors = json.loads(file.read(header_bytes))
            tensors.pop("__metadata__", None)
            end = 8 + header_bytes + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            dtypes: Counter[str] = Counter()
            for entry in tensors.values():
                first, last = entry["data_offsets"]
                dtypes[entry["dtype"]] += last - first
    except OSError as error:
        raise ModelInvalid(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelInvalid(f"{path} has a damaged safetensors header ({error!r}). {again}") from None
    if size != end:
        raise ModelInvalid(f"{path} is truncated or damaged: it has {size} bytes, its header says {end}. {again}")
    return dtypes


def _shards(folder: Path) -> list[Path]:
    """The weight files. mlx-lm loads every ``model*.safetensors``; an index, when there is one, must be complete."""
    shards = sorted(folder.glob("model*.safetensors"))
    if gaps := _missing_parts({shard.name for shard in shards}):
        raise ModelInvalid(
            f"{folder} lacks {len(gaps)} of its weight files: {_some(gaps)}. The download is incomplete: fetch them."
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index, why="it says which shard holds which weight").get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelInvalid(f"{index} has no weight_map. Download the file again.")
        missing = sorted({str(name) for name in weight_map.values()} - {shard.name for shard in shards})
        if missing:
            raise ModelInvalid(
                f"{index} names {len(missing)} weight file(s) that are not there: {_some(missing)}. "
                f"The download is incomplete: fetch them into {folder}."
            )
    if not shards:
        others = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".gguf", ".npz"})[:5])
        hint = f" It has {others}; name a .gguf file itself, or convert with mlx_lm.convert." if others else ""
        raise ModelInvalid(f"{folder} has no weights (model*.safetensors).{hint or ' The download is incomplete.'}")
    return shards


def _missing_parts(names: set[str]) -> list[str]:
    """Of NAME-00001-of-00004.safetensors, where some are there; an index may come last in a download."""
    found = [match for name in names if (match := _PART.fullmatch(name))]
    wanted = {
        f"{match['stem']}-{number:05}-of-{match['count']}.safetensors"
        for match in found
        for number in range(1, int(match["count"]) + 1)
    }
    return sorted(wanted - names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Multimodal configurations keep the language model's own in ``text_config``."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def context_length(config: Mapping[str, Any]) -> int:
    """0: it names none."""
    for source in (config, _text_config(config)):
        for key in _CONTEXT_KEYS:
            value = source.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return 0


def quantization(config: Mapping[str, Any], dtypes: Counter[str]) -> str:
    """ "4-bit" (or MLX's mode, "mxfp4") for quantised weights, another program's method ("awq"), else the dtype that
    most bytes have."""
    own = config.get("quantization")
    if isinstance(own, dict) and "bits" in own:
        mode = own.get("mode", "affine")
        return f"{own['bits']}-bit" if mode == "affine" else str(mode)
    others = config.get("quantization_config")
    if isinstance(others, dict) and others.get("quant_method"):
        return str(others["quant_method"])
    likeliest = dtypes.most_common(1)[0][0] if dtypes else ""
    return _DTYPE_NAMES.get(likeliest, likeliest.lower())
