"""JSON bodies of every kind against a running server, by the thousand: ``make fuzz``. LMX_FUZZ_CASES sets how many.

No answer may be a 5xx but 503, no process may die, and /health answers all along. tests/test_api_inputs.py holds a
quick form of it; pytest collects this file only by its name.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx.api.body import SMALL_BYTES
from lmx.api.core.embedding_requests import EmbeddingRequest, RerankRequest
from lmx.api.core.schemas import ChatRequest, CompletionRequest, TokenizeRequest
from lmx.api.core.unbuilt import _FIELDS
from tests.server import Server, serve

CASES = int(os.environ.get("LMX_FUZZ_CASES", "5000"))
TAKEN = {200, 400, 404, 405, 408, 413, 415, 421, 422, 429, 503}
HEALTH_S = 0.05
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = [CHAT, CHAT, CHAT, COMPLETIONS, COMPLETIONS, "/tokenize", "/detokenize", "/v1/embeddings", "/v1/rerank"]

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from([5e-324, 1e308, 2**63, -(2**63), 10**400, "<|im_end|>", "\0", "auto", "none", "function", "text"])
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def near(good: Any) -> st.SearchStrategy[Any]:
    """``good``, with anything in any place of it."""
    if isinstance(good, dict):
        strategy: st.SearchStrategy[Any] = st.fixed_dictionaries(
            {}, optional={key: near(value) for key, value in good.items()}
        )
    elif isinstance(good, list):
        strategy = st.lists(st.one_of([near(item) for item in good]), max_size=4)
    else:
        strategy = st.just(good)
    return st.one_of(strategy, strategy, strategy, ANYTHING)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": "Hello!", "name": "bob"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
    {"role": "tool", "content": "1", "tool_call_id": "1"},
]
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "pattern": "^[a-z]{1,3}$", "maxLength": 5},
        "b": {"anyOf": [{"type": "integer", "minimum": 0, "multipleOf": 2}, {"enum": ["x", None]}]},
        "c": {"type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 3, "uniqueItems": True},
    },
    "patternProperties": {"^x": {"const": 1}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"d": {"allOf": [{"type": "number"}, {"not": {"const": 3}}], "format": "date"}},
}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
TOOLS = [{"type": "function", "function": FUNCTION}, {"type": "web_search"}]
NAMED = {"type": "function", "function": {"name": "f"}}
GRAMMARS = ['root ::= "a" | [b-d]+', 'start: A B*\nA: /x{1,3}/\nB: A | "y"', "start: start |", "start: %json {}"]
PATTERNS = ["(a|b)*c{2,3}", "((a{100}){100}){100}", r"(?=x)\1", "[a-z]+@x", "(" * 300]
STRUCTURED = {
    **{"json": SCHEMA, "regex": PATTERNS[0], "choice": ["a", "b"], "grammar": GRAMMARS[0], "json_object": True},
    **{"whitespace_pattern": "[ ]?", "structural_tag": {}, "disable_any_whitespace": True},
}
SPECIAL: dict[str, Any] = {
    "messages": MESSAGES,
    "tools": TOOLS,
    "functions": [FUNCTION],
    "tool_choice": [{"type": "allowed_tools", "mode": "auto", "tools": TOOLS}, NAMED, "required", "auto", "none"],
    "function_call": [{"name": "f"}, "auto", "none"],
    "response_format": [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        {"type": "json_object"},
        {"type": "text"},
        {"type": "grammar", "grammar": GRAMMARS[1]},
    ],
    "structured_outputs": STRUCTURED,
    "guided_json": SCHEMA,
    "guided_regex": PATTERNS,
    "guided_choice": ["a", "b"],
    "guided_grammar": GRAMMARS,
    "grammar": GRAMMARS,
    "regex": PATTERNS,
    "json_schema": SCHEMA,
    "format": SCHEMA,
    "logprobs": [True, 2],
    "top_logprobs": 3,
    "prompt_logprobs": 1,
    "echo": True,
    "suffix": "b",
    "n": 2,
    "best_of": 3,
    "max_tokens": [0, 1, 12],
    "stop_token_ids": [5, 6],
    "min_tokens": 2,
    "return_token_ids": True,
    "continue_final_message": True,
    "add_generation_prompt": False,
    "max_reasoning_tokens": 3,
    "reasoning_effort": ["none", "low", "max"],
    "thinking": [{"type": "enabled", "budget_tokens": 5}, {"type": "disabled"}],
    "input": ["a", ["a", "b"], [101, 102], [[101], [5, 102]]],
    "encoding_format": ["float", "base64"],
    "dimensions": 384,
    "query": "q",
    "documents": ["a", {"text": "b"}],
    "stream_options": {"include_usage": True},
    "stream": True,
    "logit_bias": {"5": 1.5},
    "prompt": [[5, 6], [7]],
    "tokens": [5, 6],
    "stop": ["x", "yz"],
    "reasoning": {"effort": "low", "enabled": True},
    "chat_template_kwargs": {"enable_thinking": True},
}
ONE_OF = {
    *("tool_choice", "function_call", "response_format", "guided_regex", "guided_grammar", "grammar", "regex"),
    *("logprobs", "max_tokens", "reasoning_effort", "thinking", "input", "encoding_format"),
}
"""Of ``SPECIAL``: each item is a value."""
KINDS = (ChatRequest, CompletionRequest, TokenizeRequest, EmbeddingRequest, RerankRequest)
FIELDS = sorted({*(field for kind in KINDS for field in kind.model_fields), *_FIELDS})
BASE = {
    **{"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "tokens": [5], "max_tokens": 2},
    **{"input": "Hi", "query": "Hi", "documents": ["Hi"]},
}


def value(name: str) -> st.SearchStrategy[Any]:
    if name in ONE_OF:
        return st.sampled_from(SPECIAL[name]).flatmap(near)
    return near(SPECIAL[name]) if name in SPECIAL else ANYTHING


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    names = draw(st.lists(st.sampled_from([*FIELDS, *SPECIAL]), max_size=4, unique=True))
    body = BASE | {name: draw(value(name)) for name in names}
    if draw(st.integers(0, 9)) == 0:  # through a reader
        body["padding"] = "x" * SMALL_BYTES
    raw = json.dumps(body).encode()
    if draw(st.integers(0, 19)) == 0:  # cut, or with other bytes in it
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=4)) + raw[at + draw(st.integers(0, 9)) :]
    return raw


@pytest.fixture(scope="module")
def server(tiny_model: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With real engines: grammars are compiled and followed there. A context so short that an answer without a limit
    ends before its client gives up."""
    settings = {"model": {"embedding": str(minilm), "context_length": 1024}}
    with serve(tmp_path_factory.mktemp("fuzz"), "--model", str(tiny_model), settings=settings) as running:
        running.line(r"model tiny-llama ready")
        running.line(rf"model {minilm.name} ready")
        yield running


WATCHER = """
import http.client, select, sys, time
connection, times = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2])), []
while not select.select([sys.stdin], [], [], 0.01)[0]:
    began = time.perf_counter()
    connection.request("GET", "/health")
    response = connection.getresponse()
    assert response.status == 200 and response.read()
    times.append(time.perf_counter() - began)
times.sort()
print(len(times), times[-1], times[int(len(times) * 0.99)])
"""


@contextmanager
def watching(server: Server) -> Iterator[list[float]]:
    """Another process asks for /health all the time: how often, the slowest answer, the slowest of 99 in a hundred."""
    command, told = [sys.executable, "-c", WATCHER, *map(str, server.address)], []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        yield told
        told += map(float, watcher.communicate("done")[0].split())
    print(f"/health: {told[0]:.0f} answers, worst {told[1] * 1000:.0f} ms, 99 of 100 in {told[2] * 1000:.0f} ms")


@pytest.fixture
def healthy(server: Server) -> Iterator[None]:
    """The server lives, with the same engine, and was never busy; on a machine that is, no more than it was idle."""
    with watching(server) as idle:
        time.sleep(2)
    lives = engines(server)
    with watching(server) as busy:
        yield
    assert busy[2] <= max(HEALTH_S, 2 * idle[2])
    server.idle()
    assert engines(server) == lives


def engines(server: Server) -> list[tuple[int, int]]:
    """The process of each, and how often it was started again."""
    return [(model["engine"]["pid"], model["engine"]["restarts"]) for model in server.status()["models"]]


@pytest.mark.usefixtures("healthy")
def test_bodies(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:

        @settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(PATHS), bodies())
        def check(path: str, body: bytes) -> None:
            response = client.post(path, content=body)
            assert response.status_code in TAKEN, response.text
            if "text/event-stream" in response.headers["content-type"]:
                assert response.text.endswith("data: [DONE]\n\n")
            elif response.status_code != 200:
                error = response.json()["error"]
                assert error["param"] is not None or "JSON" in error["message"]

        check()


@pytest.mark.usefixtures("healthy")
def test_openapi(server: Server, tmp_path: Path) -> None:
    """What /openapi.json promises, and its opposite, as Schemathesis makes it."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:

        @settings(
            max_examples=max(CASES // len(operations), 1),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy())
        def check(case: Any) -> None:
            response = case.call(base_url=server.url)
            assert response.status_code in TAKEN, (case, response.text)

        check()
