"""Reads the large bodies: a process that parses, checks, templates and tokenises, so that the server never does.

One JSON body of 30 MB holds the GIL for 0.3 s while it is parsed, its pydantic errors took gigabytes, and a tokenizer
can abort the process that runs it. Here all of that ends one request: the server kills a reader whose client has gone
or that takes too long (``lmx.serving.readers``, which starts it as ``python -m lmx.api.reader``). It must end when the
server does, and when it takes more memory than the body can explain.

The conversation, as length-prefixed pickles: the request's kind, and its bytes as they are; ("model", name); what that
model's words are made from (``ChatModel.source``) and its context, or None; ("done", body, Prepared). Instead of an
answer ("error", LmxError) or ("bug", text).
"""

import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from lmx.api.core import prepare_embeddings
from lmx.api.core.parse import parse_object, validate, wishes
from lmx.api.core.prepare import KINDS, prepare, slimmed
from lmx.chat.encoder import TextEncoder
from lmx.chat.model import ChatModel, Source
from lmx.errors import InvalidRequest, LmxError

WATCH_S = 0.1
FREE_BYTES = 512 * 1024 * 1024
BYTES_PER_BYTE = 64
"""What a body may cost: JSON of nothing but ``{"a":1}`` takes 30 times its size, the tokens of a text of single
characters 250, but of such a text there is never more than the model's context."""
TOO_LARGE_EXIT = 77  # lmx.serving.readers tells the client what it means


class Reader:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._incoming = sock.makefile("rb")
        self._words: dict[tuple[Source, bool], ChatModel | TextEncoder] = {}
        """By what they are made from, and whether that is to make embeddings."""
        self._limit_bytes = 0
        """Of memory, while a body is read."""

    def run(self, sources: Sequence[Source]) -> None:
        """Until the server closes the socket. ``sources``: of models that will be asked for."""
        threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True).start()
        for source in sources:
            self._read(source, embeds=False)
        while True:
            kind, raw = self._receive(), self._receive_bytes()
            self._limit_bytes = _resident_bytes() + FREE_BYTES + BYTES_PER_BYTE * len(raw)
            answer = self._answer(kind, raw)
            del raw
            self._limit_bytes = 0
            if answer is not None:
                self._send(answer)

    def _answer(self, kind: str, raw: bytes) -> tuple[Any, ...] | None:
        try:
            given = parse_object(raw)
            embeds = kind in prepare_embeddings.KINDS
            body = validate((prepare_embeddings.KINDS if embeds else KINDS)[kind], given)
            self._send(("model", body.model, *wishes(body)))
            model = self._receive()
            if model is None:
                return None
            source, context = model
            words = self._read(source, embeds=embeds)
            if isinstance(words, TextEncoder):
                prepared = prepare_embeddings.prepare_embeddings(body, words, context)
                return "done", prepare_embeddings.slimmed(body), prepared
            prepared = prepare(body, given, words, context)
            return "done", slimmed(body), prepared
        except LmxError as error:
            return "error", error
        except (RecursionError, MemoryError) as error:
            return "error", InvalidRequest(f"The request is too large to be read ({type(error).__name__}).")
        except Exception:
            return "bug", traceback.format_exc()

    def _read(self, source: Source, *, embeds: bool) -> ChatModel | TextEncoder:
        if (source, embeds) not in self._words:
            made = TextEncoder.load(Path(source.folder)) if embeds else ChatModel.load(*source)
            self._words[source, embeds] = made
        return self._words[source, embeds]

    def _receive(self) -> Any:
        return pickle.loads(self._receive_bytes())

    def _receive_bytes(self) -> bytes:
        header = self._incoming.read(8)
        if len(header) < 8:
            sys.exit(0)
        return self._incoming.read(int.from_bytes(header, "big"))

    def _send(self, message: Any) -> None:
        data = pickle.dumps(message)
        try:
            self._sock.sendall(len(data).to_bytes(8, "big") + data)
        except ConnectionError:
            sys.exit(0)

    def _watch(self, parent: int) -> None:
        while True:
            time.sleep(WATCH_S)
            if os.getppid() != parent:
                os._exit(0)
            limit_bytes = self._limit_bytes  # once: it becomes 0 when the body is read
            if limit_bytes and _resident_bytes() > limit_bytes:
                os._exit(TOO_LARGE_EXIT)


def _resident_bytes() -> int:
    resident: int = psutil.Process().memory_info().rss
    return resident


def main() -> None:
    number, *sources = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which lets requests finish
    # Behind the server and the engines: whoever sends much can wait a little.
    os.nice(5)
    Reader(socket.socket(fileno=int(number))).run([Source(*json.loads(source)) for source in sources])


if __name__ == "__main__":
    main()
