"""What is kept of prefixes on the disk, for people and programs: behind ``lmx cache`` and ``/admin/cache``.

Works on the folder, whether or not a server runs. Called by ``lmx.cli`` and, in a thread, by the admin face.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lmx.errors import ConfigError, ModelNotFound
from lmx.prefix_disk import folders
from lmx.prefix_disk.folders import ModelPrefixes


def command(action: str, models: list[str], folder: Path, asked_bytes: int) -> str:
    """What ``lmx cache`` answers. Raises ConfigError or ModelNotFound."""
    try:
        if action == "clear":
            done = clear(folder, models)
            return f"{_size(done['freed_bytes'])} freed, of {len(done['cleared'])} models in {folder}"
        facts = document(folder, asked_bytes)
    except OSError as error:
        raise ConfigError(
            f"The prefixes kept in {folder} cannot be used: {error.strerror or error}.", param="engine.prefix_dir"
        ) from None
    return _table(facts["models"]) if action == "ls" else _sums(facts)


def document(folder: Path, asked_bytes: int) -> dict[str, Any]:
    """All that is kept; ``asked_bytes``: the setting. Raises OSError."""
    models = [_describe(kept) for kept in folders.inventory(folder)]
    return {
        "folder": str(folder),
        "budget_bytes_per_model": folders.budget(asked_bytes, folder),
        "free_bytes": folders.free_bytes(folder),
        "bytes": sum(model["bytes"] for model in models),
        "models": models,
    }


def clear(folder: Path, names: list[str]) -> dict[str, Any]:
    """Delete what is kept for these models (ids or fingerprints), or with no name all of it. Raises OSError, or
    ModelNotFound for a name of which nothing is kept; then nothing is deleted."""
    kept = folders.inventory(folder)
    known = {name for one in kept for name in _names(one)}
    if unknown := [name for name in names if name not in known]:
        there = ", ".join(sorted(known)) or "nothing"
        raise ModelNotFound(f"No prefixes are kept for {unknown[0][:200]!r}. There are: {there}.", param="model")
    chosen = {one.fingerprint for one in kept if not names or not _names(one).isdisjoint(names)}
    return {"cleared": sorted(chosen), "freed_bytes": folders.clear(folder, chosen)}


def _names(kept: ModelPrefixes) -> set[str]:
    model = kept.summary.model if kept.summary else ""
    return {kept.fingerprint} | ({model, Path(model).name} if model else set())


def _describe(kept: ModelPrefixes) -> dict[str, Any]:
    summary = kept.summary
    if summary is None:
        return {"model": "", "fingerprint": kept.fingerprint, "bytes": 0, "problem": kept.problem}
    return {
        "model": summary.model,
        "fingerprint": kept.fingerprint,
        "bytes": summary.bytes,
        "blocks": summary.nodes,
        "tokens": summary.tokens,
        "checkpoints": summary.checkpoints,
        "shared_blocks": summary.shared,
        "last_used": datetime.fromtimestamp(summary.used, UTC).isoformat(timespec="seconds") if summary.nodes else None,
    }


def _table(models: list[dict[str, Any]]) -> str:
    rows = [("MODEL", "FINGERPRINT", "SIZE", "BLOCKS", "TOKENS", "SHARED", "LAST USED")]
    for model in models:
        if "problem" in model:
            rows.append(("?", model["fingerprint"], "", "", "", "", model["problem"]))
        else:
            figures = (model["blocks"], model["tokens"], model["shared_blocks"])
            rows.append(
                (
                    model["model"] or "?",
                    model["fingerprint"],
                    _size(model["bytes"]),
                    *map(str, figures),
                    model["last_used"] or "never",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _sums(facts: dict[str, Any]) -> str:
    models = [model for model in facts["models"] if "problem" not in model]
    lines = {
        "folder": facts["folder"],
        "models": str(len(facts["models"])),
        "kept": _size(facts["bytes"]),
        "most for a model": _size(facts["budget_bytes_per_model"]),
        "free on the disk": _size(facts["free_bytes"]),
        "blocks": str(sum(model["blocks"] for model in models)),
        "tokens": str(sum(model["tokens"] for model in models)),
        "checkpoints": str(sum(model["checkpoints"] for model in models)),
        "used by several": f"{sum(model['shared_blocks'] for model in models)} blocks",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items())


def _size(nbytes: int) -> str:
    size, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"
