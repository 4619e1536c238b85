"""Lays models out on a disk as the programs do that download them, for tests of the library and of removal."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lmx.config import Settings, load_settings
from tests.models import CHATML, write_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 4096,
}


def settings_in(home: Path, **hub: Any) -> Settings:
    """lmx's own folder below ``home``, and nobody else's unless ``hub`` says so."""
    own = {"data_dir": str(home / "lmx"), "huggingface": False, "lmstudio": False}
    return load_settings(None, {}, {"hub": own | hub})


def write_folder(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    template: str | None = CHATML,
    shards: int = 1,
    metadata: dict[str, str] | None = None,
    dtype: Any = np.float16,
) -> Path:
    """A whole folder of a few hundred numbers, that no engine could run but whose files are all in order."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    weight = {"model.embed_tokens.weight": np.zeros((16, 8), dtype)}
    if shards == 1:
        save_file(weight, folder / "model.safetensors", metadata)
    else:
        names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
        for number, name in enumerate(names):
            save_file({f"model.layers.{number}.weight": np.zeros((4, 8), dtype)}, folder / name, metadata)
        weight_map = {f"model.layers.{number}.weight": name for number, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_tokenizer(folder, chat_template=template)
    return folder


def write_gguf(path: Path, *, architecture: str = "llama", quantization: str = "Q8_0", **metadata: Any) -> Path:
    """A GGUF file of one tensor, with a vocabulary of three words; ``metadata`` by GGUF's keys, with "__" for "."."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(2048)
    if "tokenizer__ggml__model" not in metadata:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b", "<|end|>"])
    for key, value in metadata.items():
        name = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
    kind = gguf.GGMLQuantizationType[quantization]
    weight = gguf.quants.quantize(np.zeros((4, 256), np.float32), kind)
    writer.add_tensor("blk.0.attn_q.weight", weight, raw_dtype=None if quantization == "F32" else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_to_hub_cache(cache: Path, repo: str, files: Path, *, commit: str = COMMIT, ref: str = "main") -> Path:
    """Put a folder's files into a Hugging Face cache as huggingface_hub does: blobs by their hash, a snapshot of links
    to them, and the branch's name. Returns the snapshot."""
    repository = cache / f"models--{repo.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    for path in sorted(path for path in files.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        if not blob.exists():
            shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
