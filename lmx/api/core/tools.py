"""Which tools an answer may call, and whether it must: ``tools`` and ``tool_choice`` in every spelling.

Pure. Called by ``lmx.api.core.prepare`` with the body as the client wrote it, whose types ``lmx.api.core.schemas`` has
checked.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lmx.api.core.shorten import shorten
from lmx.chat.forms.schema import strict_rule
from lmx.chat.tools.base import Tool
from lmx.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
"""OpenAI takes 64 letters, digits, ``_`` and ``-``; others write namespaces with the further characters."""

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class ToolUse:
    shown: list[dict[str, Any]]
    """For the chat template, as the client wrote them."""
    callable: tuple[Tool, ...]
    mode: Mode
    parallel: bool
    """More than one call in one answer."""
    old: bool
    """They were given as ``functions``."""


def tool_use(given: dict[str, Any]) -> ToolUse:
    """Raises InvalidRequest with the offending name or value."""
    old = not given.get("tools") and bool(given.get("functions"))
    param = "functions" if old else "tools"
    if old:
        declared = [{"type": "function", "function": function} for function in given["functions"]]
    else:  # others are the client's own business, or OpenAI's: {"type": "web_search"}
        declared = [tool for tool in given.get("tools") or () if tool["type"] == "function"]
    tools = _tools(declared, param, old)
    choice_param, choice = _choice(given)
    mode, names, single = _read_choice(choice, choice_param)
    present = given.get("functions" if choice_param == "function_call" else "tools") is not None
    if mode == "required" and not tools:
        raise InvalidRequest(
            f"{choice_param} {shorten(choice)} needs {param} with at least one function (got "
            f"{shorten(given.get(param))}).",
            param=choice_param,
        )
    if choice is not None and mode == "auto" and not present:
        raise InvalidRequest(f"{choice_param} {shorten(choice)} needs {param} (got null).", param=choice_param)
    for name in names or ():
        if name not in tools:
            raise InvalidRequest(
                f"{choice_param}: there is no tool {name[:128]!r} in {param}; there are: "
                f"{', '.join(list(tools)[:20]) or 'none'}.",
                param=choice_param,
            )
    if mode == "none":
        return ToolUse([], (), "none", False, old)
    allowed = [tool for name, tool in tools.items() if names is None or name in names]
    # A tool that must be called leaves the prompt as it is, and with it the cached prefix. What must not be called is
    # not shown: a model that began to call it would be led to call another one.
    hides = names is not None and mode == "auto"
    shown = [tool for tool in declared if not hides or tool["function"]["name"] in (names or ())]
    parallel = given.get("parallel_tool_calls") is not False and not single and not old
    return ToolUse(shown, tuple(allowed), mode if allowed else "none", parallel, old)


def _tools(declared: Iterable[dict[str, Any]], param: str, old: bool) -> dict[str, Tool]:
    tools: dict[str, Tool] = {}
    for index, tool in enumerate(declared):
        function = tool["function"]
        name, parameters = function["name"], function.get("parameters")
        where = f"{param}[{index}]" if old else f"{param}[{index}].function"
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"{where}.name: {shorten(name)} is no name of a function: 1 to 128 letters, digits and _ - . : / are.",
                param=f"{where}.name",
            )
        if name in tools:
            raise InvalidRequest(f"{where}.name: {name!r} is there twice; give each its own.", param=f"{where}.name")
        kind = (parameters or {}).get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise InvalidRequest(
                f"{where}.parameters: the arguments of a function are an object; its schema's type is {shorten(kind)}.",
                param=f"{where}.parameters",
            )
        if function.get("strict") in (True, "true") and parameters:
            strict_rule(parameters, f"{where}.parameters")  # of others, what cannot be enforced is let be
        tools[name] = Tool(name, parameters or {"type": "object", "properties": {}})
    return tools


def _choice(given: dict[str, Any]) -> tuple[str, Any]:
    """The field that decides, and its value."""
    if given.get("tool_choice") is None and given.get("function_call") is not None:
        return "function_call", given["function_call"]
    return "tool_choice", given.get("tool_choice")


def _read_choice(choice: Any, param: str) -> tuple[Mode, frozenset[str] | None, bool]:
    """(mode, the tools that are left or None for all, no more than one call). Raises InvalidRequest."""
    kind = choice.get("type", "function") if isinstance(choice, dict) else choice
    single = isinstance(choice, dict) and choice.get("disable_parallel_tool_use") is True
    match kind:
        case None | "auto":
            return "auto", None, single
        case "none":
            return "none", None, single
        case "required" | "any":
            return "required", None, single
        case "function" | "tool" if isinstance(choice, dict):
            name = tool_name(choice)
            if name is not None:
                return "required", frozenset([name]), True
        case "allowed_tools" if isinstance(choice, dict):
            # OpenAI's chat face nests it, its Responses face does not
            rule = choice.get("allowed_tools", choice)
            mode, allowed = (rule.get("mode"), rule.get("tools")) if isinstance(rule, dict) else (None, None)
            names = [tool_name(tool) for tool in allowed] if isinstance(allowed, list) else [None]
            if mode in ("auto", "required") and names and None not in names:
                return mode, frozenset(name for name in names if name), single
            raise InvalidRequest(
                f'{param} {shorten(choice)}: allowed_tools needs a mode, "auto" or "required", and a list of tools.',
                param=param,
            )
    raise InvalidRequest(
        f'{param} {shorten(choice)}: it must be "none", "auto", "required", or name a function: '
        '{"type": "function", "function": {"name": …}}.',
        param=param,
    )


def tool_name(tool: Any) -> str | None:
    """Of a function as ``tools`` has it, or as the Responses face and Anthropic write it."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
