"""What clients put into bodies: every value is honoured, or refused with its field and itself; none is dropped in
silence, and none gives a 5xx. Tables of (body, status, param), through HTTP and the OpenAI SDK."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.api.core.parse import parse
from lmx.api.core.schemas import ChatRequest
from lmx.api.core.unbuilt import _FIELDS
from lmx.errors import InvalidRequest
from tests.api_server import CONTEXT, Server, answer_text, with_server, write_model
from tests.models import train_tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: Any = [{"role": "user", "content": "Hello!"}]
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER: Any = {"type": "function", "function": {"name": "g"}}

Case = tuple[dict[str, Any], int, str | None]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


async def check(server: Server, path: str, base: dict[str, Any], cases: list[Case]) -> None:
    for fields, status, param in cases:
        response = await server.http.post(path, content=json.dumps({"max_tokens": 1} | base | fields).encode())
        answer = response.json()
        told = (response.status_code, answer.get("error", {}).get("param"))
        assert told == (status, param), (fields, answer)
        if status == 400:
            assert answer["error"]["type"] == "invalid_request_error"
            assert len(answer["error"]["message"]) < 600


def assistant(**fields: Any) -> dict[str, Any]:
    return {"messages": [*HELLO, {"role": "assistant", "content": "x"} | fields, *HELLO]}


def calls(value: Any) -> dict[str, Any]:
    return assistant(tool_calls=value)


def arguments(value: Any) -> dict[str, Any]:
    return calls([{"id": "1", "type": "function", "function": {"name": "f", "arguments": value}}])


CALLED = "messages[1].tool_calls"
MESSAGES: list[Case] = [
    (calls(5), 400, CALLED),
    (calls("x"), 400, CALLED),
    (calls(["x"]), 400, f"{CALLED}[0]"),
    (calls([None]), 400, f"{CALLED}[0]"),
    (calls({"a": 1}), 400, CALLED),
    (calls([{}]), 400, f"{CALLED}[0].function"),
    (calls([{"function": "f"}]), 400, f"{CALLED}[0].function"),
    (calls([{"function": {"name": 5}}]), 400, f"{CALLED}[0].function.name"),
    (calls([{"function": {"arguments": "{}"}}]), 400, f"{CALLED}[0].function.name"),
    (calls([{"type": "custom", "function": {"name": "f"}}]), 400, f"{CALLED}[0].type"),
    (calls([{"id": 5, "function": {"name": "f"}}]), 400, f"{CALLED}[0].id"),
    (calls([]), 200, None),
    (calls(None), 200, None),
    (calls([{"function": {"name": "f"}}]), 200, None),
    (arguments(5), 400, f"{CALLED}[0].function.arguments"),
    (arguments(["a"]), 400, f"{CALLED}[0].function.arguments"),
    (arguments([]), 200, None),
    (arguments("[" * 1000), 200, None),
    (arguments('{"a":' * 500 + "1" + "}" * 500), 200, None),
    (arguments('{"a":' * 150 + "1" + "}" * 150), 200, None),
    (arguments('{"a":' + "1" * 1500 + "}"), 200, None),
    (arguments('{"a": NaN}'), 200, None),
    (arguments("not JSON"), 200, None),
    (arguments({"a": [1, {"b": None}]}), 200, None),
    *[(arguments(value), 200, None) for value in ("", " ", "\n", "null", None, "{}", "5", "[]")],
    (assistant(name=5), 400, "messages[1].name"),
    (assistant(tool_call_id=[]), 400, "messages[1].tool_call_id"),
    (assistant(function_call="f"), 400, "messages[1].function_call"),
    (assistant(reasoning_content=[1]), 400, "messages[1].reasoning_content"),
    (assistant(reasoning_content="hm", refusal=None, annotations=[], audio=None), 200, None),
    (assistant(audio={"id": "a"}), 400, "messages[1].audio"),
    (assistant(prefix=True), 400, "messages[1].prefix"),
    (assistant(prefix=False), 200, None),
    (assistant(content=[{"type": "refusal", "refusal": "no"}, {"type": "output_text", "text": "x"}]), 200, None),
    (assistant(content=[{"type": "refusal"}]), 400, "messages[1].content[0]"),
    (assistant(content=[{"type": ["text"], "text": "x"}]), 400, "messages[1].content[0]"),
    (assistant(content=[{"type": "text", "text": None}]), 400, "messages[1].content[0]"),
    (assistant(content=[{}]), 400, "messages[1].content[0]"),
    (assistant(content=["x"]), 400, "messages[1].content[0]"),
    (assistant(content={}), 400, "messages[1].content"),
    (assistant(role="tool", content=None), 400, "messages[1].content"),
    (assistant(role=["user"]), 400, "messages[1].role"),
    ({"messages": [HELLO]}, 400, "messages[0]"),
    ({"messages": {}}, 400, "messages"),
    ({"messages": None}, 400, "messages"),
]


@with_server()
async def test_messages(server: Server) -> None:
    await check(server, CHAT, {}, MESSAGES)


VALUES: list[Case] = [
    *[({"logit_bias": {key: 1}}, 400, "logit_bias") for key in ("1" * 5000, "-1", "1.0", " 5", "٣", "²", "", "99999")],
    *[({"logit_bias": {"5": value}}, 400, "logit_bias.5") for value in (1e308, -101, 100.1, "1", None, [], True)],
    *[({"logit_bias": value}, 400, "logit_bias") for value in ([], "x", 5)],
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, 400, "logit_bias"),
    *[({"logit_bias": {"5": value}}, 200, None) for value in (5e-324, -100, 100, 0, -0.0)],
    ({"logit_bias": {}}, 200, None),
    ({"logit_bias": {"0005": 1}}, 200, None),
    *[({"temperature": value}, 200, None) for value in (5e-324, 1e-310, 1e-5, 0, -0.0, 2)],
    *[({"temperature": value}, 400, "temperature") for value in (-5e-324, 2.1, 1e308, "0", True, [])],
    *[({"top_p": value}, 200, None) for value in (0, 5e-324, 1, 1e-9)],
    *[({"top_p": value}, 400, "top_p") for value in (-0.1, 1.1)],
    *[({"min_p": value}, 200, None) for value in (0, 5e-324, 1)],
    *[({"min_p": value}, 400, "min_p") for value in (-0.1, 1.1)],
    *[({"top_k": value}, 200, None) for value in (-1, 0, 1, 2**40, 2**63 - 1)],
    *[({"top_k": value}, 400, "top_k") for value in (-2, 2**63, 1.5, 10**4000)],
    *[({name: v}, 400, name) for name in ("repetition_penalty", "repeat_penalty") for v in (5e-324, 0, -1, 0.001, 11)],
    *[({name: v}, 200, None) for name in ("repetition_penalty", "repeat_penalty") for v in (0.01, 1, 10)],
    *[({name: v}, 400, name) for name in ("presence_penalty", "frequency_penalty") for v in (-2.1, 2.1, 1e308)],
    *[({name: v}, 200, None) for name in ("presence_penalty", "frequency_penalty") for v in (-2, 5e-324, 2)],
    *[({"seed": value}, 200, None) for value in (-1, 0, -(2**63), 2**63 - 1)],
    *[({"seed": value}, 400, "seed") for value in (2**63, 1.5, "1", 10**4000)],
    ({"repetition_penalty": 0.01, "temperature": 5e-324, "logit_bias": {"5": 100}, "top_p": 5e-324}, 200, None),
    ({"stop": ["x" * 4096]}, 200, None),
    ({"stop": "x" * 4097}, 400, "stop"),
    ({"stop": [["x"]]}, 400, "stop[0]"),
    ({"model": "x" * 1001}, 400, "model"),
    ({"model": "gpt-4" + "o" * 2000}, 400, "model"),
    ({"model": ["tiny"]}, 400, "model"),
    ({"user": "u" * 60_000}, 200, None),
    ({"user": 5}, 400, "user"),
    ({"timeout": 1e308}, 200, None),
    ({"timeout": -1}, 400, "timeout"),
    ({"priority": 10**4000}, 400, "priority"),
    ({"n": 10**30}, 400, "n"),
    ({"best_of": 2, "n": 3}, 400, "best_of"),
    ({"best_of": 17}, 400, "best_of"),
    ({"best_of": 2, "stream": True}, 400, "best_of"),
    ({"best_of": 2}, 200, None),
    ({"best_of": 2, "n": 2}, 200, None),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream_options": {}, "stream": False}, 400, "stream_options"),
    ({"stream_options": None}, 200, None),
    ({"stream_options": []}, 400, "stream_options"),
    ({"response_format": {"type": "text"}}, 200, None),
    ({"response_format": {"type": "json_object"}}, 200, None),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}, 200, None),
    ({"response_format": {"type": "json_schema", "json_schema": 5}}, 400, "response_format.json_schema"),
    ({"response_format": {"type": "grammar"}}, 400, "response_format.grammar"),
    ({"response_format": {"type": "banana"}}, 400, "response_format.type"),
    ({"response_format": {"type": None}}, 400, "response_format.type"),
    ({"response_format": {}}, 400, "response_format.type"),
    ({"response_format": "json"}, 400, "response_format"),
]


@with_server()
async def test_values_on_both_faces(server: Server) -> None:
    await check(server, CHAT, {"messages": HELLO}, VALUES)
    await check(server, COMPLETIONS, {"prompt": "Hello"}, VALUES)
    await server.free()


FORCED = {"type": "function", "function": {"name": "f"}}
UNIQUE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
"""What no grammar can say."""
CHATS: list[Case] = [
    *[({"tools": value}, 400, "tools[0]") for value in ([1, 2], ["x"], [None], [[]])],
    *[({"tools": value}, 400, "tools") for value in (5, "x", {}, True)],
    ({"tools": [{}]}, 400, "tools[0].function"),
    ({"tools": [{"function": {"name": "f"}}]}, 400, "tools[0].type"),
    ({"tools": [{"type": 5, "function": {"name": "f"}}]}, 400, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].function"),
    ({"tools": [{"type": "function", "name": "f"}]}, 400, "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}, TOOL]}, 200, None),
    ({"tools": [{"type": "web_search"}]}, 200, None),
    ({"tools": [{"type": "namespace", "name": "a", "tools": [TOOL]}], "tool_choice": "auto"}, 200, None),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [TOOL, {"type": "function", "function": {}}]}, 400, "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, 400, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": UNIQUE}}]}, 200, None),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": UNIQUE, "strict": True}}]},
        400,
        "tools[0].function.parameters",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
        400,
        "tools[0].function.parameters",
    ),
    ({"tools": [TOOL] * 1025}, 400, "tools"),
    ({"tools": [TOOL]}, 200, None),
    ({"tools": []}, 200, None),
    ({"tools": [], "tool_choice": "auto"}, 200, None),
    ({"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False}, 200, None),
    ({"tools": [TOOL], "tool_choice": "none"}, 200, None),
    ({"tool_choice": "none"}, 200, None),
    ({"tool_choice": "auto"}, 400, "tool_choice"),
    ({"tool_choice": {"type": "auto"}}, 400, "tool_choice"),
    ({"tool_choice": {"type": "auto"}, "tools": [TOOL]}, 200, None),
    ({"tool_choice": {"type": "none"}, "tools": [TOOL]}, 200, None),
    *[({"tools": [TOOL], "tool_choice": value}, 200, None) for value in ("required", "any", FORCED, {"type": "any"})],
    *[({"tools": [TOOL], "tool_choice": value}, 400, "tool_choice") for value in ("x", "", {}, 5, {"type": "x"})],
    *[({"tools": [], "tool_choice": value}, 400, "tool_choice") for value in ("required", FORCED, {"type": "any"})],
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [FORCED]}}, 200, None),
    (
        {
            "tools": [TOOL, OTHER],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [OTHER]}},
        },
        200,
        None,
    ),
    *[
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"} | rule}, 400, "tool_choice")
        for rule in (
            {"mode": "required", "tools": []},
            {"mode": "none", "tools": [FORCED]},
            {"mode": "auto"},
            {"mode": "auto", "tools": [OTHER]},
            {"mode": "auto", "tools": [{}]},
            {"mode": "auto", "tools": 5},
            {"allowed_tools": 5},
            {},
        )
    ],
    ({"functions": [{"name": "f"}]}, 200, None),
    ({"functions": [{"name": "f"}], "function_call": "auto"}, 200, None),
    ({"functions": [{"name": "f"}], "function_call": "none"}, 200, None),
    ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, 200, None),
    ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, 400, "function_call"),
    ({"functions": [{"name": "f"}], "function_call": {}}, 400, "function_call"),
    ({"function_call": {"name": "g"}}, 400, "function_call"),
    ({"function_call": "auto"}, 400, "function_call"),
    ({"functions": [{}]}, 400, "functions[0].name"),
    ({"functions": ["f"]}, 400, "functions[0]"),
    *[({"reasoning_effort": v}, 200, None) for v in ("none", "minimal", "low", "medium", "high", "xhigh", "max")],
    *[({"reasoning_effort": v}, 400, "reasoning_effort") for v in ("banana", "", 5, True, ["low"])],
    ({"reasoning": {"effort": "low"}}, 200, None),
    ({"reasoning": {"enabled": False, "exclude": False}}, 200, None),
    ({"reasoning": {"effort": "banana"}}, 400, "reasoning.effort"),
    ({"reasoning": {"max_tokens": 5}}, 200, None),
    ({"reasoning": {"max_tokens": "5"}}, 400, "reasoning.max_tokens"),
    ({"reasoning": {"exclude": True}}, 200, None),
    ({"reasoning": {"exclude": "yes"}}, 400, "reasoning.exclude"),
    ({"thinking": {"type": "disabled"}}, 200, None),
    ({"thinking": True}, 200, None),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 200, None),
    ({"thinking": {"type": "x"}}, 400, "thinking.type"),
    ({"think": "banana"}, 400, "think"),
    ({"think": False}, 200, None),
    ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"top_logprobs": 3, "logprobs": False}, 400, "top_logprobs"),
    ({"top_logprobs": 0}, 200, None),
    ({"logprobs": 1}, 400, "logprobs"),
    ({"echo": True}, 400, "echo"),
    ({"echo": False, "suffix": ""}, 200, None),
    ({"suffix": "x"}, 400, "suffix"),
    ({"add_special_tokens": True}, 400, "add_special_tokens"),
    ({"add_generation_prompt": False}, 200, None),
    ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"loop": 1, "range": None, "message": "x", "": 1, "a b": 2}}, 200, None),
    ({"chat_template_kwargs": []}, 400, "chat_template_kwargs"),
]


@with_server()
async def test_chats(server: Server) -> None:
    await check(server, CHAT, {"messages": HELLO}, CHATS)


COMPLETED: list[Case] = [
    *[({"prompt": value}, 400, "prompt") for value in (None, 5, {}, True, [], [{}], [True], [None], [1.5], "", [[]])],
    ({"prompt": [1, "x"]}, 400, "prompt[1]"),
    ({"prompt": ["x", 1]}, 400, "prompt[1]"),
    ({"prompt": ["x", None]}, 400, "prompt[1]"),
    ({"prompt": ["x", ""]}, 400, "prompt"),
    ({"prompt": [[1], [1, []]]}, 400, "prompt[1][1]"),
    ({"prompt": [[1], []]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt[0]"),
    ({"prompt": [2**70]}, 400, "prompt[0]"),
    ({"prompt": [2**33]}, 400, "prompt"),
    ({"prompt": [[5]] * 1025}, 400, "prompt"),
    ({"prompt": [[5]] * 65, "n": 16}, 400, "prompt"),
    ({"prompt": ["a"] * 65, "n": 16}, 400, "prompt"),
    ({"prompt": [5] * CONTEXT}, 400, "prompt"),
    ({"prompt": [[5], [5] * CONTEXT]}, 400, "prompt"),
    ({"prompt": [5] * (CONTEXT - 1)}, 200, None),
    ({"prompt": [[5]] * 64, "n": 16}, 200, None),
    ({"prompt": "a\ud800"}, 400, None),
    ({"tools": [TOOL]}, 400, "tools"),
    ({"functions": [{"name": "f"}]}, 400, "functions"),
    ({"tools": []}, 200, None),
    ({"suffix": ""}, 200, None),
    ({"add_special_tokens": False}, 200, None),
    ({"logprobs": True}, 400, "logprobs"),
    ({"logprobs": 21}, 400, "logprobs"),
]


@with_server()
async def test_completions(server: Server) -> None:
    await check(server, COMPLETIONS, {"prompt": "Hello"}, COMPLETED)
    await server.free()


# --- fields that are not built --------------------------------------------------------------------

ASKED: dict[str, Any] = {
    "guided_whitespace_pattern": " ",
    "structured_output": {"choice": ["a", "b"]},
    "audio": {"voice": "alloy", "format": "wav"},
    "modalities": ["text", "audio"],
    "truncate_prompt_tokens": 10,
    "return_tokens": True,
    "min_length": 5,
    "allowed_token_ids": [1, 2],
    "bad_words": ["x"],
    "skip_special_tokens": False,
    "use_beam_search": True,
    "chat_template": "{{ messages }}",
    "documents": [{"text": "x"}],
    "n_predict": 5,
    "n_probs": 3,
    "mirostat": 2,
    "xtc_probability": 0.5,
    "dry_multiplier": 0.8,
    "top_n_sigma": 1.0,
    "typical_p": 0.9,
    "samplers": ["top_k"],
    "max_new_tokens": 5,
    "json_mode": True,
    "lora": [{"id": 0, "scale": 1.0}],
    "transforms": ["middle-out"],
    "verbosity": "low",
    "web_search_options": {},
    "random_seed": 5,
    "stop_sequences": ["x"],
    "extra_body": {"top_k": 1},
    "instructions": "Be brief.",
    "num_ctx": 2048,
    # Other spellings of what is built, or known
    "maxTokens": 5,
    "topP": 0.5,
    "top-k": 5,
    "Temperature": 0,
    "logitBias": {},
    "responseFormat": {"type": "json_object"},
    "guidedJson": {"type": "object"},
}
HARMLESS: dict[str, list[Any]] = {
    "grammar": ["", None],
    "guided_json": [None, False],
    "stop_token_ids": [[], None],
    "min_tokens": [0],
    "min_length": [0, 0.0],
    "typical_p": [1, 1.0],
    "mirostat": [0],
    "n_predict": [-1],
    "modalities": [["text"]],
    "skip_special_tokens": [True],
    "continue_final_message": [False],
    "include_stop_str_in_output": [False],
    "prompt_logprobs": [None],
    "verbosity": ["medium"],
    "repeat_last_n": [64, -1],
    # These only describe, or ask for what cannot be seen in the answer.
    "store": [True],
    "service_tier": ["flex"],
    "metadata": [{"a": "b"}],
    "cache_salt": ["x"],
    "prompt_cache_key": ["x"],
    "safety_identifier": ["x"],
    "request_id": ["x"],
    "cache_prompt": [True],
    "id_slot": [1],
    "prediction": [{"type": "content", "content": "x"}],
    "anything": [[{}]],
    "maxTokens": [None],
    "x" * 5000: [1],
    "": [1],
}


@with_server()
async def test_what_is_not_built_is_refused_by_name(server: Server) -> None:
    asked: list[Case] = [({name: value}, 400, name) for name, value in ASKED.items()]
    harmless: list[Case] = [({name: value}, 200, None) for name, values in HARMLESS.items() for value in values]
    windows: list[Case] = [({"repeat_last_n": 64, "repeat_penalty": 1.1}, 400, "repeat_last_n")]
    for path, base in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "Hello"})):
        await check(server, path, base, asked + harmless + windows)


@pytest.mark.parametrize("name", sorted(_FIELDS))
def test_null_is_never_asked_for(name: str) -> None:
    """SDKs dump whole models, in which most fields are null."""
    hello = b'"messages":[{"role":"user","content":"hi"}]'
    parse(ChatRequest, b'{%s,"%s":null}' % (hello, name.encode()))
    with pytest.raises(InvalidRequest) as raised:
        parse(ChatRequest, b'{%s,"%s":{"x":"%s"}}' % (hello, name.encode(), b"y" * 5000))
    assert raised.value.param == name
    assert len(raised.value.message) < 400


# --- what values mean -----------------------------------------------------------------------------


async def seeds(server: Server, **fields: Any) -> set[int]:
    body = {"prompt": "Hello", "max_tokens": 1} | fields
    return {(await server.http.post(COMPLETIONS, json=body)).json()["seed"] for _ in range(3)}


@with_server()
async def test_seed_minus_one_is_a_fresh_one(server: Server) -> None:
    assert len(await seeds(server, seed=-1)) == 3
    assert await seeds(server, seed=-2) == {-2}
    assert await seeds(server, seed=0) == {0}


@with_server()
async def test_the_drawn_token_is_always_among_the_top_logprobs(server: Server) -> None:
    for count in (0, 1, 3):
        answer = await server.sdk.completions.create(model="tiny", prompt="Hello", max_tokens=5, logprobs=count)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        for token, logprob, top in zip(
            logprobs.tokens or [], logprobs.token_logprobs or [], logprobs.top_logprobs or [], strict=True
        ):
            assert top[token] == logprob
            assert count <= len(top) <= count + 1


@with_server()
async def test_tokenizing_a_conversation(server: Server) -> None:
    """As vLLM: the ids that a chat would have."""

    async def tokenize(**body: Any) -> dict[str, Any]:
        response = await server.http.post("/tokenize", json=body)
        assert response.status_code == 200, response.text
        told: dict[str, Any] = response.json()
        return told

    told = await tokenize(messages=HELLO, return_token_strs=True)
    rendered = train_tokenizer().encode("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")
    assert told["tokens"] == rendered.ids
    assert told["token_strs"] == rendered.tokens
    assert (told["count"], told["max_model_len"]) == (len(rendered.ids), CONTEXT)
    chat = await server.sdk.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == told["count"]
    short = await tokenize(messages=HELLO, add_generation_prompt=False)
    assert short["tokens"] == rendered.ids[: short["count"]]
    assert "token_strs" not in short
    assert (await tokenize(messages=HELLO, tools=[TOOL]))["count"] >= told["count"]
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "x", "messages": HELLO}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": HELLO, "tools": [1]}, "tools[0]"),
        ({"messages": HELLO, "chat_template": "x"}, "chat_template"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls"),
        ({"prompt": ["x"]}, "prompt"),
        ({"prompt": "x", "return_token_strs": 1}, "return_token_strs"),
    ):
        response = await server.http.post("/tokenize", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), body
    for body, param in (({"tokens": [1, -1]}, "tokens[1]"), ({"tokens": [True]}, "tokens[0]"), ({}, "tokens")):
        response = await server.http.post("/detokenize", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), body


@with_server()
async def test_tokenizing_as_llama_server_does(server: Server) -> None:
    text = "Hello <|im_end|> 🤗"
    tokenizer = train_tokenizer()
    told = (await server.http.post("/tokenize", json={"content": text, "with_pieces": True})).json()
    ids = [token["id"] for token in told["tokens"]]
    assert ids == tokenizer.encode(text).ids
    spelled = b"".join(
        piece.encode() if isinstance(piece, str) else bytes(piece) for piece in (t["piece"] for t in told["tokens"])
    )
    assert spelled.decode() == text
    assert any(isinstance(token["piece"], list) for token in told["tokens"])  # 🤗 is in no piece as a whole
    plain = (await server.http.post("/tokenize", json={"content": text, "parse_special": False})).json()["tokens"]
    assert tokenizer.token_to_id("<|im_end|>") not in plain
    back = (await server.http.post("/detokenize", json={"tokens": plain})).json()
    assert back == {"prompt": text, "content": text}
    for body in ({"content": text, "prompt": text}, {"content": text, "messages": HELLO}):
        response = await server.http.post("/tokenize", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


NAMES = {
    200: (
        "tiny mine lmstudio/tiny openai/tiny lmstudio/mine default auto local-model model-placeholder gpt-3.5-turbo "
        "gpt-4 gpt-4o gpt-4o-mini gpt-4.1-nano gpt-4-0613 gpt-5 gpt-5-mini gpt-5.1 openai/gpt-4o o1 o1-mini o3 o3-pro "
        "TINY o4-mini claude-3-5-sonnet-20241022 claude-sonnet-4-5 chatgpt-4o-latest"
    ),
    404: (
        "gpt-oss-120b gpt-oss:20b openai/gpt-oss-20b gpt-2 gpt-j-6b gpt-neo gpt4all gpt-4all o1js o3x claude tiny2 tin "
        "lmstudio/ openai/x lmstudio/openai x/tiny tiny/ openchat gpt- gpt"
    ),
}


@with_server()
async def test_names(server: Server) -> None:
    for status, names in NAMES.items():
        for name in names.split():
            response = await server.http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1, "model": name})
            assert response.status_code == status, name
            if status == 404:
                assert response.json()["error"]["code"] == "model_not_found"
                assert "tiny" in response.json()["error"]["message"]
                assert response.json()["error"]["param"] == "model"
            else:
                assert response.json()["model"] == name
    with pytest.raises(openai.NotFoundError):
        await server.sdk.chat.completions.create(model="gpt-oss-120b", messages=HELLO)


ITEMS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "({% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}){% endfor %}{% endfor %}"
)


def test_no_arguments_are_the_empty_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a template that asks for the arguments' items, as those of Qwen 3 Coder and MiniMax do."""

    @with_server()
    async def test(server: Server) -> None:
        for value in ("", " ", "null", None, "{}", {}, "[]", [], '"{}"', '""', "0", "false"):
            response = await server.http.post("/tokenize", json=arguments(value))
            assert response.status_code == 200, value
            assert response.json()["tokens"] == train_tokenizer().encode("()").ids
        told = (await server.http.post("/tokenize", json=arguments('{"a": 1}'))).json()
        assert told["tokens"] == train_tokenizer().encode("(a=1)").ids
        for value, shown in (('{"a": ', '{"a": '), ("[1]", "[1]"), ('"x"', '"x"')):  # no object: not lost either
            told = (await server.http.post("/tokenize", json=arguments(value))).json()
            assert told["tokens"] == train_tokenizer().encode(f"(arguments={shown})").ids

    folder = write_model(tmp_path / "items")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": ITEMS}))
    test(folder, monkeypatch)


TOOLS_SHOWN = "{{ tools | tojson }}{{ enable_thinking }}{{ reasoning_effort }}"


def test_tools_and_thinking_reach_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {"function": {"parameters": {"z": 1, "a": 2}, "name": "f", "x": [1]}, "type": "function"}

    def shown(tools: Any, thinking: Any = "", effort: str = "") -> list[int]:
        ids: list[int] = train_tokenizer().encode(json.dumps(tools) + f"{thinking}{effort}").ids
        return ids

    @with_server()
    async def test(server: Server) -> None:
        allowed = {"type": "allowed_tools", "mode": "auto", "tools": [OTHER]}
        for fields, expected in (
            ({"tools": [odd]}, shown([odd])),  # as the client wrote it, the order of keys included
            ({"tools": [odd, OTHER], "tool_choice": allowed}, shown([OTHER])),
            ({"tools": [odd], "tool_choice": "none"}, shown(None)),
            ({"functions": [odd["function"]]}, shown([{"type": "function", "function": odd["function"]}])),
            ({"functions": [odd["function"]], "function_call": "none"}, shown(None)),
            ({"reasoning_effort": "low"}, shown(None, True, "low")),
            ({"reasoning_effort": "none"}, shown(None, False)),  # the template has a switch, and no word for it
            ({"reasoning": {"effort": "high"}}, shown(None, True, "high")),
            ({"reasoning": {"enabled": False}}, shown(None, False)),
            ({"thinking": {"type": "disabled"}}, shown(None, False)),
            ({"think": True}, shown(None, True)),
            ({"enable_thinking": False}, shown(None, False)),
            ({"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}}, shown(None, True)),
        ):
            response = await server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 1} | fields)
            assert response.json()["usage"]["prompt_tokens"] == len(expected), fields

    folder = write_model(tmp_path / "tools")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TOOLS_SHOWN}))
    test(folder, monkeypatch)


@with_server()
async def test_the_sdk_sees_its_own_errors(server: Server) -> None:
    for fields, param in (
        ({"temperature": 3}, "temperature"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice"),
        ({"tools": [1]}, "tools[0]"),
        ({"response_format": {"type": "json"}}, "response_format.type"),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            await server.sdk.chat.completions.create(model="tiny", messages=HELLO, **fields)
        assert raised.value.param == param
    answer = await server.sdk.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3, seed=-1, top_p=0)
    assert answer.choices[0].message.content == answer_text(3)


# --- any JSON at all ------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
LONG = {"max_tokens", "max_completion_tokens"}  # null is thousands of tokens
FIELDS = sorted({*ChatRequest.model_fields, *ASKED, "prompt", "tokens"} - LONG)


@with_server(patience_s=60)
async def test_any_value_in_any_field_is_answered(server: Server) -> None:
    """The quick form of tests/fuzz_bodies.py."""
    bodies: list[tuple[str, dict[str, Any]]] = []

    @settings(max_examples=150, deadline=None, database=None)
    @given(
        st.sampled_from([CHAT, COMPLETIONS, "/tokenize", "/detokenize"]),
        st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3),
    )
    def collect(path: str, fields: dict[str, Any]) -> None:
        bodies.append((path, fields))

    await trio.to_thread.run_sync(collect)
    base = {"messages": HELLO, "prompt": "Hello", "max_tokens": 1}
    for path, fields in bodies:
        response = await server.http.post(path, content=json.dumps(base | fields).encode())
        assert response.status_code in (200, 400, 404), (path, fields, response.text)
        if response.status_code == 400:
            error = response.json()["error"]
            assert error["param"] is not None or "JSON" in error["message"], (path, fields, error)
    await server.free()
