"""What users see of the prefix store: usage, the log, figures; and that it keeps within its memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lmx.engine.prefix.fingerprint import fingerprint
from tests.backends import needs_llama
from tests.engine_client import engine
from tests.models import build_model
from tests.server import Server, serve
from tests.test_prefix import ask, load, started, tokens


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("face")
    model = build_model("llama", folder / "model")
    with serve(folder, "--model", str(model), settings={"server": {"log_format": "json"}}) as server:
        server.line(r"model \S+ ready")
        yield server


def cached(server: Server, text: str, path: str = "chat/completions", **fields: Any) -> tuple[int, int]:
    """Of the prompt's tokens as usage tells them, and how many these are."""
    prompt = {"messages": [{"role": "user", "content": text}]} if path == "chat/completions" else {"prompt": text}
    body = {"model": "default", "max_tokens": 2, "temperature": 0, **prompt, **fields}
    usage = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60).raise_for_status().json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_usage_counts_each_prompt_once(server: Server, path: str) -> None:
    text = f"Of {path}. " * 60
    assert cached(server, text, path)[0] == 0
    first, size = cached(server, text, path)
    assert first == size - 1
    for shape in ({"n": 3}, {"best_of": 3}):
        assert cached(server, text, path, temperature=1, **shape) == (first, size)
    for private in ({"cache": False}, {"cache_salt": "another"}, {"prompt_logprobs": 0}):
        assert cached(server, text, path, **private)[0] == 0
    assert cached(server, text, path, cache_salt="another")[0] == first


def test_the_sdk_sees_it_in_a_stream(server: Server) -> None:
    text = "From the SDK. " * 60
    cached(server, text)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": text}],
            max_tokens=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        *_, last = stream
    assert last.usage is not None
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == last.usage.prompt_tokens - 1


@pytest.mark.parametrize(
    "fields",
    [{"cache": "no"}, {"cache_prompt": 1}, {"cache_salt": ""}, {"cache_salt": 5}, {"prompt_cache_key": ["a"]}],
)
def test_bad_values_are_named(server: Server, fields: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(fields))


def test_the_log_says_where_a_prefix_broke(server: Server) -> None:
    text = "Where does it part? " * 60
    cached(server, text)
    count, _ = cached(server, text + "Here. " * 20)
    line = server.line(rf'.*"cached_tokens": {count}, .*"cache_broke_at": .*')[0]
    told = json.loads(line[line.index("{") :])
    assert told["cache_broke"] == "tokens"
    assert told["cache_broke_at"] == count
    assert "cache_broke_before" not in told  # a piece of a prompt


def test_figures(server: Server) -> None:
    cached(server, "Of figures. " * 60)
    before = server.metrics()["lmx_prefix_hit_tokens"]
    count, _ = cached(server, "Of figures. " * 60)
    server.idle()
    assert server.metrics()["lmx_prefix_hit_tokens"] == before + count
    assert server.engine()["engine"]["prefix"]["ram_bytes"] == server.metrics()["lmx_prefix_bytes"] > 0


@pytest.mark.parametrize("kind", ["gemma3_text", pytest.param("llama.cpp", marks=needs_llama)])
def test_blocks_keep_within_their_memory(kind: str, tmp_path: Path) -> None:
    """Also what the last sequence left, after which no step comes. And a long conversation outlives side requests."""
    path, backend = load(kind, tmp_path)
    with engine(path, backend=backend, prefix_cache=False) as client:
        assert client.ready is not None
        budget = 2900 * client.ready.kv_bytes_per_token + 2**18
    with engine(path, backend=backend, max_rows=4, max_chunk_tokens=256, prefix_ram_bytes=budget) as client:
        history = tokens(2000)
        history += ask(client, history, 20, session="bot")[0].tokens
        for _ in range(10):
            ask(client, tokens(200))
        assert ask(client, history + tokens(40), session="bot")[1] == len(history) - 1
        for _ in range(3):
            ask(client, tokens(1500))
        assert client.idle_stats().prefix.evicted_blocks > 0
        assert max(stats.prefix.ram_bytes for stats in client.stats) <= budget


def test_who_takes_a_row_of_a_lower_priority_starts_with_what_is_kept(tmp_path: Path) -> None:
    path = build_model("llama", tmp_path / "model")
    with engine(path, max_rows=2, context_length=4096) as client:
        prompt = tokens(600)
        ask(client, prompt)
        low = [client.submit(tokens(100), 2000, priority=-1) for _ in range(2)]
        client.wait(lambda: all(client.answers[seq].tokens for seq in low))
        high = client.submit(prompt + tokens(20), 4, priority=1)
        client.wait_freed(high)
        assert client.idle_stats().preemptions > 0
        assert started(client, high).cached_tokens == 600
        for seq in low:
            client.cancel(seq)
        client.wait_freed(*low)


def test_every_part_of_a_model_counts(tmp_path: Path) -> None:
    first, second, other = (tmp_path / f"{name}.gguf" for name in ("m-00001-of-00002", "m-00002-of-00002", "n"))
    for path in (first, second, other):
        path.write_bytes(b"weights")
    before = fingerprint(first, "mlx", "")
    other.write_bytes(b"others")
    assert fingerprint(first, "mlx", "") == before
    second.write_bytes(b"changed")
    assert fingerprint(first, "mlx", "") != before
