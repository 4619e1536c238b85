"""/v1/embeddings and /v1/rerank as clients meet them: a server with a real embedding model beside one that writes."""

import base64
import concurrent.futures
import json
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest

from tests.data.embeddings_reference import TEXTS
from tests.server import Server, serve
from tests.test_embedding_models import REFERENCE, write

NAME = "all-MiniLM-L6-v2"
LONG = "The server hands a lease out for each request, and takes it back. " * 15
"""About 220 tokens."""
MANY = 200
SETTINGS = {"engine": {"restart_backoff_s": 0.05, "max_queue": 2}}


@pytest.fixture(scope="module")
def server(minilm: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"model": {"embedding": str(minilm), "aliases": {"small": NAME}}, **SETTINGS}
    with serve(tmp_path_factory.mktemp("embeddings"), "--model", str(tiny_model), settings=settings) as server:
        server.line(rf"lmx: model {NAME} ready")
        server.line(r"lmx: model tiny-llama ready")
        yield server


def post(server: Server, path: str = "/v1/embeddings", **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60)


def vectors(answer: httpx.Response) -> npt.NDArray[np.float32]:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return np.array([item["embedding"] for item in data], np.float32)


def record(server: Server) -> dict[str, Any]:
    """What /admin/status says of the embedding engine."""
    model: dict[str, Any] = server.status()["models"][1]
    assert model["type"] == "embeddings"
    found: dict[str, Any] = model["engine"]
    return found


def until(server: Server, condition: Callable[[dict[str, Any]], bool]) -> None:
    while not condition(record(server)):
        assert server.process.poll() is None


def idle(server: Server) -> None:
    """Nothing is held, by the server's account and by the engine's own."""
    until(server, lambda r: r["state"] == "ready" and r["live_leases"] == r["live_sequences"] == r["waiting"] == 0)
    until(server, lambda r: r["engine"] is not None and r["engine"]["queued"] == r["engine"]["prefilling"] == 0)


def test_vectors_are_sentence_transformers(server: Server) -> None:
    answer = post(server, input=TEXTS, model=NAME)
    assert (vectors(answer) * np.array(REFERENCE["minilm"])).sum(1).min() > 0.9999
    body = answer.json()
    assert (body["object"], body["model"], body["data"][0]["object"]) == ("list", NAME, "embedding")
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 300
    assert answer.headers["x-request-id"].startswith("req_")


def test_every_spelling_of_input_is_the_same_vector(server: Server) -> None:
    ids = [101, 1037, 2460, 2028, 1012, 102]  # [CLS] a short one . [SEP]
    one = vectors(post(server, input=TEXTS[0]))
    for spelled in (TEXTS[:1], ids, [ids]):
        np.testing.assert_array_equal(vectors(post(server, input=spelled)), one)
    np.testing.assert_allclose(vectors(post(server, input=[ids, ids[:3], ids]))[[0, 2]], one[[0, 0]], atol=1e-6)
    assert post(server, input=[ids, ids]).json()["usage"]["prompt_tokens"] == 12


@pytest.mark.parametrize("model", [None, NAME, "small", "text-embedding-3-small", "openai/" + NAME, "default"])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings"])
def test_names_and_paths(server: Server, model: str | None, path: str) -> None:
    answer = post(server, path, input="a", **({"model": model} if model else {}))
    assert vectors(answer).shape == (1, 384)
    assert answer.json()["model"] == (model or NAME)


def test_base64_is_the_same_numbers(server: Server) -> None:
    numbers = vectors(post(server, input=TEXTS, encoding_format="float"))
    data = post(server, input=TEXTS, encoding_format="base64").json()["data"]
    decoded = np.array([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data])
    np.testing.assert_allclose(decoded, numbers, atol=1e-6)
    one = post(server, input=TEXTS[0], encoding_format="base64").json()["data"][0]["embedding"]
    again = vectors(post(server, input=TEXTS[0]))[0]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(one), "<f4"), again)


def test_the_sdk_which_asks_for_base64(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.embeddings.create(model=NAME, input=TEXTS, user="me")
        assert client.models.retrieve(NAME).id == NAME
    found = np.array([item.embedding for item in answer.data])
    assert (found * np.array(REFERENCE["minilm"])).sum(1).min() > 0.9999
    assert answer.usage.total_tokens > 300


def test_a_large_body_is_read_apart_and_each_of_many_is_as_if_alone(server: Server) -> None:
    texts = [f"{index} {'word ' * (index % 40 // 4)}{' ' * 200}" for index in range(400)]
    assert len(json.dumps(texts)) > 64 * 1024
    many = vectors(post(server, input=texts))
    for index in (0, 39, 40, 200, 399):
        alone = vectors(post(server, input=texts[index]))[0]
        assert alone @ many[index] > 0.99999
    idle(server)
    texts[150] = LONG * 2
    refused = post(server, input=texts)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[150]")


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({"input": ""}, "input", '""'),
        ({"input": []}, "input", "[]"),
        ({"input": ["a", ""]}, "input[1]", '""'),
        ({"input": [[5], []]}, "input[1]", "[]"),
        ({"input": [5, 30522]}, "input", "30522"),
        ({"input": [[5], [99999]]}, "input[1]", "99999"),
        ({"input": [5, -1]}, "input[1]", "-1"),
        ({"input": ["a", 5]}, "input[1]", "5"),
        ({"input": {"a": 1}}, "input", "a"),
        ({}, "input", "required"),
        ({"input": ["a"] * 2049}, "input", "2049"),
        ({"input": ["a", LONG * 2]}, "input[1]", "at most 256 tokens"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "hex"),
        ({"input": "a", "dimensions": 0}, "dimensions", "0"),
        ({"input": "a", "dimensions": 128}, "dimensions", "384"),
        ({"input": "a", "prompt_name": "query"}, "prompt_name", "query"),
        ({"input": "a", "input_type": "poem"}, "input_type", "poem"),
        ({"input": "a", "model": "tiny-llama"}, "model", NAME),
        ({"input": "a", "truncate_prompt_tokens": 10}, "truncate_prompt_tokens", "10"),
        ({"input": "a", "normalize": False}, "normalize", "false"),
        ({"input": "a", "add_special_tokens": False}, "add_special_tokens", "false"),
    ],
)
def test_a_bad_request_names_field_and_value(server: Server, body: dict[str, Any], param: str, named: str) -> None:
    answer = httpx.post(f"{server.url}/v1/embeddings", content=json.dumps(body), timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert named in error["message"]


def test_the_length_that_is_refused_is_told_with_the_limit(server: Server) -> None:
    error = post(server, input=["a", LONG * 2]).json()["error"]
    assert error["code"] == "context_length_exceeded"
    tokens = int(error["message"].split(" has ")[1].split(".")[0])
    assert vectors(post(server, input=LONG)).shape == (1, 384)
    assert 256 < tokens < 600


def test_models_know_of_each_other(server: Server) -> None:
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    loaded = [model for model in listed if model["state"] != "not loaded"]
    kinds = [(model["id"], model["type"], model["max_model_len"]) for model in loaded]
    assert kinds == [("tiny-llama", "llm", 8192), (NAME, "embeddings", 256)]
    chat = post(server, "/v1/chat/completions", model=NAME, messages=[{"role": "user", "content": "hello"}])
    assert (chat.status_code, chat.json()["error"]["param"]) == (400, "model")
    assert "tiny-llama" in chat.json()["error"]["message"]
    assert post(server, input="a", model="nobody").status_code == 404
    assert httpx.get(f"{server.url}/health?ready").json()["models"] == {"tiny-llama": "ready", NAME: "ready"}
    assert post(server, "/v1/rerank", query="a", documents=["b"]).status_code == 400


def send(server: Server, **body: Any) -> socket.socket:
    sock = socket.create_connection(server.address)
    data = json.dumps({"input": [LONG] * MANY, **body}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


GO: dict[str, Callable[[socket.socket], None]] = {
    "fin": lambda sock: sock.close(),
    "half-close": lambda sock: sock.shutdown(socket.SHUT_WR),
    "reset": reset,
}


def computed(server: Server) -> float:
    return server.metrics()["lmx_prompt_tokens_total"]


@pytest.mark.parametrize("go", sorted(GO))
def test_a_client_that_goes_in_a_running_batch(server: Server, go: str) -> None:
    """Most of its 44,000 tokens are never computed."""
    before = computed(server)
    sock = send(server)
    until(server, lambda r: r["live_leases"] == r["live_sequences"] == 1 and r["waiting"] == 0)
    GO[go](sock)
    idle(server)
    sock.close()
    assert computed(server) - before < 22_000


def test_a_client_that_goes_while_it_waits(server: Server) -> None:
    """Behind an earlier one of the same client's."""
    first = send(server)
    until(server, lambda r: r["live_sequences"] == 1 and r["waiting"] == 0)
    second = send(server, input="short")
    until(server, lambda r: r["live_leases"] == 2 and r["waiting"] == 1)
    second.close()
    until(server, lambda r: r["live_leases"] == r["live_sequences"] == 1)
    first.close()
    idle(server)


def test_a_deadline(server: Server) -> None:
    for options in ({"json": {"input": [LONG] * 1000, "timeout": 0.5}}, {"headers": {"x-request-timeout": "0.5"}}):
        body: dict[str, Any] = {"json": {"input": [LONG] * 1000}, **options}
        answer = httpx.post(f"{server.url}/v1/embeddings", timeout=60, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout"), answer.text
    idle(server)


def test_a_short_request_does_not_wait_behind_another_clients_thousands(server: Server) -> None:
    crowd = send(server, user="crowd")
    until(server, lambda r: r["live_sequences"] == 1 and r["waiting"] == 0)
    assert vectors(post(server, input="short", user="single")).shape == (1, 384)
    assert record(server)["live_sequences"] == 1  # the crowd's is still at work
    crowd.close()
    idle(server)


def test_a_full_queue(server: Server) -> None:
    running = send(server)
    until(server, lambda r: r["live_sequences"] == 1 and r["waiting"] == 0)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, server, input=text) for text in "ab"]
        until(server, lambda r: r["waiting"] == 2)
        refused = post(server, input="c")
        running.close()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        assert [answer.result().status_code for answer in waiting] == [200, 200]


def test_an_engine_that_dies_is_replaced_and_its_requests_done_again(server: Server) -> None:
    """No vector was with the client yet, so it need not know. The model that writes is not touched."""
    before = record(server)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, input=[LONG] * 20)
        until(server, lambda r: r["live_sequences"] == 1 and r["waiting"] == 0)
        os.kill(before["pid"], signal.SIGKILL)
        assert vectors(answer.result()).shape == (20, 384)
    after = record(server)
    assert (after["restarts"], after["pid"] != before["pid"]) == (before["restarts"] + 1, True)
    assert server.engine()["restarts"] == 0
    idle(server)


def test_a_model_that_writes_makes_vectors_too(tiny_model: Path, tmp_path: Path) -> None:
    """The very folder that also chats; its vectors may be cut where its files say so."""
    folder = tmp_path / "twice"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).symlink_to(file)
    prompts = {"prompts": {"query": "Find: ", "document": ""}, "matryoshka_dims": [16, 32]}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with serve(tmp_path, "--model", str(folder), settings={"model": {"embedding": str(folder)}}) as server:
        server.line(r"lmx: model twice-embedding ready")
        whole = vectors(post(server, input=["Hello!", "Find: Hello!"]))
        assert whole.shape == (2, 64)
        np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
        cut = vectors(post(server, input=["Hello!"], dimensions=16))
        np.testing.assert_allclose(cut[0], whole[0, :16] / np.linalg.norm(whole[0, :16]), atol=1e-5)
        for asked in ({"prompt_name": "query"}, {"input_type": "query"}, {"input_type": "search_query"}):
            np.testing.assert_allclose(vectors(post(server, input="Hello!", **asked))[0], whole[1], atol=1e-5)
        plain = vectors(post(server, input="Hello!", input_type="document"))[0]
        np.testing.assert_allclose(plain, whole[0], atol=1e-5)
        refused = post(server, input="Hello!", dimensions=17).json()["error"]["message"]
        assert "16, 32, 64" in refused
        chat = post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "a"}], max_tokens=2)
        assert chat.status_code == 200


def test_rerank_and_a_hang(tiny_model: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "ranker", "rank", vocab_size=96)
    write_ranker_tokenizer(folder)
    settings = {"model": {"embedding": str(folder)}, "engine": {"hang_timeout_s": 2.0, "restart_backoff_s": 0.05}}
    with serve(tmp_path, "--model", str(tiny_model), settings=settings) as server:
        server.line(r"lmx: model ranker ready")
        documents = ["b c d", {"text": "e f g h i"}, "j"]
        answer = post(server, "/v1/rerank", query="a b", documents=documents, return_documents=True).json()
        scores = [result["relevance_score"] for result in answer["results"]]
        assert scores == sorted(scores, reverse=True)
        assert all(0 < score < 1 for score in scores)
        assert {result["index"] for result in answer["results"]} == {0, 1, 2}
        texts = {result["index"]: result["document"]["text"] for result in answer["results"]}
        assert texts == {0: "b c d", 1: "e f g h i", 2: "j"}
        best = post(server, "/rerank", query="a b", documents=documents, top_n=1).json()["results"]
        assert [result["index"] for result in best] == [answer["results"][0]["index"]]
        alone = post(server, "/v1/rerank", query="a b", documents=["j"]).json()["results"][0]["relevance_score"]
        assert alone == pytest.approx(scores[[r["index"] for r in answer["results"]].index(2)], abs=1e-6)
        for body, param in (
            ({"query": "", "documents": ["a"]}, "query"),
            ({"query": "a", "documents": []}, "documents"),
            ({"query": "a", "documents": ["b", ""]}, "documents[1]"),
            ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ):
            refused = post(server, "/v1/rerank", **body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert post(server, input="a").status_code == 400
        # One that hangs is replaced, and what it had is done by the next.
        os.kill(record(server)["pid"], signal.SIGSTOP)
        assert post(server, "/v1/rerank", query="a b", documents=["j"]).json()["results"][0]["relevance_score"] == alone
        assert record(server)["restarts"] == 1
        idle(server)


def write_ranker_tokenizer(folder: Path) -> None:
    """A word for each letter, and pairs as BERT has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {chr(ord("a") + index): index + 3 for index in range(26)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
