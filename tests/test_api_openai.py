"""The OpenAI face, through the real SDK and raw HTTP, against the whole server with the null engine."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import trio
from openai.types.chat import ChatCompletionChunk

from lmx import __version__
from lmx.hub.inventory import EMBEDDED_ID
from tests.api_server import CONTEXT, Server, answer_text, with_server, write_model
from tests.models import train_tokenizer

HELLO: Any = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


async def events(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of each event of a stream, with [DONE] as a string."""
    response = await server.http.post(path, json=body | {"stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    return [line if line == "[DONE]" else json.loads(line) for line in data]


@with_server()
async def test_models(server: Server) -> None:
    listed = (await server.sdk.models.list()).data
    assert [model.id for model in listed] == ["tiny", EMBEDDED_ID]  # which a request would load
    for name in ("tiny", "mine", "gpt-4o"):
        assert (await server.sdk.models.retrieve(name)).id == "tiny"
    response = await server.http.get("/v1/models/org/name")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "tiny" in response.json()["error"]["message"]


@with_server()
async def test_chat_in_one_piece(server: Server) -> None:
    raw = await server.sdk.chat.completions.with_raw_response.create(model="gpt-4o", messages=HELLO, max_tokens=5)
    answer = raw.parse()
    assert answer.model == "gpt-4o"
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == answer_text(5)
    assert answer.choices[0].finish_reason == "length"
    assert "tool_calls" not in raw.http_response.json()["choices"][0]["message"]
    prompt = train_tokenizer().encode("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt.ids)
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == len(prompt.ids) + 5
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert raw.headers["x-request-id"]
    assert int(raw.headers["openai-processing-ms"]) >= 0


@with_server()
async def test_chat_as_a_stream(server: Server) -> None:

    def read() -> list[ChatCompletionChunk]:  # in a thread: the asynchronous SDK leaves generators open under Trio
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as sdk:
            asks_usage: Any = {"include_usage": True}
            return list(
                sdk.chat.completions.create(
                    model="mine", messages=HELLO, max_tokens=20, stream=True, stream_options=asks_usage
                )
            )

    first, *middle, last, usage = await trio.to_thread.run_sync(read)
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].finish_reason is None
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == answer_text(20)
    assert last.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 20
    assert {chunk.model for chunk in (first, *middle, last, usage)} == {"mine"}
    assert len({chunk.id for chunk in (first, *middle, last, usage)}) == 1


@with_server()
async def test_streams_end_with_done_and_carry_usage_only_when_asked(server: Server) -> None:
    for path, prompt in (("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "Hello"})):
        *chunks, done = await events(server, path, prompt | {"max_tokens": 3})
        assert done == "[DONE]"
        assert not any("usage" in chunk for chunk in chunks)
        asked = prompt | {"max_tokens": 3, "stream_options": {"include_usage": True}}
        *chunks, usage, done = await events(server, path, asked)
        assert done == "[DONE]"
        assert all(chunk["usage"] is None for chunk in chunks)
        assert usage["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"stop": ["é", "q"]}, {"logprobs": True, "top_logprobs": 2}])
def test_a_stream_put_together_is_the_answer_in_one_piece(
    options: dict[str, Any], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @with_server()
    async def test(server: Server) -> None:
        body = {"messages": HELLO, "max_tokens": 200, "seed": 7} | options
        whole = (await server.http.post("/v1/chat/completions", json=body)).json()
        *chunks, _ = await events(server, "/v1/chat/completions", body)
        assert whole["seed"] == chunks[0]["seed"] == 7
        for choice in whole["choices"]:
            mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
            assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
            if choice["logprobs"] is not None:
                together = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
                assert together == choice["logprobs"]["content"]
                assert [len(entry["top_logprobs"]) for entry in together] == [2] * 200

    test(model_folder, monkeypatch)


@with_server()
async def test_a_stop_string_ends_the_answer_and_the_lease(server: Server) -> None:
    text = answer_text(100)
    stop = text[40:44]
    answer = await server.sdk.chat.completions.create(model="tiny", messages=HELLO, stop=["never", stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 100
    await server.free()


@with_server()
async def test_n_answers_and_their_seeds(server: Server) -> None:
    answer = await server.sdk.chat.completions.create(model="tiny", messages=HELLO, n=4, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    seeds = {(await server.sdk.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)).seed for _ in "ab"}
    assert len(seeds) == 2  # none given: a fresh one, told
    assert all(0 <= seed < 2**53 for seed in seeds)


@with_server()
async def test_completions_of_every_kind_of_prompt(server: Server) -> None:
    tokens = train_tokenizer().encode("Hello there").ids
    for prompt, count in (("Hello there", 1), (["Hello there", "x"], 2), (tokens, 1), ([tokens, tokens], 2)):
        answer = await server.sdk.completions.create(model="tiny", prompt=prompt, max_tokens=4, n=2)
        assert [choice.text for choice in answer.choices] == [answer_text(4)] * (2 * count)
        assert [choice.index for choice in answer.choices] == list(range(2 * count))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2 * len(tokens)
    assert answer.usage.completion_tokens == 16
    default = await server.sdk.completions.create(model="tiny", prompt="Hello")
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


@with_server()
async def test_completions_echo_and_logprobs(server: Server) -> None:
    tokens = train_tokenizer().encode("Hello there").ids
    for prompt in ("Hello there", tokens):
        echoed = await server.sdk.completions.create(model="tiny", prompt=prompt, max_tokens=4, echo=True)
        assert echoed.choices[0].text == "Hello there" + answer_text(4)
        body = {"prompt": prompt, "max_tokens": 4, "echo": True}
        *chunks, _ = await events(server, "/v1/completions", body)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == echoed.choices[0].text
    answer = await server.sdk.completions.create(model="tiny", prompt="Hello", max_tokens=4, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-1.0] * 4
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    for token, offset in zip(logprobs.tokens or [], logprobs.text_offset or [], strict=True):
        assert answer.choices[0].text[offset:].startswith(token)


@with_server()
async def test_max_tokens_is_cut_to_the_room_left(server: Server) -> None:
    for asked in (32_000_000, -1, None):
        body = {"prompt": [5] * (CONTEXT - 3), "max_tokens": asked}
        answer = (await server.http.post("/v1/completions", json=body)).json()
        assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


@with_server()
async def test_a_prompt_over_the_context_is_refused_before_the_first_byte(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await server.sdk.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x y" * CONTEXT}], stream=True
        )
    assert raised.value.code == "context_length_exceeded"
    assert raised.value.param == "messages"
    assert f"This model's maximum context length is {CONTEXT} tokens. However, your messages resulted in" in str(
        raised.value
    )
    assert "Please reduce the length of the messages." in str(raised.value)
    await server.free()


BAD_CHAT: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "llama-9"}, 404, "model", "'llama-9'"),
    ({"tool_choice": "required"}, 400, "tool_choice", "required"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice", "function"),
    ({"response_format": {"type": "json"}}, 400, "response_format.type", '"json"'),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "null"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "logprobs"),
    ({"logit_bias": {"99999999": 1}}, 400, "logit_bias", "'99999999'"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", "'x'"),
    ({"temperature": "hot"}, 400, "temperature", '"hot"'),
    ({"messages": []}, 400, "messages", "[]"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "user"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]", "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, 400, "messages[0].content[0]", "5"),
]


@with_server()
async def test_bad_chat_requests(server: Server) -> None:
    for fields, status, param, told in BAD_CHAT:
        for stream in (False, True):
            body = {"messages": HELLO, "stream": stream} | fields
            response = await server.http.post("/v1/chat/completions", json=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (status, param), fields
            assert error["type"] == "invalid_request_error"
            assert told in error["message"]
    await server.free()


BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "required"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ""}, "prompt", "no tokens"),
    ({"prompt": [[]]}, "prompt", "[]"),
    ({"prompt": [1, -1]}, "prompt[1]", "-1"),
    ({"prompt": [99999999]}, "prompt", "99999999"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "middle"),
    ({"prompt": "x", "best_of": 3, "n": 4}, "best_of", "3"),
    ({"prompt": "x", "echo": True, "logprobs": 0, "suffix": "y"}, "echo", "suffix"),
]


@with_server()
async def test_bad_completion_requests(server: Server) -> None:
    for body, param, told in BAD_COMPLETIONS:
        response = await server.http.post("/v1/completions", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param), body
        assert told in error["message"]


@with_server()
async def test_what_agents_send_is_taken(server: Server) -> None:
    """Fields and shapes that clients use, several of which the model's template does not know."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": "true"}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}]},
        {"role": "developer", "content": "brief."},
        {"role": "user", "content": "a", "name": "bob"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"role": "assistant", "content": "ok", "tool_calls": []},
        {"role": "user", "content": "go on"},
    ]
    for extra in (
        {"tools": [tool], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "store": True, "metadata": {"a": "b"}, "user": "u", "priority": 1},
        {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": True},
        {"max_completion_tokens": 2, "max_tokens": 9, "ttl": 60, "draft_model": "d", "service_tier": "auto"},
        {"model": None, "temperature": 0, "top_k": -1, "seed": -(2**63), "frequency_penalty": 0, "stop": None},
    ):
        response = await server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2} | extra)
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == 2


@with_server()
async def test_tokenize_and_detokenize(server: Server) -> None:
    told = (await server.http.post("/tokenize", json={"prompt": "Hello <|im_end|>"})).json()
    assert told["tokens"] == train_tokenizer().encode("Hello <|im_end|>").ids
    assert told["count"] == len(told["tokens"])
    ids = train_tokenizer().encode("Hello there").ids
    assert (await server.http.post("/detokenize", json={"tokens": ids})).json()["prompt"] == "Hello there"
    assert (await server.http.post("/detokenize", json={"tokens": [10**9]})).status_code == 400


@with_server()
async def test_docs_name_every_route_and_need_no_internet(server: Server) -> None:
    spec = (await server.http.get("/openapi.json")).json()
    assert spec["info"]["version"] == __version__
    assert "messages" in json.dumps(spec["paths"]["/v1/chat/completions"]["post"]["requestBody"])
    page = (await server.http.get("/docs")).text
    assert "https://" not in page
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/admin/status", "/metrics", "/health"):
        assert path in spec["paths"]
        assert path in page


@with_server(LMX_NULL_STEP_MS=50)
async def test_a_deadline_ends_the_request(server: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 4000}
    for extra, headers in (({"timeout": 0.3}, {}), ({}, {"x-request-timeout": "0.3"})):
        response = await server.http.post("/v1/chat/completions", json=body | extra, headers=headers)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        response = await server.http.post("/v1/chat/completions", json=body | extra | {"stream": True}, headers=headers)
        assert response.status_code == 200
        *_, last = response.text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert "[DONE]" not in response.text
    await server.free()
    response = await server.http.post("/v1/chat/completions", json=body, headers={"x-request-timeout": "soon"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout"


@with_server(LMX_NULL_FAIL_TOKEN=9)
async def test_a_sequence_that_fails_tells_so(server: Server) -> None:
    body = {"prompt": [[5], [9]], "max_tokens": 50}
    response = await server.http.post("/v1/completions", json=body)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "generation_failed"
    response = await server.http.post("/v1/completions", json=body | {"stream": True})
    assert response.status_code == 200
    assert "generation_failed" in response.text.strip().split("\n\n")[-1]
    await server.free()


@with_server(LMX_NULL_STEP_MS=20)
async def test_many_streams_at_once(server: Server) -> None:
    texts = []

    async def one() -> None:
        chunks = await events(server, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 20})
        texts.append("".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one)
    assert texts == [answer_text(20)] * 20
    await server.free()
