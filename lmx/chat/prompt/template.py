"""Renders a conversation with the model's own Jinja chat template, sandboxed.

``ChatModel`` calls it. It gives templates what transformers gives them (the environment they are written for) and
nothing else: no files, no attributes of Python objects, no mutation of the arguments. What a template refuses becomes
an InvalidRequest. See https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lmx.chat.prompt.messages import collector, map_strings
from lmx.errors import InvalidRequest

SHOWN_CHARACTERS = 300
_OWN_NAMES = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks what a model learns in training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Compiled templates of one model: ``default``, perhaps ``tool_use``. Raises jinja2.TemplateSyntaxError."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(special_tokens)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source = sources.get("tool_use") or sources.get("default") or next(iter(sources.values()))
        """Of the one that tells of tools, for those who look what it knows."""
        trees = [environment.parse(source) for source in sources.values()]
        self.variables = frozenset[str]().union(*map(find_undeclared_variables, trees))
        """What it may be told beside the conversation."""
        texts: list[str] = [node.attr for tree in trees for node in tree.find_all(jinja2.nodes.Getattr)]
        # Lists of constants are read as one constant.
        map_strings([node.value for tree in trees for node in tree.find_all(jinja2.nodes.Const)], collector(texts))
        self.names = frozenset(texts)
        """Every field that it may read, and every other string in it."""
        self._templates = {name: environment.from_string(source) for name, source in sources.items()}

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        kwargs: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt's text, ending where the assistant begins. Raises InvalidRequest."""
        reserved = sorted(_OWN_NAMES & kwargs.keys())
        if reserved:
            raise InvalidRequest(
                f"chat_template_kwargs may not set {', '.join(reserved)}.", param="chat_template_kwargs"
            )
        template = self._templates.get("tool_use" if tools else "default") or next(iter(self._templates.values()))
        variables = {**kwargs, "messages": messages, "tools": tools, "documents": None}
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return template.render(variables)
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {str(error)[:SHOWN_CHARACTERS]}", param="messages"
            ) from None
        except Exception as error:  # template code run on a client's values: it can raise anything
            raise InvalidRequest(
                f"The model's chat template fails on these messages ({type(error).__name__}: "
                f"{str(error)[:SHOWN_CHARACTERS]}).",
                param="messages",
            ) from None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML characters, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
