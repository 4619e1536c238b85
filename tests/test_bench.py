"""``python -m lmx.bench`` against a real server, and the arithmetic of its figures."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from lmx.bench.client import BenchError, Request, Stream
from lmx.bench.figures import decode_tokens_per_s, figures, spread
from lmx.bench.prompts import Prompts
from lmx.bench.server import running_server
from tests.models import build_model

SPREAD = {"p50", "p95", "p99", "max"}


@dataclass
class Seen:
    """A finished stream, as ``figures`` reads it."""

    sent_at: float
    event_times: list[float]
    prompt_tokens: int = 10
    cached_tokens: int = 0
    completion_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.completion_tokens = len(self.event_times)


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "lmx.bench", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("bench") / "tiny")


def test_command_starts_a_server_sweeps_and_writes_json(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    command = ["--model-path", str(folder), "--json", str(target), "--seed", "7"]
    done = bench(*command, "--prompt-tokens", "20,90", "--max-tokens", "6", "--concurrency", "1,2", "--requests", "3")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(target.read_text())
    assert document["seed"] == 7
    assert document["model"] == "tiny"
    loads = [(result["concurrency"], result["requests"]) for result in document["results"]]
    assert loads == [(1, 3), (2, 3), (1, 3), (2, 3)]
    short, long = document["results"][0], document["results"][2]
    assert short["prompt_tokens"] == pytest.approx(20, rel=0.4)
    assert long["prompt_tokens"] == pytest.approx(90, rel=0.4)
    for result in document["results"]:
        assert result["completion_tokens"] == 6
        assert result["cached_tokens"] == 0
        assert result["prompt_tokens_per_s"] > 0
        assert 0 < result["generation_tokens_per_s"] <= 18 / result["wall_s"] + 1e-6
        assert set(result["ttft_ms"]) == SPREAD
        assert result["itl_ms"] is None or set(result["itl_ms"]) == SPREAD
    assert "tok/s" in done.stderr
    assert done.stdout == ""


def test_nothing_listens() -> None:
    done = bench("--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"config\.json"), running_server(str(tmp_path)):
        pass


def test_refusal_is_reported() -> None:
    stream = Stream(cast(Any, None), Request("", 1), 0.0)
    with pytest.raises(BenchError, match=r"404 .*no such model"):
        stream.feed(b'HTTP/1.1 404 Not Found\r\n\r\n{"error": {"message": "no such model"}}', 1.0)


def test_answers_in_any_pieces() -> None:
    """Chunk framing, events and the head cut after every byte give what they give in one piece."""
    events = [b'data: {"choices": [{"text": "a"}]}\n\n', b": waiting\n\n", b'data: {"choices": [{"text": ""}]}\n\n']
    events += [b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n', b"data: [DONE]\n\n"]
    body = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body
    for size in (1, 2, 7, len(answer)):
        stream = Stream(cast(Any, None), Request("", 2), 0.0)
        for at in range(0, len(answer), size):
            stream.feed(answer[at : at + size], float(at))
        assert stream.done
        assert (len(stream.event_times), stream.prompt_tokens, stream.completion_tokens) == (1, 3, 2)


def test_end_in_the_middle_is_an_error() -> None:
    stream = Stream(cast(Any, None), Request("", 2), 0.0)
    stream.feed(b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"text": "a"}]}\n\n', 1.0)
    with pytest.raises(BenchError, match="middle of an answer"):
        stream.feed(b"", 2.0)


def test_figures_of_two_streams() -> None:
    streams = [Seen(0.0, [1.0, 2.0, 3.0]), Seen(0.5, [2.0, 3.0, 4.0, 5.0])]
    found = figures(streams, 2)
    assert found.wall_s == 5.0
    assert found.generation_tokens_per_s == pytest.approx(7 / 5)
    assert found.prompt_tokens_per_s == pytest.approx(20 / 2.0)  # somebody waited from 0 to 2
    assert found.decode_tokens_per_s == pytest.approx(2.0)  # from 2 to 3 both decoded, and one token of each came
    assert found.ttft_ms.max == 1500.0
    assert found.itl_ms is not None
    assert found.itl_ms.p50 == 1000.0


def test_streams_that_never_decode_together_have_no_decode_figure() -> None:
    assert decode_tokens_per_s([Seen(0.0, [1.0, 2.0]), Seen(2.0, [3.0, 4.0])], 2) is None


def test_a_stream_without_text_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="no text"):
        figures([Seen(0.0, [])], 1)


def test_spread_is_nearest_rank() -> None:
    found = spread([float(value) for value in range(101)])
    assert (found.p50, found.p95, found.p99, found.max) == (50.0, 95.0, 99.0, 100.0)


def test_prompts_repeat_with_the_seed_and_never_without() -> None:
    first, again, other = (Prompts(seed) for seed in (1, 1, 2))
    texts = [first.words(60) for _ in range(20)]
    assert texts == [again.words(60) for _ in range(20)]
    assert all(len(text.split()) == 60 for text in texts)
    assert len({text.split()[0] for text in [*texts, other.words(60)]}) == 21
