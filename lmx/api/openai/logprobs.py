"""Log-probabilities in OpenAI's two formats, and a prompt's in vLLM's. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

from lmx.chat.model import ChatModel
from lmx.protocol import Logprobs

LEAST = -9999.0
"""For probability zero: JSON has no -Infinity, and this is what OpenAI sends."""


def chat_logprobs(chat: ChatModel, logprobs: Iterable[tuple[int, Logprobs | None]]) -> dict[str, Any]:
    """The ``logprobs`` object of a chat choice."""
    content = []
    for token, values in logprobs:
        assert values is not None  # only a prompt's first token has none
        likeliest = zip(values.top_ids, values.top, strict=True)
        content.append(
            _entry(chat, token, values.drawn) | {"top_logprobs": [_entry(chat, *pair) for pair in likeliest]}
        )
    return {"content": content, "refusal": None}


def _entry(chat: ChatModel, token: int, logprob: float) -> dict[str, Any]:
    raw = chat.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(raw)}


class CompletionLogprobs:
    """The ``logprobs`` object of a plain completion, whole or in pieces: ``text_offset`` goes on from the last.

    ``prompt_offsets``: of the tokens of an echoed prompt, which come first; ``start``: where the answer begins.
    """

    def __init__(self, chat: ChatModel, prompt_offsets: Sequence[int] = (), start: int = 0) -> None:
        self._chat = chat
        self._prompt_offsets = iter(prompt_offsets)
        self._offset = start
        self._text = chat.text_stream(continues=True)

    def format(self, logprobs: Iterable[tuple[int, Logprobs | None]]) -> dict[str, Any]:
        tokens: list[str] = []
        drawn: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token, values in logprobs:
            name = self._name(token)
            tokens.append(name)
            drawn.append(None if values is None else max(values.drawn, LEAST))
            top.append(None if values is None else self._likeliest(name, values))
            offset = next(self._prompt_offsets, None)
            if offset is None:
                offset = self._offset
                self._offset += len(self._text.feed((token,)))
            offsets.append(offset)
        return {"tokens": tokens, "token_logprobs": drawn, "top_logprobs": top, "text_offset": offsets}

    def _likeliest(self, name: str, values: Logprobs) -> dict[str, float]:
        """The token itself is always there, as at OpenAI: up to n + 1 entries."""
        found: dict[str, float] = {}
        for other, logprob in zip(values.top_ids, values.top, strict=True):
            found.setdefault(self._name(other), max(logprob, LEAST))
        return found | {name: max(values.drawn, LEAST)}

    def _name(self, token: int) -> str:
        """What is not whole characters is spelled as OpenAI does it, so that no two such tokens look alike."""
        raw = self._chat.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def prompt_logprobs(
    chat: ChatModel, prompt: Sequence[int], logprobs: Sequence[Logprobs]
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's: for each token but the first, by id: the token itself and the likeliest ones. ``rank`` is null for a
    token that is none of those."""
    found: list[dict[str, dict[str, Any]] | None] = [None]
    for token, values in zip(prompt[1:], logprobs, strict=True):
        entries = {token: values.drawn} | dict(zip(values.top_ids, values.top, strict=True))
        ranks = {top: rank for rank, top in enumerate(values.top_ids, 1)}
        found.append(
            {
                str(one): {
                    "logprob": max(logprob, LEAST),
                    "rank": ranks.get(one),
                    "decoded_token": chat.token_bytes(one).decode(errors="replace"),
                }
                for one, logprob in entries.items()
            }
        )
    return found
