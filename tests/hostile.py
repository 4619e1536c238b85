"""Cheap requests that cost much, and a client that sends them from a process of its own.

``python -m tests.hostile URL SCALE`` posts every body and prints a JSON list of [name, status, param, seconds]. At
scale 1 the largest is 30 MB; at a quarter everything still shows, in a quarter of the time.
"""

import gzip
import http.client
import json
import sys
import time
from collections.abc import Callable
from urllib.parse import urlsplit

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
Body = tuple[str, Callable[[float], bytes], int, str | None]


def chat(content: str) -> bytes:
    return b'{"messages":[{"role":"user","content":"%s"}],"max_tokens":1}' % content.encode()


def many(item: bytes, count: int) -> bytes:
    return b"[" + b",".join([item] * count) + b"]"


MESSAGE = b'{"role":"user","content":""}'
HELLO = b'"messages":[{"role":"user","content":"hi"}],"max_tokens":1'
BODIES: dict[str, Body] = {
    "one long message": (CHAT, lambda scale: chat("x" * int(30_000_000 * scale)), 400, "messages"),
    "words with commas": (CHAT, lambda scale: chat("hello, " * int(4_000_000 * scale)), 400, "messages"),
    "escapes": (CHAT, lambda scale: chat("\\n" * int(15_000_000 * scale)), 400, "messages"),
    "blanks": (CHAT, lambda scale: chat(" " * int(12_000_000 * scale)), 400, "messages"),
    "a megabyte": (CHAT, lambda scale: chat("hello, " * int(140_000 * scale)), 400, "messages"),
    "many parts": (
        CHAT,
        lambda scale: (
            b'{"messages":[{"role":"user","content":%s}]}' % many(b'{"type":"text","text":"a"}', int(1_000_000 * scale))
        ),
        400,
        "messages[0].content",
    ),
    "a million messages": (
        CHAT,
        lambda scale: b'{"messages":%s}' % many(MESSAGE, int(1_000_000 * scale)),
        400,
        "messages",
    ),
    "a million wrong messages": (
        CHAT,
        lambda scale: b'{"messages":%s}' % many(b"{}", int(1_000_000 * scale)),
        400,
        "messages[0].role",
    ),
    "wrong parts": (
        CHAT,
        lambda scale: b'{"messages":[{"role":"user","content":%s}]}' % many(b"5", int(1_000_000 * scale)),
        400,
        "messages[0].content[0]",
    ),
    "wrong tools": (
        CHAT,
        lambda scale: b'{%s,"tools":%s}' % (HELLO, many(b"5", int(1_000_000 * scale))),
        400,
        "tools[0]",
    ),
    "wrong tool calls": (
        CHAT,
        lambda scale: b'{"messages":[{"role":"assistant","tool_calls":%s}]}' % many(b"{}", int(1_000_000 * scale)),
        400,
        "messages[0].tool_calls[0].function",
    ),
    "wrong stop strings": (
        CHAT,
        lambda scale: b'{%s,"stop":%s}' % (HELLO, many(b"{}", int(1_000_000 * scale))),
        400,
        "stop[0]",
    ),
    "many biases": (
        CHAT,
        lambda scale: (
            b'{%s,"logit_bias":{%s}}' % (HELLO, b",".join(b'"x%d":1e9' % i for i in range(int(500_000 * scale))))
        ),
        400,
        "logit_bias",
    ),
    "deep": (CHAT, lambda scale: b'{%s,"x":%s}' % (HELLO, b"[" * int(5_000_000 * scale)), 400, None),
    "deep arguments": (
        CHAT,
        lambda scale: (
            b'{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"%s"}}]}]}'
            % (b"[" * int(3_000_000 * scale))
        ),
        400,  # too long for the model, which is told of them
        "messages",
    ),
    "a long model name": (
        CHAT,
        lambda scale: b'{%s,"model":"gpt-4%s"}' % (HELLO, b"x" * int(10_000_000 * scale)),
        400,
        "model",
    ),
    "a long unknown field": (
        CHAT,
        lambda scale: b'{%s,"x":%s}' % (HELLO, many(b"{}", int(1_000_000 * scale))),
        200,
        None,
    ),
    "many template variables": (
        CHAT,
        lambda scale: (
            b'{%s,"chat_template_kwargs":{%s}}'
            % (HELLO, b",".join(b'"x%d":1' % i for i in range(int(500_000 * scale))))
        ),
        200,
        None,
    ),
    "wrong prompts": (COMPLETIONS, lambda scale: b'{"prompt":%s}' % many(b"{}", int(1_000_000 * scale)), 400, "prompt"),
    "many prompts": (
        COMPLETIONS,
        lambda scale: b'{"prompt":%s,"n":16}' % many(b"[5]", int(100_000 * scale)),
        400,
        "prompt",
    ),
    "many texts": (COMPLETIONS, lambda scale: b'{"prompt":%s}' % many(b'"a"', int(100_000 * scale)), 400, "prompt"),
    "many empty prompts": (
        COMPLETIONS,
        lambda scale: b'{"prompt":%s}' % many(b"[]", int(1_000_000 * scale)),
        400,
        "prompt",
    ),
    "many ids": (COMPLETIONS, lambda scale: b'{"prompt":%s}' % many(b"5", int(10_000_000 * scale)), 400, "prompt"),
    "a long prompt": (COMPLETIONS, lambda scale: b'{"prompt":"%s"}' % (b"a " * int(10_000_000 * scale)), 400, "prompt"),
    "a text to count": (TOKENIZE, lambda scale: b'{"prompt":"%s"}' % (b"hello, " * int(140_000 * scale)), 200, None),
    "a text too long to count": (
        TOKENIZE,
        lambda scale: b'{"prompt":"%s"}' % (b"a " * max(int(10_000_000 * scale), 2_100_000)),
        400,
        "prompt",
    ),
    "many tokens": (DETOKENIZE, lambda scale: b'{"tokens":%s}' % many(b"5", int(10_000_000 * scale)), 400, "tokens"),
    "no JSON": (CHAT, lambda scale: b"\xff" * int(20_000_000 * scale), 400, None),
}
PACKED: dict[str, Body] = {
    "a bomb": (CHAT, lambda scale: gzip.compress(b"x" * int(500_000_000 * scale), 1), 413, None),
    "packed blanks": (CHAT, lambda scale: gzip.compress(chat(" " * int(12_000_000 * scale)), 1), 400, "messages"),
}


def post(url: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str | None, float]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    started = time.perf_counter()
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    seconds = time.perf_counter() - started
    connection.close()
    return response.status, answer.get("error", {}).get("param"), seconds


def main() -> None:
    url, scale, told = sys.argv[1], float(sys.argv[2]), []
    for bodies, headers in ((BODIES, {}), (PACKED, {"Content-Encoding": "gzip"})):
        for name, (path, build, _, _) in bodies.items():
            told.append([name, *post(url, path, build(scale), headers)])
    print(json.dumps(told))


if __name__ == "__main__":
    main()
