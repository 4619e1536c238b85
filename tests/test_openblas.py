"""The BLAS that MLX gets on Linux: every function it imports, the same results, and the choice in lmx.toml."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from lmx.engine.mlx import blas
from lmx.protocol import Failed
from tests.engine_client import engine_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX brings a fast BLAS")
_ROUTINE = re.compile(rb"\0((?:cblas_[sdcz][a-z0-9]+)|(?:[sdcz](?:ge|po|tr|or|un|sy|he)[a-z0-9]{2,4}_))(?=\0)")
_RUN = """
import sys
from lmx.engine.mlx import blas
used = blas.load(sys.argv[1])
import mlx.core as mx
import numpy as np
mx.set_default_device(mx.cpu)
a = mx.array(np.random.default_rng(0).standard_normal((96, 96)).astype(np.float32))
b = a @ a.T + 96 * mx.eye(96)
arrays = [a @ a, mx.linalg.inv(b), mx.linalg.cholesky(b), mx.linalg.qr(a)[1], mx.linalg.svd(a)[1]]
arrays.append(mx.linalg.eigvalsh(b))
np.savez(sys.argv[2], *map(np.array, arrays))
print(used)
print(*(line.split()[-1] for line in open("/proc/self/maps") if "blas" in line))
"""


def names(library: str | Path) -> set[str]:
    """BLAS and LAPACK names among the strings of an ELF file, without the prefix of scipy-openblas32."""
    return {name.decode() for name in _ROUTINE.findall(Path(library).read_bytes().replace(b"\0scipy_", b"\0"))}


def compute(choice: str, folder: Path, **variables: str) -> tuple[list[np.ndarray], str, str]:
    path = folder / "results.npz"
    command = [sys.executable, "-c", _RUN, choice, str(path)]
    ran = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    used, mapped = ran.stdout.splitlines()
    with np.load(path) as results:
        return list(results.values()), used, mapped


def test_all_that_mlx_imports_is_forwarded() -> None:
    [folder] = find_spec("mlx").submodule_search_locations  # type: ignore[union-attr]
    wanted = names(Path(folder) / "lib" / "libmlx.so")
    assert "cblas_sgemm" in wanted
    package, shim = blas.libraries()
    assert wanted <= names(shim)
    assert names(shim) <= names(package)


def test_results_equal_those_of_mlx_own(tmp_path: Path) -> None:
    fast, used, mapped = compute("auto", tmp_path)
    slow, own, unmapped = compute("off", tmp_path)
    assert "libscipy_openblas.so" in used
    assert "libscipy_openblas.so" in mapped
    assert "many times slower" in own
    assert "libscipy_openblas.so" not in unmapped
    for one, other in zip(fast, slow, strict=True):
        np.testing.assert_allclose(abs(one), abs(other), rtol=1e-3, atol=1e-4)


def test_one_set_by_hand_wins(tmp_path: Path) -> None:
    preload = " ".join(blas.libraries())
    _, used, _ = compute("off", tmp_path, LD_PRELOAD=preload)
    assert used == f"the one that was there already (LD_PRELOAD={preload})"
    # Any library that has the names will do; this one needs the other to be loaded already.
    package, _ = blas.libraries()
    _, used, _ = compute(package, tmp_path)
    assert used == f"OpenBLAS ({package})"


def test_a_library_that_cannot_be_loaded_is_named(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "libopenblas.so.0"
    broken.write_bytes(b"not ELF")
    with engine_process(tiny_model, openblas=str(broken)) as client:
        client.wait(lambda: any(isinstance(message, Failed) for message in client.messages))
        [failed] = client.messages
        assert isinstance(failed, Failed)
        assert (failed.seq, failed.code) == (-1, "model_invalid")
        assert str(broken) in failed.message
