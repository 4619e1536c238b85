"""What ends an answer, what it goes on from and what is told of its tokens: against the null engine, which draws token
300, 301, ... and honours stop_ids.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.api_server import FIRST_TOKEN, Server, answer_text, with_server, write_model
from tests.models import train_tokenizer
from tests.test_api_openai import events
from tests.test_api_tools import function

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


async def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    response = await server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@with_server()
async def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(server: Server) -> None:
    body = HELLO | {"stop_token_ids": [FIRST_TOKEN + 5], "max_tokens": 20}
    for options, text in (
        ({}, answer_text(5)),
        ({"logprobs": True}, answer_text(5)),
        ({"include_stop_str_in_output": True}, answer_text(6)),
        ({"no_stop_trim": True, "logprobs": True}, answer_text(6)),
        ({"min_tokens": 5}, answer_text(5)),
        ({"min_tokens": 6}, answer_text(20)),
        ({"min_new_tokens": 6}, answer_text(20)),
    ):
        answer = await post(server, CHAT, body | options)
        [choice] = answer["choices"]
        assert choice["message"]["content"] == text, options
        ended = text != answer_text(20)
        assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == (
            ("stop", 6) if ended else ("length", 20)
        )
        *chunks, _ = await events(server, CHAT, body | options)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    error = (await server.http.post(CHAT, json=HELLO | {"stop_token_ids": [10**6]})).json()["error"]
    assert error["param"] == "stop_token_ids"
    assert "1000000" in error["message"]
    await server.free()


@with_server()
async def test_a_stop_string_may_stay_and_waits_for_min_tokens(server: Server) -> None:
    text = answer_text(100)
    stop = text[40:44]
    end = text.index(stop)
    body = HELLO | {"stop": ["never", stop], "max_tokens": 100}
    kept = (await post(server, CHAT, body | {"include_stop_str_in_output": True}))["choices"][0]
    assert (kept["message"]["content"], kept["finish_reason"]) == (text[: end + len(stop)], "stop")
    *chunks, _ = await events(server, CHAT, body | {"include_stop_str_in_output": True})
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text[: end + len(stop)]
    assert stop not in text[end + 4 :]
    late = (await post(server, CHAT, body | {"min_tokens": 99}))["choices"][0]
    assert (late["message"]["content"], late["finish_reason"]) == (text, "length")
    refused = await server.http.post(CHAT, json=body | {"min_tokens": 101})
    assert refused.json()["error"]["param"] == "min_tokens"
    await server.free()


@with_server()
async def test_token_ids_are_told_as_vllm_tells_them(server: Server) -> None:
    tokens = train_tokenizer().encode("Hello there").ids
    ids = list(range(FIRST_TOKEN, FIRST_TOKEN + 4))
    for prompt in ("Hello there", tokens):
        body = {"prompt": prompt, "max_tokens": 10, "n": 2, "stop_token_ids": [ids[-1]], "return_token_ids": True}
        for choice in (await post(server, PLAIN, body))["choices"]:
            assert (choice["prompt_token_ids"], choice["token_ids"]) == (tokens, ids)
        *chunks, _ = await events(server, PLAIN, body)
        for index in range(2):
            mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert [c["prompt_token_ids"] for c in mine if "prompt_token_ids" in c] == [tokens]
            assert [token for c in mine for token in c.get("token_ids", ())] == ids
            assert "".join(c["text"] for c in mine) == answer_text(3)
    prompt = train_tokenizer().encode("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n").ids
    body = HELLO | {"max_tokens": 4, "return_token_ids": True}
    answer = await post(server, CHAT, body)
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == ids
    *chunks, _ = await events(server, CHAT, body)
    assert [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk] == [prompt]
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())] == ids
    # A stop string's last token counts, what was drawn after it does not.
    stop = answer_text(100)[40:44]
    answer = await post(server, CHAT, body | {"stop": stop, "max_tokens": 100})
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]
    assert stop in train_tokenizer().decode(answer["choices"][0]["token_ids"])


@with_server()
async def test_an_answer_goes_on_with_the_last_message(server: Server) -> None:
    start = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    for last, fields in (
        ({}, {"continue_final_message": True, "add_generation_prompt": False}),
        ({}, {"continue_final_message": True}),
        ({}, {"continue_": True}),
        ({"prefix": True}, {}),
        ({"partial": True}, {}),
    ):
        for content in ("Well, ", "", [{"type": "text", "text": "Well, "}]):
            messages = [*HELLO["messages"], {"role": "assistant", "content": content} | last]
            answer = await post(
                server, CHAT, {"messages": messages, "max_tokens": 3, "return_token_ids": True} | fields
            )
            expected = start + ("Well, " if content else "")
            assert answer["prompt_token_ids"] == train_tokenizer().encode(expected).ids
            assert answer["choices"][0]["message"]["content"] == answer_text(3)
    said = {"role": "assistant", "content": "x"}
    for messages, fields, param in (
        (HELLO["messages"], {"continue_final_message": True}, "continue_final_message"),
        (
            [*HELLO["messages"], said],
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ([said | {"prefix": True}, *HELLO["messages"]], {}, "messages[0].prefix"),
        ([HELLO["messages"][0] | {"partial": True}], {}, "messages[0].partial"),
    ):
        refused = await server.http.post(CHAT, json={"messages": messages} | fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


@with_server()
async def test_a_large_body_goes_on_with_its_last_message_too(server: Server) -> None:
    """It is read by another process, which sends back less."""
    messages = [
        {"role": "user", "content": "word " * 2_000, "x": "y" * 70_000},
        {"role": "assistant", "content": "A", "prefix": True},
    ]
    answer = await post(server, CHAT, {"messages": messages, "max_tokens": 2, "return_token_ids": True})
    assert train_tokenizer().decode(answer["prompt_token_ids"], skip_special_tokens=False).endswith("assistant\nA")


# --- log-probabilities --------------------------------------------------------------------------------


def together(chunks: list[Any], index: int) -> dict[str, list[Any]]:
    """The logprobs of a completion stream, put together."""
    found: dict[str, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index and choice["logprobs"]:
                for name, values in choice["logprobs"].items():
                    found.setdefault(name, []).extend(values)
    return found


@with_server()
async def test_a_prompt_is_scored_as_lm_eval_asks(server: Server) -> None:
    """Its ``loglikelihood``: echo, logprobs 1, max_tokens 1; and the same with 0, which answers nothing."""
    texts = ["Hello there, wörld! 🙂 Ünïcode", "Hello" * 400]
    ids = [train_tokenizer().encode(text).ids for text in texts]
    for prompt in (texts, ids):
        for max_tokens in (1, 0):
            body = {"prompt": prompt, "max_tokens": max_tokens, "logprobs": 1, "echo": True, "temperature": 0, "n": 2}
            answer = await post(server, PLAIN, body)
            *chunks, _ = await events(server, PLAIN, body)
            assert answer["usage"]["completion_tokens"] == 4 * max_tokens
            for choice in answer["choices"]:
                text, tokens = texts[choice["index"] // 2], ids[choice["index"] // 2]
                assert choice["text"] == text + answer_text(max_tokens)
                assert choice["finish_reason"] == "length"
                logprobs = choice["logprobs"]
                assert logprobs["token_logprobs"] == [None] + [-1.0] * (len(tokens) - 1 + max_tokens)
                assert logprobs["top_logprobs"][0] is None
                for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
                    assert top[token] == max(top.values())
                for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
                    assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
                assert together(chunks, choice["index"]) == logprobs
    await server.free()


@with_server()
async def test_a_prompts_logprobs_in_vllms_shape(server: Server) -> None:
    prompt = train_tokenizer().encode("Hello there").ids
    for path, body in (
        (PLAIN, {"prompt": "Hello there", "n": 2}),
        (CHAT, HELLO | {"return_token_ids": True}),
    ):
        answer = await post(server, path, body | {"max_tokens": 2, "prompt_logprobs": 2})
        told = [answer] if path == CHAT else answer["choices"]
        for holder in told:
            first, *others = holder["prompt_logprobs"]
            tokens = answer["prompt_token_ids"] if path == CHAT else prompt
            assert first is None
            for token, entries in zip(tokens[1:], others, strict=True):
                assert entries[str(token)]["logprob"] == -1.0
                assert entries[str(token)]["rank"] == 1
                assert len(entries) == 2
        refused = await server.http.post(path, json=body | {"prompt_logprobs": 2, "stream": True})
        assert refused.json()["error"]["param"] == "prompt_logprobs"
    for options in ({"max_tokens": 0}, {"prompt_logprobs": 21}, {"echo": True, "logprobs": 1, "suffix": "x"}):
        assert (await server.http.post(PLAIN, json={"prompt": "x"} | options)).status_code == 400
    await server.free()


@with_server(LMX_NULL_FIRST_TOKEN=150)
async def test_the_bytes_of_a_token_that_is_part_of_a_character(server: Server) -> None:
    """The null engine's tokens are single bytes here, most of them no text by themselves."""
    names = [train_tokenizer().id_to_token(token) for token in range(150, 180)]
    answer = await post(server, CHAT, HELLO | {"max_tokens": 30, "logprobs": True, "top_logprobs": 3})
    entries = answer["choices"][0]["logprobs"]["content"]
    assert all(len(entry["bytes"]) == 1 for entry in entries)
    whole = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert whole.decode(errors="replace") == answer["choices"][0]["message"]["content"]
    assert len({tuple(entry["bytes"]) for entry in entries}) == len(names)
    body = {"prompt": "x", "max_tokens": 30, "logprobs": 3}
    plain = (await post(server, PLAIN, body))["choices"][0]
    assert any(token == f"bytes:\\x{byte:02x}" for token, byte in zip(plain["logprobs"]["tokens"], whole, strict=True))
    assert [len(top) for top in plain["logprobs"]["top_logprobs"]] == [3, 3, 3] + [4] * 27
    *chunks, _ = await events(server, PLAIN, body)
    assert together(chunks, 0) == plain["logprobs"]


@with_server()
async def test_a_token_that_ends_a_completion_is_scored_and_one_that_ends_a_chat_is_not(server: Server) -> None:
    stop = {"stop_token_ids": [FIRST_TOKEN + 2], "max_tokens": 9}
    plain = (await post(server, PLAIN, {"prompt": "x", "logprobs": 0} | stop))["choices"][0]
    assert (plain["text"], len(plain["logprobs"]["tokens"])) == (answer_text(2), 3)
    assert plain["logprobs"]["text_offset"][-1] == len(plain["text"])
    chat = (await post(server, CHAT, HELLO | {"logprobs": True} | stop))["choices"][0]
    assert len(chat["logprobs"]["content"]) == 2


def said(chunks: list[Any], index: int) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices)


@with_server()
async def test_usage_in_every_chunk(server: Server) -> None:
    """vLLM's continuous_usage_stats, which benchmark clients send."""
    each = {"continuous_usage_stats": True}
    for path, body in ((CHAT, HELLO), (PLAIN, {"prompt": "Hello"}), (CHAT, HELLO | {"tools": [function("get_time")]})):
        for further in ({}, {"n": 2}, {"logprobs": 1 if path == PLAIN else True}):
            asked = body | further | {"max_tokens": 5}
            *chunks, last, _ = await events(server, path, asked | {"stream_options": each | {"include_usage": True}})
            *plain, _ = await events(server, path, asked | {"stream_options": each})
            assert last["choices"] == []
            for index in range(asked.get("n", 1)):
                told = [chunk["usage"] for chunk in chunks if chunk["choices"][0]["index"] == index]
                assert {usage["prompt_tokens"] for usage in told} == {last["usage"]["prompt_tokens"]}
                counts = [usage["completion_tokens"] for usage in told]
                assert (counts, counts[-1]) == (sorted(counts), 5)
                assert said(chunks, index) == said(plain, index) == answer_text(5)
            assert not any(chunk.get("usage") for chunk in plain)
    await server.free()
