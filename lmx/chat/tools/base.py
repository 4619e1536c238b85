"""What a tool format is: how a family of models writes tool calls, to be read and to be enforced.

One small module a format, each pure: text in, events out, and the grammar of the same. ``lmx.chat.tools`` holds the
table of them and chooses. Called by ``lmx.chat.model`` and the API faces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from lmx.chat.events import Event


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments: an object's."""


class Parser(Protocol):
    """Reads one answer (what follows the reasoning). Pure and synchronous; a piece costs its own length."""

    def feed(self, text: str) -> list[Event]:
        """The events that ``text`` makes certain. Text that may still begin a marker is held back."""

    def finish(self) -> list[Event]:
        """The answer ended: what was held back. Call it once, last."""


@dataclass(frozen=True, slots=True)
class Calls:
    """The grammar of an answer's calls, as Lark rules in llguidance's dialect."""

    trigger: str
    """The literal text that begins the calls, and that no other text of an answer contains."""
    rules: str
    """Rules and terminals whose names begin with ``call``; the rule ``calls`` is all that follows the trigger."""
    at_start: bool = False
    """The trigger is too common to be kept out of other text: it begins the calls only where the answer begins, behind
    white space, and an answer that begins so has them. Elsewhere it is text."""


class Format(Protocol):
    @property
    def name(self) -> str:
        """As in ``[model] tool_format``."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Strings that mean something to the parser. Special tokens among them are shown to it as text; other special
        tokens of an answer are not."""

    def matches(self, template: str, special: Mapping[str, int]) -> bool:
        """Whether a model with this chat template and these special tokens (text → id) writes calls so."""

    def parser(self, tools: Sequence[Tool]) -> Parser:
        """For one answer. A call of a tool that is none of ``tools`` is no call."""

    def grammar(self, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool) -> Calls:
        """``parallel``: one call or more; otherwise exactly one. Arguments match their tool's schema."""


@runtime_checkable
class WholeFormat(Format, Protocol):
    """A format of which the whole answer is one: its parser reads what the model wrote after the prompt, markers and
    reasoning included, and gives Reasoning too."""

    def answer(
        self,
        tools: Sequence[Tool],
        special: Mapping[str, int],
        *,
        choice: Literal["none", "auto", "required"],
        parallel: bool,
        body: str = "",
        thinking: bool = True,
    ) -> str:
        """The grammar of all that follows the prompt: Lark rules, ``start`` among them.

        ``body``: rules that define ``body``, the final message as it must be; empty: any text. ``thinking``: whether
        the model may reason first.
        """
