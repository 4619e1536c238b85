"""One server with the embedded model, and MiniLM beside it, for real clients of other people. ``make clients`` runs
them: their packages need an environment of their own (``.venv-clients``), where lmx is not installed."""

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
    settings = {"model": {"embedding": "all-minilm-l6-v2"}, "server": {"log_level": "info"}}
    python = [str(ROOT / ".venv" / "bin" / "python")]
    with serve(tmp_path_factory.mktemp("clients"), settings=settings, python=python) as server:
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
