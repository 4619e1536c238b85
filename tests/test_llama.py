"""llama.cpp's own side: bad files and settings in words, KV in every type, the packages' models, and the back end's
KV operations that the step loop does not use yet."""

import struct
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from lmx.chat.model import ChatModel
from lmx.hub.inventory import EMBEDDED_ID, resolve
from lmx.protocol import Failed
from tests.backends import needs_llama
from tests.engine_client import engine, engine_process
from tests.models import build_gguf
from tests.server import serve

pytestmark = needs_llama


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_gguf(tmp_path_factory.mktemp("llama") / "model.gguf")


def refusal(path: Path, **options: object) -> str:
    """What the engine says of a load that it refuses; it must end by itself."""
    with engine_process(path, backend="llama", **options) as client:
        client.wait(lambda: any(isinstance(message, Failed) for message in client.messages))
        failed = client.messages[-1]
        assert isinstance(failed, Failed)
        assert (failed.seq, failed.code) == (-1, "model_invalid")
        assert client.process.wait(60) == 3
        return failed.message


def number(key: str, value: int) -> bytes:
    """A GGUF metadata entry of type uint32."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", 4, value)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "architecture": (lambda data: data.replace(b"llama", b"lxama"), "unknown model architecture: 'lxama'"),
    "truncated": (lambda data: data[:-1000], "not within the file bounds"),
    "header": (lambda data: data[:1000], "failed to read key-value pairs"),
    "magic": (lambda data: b"XXXX" + data[4:], "invalid magic characters: 'XXXX'"),
    "shape": (
        lambda data: data.replace(
            number("llama.attention.head_count_kv", 2), number("llama.attention.head_count_kv", 3)
        ),
        "'blk.0.attn_k.weight' has wrong shape",
    ),
    "missing tensor": (
        lambda data: data.replace(number("llama.block_count", 3), number("llama.block_count", 4)),
        "'blk.3.attn_norm.weight' not found",
    ),
    "context": (
        lambda data: data.replace(number("llama.context_length", 8192), number("llama.context_length", 0)),
        "names no context length",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_file_is_named_with_llama_cpps_own_reason(gguf: Path, tmp_path: Path, damage: str) -> None:
    change, words = DAMAGES[damage]
    path = tmp_path / "broken.gguf"
    path.write_bytes(change(gguf.read_bytes()))
    assert path.read_bytes() != gguf.read_bytes()
    message = refusal(path)
    assert str(path) in message
    assert words in message


def test_kv_beyond_the_memory_or_the_budget_is_refused_with_the_numbers(gguf: Path, tmp_path: Path) -> None:
    with engine(gguf, backend="llama", max_rows=1000) as client:
        assert client.ready is not None
        per_token = client.ready.kv_bytes_per_token
    message = refusal(gguf, context_length=4096, kv_budget_bytes=2048 * per_token)
    assert "a context of 4096 tokens needs" in message
    assert "holds 2048 tokens" in message
    long = build_gguf(tmp_path / "long.gguf", max_position_embeddings=10**9)
    message = refusal(long, kv_budget_bytes=10**15)
    assert "a context of 1000000000 tokens, 8 rows" in message
    assert "free memory" in message


def test_what_llama_cpp_logs_is_in_the_engines_log(
    gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with engine(gguf, backend="llama", log_level="debug"):
        pass
    out, err = capfd.readouterr()
    assert "llama.cpp: info: " in out
    assert err == ""
    with engine(gguf, backend="llama"):
        pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bits", [8, 4])
def test_kv_in_fewer_bits_takes_less(bits: int, smollm2: tuple[Path, ChatModel]) -> None:
    path, chat = smollm2
    prompt = chat.encode_chat([{"role": "user", "content": "How many days are in a week?"}])
    with engine(path, backend="llama", kv_bits=bits) as client:
        assert client.ready is not None
        assert client.ready.kv_bytes_per_token < 23052 * (bits + 1) / 16
        answer = client.run([prompt], 24)[0]
        assert len(answer) == 24
        assert bits == 4 or "7" in chat.decode(answer)  # so small a model loses its thread with 4


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ChatModel]:
    found = resolve(EMBEDDED_ID, tmp_path_factory.mktemp("cache"), "llama")
    return found.path, ChatModel.load(found.words)


def test_a_server_whose_model_llama_cpp_refuses_says_why(gguf: Path, tmp_path: Path) -> None:
    change, words = DAMAGES["shape"]
    path = tmp_path / "broken.gguf"
    path.write_bytes(change(gguf.read_bytes()))
    with serve(tmp_path, "--model", str(path), settings={"model": {"backend": "llama"}}) as server:
        answer = httpx.post(
            f"{server.url}/v1/completions", json={"model": "broken", "prompt": "Hello", "max_tokens": 2}, timeout=60
        )
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_loading_failed"
        assert words in answer.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health", timeout=60).json()["models"] == {"broken": "failed"}
