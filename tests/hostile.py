"""Cheap requests that cost much, and a client that sends them from a process of its own.

``python -m tests.hostile URL`` posts every body of BODIES and prints a JSON list of [name, status, param, seconds].
"""

import gzip
import http.client
import json
import sys
import time
from collections.abc import Callable
from urllib.parse import urlsplit

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
Body = tuple[str, Callable[[], bytes], int, str | None]


def chat(content: str) -> bytes:
    return b'{"messages":[{"role":"user","content":"%s"}],"max_tokens":1}' % content.encode()


def many(item: bytes, count: int) -> bytes:
    return b"[" + b",".join([item] * count) + b"]"


MESSAGE = b'{"role":"user","content":""}'
HELLO = b'"messages":[{"role":"user","content":"hi"}],"max_tokens":1'
BODIES: dict[str, Body] = {
    "one long message": (CHAT, lambda: chat("x" * 30_000_000), 400, "messages"),
    "words with commas": (CHAT, lambda: chat("hello, " * 4_000_000), 400, "messages"),
    "escapes": (CHAT, lambda: chat("\\n" * 15_000_000), 400, "messages"),
    "blanks": (CHAT, lambda: chat(" " * 12_000_000), 400, "messages"),
    "a megabyte": (CHAT, lambda: chat("hello, " * 140_000), 400, "messages"),
    "many parts": (
        CHAT,
        lambda: b'{"messages":[{"role":"user","content":%s}]}' % many(b'{"type":"text","text":"a"}', 1_000_000),
        400,
        "messages[0].content",
    ),
    "a million messages": (CHAT, lambda: b'{"messages":%s}' % many(MESSAGE, 1_000_000), 400, "messages"),
    "a million wrong messages": (CHAT, lambda: b'{"messages":%s}' % many(b"{}", 1_000_000), 400, "messages[0].role"),
    "wrong parts": (
        CHAT,
        lambda: b'{"messages":[{"role":"user","content":%s}]}' % many(b"5", 1_000_000),
        400,
        "messages[0].content[0]",
    ),
    "wrong tools": (CHAT, lambda: b'{%s,"tools":%s}' % (HELLO, many(b"5", 1_000_000)), 400, "tools[0]"),
    "wrong tool calls": (
        CHAT,
        lambda: b'{"messages":[{"role":"assistant","tool_calls":%s}]}' % many(b"{}", 1_000_000),
        400,
        "messages[0].tool_calls[0].function",
    ),
    "wrong stop strings": (CHAT, lambda: b'{%s,"stop":%s}' % (HELLO, many(b"{}", 1_000_000)), 400, "stop[0]"),
    "many biases": (
        CHAT,
        lambda: b'{%s,"logit_bias":{%s}}' % (HELLO, b",".join(b'"x%d":1e9' % i for i in range(500_000))),
        400,
        "logit_bias",
    ),
    "deep": (CHAT, lambda: b'{%s,"x":%s}' % (HELLO, b"[" * 5_000_000), 400, None),
    "deep arguments": (
        CHAT,
        lambda: (
            b'{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"%s"}}]}]}'
            % (b"[" * 3_000_000)
        ),
        200,
        None,
    ),
    "a long model name": (CHAT, lambda: b'{%s,"model":"gpt-4%s"}' % (HELLO, b"x" * 10_000_000), 400, "model"),
    "a long unknown field": (CHAT, lambda: b'{%s,"x":%s}' % (HELLO, many(b"{}", 1_000_000)), 200, None),
    "many template variables": (
        CHAT,
        lambda: b'{%s,"chat_template_kwargs":{%s}}' % (HELLO, b",".join(b'"x%d":1' % i for i in range(500_000))),
        200,
        None,
    ),
    "wrong prompts": (COMPLETIONS, lambda: b'{"prompt":%s}' % many(b"{}", 1_000_000), 400, "prompt"),
    "many prompts": (COMPLETIONS, lambda: b'{"prompt":%s,"n":16}' % many(b"[5]", 100_000), 400, "prompt"),
    "many texts": (COMPLETIONS, lambda: b'{"prompt":%s}' % many(b'"a"', 100_000), 400, "prompt"),
    "many empty prompts": (COMPLETIONS, lambda: b'{"prompt":%s}' % many(b"[]", 1_000_000), 400, "prompt"),
    "many ids": (COMPLETIONS, lambda: b'{"prompt":%s}' % many(b"5", 10_000_000), 400, "prompt"),
    "a long prompt": (COMPLETIONS, lambda: b'{"prompt":"%s"}' % (b"a " * 10_000_000), 400, "prompt"),
    "a text to count": (TOKENIZE, lambda: b'{"prompt":"%s"}' % (b"hello, " * 140_000), 200, None),
    "a text too long to count": (TOKENIZE, lambda: b'{"prompt":"%s"}' % (b"a " * 10_000_000), 400, "prompt"),
    "many tokens": (DETOKENIZE, lambda: b'{"tokens":%s}' % many(b"5", 10_000_000), 400, "tokens"),
    "no JSON": (CHAT, lambda: b"\xff" * 20_000_000, 400, None),
}
PACKED: dict[str, Body] = {
    "a bomb": (CHAT, lambda: gzip.compress(b"x" * 500_000_000, 1), 413, None),
    "packed blanks": (CHAT, lambda: gzip.compress(chat(" " * 12_000_000), 1), 400, "messages"),
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
    url, told = sys.argv[1], []
    for bodies, headers in ((BODIES, {}), (PACKED, {"Content-Encoding": "gzip"})):
        for name, (path, build, _, _) in bodies.items():
            told.append([name, *post(url, path, build(), headers)])
            if sys.argv[2:] == ["-v"]:
                print(told[-1], file=sys.stderr, flush=True)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
