"""Which repository a name means, and which of its files make the model.

A name without a publisher is looked for: mlx-community's weights first, then other MLX weights, then GGUF files by the
quantisations preferred. A repository that was named is taken as it is. What was chosen says why, since an operator sees
only the bytes come. Called by the fetching child; asks the Hub, writes nothing.
"""

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile

from lmx.errors import LmxError, ModelInvalid, ModelNotFound
from lmx.hub.download.hub import Patience, explain
from lmx.hub.download.names import Name, gguf_quantization, is_quantization, mlx_suffix
from lmx.hub.download.request import Chosen, File

MLX_PUBLISHER = "mlx-community"
MLX_QUANTIZATIONS = ("4bit", "mxfp4", "5bit", "6bit", "8bit", "3bit", "bf16")
"""In the order preferred where a name leaves it open."""
SEARCHED = 50
_CHATS = ("instruct", "it", "chat")
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_NEEDED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.safetensors")
_NOT_NEEDED = ("*.bin.index.json", "*.onnx*.json", "trainer_state.json", "training_args.json")
_OTHER_FOLDERS = ("original", "onnx", "openvino", "metal", "coreml", "tflite", "flax", "runs", "logs")


def choose(
    hub: HfApi,
    name: Name,
    *,
    quantizations: Sequence[str],
    allow_patterns: Sequence[str],
    patience: Patience,
) -> Chosen:
    """Raises LmxError."""
    try:
        if name.publisher:
            info, why = _info(hub, name.repository, name.revision, patience), ""
        else:
            info, why = _look_for(hub, name, quantizations, patience)
        assert info.sha
        sha = info.sha
        tree = patience.run(lambda: list(hub.list_repo_tree(info.id, recursive=True, revision=sha)))
    except ModelNotFound as error:
        raise _with_near_names(error, hub, name, patience) from None
    except LmxError:
        raise
    except Exception as error:
        raise explain(error, name.repository, name.revision) from error
    files = [_file(entry) for entry in tree if isinstance(entry, RepoFile)]
    return choose_files(info, files, name.quantization, quantizations, allow_patterns, why)


def choose_files(
    info: ModelInfo,
    files: Sequence[File],
    wanted: str,
    quantizations: Sequence[str],
    allow_patterns: Sequence[str],
    why: str = "",
) -> Chosen:
    """Of one repository. Raises ModelInvalid, ModelNotFound."""
    repo = info.id
    files = [file for file in files if _is_plain(file.path)]
    has_gguf = any(_is_model_gguf(file.path) for file in files)
    tensors = [file for file in files if file.path.endswith(".safetensors") and "/" not in file.path]
    mlx = bool(tensors) and is_mlx(info)
    suffix = mlx_suffix(wanted)

    def chosen(taken: Iterable[File], format: str, quantization: str, because: str) -> Chosen:
        kept = tuple(sorted(taken, key=lambda file: file.path))
        reason = f"{why}; {because}" if why else because
        return Chosen(repo, info.sha or "", kept, sum(file.size for file in kept), format, quantization, reason)

    if allow_patterns:
        taken = [file for file in files if any(fnmatch.fnmatch(file.path, pattern) for pattern in allow_patterns)]
        if not taken:
            raise ModelInvalid(
                f"No file of {repo} matches {', '.join(allow_patterns)[:200]}. It has "
                f"{_some(file.path for file in files)}.",
                param="allow_patterns",
            )
        ggufs = [file.path for file in taken if _is_model_gguf(file.path)]
        if ggufs:
            return chosen(taken, "gguf", gguf_quantization(ggufs[0]), "the files that allow_patterns names")
        return chosen(
            taken, "mlx" if mlx else "safetensors", _quantization(info), "the files that allow_patterns names"
        )
    if tensors and (mlx or not has_gguf) and not (wanted and has_gguf and not suffix):
        own = _quantization(info)
        if wanted and own != suffix:
            raise ModelNotFound(
                f"{repo} has no files in {wanted}: its weights are {own or 'not quantised'}. "
                + (
                    "Leave the quantisation out."
                    if mlx
                    else "Download it without, and convert it (POST /admin/convert)."
                ),
                param="quantization",
            )
        kind = "MLX weights" if mlx else "safetensors that are not MLX's: they are run unquantised, or converted"
        return chosen(_folder_files(files), "mlx" if mlx else "safetensors", own, f"{kind}, {len(tensors)} file(s)")
    if has_gguf:
        taken, quantization, because = _gguf_files(repo, files, wanted, quantizations)
        return chosen(taken, "gguf", quantization, because)
    raise ModelInvalid(
        f"{repo} has neither safetensors nor GGUF files that lmx could run; it has {_some(f.path for f in files)}. "
        f"Look for the model's name alone: {info.id.rpartition('/')[2]!r}.",
        param="model",
    )


def is_mlx(info: ModelInfo) -> bool:
    """Whether the weights are laid out as mlx-lm writes them: by what mlx-lm writes into the card and the config."""
    quantization = (info.config or {}).get("quantization_config") or {}
    return (
        info.library_name == "mlx"
        or "mlx" in (info.tags or [])
        or info.id.startswith(f"{MLX_PUBLISHER}/")
        or ("group_size" in quantization and "bits" in quantization and "quant_method" not in quantization)
    )


def _quantization(info: ModelInfo) -> str:
    words = re.split(r"[-_.]", info.id.rpartition("/")[2])
    return next((mlx_suffix(word) for word in reversed(words) if mlx_suffix(word)), "")


def _folder_files(files: Sequence[File]) -> list[File]:
    """All that a folder of safetensors needs: weights, tokenizer, template, configs, poolings of embedding models."""
    sharded = any(file.path == "model.safetensors" or file.path.startswith("model-") for file in files)

    def is_needed(path: str) -> bool:
        folders, name = PurePosixPath(path).parts[:-1], PurePosixPath(path).name
        if any(folder.lower() in _OTHER_FOLDERS or folder.startswith("checkpoint-") for folder in folders):
            return False
        if sharded and name.startswith("consolidated") and name.endswith((".safetensors", ".json")):
            return False  # Mistral's second copy of the same weights
        return any(fnmatch.fnmatch(name, pattern) for pattern in _NEEDED) and not any(
            fnmatch.fnmatch(name, pattern) for pattern in _NOT_NEEDED
        )

    return [file for file in files if is_needed(file.path)]


def _gguf_files(
    repo: str, files: Sequence[File], wanted: str, quantizations: Sequence[str]
) -> tuple[list[File], str, str]:
    """All parts of the one model, its quantisation, and why this."""
    models: dict[str, list[File]] = {}
    for file in files:
        if _is_model_gguf(file.path):
            split = _PART.fullmatch(file.path)
            models.setdefault(split[1] if split else file.path.removesuffix(".gguf"), []).append(file)
    by_quantization: dict[str, list[str]] = {}
    for stem in sorted(models):
        by_quantization.setdefault(gguf_quantization(stem), []).append(stem)
    there = _some(sorted(word or "an unnamed one" for word in by_quantization), 30)
    if wanted:
        spellings = (wanted.upper(), f"UD-{wanted.upper()}", wanted.upper().replace("FP", "F"))
        stems = next((by_quantization[word] for word in spellings if word in by_quantization), None)
        if stems is None:
            raise ModelNotFound(f"{repo} has no GGUF file in {wanted}; it has {there}.", param="quantization")
        because = "GGUF in the quantisation asked for"
    else:
        preferred = [word.upper() for word in quantizations]
        preferred += [f"UD-{word}" for word in preferred]
        found = next((word for word in preferred if word in by_quantization), None)
        if found is not None:
            stems = by_quantization[found]
            because = f"GGUF: {found} is the first of hub.quantizations that it has (of {there})"
        else:
            smallest = min(models, key=lambda stem: (sum(file.size for file in models[stem]), stem))
            stems = [smallest]
            because = f"GGUF: the smallest, since it has none of hub.quantizations (of {there})"
    if len(stems) > 1:
        raise ModelInvalid(
            f"{repo} has several models in {gguf_quantization(stems[0])}: {_some(stems)}. Name the files of one with "
            f"allow_patterns, for example {stems[0] + '*'!r}.",
            param="allow_patterns",
        )
    parts = models[stems[0]]
    split = _PART.fullmatch(parts[0].path)
    if split and len(parts) != int(split[3]):
        raise ModelInvalid(
            f"{repo} is incomplete: of {stems[0]} it has {len(parts)} of {int(split[3])} parts. Choose another "
            f"quantisation (it has {there}) or repository.",
            param="model",
        )
    return parts, gguf_quantization(stems[0]), because


def _is_model_gguf(path: str) -> bool:
    name = PurePosixPath(path).name.lower()
    return name.endswith(".gguf") and "mmproj" not in name and "imatrix" not in name


def _is_plain(path: str) -> bool:
    """A path from the network becomes one on the disk: nothing hidden, nothing that leaves the folder."""
    parts = path.split("/")
    return all(part and not part.startswith(".") and "\\" not in part and part.isprintable() for part in parts)


def _file(entry: RepoFile) -> File:
    return File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else "", entry.blob_id)


def _info(hub: HfApi, repo: str, revision: str, patience: Patience) -> ModelInfo:
    try:
        return patience.run(lambda: hub.model_info(repo, revision=revision or None))
    except LmxError:
        raise
    except Exception as error:
        raise explain(error, repo, revision) from error


def _look_for(hub: HfApi, name: Name, quantizations: Sequence[str], patience: Patience) -> tuple[ModelInfo, str]:
    """The repository for a bare name, and why that one."""
    suffix = mlx_suffix(name.quantization)
    if not name.quantization or suffix:
        spellings = [f"{name.name}-{suffix}" if suffix else name.name]
        if not suffix and not mlx_suffix(re.split(r"[-_.]", name.name)[-1]):
            spellings.append(f"{name.name}-{MLX_QUANTIZATIONS[0]}")
        for spelling in spellings:
            repo = f"{MLX_PUBLISHER}/{spelling}"
            try:
                info = patience.run(functools.partial(hub.model_info, repo, revision=name.revision or None))
            except RepositoryNotFoundError:
                continue
            return info, f"{MLX_PUBLISHER} has it"
        found = _search(hub, name.name, "mlx", patience, lambda repo: _mlx_rank(repo, name.name, suffix))
        if found is not None:
            return _info(hub, found.id, name.revision, patience), (
                f"the most used MLX weights that a search for {name.name!r} finds"
            )
    if not suffix:
        found = _search(hub, name.name, "gguf", patience, lambda repo: _gguf_rank(repo, name.name))
        if found is not None:
            return _info(hub, found.id, name.revision, patience), (
                f"no MLX weights; the most used GGUF repository that a search for {name.name!r} finds"
                if not name.quantization
                else f"the most used GGUF repository that a search for {name.name!r} finds"
            )
    raise ModelNotFound(
        f"The Hub has no model called {name.name!r} in MLX or GGUF"
        f"{f' in {name.quantization}' if name.quantization else ''}. Name its repository: org/name.",
        param="model",
    )


def _search(
    hub: HfApi, words: str, tag: str, patience: Patience, rank: Callable[[str], tuple[int, ...] | None]
) -> ModelInfo | None:
    """The best of the most used repositories whose names have all ``words``; ``rank`` says None for what is none."""
    for query in dict.fromkeys((words, _query(words))):
        found = patience.run(functools.partial(_list, hub, query, tag, SEARCHED))
        ranked = [(key, place, info) for place, info in enumerate(found) if (key := rank(info.id)) is not None]
        if ranked:
            return min(ranked, key=lambda entry: entry[:2])[2]
    return None


def _list(hub: HfApi, query: str, tag: str | None, most: int) -> list[ModelInfo]:
    return list(hub.list_models(search=query, filter=tag, sort="downloads", limit=most))


def _query(name: str) -> str:
    """Word by word, and "llama3.2" as "llama 3.2", since the Hub looks for each in a repository's name."""
    return " ".join(re.split(r"[-_ ]+", re.sub(r"(?<=[a-z]{2})(?=\d)", " ", name.lower())))


def _rest(repo: str, name: str) -> list[str] | None:
    """The words of a repository's name beyond those asked for; None if it lacks one of these."""
    found = repo.rpartition("/")[2].lower()
    words = _words(found)
    asked = _words(name)
    if all(words.count(word) >= asked.count(word) for word in asked):
        for word in asked:
            words.remove(word)
        return words
    # "llama3.2-3b" is "Llama-3.2-3B", but "qwen3-4b" is not "Qwen3-14B".
    parts = re.findall(r"[a-z]+|\d+", name.lower())
    spelled = re.compile(r"(?<![a-z0-9])" + r"[-_. ]*".join(parts) + r"(?![a-z0-9])")
    rest, matches = spelled.subn(" ", found, 1)
    return _words(rest) if matches else None


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[-_. ]+", name.lower()) if word]


def _mlx_rank(repo: str, name: str, suffix: str) -> tuple[int, ...] | None:
    words = _rest(repo, name)
    if words is None:
        return None
    found = next((mlx_suffix(word) for word in words if mlx_suffix(word)), "")
    if suffix and found != suffix:
        return None
    own = [word for word in words if not is_quantization(word) and word not in ("mlx", "dwq", *_CHATS)]
    preference = MLX_QUANTIZATIONS.index(found) if found in MLX_QUANTIZATIONS else len(MLX_QUANTIZATIONS)
    return len(own), int(not repo.startswith(f"{MLX_PUBLISHER}/")), _no_chat(words), preference


def _gguf_rank(repo: str, name: str) -> tuple[int, ...] | None:
    words = _rest(repo, name)
    if words is None:
        return None
    return len([word for word in words if word not in ("gguf", "i1", *_CHATS)]), _no_chat(words)


def _no_chat(words: Sequence[str]) -> int:
    """A bot wants to be answered: of a base model and its instructed one the latter."""
    return int(not any(word in _CHATS for word in words))


def _with_near_names(error: ModelNotFound, hub: HfApi, name: Name, patience: Patience) -> ModelNotFound:
    if error.param != "model":
        return error
    try:
        found = patience.run(functools.partial(_list, hub, _query(name.name), None, 5))
    except Exception:
        return error  # what went wrong first is what is told
    if not found:
        return error
    return ModelNotFound(f"{error.message} Near names: {', '.join(info.id for info in found)}.", param=error.param)


def _some(names: Iterable[str], most: int = 12) -> str:
    listed = list(names)
    return (", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")) or "no files"
