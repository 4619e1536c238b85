"""Downloads: what a name means on the Hub, and the fetching child against a small real one, in all its troubles."""

import hashlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from lmx.errors import LmxError
from lmx.hub.download.choose import choose
from lmx.hub.download.hub import Patience
from lmx.hub.download.names import gguf_quantization, read_name
from lmx.hub.download.request import Chosen, Request
from tests.hub_server import Hub, hub_server

QUANTIZATIONS = ("Q4_K_M", "Q8_0")
TOKEN = "hf_test"


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


class Fetch:
    """A running child. Its lines come as they are asked for."""

    def __init__(self, hub_url: str, models: Path, model: str, **more: Any) -> None:
        code, limit, proxy = more.pop("code", ""), more.pop("largest_file", None), more.pop("proxy", None)
        silence_s = more.pop("silence_s", None)
        defaults: dict[str, Any] = {
            "revision": "",
            "quantization": "",
            "allow_patterns": (),
            "quantizations": QUANTIZATIONS,
            "low_disk_bytes": 0,
            "first_wait_s": 0.01,
            "give_up_s": 20.0,
        }
        request = Request(model=model, models_path=str(models), **{**defaults, **more})
        environment = {name: text for name, text in os.environ.items() if not name.lower().endswith("_proxy")}
        environment |= {"HF_ENDPOINT": hub_url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}
        if silence_s:
            environment["HF_HUB_DOWNLOAD_TIMEOUT"] = str(silence_s)
        if proxy:
            environment |= {"HTTP_PROXY": proxy, "NO_PROXY": "127.0.0.1"}
        command = ["-c", code] if code else ["-m", "lmx.hub.download.fetch"]
        self.process = subprocess.Popen(
            [sys.executable, "-P", *command, json.dumps(request.as_json())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
        )
        self.lines: list[dict[str, Any]] = []

    def until(self, found: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self.lines.append(json.loads(text))
            if found(self.lines[-1]):
                return self.lines[-1]
        raise AssertionError((self.lines, self.process.stderr and self.process.stderr.read()))

    def done(self) -> Path:
        """Wait for its good end."""
        folder = Path(self.until(lambda line: "done" in line or "error" in line)["done"])
        assert self.ended() == 0
        return folder

    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.until(lambda line: "error" in line or "done" in line)["error"]
        assert self.ended() == 1
        return error

    def ended(self) -> int:
        returncode = self.process.wait(60)  # and only then close its standard input, which would end it
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return returncode

    @property
    def chosen(self) -> Chosen:
        return Chosen.from_json(next(line["chosen"] for line in self.lines if "chosen" in line))


def files(folder: Path) -> dict[str, bytes]:
    """What is in a folder but hidden files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("[!.]*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


MLX = {
    "config.json": b"{}",
    "tokenizer.json": noise(3000, 1).hex().encode(),
    "model-00001-of-00002.safetensors": noise(300_000, 2),
    "model-00002-of-00002.safetensors": noise(200_000, 3),
}
OTHER = {"README.md": b"hello", ".gitattributes": b"*", "original/model.safetensors": b"x", "pytorch_model.bin": b"x"}


def test_names() -> None:
    spellings = {
        "org/name": ("org", "name", "", ""),
        " org/name@v1.0 ": ("org", "name", "v1.0", ""),
        "org/name:Q4_K_M": ("org", "name", "", "Q4_K_M"),
        "org/name:latest": ("org", "name", "", ""),
        "org/name@main:iq4_xs": ("org", "name", "main", "iq4_xs"),
        "hf.co/org/name:UD-Q2_K_XL": ("org", "name", "", "UD-Q2_K_XL"),
        "hf://org/name@refs/pr/1": ("org", "name", "refs/pr/1", ""),
        "https://huggingface.co/org/name": ("org", "name", "", ""),
        "https://huggingface.co/org/name/tree/abc123": ("org", "name", "abc123", ""),
        "https://hf.co/org/name/blob/main/a/b-Q5_K_M.gguf": ("org", "name", "main", "Q5_K_M"),
        "https://hf.co/org/name/resolve/main/config.json?download=true": ("org", "name", "main", ""),
        "Qwen3-4B": ("", "Qwen3-4B", "", ""),
        "Qwen3-4B:8bit": ("", "Qwen3-4B", "", "8bit"),
        "qwen3:0.6b": ("", "qwen3-0.6b", "", ""),
    }
    for written, expected in spellings.items():
        name = read_name(written)
        assert (name.publisher, name.name, name.revision, name.quantization) == expected, written
    assert read_name("org/name@a:Q8_0", revision="b", quantization="Q4_0") == read_name("org/name@b:Q4_0")
    wrong = [
        "",
        " ",
        "a/b/c",
        "../x",
        "org/..",
        "/etc/passwd",
        "org/na\0me",
        "org/name:wrong",
        "org/name@../x",
        "a" * 600,
    ]
    wrong += ["https://example.com/org/name", "https://huggingface.co/datasets/org/name", "org/na me", "org\\name"]
    for written in wrong:
        with pytest.raises(LmxError, match="names no model to download") as caught:
            read_name(written)
        assert caught.value.status == 400


def test_gguf_quantizations_in_names() -> None:
    names = {
        "Qwen3-4B-Q4_K_M.gguf": "Q4_K_M",
        "qwen3-4b-q4_0.gguf": "Q4_0",
        "model.Q8_0.gguf": "Q8_0",
        "Model-UD-IQ2_XXS.gguf": "UD-IQ2_XXS",
        "BF16/Model-BF16": "BF16",
        "Q4_K_M/model": "Q4_K_M",
        "gpt-oss-20b-mxfp4.gguf": "MXFP4",
        "Llama-3.2-1B.gguf": "",
    }
    assert {name: gguf_quantization(name) for name in names} == names


@pytest.fixture
def ask(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Chosen]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)

    def chosen(written: str, *, allow: tuple[str, ...] = (), **more: str) -> Chosen:
        api, patience = HfApi(endpoint=hub.url), Patience(0.01, 5, lambda _: None)
        return choose(
            api,
            read_name(written, **more),
            quantizations=QUANTIZATIONS,
            allow_patterns=allow,
            patience=patience,
        )

    return chosen


def paths(chosen: Chosen) -> list[str]:
    return [file.path for file in chosen.files]


def refusal(chosen: Callable[[], Chosen]) -> str:
    with pytest.raises(LmxError) as caught:
        chosen()
    return caught.value.message


def test_files_of_a_named_repository(hub: Hub, ask: Callable[..., Chosen]) -> None:
    repo = hub.add("org/mlx-8bit", {**MLX, **OTHER, "1_Pooling/config.json": b"{}"}, library="mlx")
    chosen = ask("org/mlx-8bit")
    assert paths(chosen) == sorted([*MLX, "1_Pooling/config.json"])
    assert (chosen.format, chosen.quantization, chosen.revision) == ("mlx", "8bit", repo.commit)
    assert chosen.total_bytes == sum(map(len, MLX.values())) + 2
    assert chosen.why.startswith("MLX weights")
    weights = next(file for file in chosen.files if file.path.startswith("model-00001"))
    assert weights.sha256 == hashlib.sha256(MLX[weights.path]).hexdigest()
    assert paths(ask("org/mlx-8bit", allow=("*.json",))) == ["1_Pooling/config.json", "config.json", "tokenizer.json"]
    assert "No file of org/mlx-8bit matches *.xyz" in refusal(lambda: ask("org/mlx-8bit", allow=("*.xyz",)))
    assert "its weights are 8bit" in refusal(lambda: ask("org/mlx-8bit:4bit"))

    hub.add("org/plain", {"config.json": b"{}", "model.safetensors": b"x", "consolidated.safetensors": b"x"})
    chosen = ask("org/plain")
    assert (chosen.format, paths(chosen)) == ("safetensors", ["config.json", "model.safetensors"])
    assert "not MLX's" in chosen.why
    hub.add("org/none", {"pytorch_model.bin": b"x"})
    assert "neither safetensors nor GGUF" in refusal(lambda: ask("org/none"))


def test_gguf_files_of_a_named_repository(hub: Hub, ask: Callable[..., Chosen]) -> None:
    parts = [f"Q8_0/m-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
    names = [*parts, "m-Q4_K_M.gguf", "m-IQ2_M.gguf", "mmproj-F16.gguf", "m.imatrix.gguf", "README.md", "config.json"]
    hub.add("org/m-GGUF", {name: name.encode() for name in names})
    chosen = ask("org/m-GGUF")
    assert (paths(chosen), chosen.format, chosen.quantization) == (["m-Q4_K_M.gguf"], "gguf", "Q4_K_M")
    assert chosen.why == "GGUF: Q4_K_M is the first of hub.quantizations that it has (of IQ2_M, Q4_K_M, Q8_0)"
    assert paths(ask("org/m-GGUF:q8_0")) == parts
    assert paths(ask("org/m-GGUF", quantization="IQ2_M")) == ["m-IQ2_M.gguf"]
    message = refusal(lambda: ask("org/m-GGUF:Q6_K"))
    assert message == "org/m-GGUF has no GGUF file in Q6_K; it has IQ2_M, Q4_K_M, Q8_0."

    hub.add("org/odd-GGUF", {"a-Q2_K.gguf": b"123", "a-Q3_K_S.gguf": b"12"})
    chosen = ask("org/odd-GGUF")
    assert (paths(chosen), chosen.why.split(",")[0]) == (["a-Q3_K_S.gguf"], "GGUF: the smallest")
    hub.add("org/half-GGUF", {parts[0]: b"1"})
    assert "has 1 of 2 parts" in refusal(lambda: ask("org/half-GGUF"))
    hub.add("org/two-GGUF", {"a-Q4_K_M.gguf": b"1", "b-Q4_K_M.gguf": b"1"})
    assert "several models in Q4_K_M: a-Q4_K_M, b-Q4_K_M" in refusal(lambda: ask("org/two-GGUF"))
    hub.add("org/both", {**MLX, "m-Q4_K_M.gguf": b"1"})
    assert ask("org/both").format == "gguf"  # tensors that are not MLX's are second to a GGUF file
    hub.add("org/both-mlx", {**MLX, "m-Q4_K_M.gguf": b"1"}, tags=("mlx",))
    assert ask("org/both-mlx").format == "mlx"
    assert ask("org/both-mlx:Q4_K_M").format == "gguf"


def test_a_name_without_publisher_is_looked_for(hub: Hub, ask: Callable[..., Chosen]) -> None:
    for name in ("Alpha-4bit", "Alpha-8bit", "Beta-Instruct-8bit", "Beta-Instruct-4bit", "Beta-Instruct-4bit-extra"):
        hub.add(f"mlx-community/{name}", MLX, tags=("mlx",), downloads=10)
    hub.add("someone/Beta-Instruct-4bit", MLX, tags=("mlx",), downloads=1000)
    hub.add("someone/Gamma-4bit-mlx", MLX, tags=("mlx",), downloads=1)
    hub.add("other/Delta-GGUF", {"d-Q8_0.gguf": b"1"}, tags=("gguf",), downloads=5)
    hub.add("other/Delta-Large-GGUF", {"d-Q8_0.gguf": b"1"}, tags=("gguf",), downloads=50)
    for name in ("Llama-3.2-3B-4bit", "Llama-3.2-3B-Instruct-4bit", "Llama-3.2-13B-Instruct-4bit"):
        hub.add(f"mlx-community/{name}", MLX, tags=("mlx",))
    found = {
        "llama3.2:3b": "mlx-community/Llama-3.2-3B-Instruct-4bit",
        "Llama-3.2-3B": "mlx-community/Llama-3.2-3B-4bit",
        "Alpha": "mlx-community/Alpha-4bit",
        "Alpha:8bit": "mlx-community/Alpha-8bit",
        "Alpha-8bit": "mlx-community/Alpha-8bit",
        "beta:instruct": "mlx-community/Beta-Instruct-4bit",
        "gamma": "someone/Gamma-4bit-mlx",
        "delta": "other/Delta-GGUF",
        "delta:Q8_0": "other/Delta-GGUF",
    }
    assert {name: ask(name).repo for name in found} == found
    assert ask("Alpha").why == "mlx-community has it; MLX weights, 2 file(s)"
    assert ask("delta").why.startswith("no MLX weights; the most used GGUF repository that a search for 'delta' finds")
    assert "no model called 'omega'" in refusal(lambda: ask("omega"))
    message = refusal(lambda: ask("someone/Alpha"))
    assert message.startswith("The Hub has no model someone/Alpha, or it is private")
    assert message.endswith("Near names: mlx-community/Alpha-4bit, mlx-community/Alpha-8bit.")


def test_a_model_appears_as_a_whole_and_is_not_fetched_twice(hub: Hub, tmp_path: Path) -> None:
    hub.add("mlx-community/Tiny-4bit", {**MLX, **OTHER}, tags=("mlx",), gated=True, token=TOKEN)
    fetch = Fetch(hub.url, tmp_path, "Tiny")
    folder = fetch.done()
    assert folder == tmp_path / "mlx-community" / "Tiny-4bit"
    assert files(folder) == MLX
    assert list((tmp_path / ".downloads").iterdir()) == []
    counts = [line["done_bytes"] for line in fetch.lines if "done_bytes" in line]
    assert counts == sorted(counts)
    assert counts[-1] == fetch.chosen.total_bytes == sum(map(len, MLX.values()))
    assert not any("agent" in request for request in hub.requests)

    hub.served.clear()
    again = Fetch("http://hub.invalid", tmp_path, "mlx-community/Tiny-4bit", proxy=hub.url)
    assert (again.done(), sum(hub.served.values())) == (folder, 0)
    assert again.lines[-2]["message"] == "it was there already"
    assert any("http://hub.invalid/api" in request for request in hub.requests), "asked as a proxy is"

    # A new commit with fewer shards replaces the folder; the GGUF file beside them is a model of its own.
    (folder / "own-Q4_0.gguf").write_bytes(b"GGUF")
    changed = {"config.json": b"{ }", "model.safetensors": noise(1000)}
    hub.add("mlx-community/Tiny-4bit", changed, tags=("mlx",))
    assert files(Fetch(hub.url, tmp_path, "Tiny").done()) == {**changed, "own-Q4_0.gguf": b"GGUF"}


@pytest.mark.parametrize("end", ["SIGKILL", "the server's end"])
def test_what_was_interrupted_goes_on_where_it_stopped(hub: Hub, tmp_path: Path, end: str) -> None:
    large = "model-00001-of-00002.safetensors"
    hub.add("org/mlx", MLX, tags=("mlx",))
    hub.holds[large] = 160 * 1024
    first = Fetch(hub.url, tmp_path, "org/mlx")
    first.until(lambda line: "chosen" in line)
    staging = tmp_path / ".downloads" / first.chosen.key
    hub.until_held(large)
    first.until(
        lambda line: line.get("done_bytes", 0) > 300_000 or (staging / f"{large}.part").stat().st_size > 100_000
    )
    if end == "the server's end":
        assert first.process.stdin is not None
        first.process.stdin.close()
        assert first.ended() == 1
    else:
        first.process.send_signal(signal.Signals[end])
        assert first.ended() == -signal.Signals[end]
    assert not (tmp_path / "org").exists()

    hub.go_on()
    # What was pushed meanwhile does not matter: the commit was chosen.
    second = Fetch(hub.url, tmp_path, "org/mlx", chosen=first.chosen.as_json())
    assert files(second.done()) == MLX
    total = first.chosen.total_bytes
    assert total <= sum(hub.served.values()) < total + 96 * 1024  # what was on its way to the first
    assert next(line for line in second.lines if line.get("done_bytes"))["done_bytes"] >= 0


def test_troubles_that_time_heals(hub: Hub, tmp_path: Path) -> None:
    one, two = (name for name in MLX if name.endswith(".safetensors"))
    hub.add("org/mlx", MLX, tags=("mlx",))
    hub.answer("GET /api/models/org/mlx$", 429, Retry_After="0")
    hub.answer("GET /api/models/org/mlx/tree", 500)
    hub.answer(f"resolve/.*{one}", 503, times=2, Retry_After="0")
    hub.answer("resolve/.*/config.json", 429, ratelimit='"resolvers";r=0;t=0')
    hub.answer("GET /org/mlx/model-00002", 502)
    hub.cuts[one] = [50_000, 0, 100_000]
    hub.damaged[two] = 1
    hub.stalled["tokenizer.json"] = 1
    fetch = Fetch(hub.url, tmp_path, "org/mlx", silence_s=1)
    assert files(fetch.done()) == MLX
    assert hub.served[one] == len(MLX[one])
    assert hub.served[two] == 2 * len(MLX[two])
    told = {line["message"] for line in fetch.lines if "message" in line}
    assert "the Hub answered 429; trying again in 0 s" in told
    assert any("timed out" in message for message in told)
    assert all(answer.times == 0 for answer in hub.answers)


def test_a_server_without_ranges_and_a_damaged_file(hub: Hub, tmp_path: Path) -> None:
    one, two = (name for name in MLX if name.endswith(".safetensors"))
    hub.add("org/mlx", MLX, tags=("mlx",))
    hub.ranges = False
    hub.cuts[one] = [50_000]
    assert files(Fetch(hub.url, tmp_path, "org/mlx").done()) == MLX
    hub.add("org/damaged", {"config.json": b"{}", two: MLX[two]}, tags=("mlx",))
    hub.damaged[two] = 9
    error = Fetch(hub.url, tmp_path, "org/damaged").error()
    assert error["message"].startswith(f"{two} of org/damaged came damaged twice")
    assert not (tmp_path / "org" / "damaged").exists()


def test_what_cannot_be_fetched_says_the_way_out(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/mlx", MLX, tags=("mlx",))
    hub.add("org/gated", MLX, gated=True)
    hub.add("org/busy", MLX)
    hub.add("org/down", MLX)
    hub.answer("/api/models/org/busy", 429, times=99, Retry_After="7200")
    hub.answer("/api/models/org/down", 503, times=99)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    huge = 2**62
    tries: dict[str, tuple[Fetch, int, str]] = {
        "gated": (Fetch(hub.url, tmp_path, "org/gated"), 403, f"accept its licence at {hub.url}/org/gated, and set HF"),
        "missing": (
            Fetch(hub.url, tmp_path, "org/mlxx"),
            404,
            "no model org/mlxx, or it is private: then set HF_TOKEN",
        ),
        "revision": (Fetch(hub.url, tmp_path, "org/mlx@v9"), 404, "org/mlx has no revision 'v9'"),
        "busy": (Fetch(hub.url, tmp_path, "org/busy"), 503, "Wait 7200 s, or set HF_TOKEN"),
        "down": (Fetch(hub.url, tmp_path, "org/down", give_up_s=1.0), 503, "answered 503 until lmx gave up"),
        "nowhere": (Fetch(nowhere, tmp_path, "org/mlx", give_up_s=1.0), 502, "Check the network, and HTTPS_PROXY"),
        "disk": (Fetch(hub.url, tmp_path, "org/mlx", low_disk_bytes=huge), 507, "org/mlx takes 0.5 MB more"),
    }
    for fetch, status, words in tries.values():
        error = fetch.error()
        assert (error["status"], words in error["message"]) == (status, True), error
    assert not (tmp_path / "org").exists()


def test_a_further_quantization_joins_the_folder(hub: Hub, tmp_path: Path) -> None:
    parts = {f"Q8_0/m-Q8_0-0000{n}-of-00002.gguf": noise(5000, n) for n in (1, 2)}
    hub.add("org/m-GGUF", {"m-Q4_K_M.gguf": noise(3000), **parts, "README.md": b"x"})
    folder = Fetch(hub.url, tmp_path, "org/m-GGUF").done()
    assert Fetch(hub.url, tmp_path, "org/m-GGUF:Q8_0").done() == folder
    assert files(folder) == {"m-Q4_K_M.gguf": noise(3000), **parts}
    assert list((tmp_path / ".downloads").iterdir()) == []
    hub.served.clear()
    Fetch(hub.url, tmp_path, "org/m-GGUF").done()
    assert sum(hub.served.values()) == 0


def test_a_full_disk_keeps_what_has_come(hub: Hub, tmp_path: Path) -> None:
    large = "model-00001-of-00002.safetensors"
    hub.add("org/mlx", MLX, tags=("mlx",))
    fetch = Fetch(hub.url, tmp_path, "org/mlx", largest_file=250_000)
    error = fetch.error()
    assert (error["code"], error["status"]) == ("insufficient_disk", 507)
    part = tmp_path / ".downloads" / fetch.chosen.key / f"{large}.part"
    assert part.stat().st_size == 250_000
    hub.served.clear()
    assert files(Fetch(hub.url, tmp_path, "org/mlx").done()) == MLX
    assert hub.served[large] == 50_000


def test_two_children_for_the_same_files(hub: Hub, tmp_path: Path) -> None:
    large = "model-00001-of-00002.safetensors"
    hub.add("mlx-community/Tiny-4bit", MLX, tags=("mlx",))
    hub.holds[large] = 0
    first = Fetch(hub.url, tmp_path, "Tiny")
    hub.until_held(large)
    second = Fetch(hub.url, tmp_path, "mlx-community/Tiny-4bit")
    second.until(lambda line: line.get("message") == "another job makes the same; waiting for it")
    hub.go_on()
    assert first.done() == second.done()
    assert hub.served == {name: len(data) for name, data in MLX.items()}
    assert list((tmp_path / ".downloads").iterdir()) == []


def test_files_too_large_for_plain_http_are_the_clients_own_business(hub: Hub, tmp_path: Path) -> None:
    """Xet's, on the real Hub; this one makes huggingface_hub fall back on HTTP."""
    hub.add("org/mlx", MLX, tags=("mlx",))
    code = (
        "import lmx.hub.download.transfer as transfer\ntransfer.MOST_HTTP_BYTES = 250_000\n"
        "from lmx.hub.download.fetch import main\nmain()"
    )
    fetch = Fetch(hub.url, tmp_path, "org/mlx", code=code)
    folder = fetch.done()
    assert files(folder) == MLX
    assert fetch.lines[-2]["done_bytes"] == fetch.chosen.total_bytes
    assert any(request.startswith("HEAD /org/mlx/resolve") for request in hub.requests)
    assert not list(folder.glob(".xet*"))
