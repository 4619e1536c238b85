"""Log-probabilities in OpenAI's two formats. Pure."""

from collections.abc import Iterable
from typing import Any

from lmx.chat.model import ChatModel
from lmx.protocol import Logprobs

LEAST = -9999.0
"""For probability zero: JSON has no -Infinity, and this is what OpenAI sends."""


def chat_logprobs(chat: ChatModel, logprobs: Iterable[tuple[int, Logprobs]]) -> dict[str, Any]:
    """The ``logprobs`` object of a chat choice."""
    content = []
    for token, values in logprobs:
        likeliest = zip(values.top_ids, values.top, strict=True)
        content.append(
            _entry(chat, token, values.drawn) | {"top_logprobs": [_entry(chat, *pair) for pair in likeliest]}
        )
    return {"content": content, "refusal": None}


def _entry(chat: ChatModel, token: int, logprob: float) -> dict[str, Any]:
    raw = chat.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(raw)}


class CompletionLogprobs:
    """The ``logprobs`` object of a plain completion, whole or in pieces: ``text_offset`` goes on from the last."""

    def __init__(self, chat: ChatModel) -> None:
        self._chat = chat
        self._offset = 0

    def format(self, logprobs: Iterable[tuple[int, Logprobs]]) -> dict[str, Any]:
        tokens, drawn, top, offsets = [], [], [], []
        for token, values in logprobs:
            text = self._text(token)
            tokens.append(text)
            drawn.append(max(values.drawn, LEAST))
            likeliest = zip(values.top_ids, values.top, strict=True)
            # The drawn token is always there, as at OpenAI: up to n + 1 entries.
            entries = {self._text(other): max(logprob, LEAST) for other, logprob in likeliest}
            top.append(entries | {text: max(values.drawn, LEAST)})
            offsets.append(self._offset)
            self._offset += len(text)
        return {"tokens": tokens, "token_logprobs": drawn, "top_logprobs": top, "text_offset": offsets}

    def _text(self, token: int) -> str:
        return self._chat.token_bytes(token).decode(errors="replace")
