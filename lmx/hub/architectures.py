"""Which architectures mlx-lm can run, told from its files without importing it (that would load MLX into the server).

So that the library can say of a speech or image model in somebody's cache that it is none of ours, before anybody loads
it. Where this version of mlx-lm keeps its names otherwise than known here, nothing is said to be unknown.
"""

import ast
import functools
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmx.hub.sentence import ENCODERS

_TABLES = ("MODEL_REMAPPING", "MODEL_ARCHITECTURE_REMAPPING")
"""In mlx_lm/utils.py: further names, as keys."""


def mlx_refusal(config: Mapping[str, Any]) -> str:
    """Why no engine of ours loads a folder with this configuration, as a clause; "" where one may."""
    architecture = str(config.get("model_type") or "")
    known = mlx_architectures()
    if not architecture or not known or architecture in known or architecture in ENCODERS or config.get("model_file"):
        return ""
    return f"is of the architecture {architecture!r}, which mlx-lm {mlx_lm_version()} does not know"


@functools.cache
def mlx_architectures() -> frozenset[str]:
    """What model_type may be; empty: nobody can tell."""
    found = importlib.util.find_spec("mlx_lm")
    if found is None or found.origin is None:
        return frozenset()
    package = Path(found.origin).parent
    try:
        names = {path.stem for path in (package / "models").iterdir() if path.suffix == ".py" or path.is_dir()}
        module = ast.parse((package / "utils.py").read_bytes())
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    tables = {
        target.id: statement.value
        for statement in module.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id in _TABLES
    }
    if _TABLES[0] not in tables:
        return frozenset()
    for table in tables.values():
        for key in table.keys if isinstance(table, ast.Dict) else ():
            name = key.elts[0] if isinstance(key, ast.Tuple) and key.elts else key
            if isinstance(name, ast.Constant):
                names.add(str(name.value))
    return frozenset(names)


@functools.cache
def mlx_lm_version() -> str:
    """ "": it is not installed."""
    try:
        return importlib.metadata.version("mlx-lm")
    except importlib.metadata.PackageNotFoundError:
        return ""
