"""What a chat template cannot read of a conversation, in the nearest form that it can. Pure; ``ChatModel`` calls it.

A template is asked once, at load, with a few short conversations of marked words (``probe``): does it refuse, or drop,
or move what they say? From then on the same rules hold for each request, so a conversation's prompt goes on as it
began. Everything that a template takes as it stands is left as it stands.

The rules, each of which leaves alone what needs none of it:

1. What the template loses or always refuses (``local``): several system messages at the beginning become one; a later
   one becomes a user's text in its place, between ``<system>`` tags; where there is no system message at all, its text
   begins the first user turn; results without a call, and where calls or results are not printed all of them, become
   text, as the model writes calls or in the generic tool format; several calls of one turn become turns of one call,
   each with its result; ids, arguments and contents become what the template asks for.
2. Where that is refused, reasoning beside both text and calls is left out, and arguments that are no object are put
   into one.
3. Where turns must alternate (``alternating``): results move to their calls, neighbours of one role become one turn,
   and an empty turn (or, where that is refused, "OK.") stands where the other side said nothing.
4. At last (``plain``), nothing but alternating user and assistant turns of text.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lmx.chat.prompt.messages import Message, normalise, with_arguments
from lmx.chat.prompt.written import generic
from lmx.errors import InvalidRequest

WriteCalls = Callable[[Sequence[Message]], str]
"""Functions' names and arguments as text."""
_PARAGRAPH = "\n\n"
_OTHER = {"user": "assistant", "assistant": "user"}
_NINE = re.compile(r"[A-Za-z0-9]{9}")
_NUMBERED = re.compile(r"functions\.[^:]+:\d+")


@dataclass(frozen=True, slots=True)
class Habits:
    """What a template does with a conversation."""

    parts: bool = False
    """Contents must be lists of parts."""
    system: bool = True
    """A first system message is printed."""
    late_system: bool = True
    """So is a later one, in its place."""
    two_systems: bool = True
    """So is a second one at the beginning."""
    tools: bool = True
    """The tools are printed."""
    calls: bool = True
    """Calls are printed."""
    results: bool = True
    """Results are."""
    several_calls: bool = True
    """Several in one turn are."""
    orphans: bool = True
    """A result without a call is."""
    arguments: str = "object"
    """What arguments must be: ``with_arguments``'s form."""
    ids: str = ""
    """What ids must be: "nine" letters and digits (Mistral), or "functions.NAME:NUMBER" (Kimi prints no other name)."""
    empty_is_none: bool = False
    """Beside calls, no content at all is what it expects for none."""
    tools_in_system: bool = False
    """The tools are printed where the first system message has them, as JSON."""
    names: frozenset[str] = field(default=frozenset(("reasoning_content",)))
    """Of message fields that the template may read."""


def write_generic(functions: Sequence[Message]) -> str:
    return generic(functions, str)


def candidates(
    messages: Sequence[Message], habits: Habits, instructions: str = "", write: WriteCalls = write_generic
) -> Iterator[list[Message]]:
    """The conversation in forms to try one after the other, until the template takes one.

    instructions: for the system message, the first or one of their own. write: calls that become text.
    Raises InvalidRequest for what is no message.
    """
    whole = normalise(messages, habits.names)
    if instructions:
        whole = _instructed(whole, instructions)
    first = local(with_arguments(whole, habits.arguments), habits, write)
    yield first
    form = "only objects" if habits.arguments == "object" else habits.arguments
    tamed = [_without_double_reasoning(message) for message in with_arguments(whole, form)]
    tamed = local(tamed, habits, write)
    if tamed != first:
        yield tamed
    other = alternating(tamed)
    if other != tamed:
        yield other
    filled = [_filled(message) for message in other]
    if filled != other:
        yield filled
    for system in (True, False) if habits.system else (False,):
        yield plain(whole, write, system=system)
    if not any(message["role"] == "user" for message in whole):
        # Some look for a user's question, and take no results for one.
        yield plain([say("user", ""), say("assistant", ""), *whole], write, system=False)


def tame_tools(tools: Sequence[Message]) -> list[Message]:
    """With all that templates may look for in a function; clients leave out what is empty."""
    result = []
    for tool in tools:
        function = {"description": "", **tool.get("function", {})}
        parameters = {"type": "object", "properties": {}, "required": [], **(function.get("parameters") or {})}
        result.append({"type": "function", **tool, "function": {**function, "parameters": parameters}})
    return result


def with_tools(messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
    """The tools in the first system message, for ``Habits.tools_in_system``."""
    listed = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
    if messages and messages[0].get("role") in ("system", "developer"):
        return [{**messages[0], "tools": listed}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": listed}, *messages]


def say(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def shaped(messages: Sequence[Message], habits: Habits) -> list[Message]:
    """Contents as the template reads them: the last step before it gets them."""
    return [_shaped(message, habits) for message in messages]


def _shaped(message: Message, habits: Habits) -> Message:
    if not message["content"] and message.get("tool_calls") and habits.empty_is_none:
        return {**message, "content": None}
    if habits.parts:
        return {**message, "content": [{"type": "text", "text": message["content"]}]}
    return message


def _instructed(messages: list[Message], instructions: str) -> list[Message]:
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": instructions}, *messages]
    first = messages[0]
    return [{**first, "content": _joined([first, {"content": instructions}])}, *messages[1:]]


# --- rule 1: what the template always refuses or loses ------------------------------------------------


def local(messages: Sequence[Message], habits: Habits, write: WriteCalls) -> list[Message]:
    result = list(messages)
    if not habits.calls:
        result = [_as_text(message, write, results=not habits.results) for message in result]
    elif not habits.orphans:
        result = _orphans_as_text(result)
    if not habits.several_calls:
        result = _one_call_a_turn(result)
    if habits.ids:
        result = _with_ids(result, _short if habits.ids == "nine" else _numbered)
    return _system_in_place(result, habits)


def _as_text(message: Message, write: WriteCalls, *, results: bool = True) -> Message:
    if message["role"] == "tool" and results:
        return _result_as_text(message)
    if not message.get("tool_calls"):
        return message
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = write([call["function"] for call in message["tool_calls"]])
    return {**rest, "content": "\n".join(filter(None, (message["content"], calls)))}


def _result_as_text(message: Message) -> Message:
    return say("user", f"<tool_response>\n{message['content']}\n</tool_response>")


def _orphans_as_text(messages: Sequence[Message]) -> list[Message]:
    """Results whose call is not before them, with nothing but results in between."""
    result: list[Message] = []
    open_ids: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            result.append(message if message.get("tool_call_id") in open_ids else _result_as_text(message))
            continue
        open_ids = {call["id"] for call in message.get("tool_calls", ())}
        result.append(message)
    return result


def _one_call_a_turn(messages: Sequence[Message]) -> list[Message]:
    result: list[Message] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        if len(message.get("tool_calls", ())) < 2:
            result.append(message)
            continue
        answers: list[Message] = []
        while index < len(messages) and messages[index]["role"] == "tool":
            answers.append(messages[index])
            index += 1
        for number, call in enumerate(message["tool_calls"]):
            turn = {**message, "tool_calls": [call]}
            if number:
                turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            own = [answer for answer in answers if answer.get("tool_call_id") == call["id"]]
            answers = [answer for answer in answers if answer.get("tool_call_id") != call["id"]]
            result += [turn, *own]
        result += answers
    return result


def _with_ids(messages: Sequence[Message], rename: Callable[[Message, int], str]) -> list[Message]:
    renamed: dict[str, str] = {}
    result = []
    count = 0
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                renamed[call["id"]] = rename(call, count)
                calls.append({**call, "id": renamed[call["id"]]})
                count += 1
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            given = str(message.get("tool_call_id", ""))
            orphan = {"id": given, "function": {"name": message.get("name", "unknown")}}
            message = {**message, "tool_call_id": renamed.get(given) or rename(orphan, count)}
        result.append(message)
    return result


def _short(call: Message, number: int) -> str:
    if _NINE.fullmatch(call["id"]):
        return str(call["id"])
    return hashlib.sha256(call["id"].encode(errors="replace")).hexdigest()[:9]


def _numbered(call: Message, number: int) -> str:
    return call["id"] if _NUMBERED.fullmatch(call["id"]) else f"functions.{call['function']['name']}:{number}"


def _system_in_place(messages: Sequence[Message], habits: Habits) -> list[Message]:
    leading = next((index for index, m in enumerate(messages) if m["role"] != "system"), len(messages))
    head, rest = list(messages[:leading]), list(messages[leading:])
    if not (habits.system and habits.late_system):
        rest = [_as_user(message) for message in rest]
    if not (habits.system and habits.two_systems) and len(head) > 1:
        head = [{**head[0], "content": _joined(head)}]
    if habits.system or not head:
        return head + rest
    return _into_first_user(head[0]["content"], rest)


def _as_user(message: Message) -> Message:
    if message["role"] != "system":
        return message
    return {"role": "user", "content": f"<system>\n{message['content']}\n</system>"}


def _into_first_user(text: str, messages: list[Message]) -> list[Message]:
    if not messages or messages[0]["role"] != "user":
        return [say("user", text), *messages]
    first = messages[0]
    return [{**first, "content": _joined([{"content": text}, first])}, *messages[1:]]


def _joined(messages: Sequence[Message]) -> str:
    return _PARAGRAPH.join(message["content"] for message in messages if message["content"])


# --- rules 2 to 4 -------------------------------------------------------------------------------------


def _without_double_reasoning(message: Message) -> Message:
    """gpt-oss's template takes text or thoughts beside calls, not both."""
    if not (message.get("tool_calls") and message["content"]):
        return message
    return {key: value for key, value in message.items() if key not in ("reasoning_content", "thinking", "reasoning")}


def alternating(messages: Sequence[Message]) -> list[Message]:
    """User and assistant in turn, the user first; calls and results stand beside that, as Mistral counts them."""
    turns: list[Message] = []
    for message in _results_at_calls(messages):
        if turns and _mergeable(turns[-1], message):
            turns[-1] = _merged(turns[-1], message)
        else:
            turns.append(message)
    result: list[Message] = []
    expected, opened = "user", False
    for message in turns:
        role = message["role"]
        counted = role in ("user", "assistant") and not message.get("tool_calls")
        if (counted and role != expected) or (role == "assistant" and not opened):
            result.append(say(expected, ""))
            expected = _OTHER[expected]
        if counted:
            expected = _OTHER[role]
        opened = opened or role in _OTHER
        result.append(message)
    return result


def _filled(message: Message) -> Message:
    """Ministral 3's template refuses an assistant's turn without a word."""
    empty = message["role"] == "assistant" and not message["content"] and not message.get("tool_calls")
    return {**message, "content": "OK."} if empty else message


def _mergeable(first: Message, second: Message) -> bool:
    if first["role"] != second["role"] or first["role"] == "tool":
        return False
    # Text would come to stand before calls that were before it, or be left out: many templates print none beside calls.
    return bool(first.get("tool_calls")) == bool(second.get("tool_calls"))


def _merged(first: Message, second: Message) -> Message:
    merged = {**first, **second, "content": _joined([first, second])}
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    return merged | ({"tool_calls": calls} if calls else {})


def _results_at_calls(messages: Sequence[Message]) -> list[Message]:
    """Each result directly behind its call's turn; others stay in place as a user's text."""
    answers: dict[str, list[Message]] = {}
    known = {call["id"] for message in messages for call in message.get("tool_calls", ())}
    for message in messages:
        if message["role"] == "tool" and message.get("tool_call_id") in known:
            answers.setdefault(message["tool_call_id"], []).append(message)
    result: list[Message] = []
    for message in messages:
        if message["role"] != "tool":
            result.append(message)
            for call in message.get("tool_calls", ()):
                result += answers.pop(call["id"], [])
        elif message.get("tool_call_id") not in known:
            result.append(_result_as_text(message))
    return result


def plain(messages: Sequence[Message], write: WriteCalls, *, system: bool) -> list[Message]:
    """Nothing but text in alternating turns, behind one system message or none."""
    texts = [_as_text(message, write) for message in messages]
    bare = [{"role": message["role"], "content": message["content"]} for message in texts]
    placed = _system_in_place(bare, Habits(system=system, late_system=False, two_systems=False))
    head = [message for message in placed[:1] if message["role"] == "system"]
    turns = alternating(placed[len(head) :])
    return head + (turns or [say("user", "")])


# --- asking a template --------------------------------------------------------------------------------

Render = Callable[[list[Message], list[dict[str, Any]] | None], str]

_TOOL = {
    "type": "function",
    "function": {
        "name": "qtool",
        "description": "Nothing.",
        "parameters": {"type": "object", "properties": {"qx": {"type": "string", "description": "A word."}}},
    },
}
_WAYS = [(form, ids) for ids in ("", "nine", "functions") for form in ("object", "text")]


def probe(render: Render, names: frozenset[str]) -> Habits:
    """Ask a template, by what it does with a few conversations. ``render`` raises InvalidRequest where it refuses.

    A template that prints nothing of the simplest one is taken to be fit for everything.
    """

    def printed(habits: Habits, *messages: Message, tools: bool = False) -> str:
        try:
            return render(shaped(messages, habits), [_TOOL] if tools else None)
        except InvalidRequest:
            return ""

    habits = Habits(names=names)
    user, other = say("user", "quser"), say("user", "qother")
    assistant, system, late = say("assistant", "qanswer"), say("system", "qsystem"), say("system", "qlate")
    if "quser" not in printed(habits, user):
        habits = replace(habits, parts=True)
        if "quser" not in printed(habits, user):
            return Habits(names=names)
    habits = replace(
        habits,
        system=_in_order(printed(habits, system, user), "qsystem", "quser"),
        late_system=_in_order(printed(habits, user, assistant, late, other), "quser", "qanswer", "qlate", "qother"),
        two_systems=_in_order(printed(habits, system, late, user), "qsystem", "qlate", "quser"),
        tools="qtool" in printed(habits, user, tools=True) or "qtool" in printed(habits, system, user, tools=True),
    )
    if not habits.tools and "tools" in names:
        with_tools = system | {"tools": json.dumps([_TOOL["function"]])}
        inside = "qtool" in printed(habits, with_tools, user)
        habits = replace(habits, tools=inside, tools_in_system=inside)
    return _probe_calls(habits, printed, user, assistant)


def _probe_calls(habits: Habits, printed: Callable[..., str], user: Message, assistant: Message) -> Habits:
    results = habits.tools and _in_order(
        printed(habits, user, assistant, _result(""), tools=True), "qanswer", "qresult"
    )
    texts: dict[tuple[str, str], str] = {}
    for form, ids in _WAYS if habits.tools else ():
        calls = _calls(form, ids, "qvalue")
        text = printed(habits, user, calls, _result(ids), tools=True)
        # The result may say the name, too, so it counts only before, or alone.
        named = _in_order(text, "qcall", "qvalue") or "qcall" in printed(habits, user, calls, tools=True)
        if named and _in_order(text, "quser", "qvalue", "qresult"):
            texts[form, ids] = text
    if not texts:
        # Told in text, as the tools are, with the arguments as they were written.
        return replace(habits, calls=False, results=results, arguments="text")
    # Printing an object without more gives Python's spelling of it.
    form, ids = next((way for way in texts if "{'qx'" not in texts[way]), next(iter(texts)))
    if "functions.qcall:" in texts[form, ids]:  # made by the template, for calls; results must have the same
        ids = "functions"
    habits = replace(habits, arguments=form, ids=ids)
    bare = replace(habits, empty_is_none=True)
    empty = printed(bare, user, _calls(form, ids, "qvalue"), _result(ids), tools=True)
    full = printed(habits, user, _calls(form, ids, "qvalue"), _result(ids), tools=True)
    shorter = len(empty) < len(full) and "None" not in empty
    both = [_result(ids, 1), _result(ids, 2)]
    several = printed(habits, user, _calls(form, ids, "qone", "qtwo"), *both, tools=True)
    return replace(
        habits,
        empty_is_none=shorter and _in_order(empty, "quser", "qvalue", "qresult"),
        several_calls=_in_order(several, "qone", "qtwo", "qresult1", "qresult2"),
        orphans=results,
    )


def _id(number: int, ids: str) -> str:
    return {"": f"call_{number:024}", "nine": f"call{number:05}", "functions": f"functions.qcall:{number}"}[ids]


def _calls(form: str, ids: str, *values: str) -> Message:
    calls = []
    for number, value in enumerate(values, 1):
        arguments: Any = {"qx": value}
        if form == "text":
            arguments = json.dumps(arguments)
        function = {"name": "qcall", "arguments": arguments}
        calls.append({"id": _id(number, ids), "type": "function", "function": function})
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _result(ids: str, number: int = 1) -> Message:
    return {"role": "tool", "tool_call_id": _id(number, ids), "name": "qcall", "content": f"qresult{number}"}


def _in_order(text: str, *words: str) -> bool:
    places = [text.find(word) for word in words]
    return -1 not in places and places == sorted(places)
