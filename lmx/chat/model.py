"""A model's words: its tokenizer, its chat template, and the text of its tokens.

The API faces call it, ``encode_*`` from worker threads (a long prompt takes many milliseconds). It uses the
``tokenizers`` library and Jinja directly; transformers would cost the server seconds and memory. It knows nothing about
engines and never needs the weights.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from lmx.chat.answer import AnswerParser
from lmx.chat.files import named_tokens, read_eos_ids, read_settings, read_template
from lmx.chat.pieces import read_pieces
from lmx.chat.plan import Plan
from lmx.chat.prompt import fim
from lmx.chat.prompt.history import Habits, candidates, probe, shaped, tame_tools, with_tools
from lmx.chat.prompt.messages import Message
from lmx.chat.prompt.special import SpecialTokens, unused_character
from lmx.chat.prompt.switches import Switches, template_variables
from lmx.chat.prompt.written import WRITERS, generic
from lmx.chat.reasoning import ReasoningFormat
from lmx.chat.reasoning import find as find_reasoning
from lmx.chat.text import TextStream
from lmx.chat.tools import find as find_tool_format
from lmx.chat.tools.base import Format, WholeFormat
from lmx.chat.tools.generic import GENERIC, instructions
from lmx.errors import ConfigError, ContextLengthExceeded, InvalidRequest, ModelInvalid


class Source(NamedTuple):
    """From what a ``ChatModel`` is made, here or in another process."""

    folder: str
    tool_format: str = ""
    """The name of the one to take; "": the one that fits."""
    reasoning_format: str = ""


_ANY = "☺"
"""A character that merges with no other into a token."""

_MARKER_TOKENS = 64
"""The longest marker of reasoning, spelled out byte by byte, and white space behind it."""


class ChatModel:
    """Nothing that can be seen of it changes after it was made, so threads may share it."""

    source: Source

    eos_ids: frozenset[int]
    vocab_size: int
    """One more than the largest token id; the engine's output matrix may have more rows, as padding."""
    special: Mapping[str, int]
    """Tokens that are no part of a text, by their names."""
    tool_format: Format
    whole_format: WholeFormat | None
    """The same where all of an answer is one."""
    tool_format_reason: str
    """Why we think that the model writes calls so."""
    habits: Habits
    """What its template does with conversations. ``habits.tools`` false: it says nothing of tools, so calls are those
    of the generic format, which ``encode_chat`` explains in the system message."""
    reasoning: ReasoningFormat | None
    reasoning_reason: str
    """Why we think that the model thinks so."""

    def __init__(self, source: Source) -> None:
        self.source = source
        folder = Path(source.folder)
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            self._literal = Tokenizer.from_file(str(path))
            self._pieces = read_pieces(self._tokenizer)
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelInvalid(f"{path} cannot be used: {error}. Is it whole? Download it again.") from None
        for tokenizer in (self._tokenizer, self._literal):  # training leaves both switched on in many files
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._literal.encode_special_tokens = True  # that is: as ordinary text
        self._special = SpecialTokens(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special = {token.content: index for index, token in added if token.special}
        settings = read_settings(folder)
        self._template = read_template(folder, settings)
        self.eos_ids = read_eos_ids(folder, settings, self._tokenizer)
        self.vocab_size = len(self._pieces.all)
        template = self._template.source if self._template is not None else ""
        self._marked: dict[tuple[str, ...], Sequence[bytes]] = {}
        self._longest_token_bytes = max(map(len, self._pieces.all))
        self._middle = fim.find_format(self._tokenizer.token_to_id)
        self.habits = self._probe()
        self._find_formats(template)
        # Some files leave adding BOS to the Python class that they name.
        self._bos: list[int] = []
        if settings.get("add_bos_token") is True and not self._tokenizer.encode("").ids:
            bos = self._tokenizer.token_to_id(named_tokens(settings).get("bos_token", ""))
            self._bos = [] if bos is None else [bos]

    @classmethod
    def load(cls, folder: Path | str, tool_format: str = "", reasoning_format: str = "") -> "ChatModel":
        """Read the tokenizer's files, config.json and the chat template. Blocks. Raises ModelInvalid, ConfigError."""
        return cls(Source(str(folder), tool_format, reasoning_format))

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continues: bool = False,
        add_special: bool = False,
        context: int = 0,
    ) -> list[int]:
        """The prompt of a conversation: OpenAI messages through the model's template, up to the assistant's turn; or,
        if the answer ``continues`` the last message, up to the end of that one's content.

        A special token spelled out in a message stays text. Raises InvalidRequest when a message cannot be rendered,
        when the template refuses, and when the model has no template; ContextLengthExceeded, before tokenising, for a
        text that cannot fit into ``context`` tokens.
        """
        if self._template is None:
            raise InvalidRequest(
                "This model has no chat template, so it cannot chat. Use /v1/completions, or put the template of its "
                "family into the model's folder as chat_template.jinja.",
                param="messages",
            )
        told = ""
        if tools and self.habits.tools_in_system:
            messages, tools = with_tools(messages, tools), None
        elif tools and not self.habits.tools:
            told, tools = instructions(tools), None
        # Special tokens of calls that are written as text, behind a character that no client has in its messages.
        written = not self.habits.calls and self.tool_format.name in WRITERS
        mark = unused_character((messages, tools)) if written else ""
        text, breaker = self._first_taken(
            partial(self._render, template_kwargs or {}, add_generation_prompt, continues, mark),
            [tools, tame_tools(tools)] if tools else [None],
            partial(candidates, messages, self.habits, told, partial(self._write_calls, mark)),
        )
        self.check_length(len(text), context, "messages")
        tokens = self._tokenizer_bos("messages") if add_special else []
        if not breaker:
            return tokens + _encode(self._tokenizer, text, "messages")
        for part, literal in self._special.segments(text, breaker):
            tokens += _encode(self._literal if literal else self._tokenizer, part, "messages")
        return tokens

    @staticmethod
    def _first_taken(
        render: Callable[[list[dict[str, Any]] | None, list[Message]], tuple[str, str]],
        tools: Sequence[list[dict[str, Any]] | None],
        forms: Callable[[], Iterable[list[Message]]],
    ) -> tuple[str, str]:
        refused: InvalidRequest | None = None
        for listed in tools:
            for form in forms():
                try:
                    return render(listed, form)
                except InvalidRequest as error:
                    if error.param != "messages":
                        raise
                    refused = refused or error
        assert refused is not None
        raise refused

    def _find_formats(self, template: str) -> None:
        """Raises ConfigError for names that are none."""
        source = self.source
        try:
            self.tool_format, self.tool_format_reason = find_tool_format(template, self.special, source.tool_format)
            self.reasoning, self.reasoning_reason = find_reasoning(template, self.special, source.reasoning_format)
        except ValueError as error:
            raise ConfigError(f"[model] {error}", param="model") from None
        if not self.habits.tools and not source.tool_format:
            self.tool_format, self.tool_format_reason = GENERIC, "its chat template says nothing of tools"
        self.whole_format = self.tool_format if isinstance(self.tool_format, WholeFormat) else None
        if self.whole_format is not None:
            self.reasoning, self.reasoning_reason = None, f"{self.whole_format.name} has it on a channel of its own"

    def _probe(self) -> Habits:
        template = self._template
        if template is None:
            return Habits()
        return probe(lambda messages, tools: template.render(messages, tools, {}), template.names)

    def _render(
        self,
        kwargs: dict[str, Any],
        add_generation_prompt: bool,
        continues: bool,
        mark: str,
        tools: list[dict[str, Any]] | None,
        messages: list[Message],
    ) -> tuple[str, str]:
        """The prompt's text, and the character that breaks up the special tokens in it that are not the template's."""
        assert self._template is not None
        end = ""
        if continues:
            # What templates do to a content (trim it, take its reasoning out) they do before its last character.
            end = unused_character((messages, tools, kwargs))
            *before, last = messages
            messages = [*before, last | {"content": last["content"] + end}]
        conversation, breaker = self._special.break_up((shaped(messages, self.habits), tools, kwargs))
        text = self._template.render(*conversation, add_generation_prompt=add_generation_prompt and not continues)
        if end:
            text, found, _ = text.rpartition(end)
            if not found:
                raise InvalidRequest(
                    "The model's chat template leaves the last message's content out, so that nothing can go on from "
                    "there. Ask for a new turn, or use /v1/completions.",
                    param="messages",
                )
            text = text.replace(end, "")
        if mark:
            for token in self.tool_format.markers:
                text = text.replace(_marked(mark, token), token)
        return text, breaker

    def _write_calls(self, mark: str, functions: Sequence[Message]) -> str:
        """As the model does, its special tokens in a spelling that survives until the template has printed them."""
        return WRITERS.get(self.tool_format.name, generic)(functions, partial(_marked, mark))

    def thinking_opened(self, prompt: Sequence[int], prefill: str = "") -> bool:
        """Whether an answer to this prompt begins within the reasoning. ``prefill``: the answer's beginning, if the
        prompt ends with one.
        """
        return self.reasoning is not None and self.reasoning.opened(self._end(prompt, prefill), prefill)

    def thinking_closed(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt says that there is nothing to think."""
        return self.reasoning is not None and self.reasoning.closed(self._end(prompt, ""))

    def _end(self, prompt: Sequence[int], prefill: str) -> str:
        return self.spelled(prompt[-(_MARKER_TOKENS + len(prefill)) :])

    def template_variables(self, switches: Switches) -> dict[str, Any]:
        """How the model's template wants to be told how much to think."""
        if self._template is None:
            return {}
        return template_variables(switches, self._template.variables, self._template.names)

    def _tokenizer_bos(self, param: str) -> list[int]:
        return self._bos or _encode(self._tokenizer, "", param, add_special=True)

    def check_length(self, characters: int, context: int, param: str) -> None:
        """Raises ContextLengthExceeded where so much text cannot be so few tokens. ``context`` 0: not known.

        Costs nothing, unlike tokenising. No token has more characters than the longest has bytes.
        """
        self.check_tokens(-(-characters // self._longest_token_bytes), context, param)

    def check_tokens(self, least: int, context: int, param: str) -> None:
        """Raises ContextLengthExceeded for a prompt of at least ``least`` tokens that leaves no room for an answer."""
        if 0 < context <= least:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context} tokens. However, your {param} resulted in at least "
                f"{least} tokens. Please reduce the length of the {param}.",
                param=param,
            )

    def encode_text(self, text: str) -> list[int]:
        """A completions prompt: with BOS where the model wants it, special tokens parsed. Raises InvalidRequest."""
        return self.tokenize(text, add_special=True, parse_special=True)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Raises InvalidRequest (``param="prompt"``) for a text that is not Unicode."""
        tokenizer = self._tokenizer if parse_special else self._literal
        return (self._bos if add_special else []) + _encode(tokenizer, text, "prompt", add_special=add_special)

    def encode_middle(
        self, prefix: str | list[int], suffix: str, *, add_special: bool
    ) -> tuple[list[int], tuple[int, ...]]:
        """The prompt for what stands between two texts, and the tokens that end it. Raises InvalidRequest."""
        if self._middle is None:
            raise InvalidRequest(
                f"suffix {suffix[:40]!r}: this model's tokenizer has no tokens for filling in the middle (such as "
                "<|fim_prefix|>). Put everything into prompt, or use a code model that was trained on it.",
                param="suffix",
            )
        if isinstance(prefix, str):
            prefix = self.tokenize(prefix, add_special=False, parse_special=True)
        # Some tokenizers put a space before a text; the suffix begins in mid-text.
        before = self.tokenize(_ANY, add_special=False, parse_special=True)
        after = self.tokenize(_ANY + suffix, add_special=False, parse_special=True)
        if after[: len(before)] != before:
            before, after = [], self.tokenize(suffix, add_special=False, parse_special=True)
        tokens, ends = fim.arrange(self._middle, self._tokenizer.token_to_id, prefix, after[len(before) :])
        return (self._tokenizer_bos("prompt") if add_special else []) + tokens, ends

    def decode(self, tokens: Sequence[int]) -> str:
        """The whole text; invalid UTF-8 as U+FFFD, special tokens left out."""
        stream = self.text_stream()
        return stream.feed(tokens) + stream.finish()

    def spelled(self, tokens: Sequence[int]) -> str:
        """The same with special tokens spelled out."""
        return b"".join(self.token_bytes(token) for token in tokens).decode(errors="replace")

    def offsets(self, tokens: Sequence[int], text: str | None = None) -> list[int]:
        """Where in a prompt's text each token begins, in characters; of the parts of one character, where it stands.
        ``text``: what was tokenised, with the special tokens that it spells out; otherwise they are no part of it."""
        pieces = self._pieces.text if text is None else self._pieces.all
        stream = TextStream(pieces, strip_space=self._pieces.strip_space)
        found: list[int] = []
        length = 0
        for token in tokens:
            found.append(length)
            # BOS, which the tokenizer puts before a text.
            added = (
                text is not None
                and not length
                and not self._pieces.text[token]
                and not text.startswith(self.token_bytes(token).decode(errors="replace"))
            )
            if not added:
                length += len(stream.feed((token,)))
        return found

    def token_name(self, token: int) -> str:
        """A token as the vocabulary spells it ("Ġthere"); "" outside it."""
        return self._tokenizer.id_to_token(token) or ""

    def token_bytes(self, token: int) -> bytes:
        """A token's bytes (perhaps part of a character), a special token's name; empty outside the vocabulary."""
        return self._pieces.all[token] if 0 <= token < self.vocab_size else b""

    def text_stream(
        self,
        stop: Sequence[str] = (),
        *,
        continues: bool = False,
        keep_stop: bool = False,
        markers: tuple[str, ...] = (),
    ) -> TextStream:
        """A detokeniser for one answer. ``continues``: it goes on with a text, so a first space counts. ``keep_stop``:
        the stop string that ends it is part of it. ``markers``: special tokens that are spelled out.
        """
        pieces = self._pieces_with(markers) if markers else self._pieces.text
        strip_space = self._pieces.strip_space and not continues
        return TextStream(pieces, stop, strip_space=strip_space, keep_stop=keep_stop)

    def _pieces_with(self, markers: tuple[str, ...]) -> Sequence[bytes]:
        """One table for each of a model's few sets of markers."""
        if markers not in self._marked:
            pieces = list(self._pieces.text)
            for marker in markers:
                if marker in self.special:
                    pieces[self.special[marker]] = marker.encode()
            self._marked[markers] = tuple(pieces)
        return self._marked[markers]

    def parser(self, plan: Plan) -> AnswerParser | None:
        """For one answer; None: it is nothing but text."""
        if not plan.tools and not plan.reasons:
            return None
        reasoning = self.reasoning if plan.reasons else None
        calls = self.tool_format.parser(plan.tools) if plan.tools or self.whole_format is not None else None
        return AnswerParser(reasoning, opened=plan.opened, calls=calls)

    def markers(self, plan: Plan) -> tuple[str, ...]:
        """What ``parser`` must see of the special tokens."""
        reasoning = self.reasoning.markers if self.reasoning is not None and plan.reasons else ()
        return reasoning + (self.tool_format.markers if plan.tools or self.whole_format is not None else ())


def _marked(mark: str, token: str) -> str:
    return mark.join(token) + mark


def _encode(tokenizer: Tokenizer, text: str, param: str, *, add_special: bool = False) -> list[int]:
    try:
        # Not encode(), which holds the GIL: 0.6 s for a text of 1 MB.
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special)
    except TypeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        raise InvalidRequest(
            f"{param} holds text that is not Unicode: a lone surrogate (\\ud800 to \\udfff).", param=param
        ) from None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # Its regular expressions give up on millions of blanks with a PanicException, which is no Exception.
        raise InvalidRequest(
            f"The model's tokenizer cannot read the text of {param} ({type(error).__name__}: {str(error)[:200]}).",
            param=param,
        ) from None
    ids: list[int] = encoding.ids
    return ids
