"""The pure rules of the HTTP faces: access, paths, request bodies, and answers that do not depend on chunk borders."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.datastructures import Headers

from lmx.api.access import authorize
from lmx.api.core.generation import Choice
from lmx.api.core.parse import parse
from lmx.api.core.schemas import ChatRequest, CompletionRequest
from lmx.api.errors import ForeignHost
from lmx.api.paths import normalised
from lmx.chat.text import TextStream
from lmx.config import ServerSettings
from lmx.errors import Forbidden, InvalidRequest, LmxError, Unauthorized
from lmx.protocol import Logprobs
from lmx.serving.engine import Chunk

KEYED = ServerSettings(inference_keys={"alice": "sk-a", "bob": "sk-ü"}, admin_keys={"root": "sk-root"})
OPEN = ServerSettings(allowed_hosts=["llm.example"], cors_origins=["https://ui.example"])


def ask(settings: ServerSettings, path: str = "/v1/models", address: str = "127.0.0.1", **headers: str) -> str:
    return authorize(settings, path, Headers({k.replace("_", "-"): v for k, v in headers.items()}), address)


@pytest.mark.parametrize(
    ("path", "headers", "name"),
    [
        ("/v1/models", {"authorization": "Bearer sk-a"}, "alice"),
        ("/v1/models", {"authorization": "bearer  sk-ü"}, "bob"),
        ("/v1/models", {"x_api_key": "sk-a"}, "alice"),
        ("/v1/models", {"x_api_key": "sk-root"}, "root"),
        ("/admin/status", {"x_api_key": "sk-root"}, "root"),
        ("/health", {}, ""),
        ("/v1/models", {"x_api_key": "sk-a", "host": "evil.example", "origin": "https://evil.example"}, "alice"),
    ],
)
def test_keys_name_the_client(path: str, headers: dict[str, str], name: str) -> None:
    assert ask(KEYED, path, "10.0.0.9", **headers) == name


@pytest.mark.parametrize(
    ("path", "headers", "error"),
    [
        ("/v1/models", {}, Unauthorized),
        ("/v1/models", {"authorization": "Bearer sk-"}, Unauthorized),
        ("/v1/models", {"authorization": "Basic sk-a"}, Unauthorized),
        ("/metrics", {}, Unauthorized),
        ("/admin/status", {}, Unauthorized),
        ("/admin/status", {"x_api_key": "sk-a"}, Forbidden),
    ],
)
def test_wrong_keys_are_refused(path: str, headers: dict[str, str], error: type[LmxError]) -> None:
    with pytest.raises(error) as raised:
        ask(KEYED, path, **headers)
    assert "sk-" not in raised.value.message


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:1234", "app.localhost", "127.0.0.1:1234", "[::1]:1234", "192.168.1.7", "llm.example:80"],
)
def test_own_hosts_are_taken(host: str) -> None:
    assert ask(OPEN, host=host) == ""


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:1234", "[::1"])
def test_foreign_hosts_are_refused(host: str) -> None:
    with pytest.raises(ForeignHost, match="allowed_hosts"):
        ask(OPEN, host=host)


def test_origins_without_keys() -> None:
    ask(OPEN, host="localhost:1234", origin="http://localhost:3000")
    ask(OPEN, host="llm.example", origin="https://llm.example")
    ask(OPEN, host="localhost", origin="https://ui.example")
    for origin in ("https://evil.example", "null", "https://localhost.evil.example"):
        with pytest.raises(Forbidden, match="cors_origins"):
            ask(OPEN, host="localhost", origin=origin)


def test_the_admin_face_without_keys_is_for_loopback() -> None:
    for address in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"):
        ask(OPEN, "/admin/status", address)
    for address in ("192.168.1.7", "::ffff:10.0.0.1", "", "fe80::1%eth0"):
        with pytest.raises(Forbidden, match="admin_keys"):
            ask(OPEN, "/admin/status", address)
        ask(OPEN, "/v1/models", address)


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("/", "/"),
        ("", "/?"),
        ("*", "/?*"),
        ("example.com:443", "/?example.com:443"),
        ("http://localhost:1234//v1/v1/models", "/v1/models"),
        ("HTTP://[::1", "/"),
        ("//", "/"),
        ("/v1/models", "/v1/models"),
        ("//v1//models/", "/v1/models"),
        ("/v1/v1/models", "/v1/models"),
        ("/v1/v1", "/v1"),
        ("/models/org/name", "/v1/models/org/name"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/completions", "/v1/completions"),
        ("/modelsx", "/modelsx"),
        ("/admin//status", "/admin/status"),
        ("/v1/models/v1/v1/x", "/v1/models/v1/v1/x"),
    ],
)
def test_paths_are_normalised(path: str, normal: str) -> None:
    assert normalised(path) == normal


HELLO = b'"messages":[{"role":"user","content":"hi"}]'


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        (b"", None, "not valid JSON"),
        (b'{"messages":', None, "not valid JSON"),
        (b'{"a":"\xff"}', None, "UTF-8"),
        (b'{"temperature":NaN}', None, "not valid JSON"),
        (b'{"user":"\\ud800"}', None, "not valid JSON"),
        (b"[" * 5000, None, "not valid JSON"),
        (b"[1,2]", None, "[1, 2]"),
        (b"{}", "messages", "required"),
        (b'{"messages":[]}', "messages", "[]"),
        (b'{"messages":"hi"}', "messages", '"hi"'),
        (b'{"messages":[5]}', "messages[0]", "got 5"),
        (b'{"messages":[{"content":"x"}]}', "messages[0].role", "required"),
        (b'{"messages":[{"role":"bot","content":"x"}]}', "messages[0].role", '"bot"'),
        (b'{"messages":[{"role":"user","content":7}]}', "messages[0].content", "got 7"),
        (b'{%s,"temperature":"0.7"}' % HELLO, "temperature", '"0.7"'),
        (b'{%s,"temperature":2.5}' % HELLO, "temperature", "2.5"),
        (b'{%s,"temperature":-1}' % HELLO, "temperature", "-1"),
        (b'{%s,"top_p":-0.1}' % HELLO, "top_p", "got -0.1"),
        (b'{%s,"n":17}' % HELLO, "n", "17"),
        (b'{%s,"n":true}' % HELLO, "n", "true"),
        (b'{%s,"max_tokens":0}' % HELLO, "max_tokens", "-1"),
        (b'{%s,"max_tokens":-2}' % HELLO, "max_tokens", "-2"),
        (b'{%s,"max_tokens":1e99}' % HELLO, "max_tokens", "1e+99"),
        (b'{%s,"max_completion_tokens":0}' % HELLO, "max_completion_tokens", "-1"),
        (b'{%s,"seed":99999999999999999999}' % HELLO, "seed", "99999999999999999999"),
        (b'{%s,"stop":["a",5]}' % HELLO, "stop[1]", "got 5"),
        (b'{%s,"stop":""}' % HELLO, "stop", '""'),
        (b'{%s,"stop":[%s]}' % (HELLO, b",".join([b'"x"'] * 17)), "stop", "16"),
        (b'{%s,"logit_bias":{"5":101}}' % HELLO, "logit_bias.5", "101"),
        (b'{%s,"top_logprobs":21}' % HELLO, "top_logprobs", "21"),
        (b'{%s,"timeout":0}' % HELLO, "timeout", "got 0"),
        (b'{%s,"stream":"yes"}' % HELLO, "stream", '"yes"'),
        (b'{%s,"stream_options":{"include_usage":1}}' % HELLO, "stream_options.include_usage", "got 1"),
    ],
)
def test_a_bad_body_is_refused_with_its_field_and_value(body: bytes, param: str | None, told: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse(ChatRequest, body)
    assert raised.value.param == param
    assert told in raised.value.message
    assert len(raised.value.message) < 400


def test_a_bad_prompt_names_its_place() -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse(CompletionRequest, b'{"prompt":[[1,2],[3,"x"]]}')
    assert raised.value.param == "prompt[1][1]"


def test_unknown_fields_are_ignored() -> None:
    body = parse(ChatRequest, b'{%s,"store":true,"foo":{"bar":1},"tools":[],"n":null}' % HELLO)
    assert body.n is None


# --- answers at any chunk border --------------------------------------------------------------------

PIECES = [b"", "é".encode()[:1], "é".encode()[1:], b"a", b"b", b"ab", b"ba", b" ", b"stop"]
EOS = 0


def whole(chunks: list[Chunk], stop: tuple[str, ...], wants_logprobs: bool) -> tuple[Any, ...]:
    choice = Choice(0, TextStream(PIECES, stop), bool(stop), wants_logprobs)
    text, logprobs = "", ()
    for chunk in chunks:
        delta = choice.feed(chunk)
        text += delta.text
        logprobs += delta.logprobs
        if choice.finish:
            break
    return text, logprobs, choice.finish, choice.completion_tokens, choice.stopped


@given(
    tokens=st.lists(st.integers(1, len(PIECES) - 1), min_size=1, max_size=20),
    ends=st.booleans(),
    stop=st.lists(st.sampled_from(["a", "ab", "bab", "top", "é", "x"]), max_size=2).map(tuple),
    wants_logprobs=st.booleans(),
    cuts=st.sets(st.integers(1, 20)),
)
def test_an_answer_is_the_same_at_any_chunk_border(
    tokens: list[int], ends: bool, stop: tuple[str, ...], wants_logprobs: bool, cuts: set[int]
) -> None:
    tokens = [*tokens, EOS] if ends else tokens
    values = [Logprobs(-float(position)) for position in range(len(tokens))]

    def chunked(borders: list[int]) -> list[Chunk]:
        edges = [0, *borders, len(tokens)]
        spans = list(pairwise(edges))
        finish = "stop" if ends else "length"
        return [
            Chunk(
                tuple(tokens[begin:end]),
                tuple(values[begin:end]) if wants_logprobs else (),
                finish if end == len(tokens) else None,
            )
            for begin, end in spans
        ]

    one_piece = whole(chunked([]), stop, wants_logprobs)
    each_alone = whole(chunked(list(range(1, len(tokens)))), stop, wants_logprobs)
    some = whole(chunked(sorted(cut for cut in cuts if cut < len(tokens))), stop, wants_logprobs)
    assert one_piece == each_alone == some
    assert len(one_piece[1]) == (one_piece[3] - (one_piece[2] == "stop" and ends and not one_piece[4])) * wants_logprobs
