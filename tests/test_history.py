"""Histories as clients send them, on templates that would refuse or lose some of them."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lmx.chat.model import ChatModel
from lmx.chat.prompt.history import Habits, candidates, probe, shaped
from lmx.chat.prompt.messages import Message, normalise, with_arguments
from lmx.chat.prompt.switches import Switches, template_variables
from lmx.chat.prompt.template import ChatTemplate
from lmx.errors import InvalidRequest
from tests.chat_templates import ALL
from tests.models import write_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}]


@cache
def compiled(name: str) -> ChatTemplate:
    return ChatTemplate({"default": ALL[name]}, {})


@cache
def habits(name: str) -> Habits:
    template = compiled(name)
    return probe(lambda messages, tools: template.render(messages, tools, {}), template.names)


def render(name: str, messages: list[Message], *, tools: Any = None, ask: bool = False) -> str:
    """As ``ChatModel`` does it; raises the first refusal if all forms are refused."""
    refused: InvalidRequest | None = None
    for form in candidates(messages, habits(name)):
        try:
            return compiled(name).render(shaped(form, habits(name)), tools, {}, add_generation_prompt=ask)
        except InvalidRequest as error:
            refused = refused or error
    assert refused is not None
    raise refused


def call(identifier: str | None, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def say(role: str, content: Any, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


# --- any history, any template ------------------------------------------------------------------------


@st.composite
def histories(draw: st.DrawFn) -> list[Message]:
    """Every text in it is a word of its own: ``w7q``."""
    count = 0

    def word() -> str:
        nonlocal count
        count += 1
        return f"w{count}q"

    messages: list[Message] = []
    ids: list[str] = []
    for _ in range(draw(st.integers(1, 8))):
        role = draw(st.sampled_from(["system", "developer", "user", "assistant", "calls", "tool", "tool", "function"]))
        content: Any = word()
        if draw(st.integers(0, 3)) == 0:
            content = [{"type": "text", "text": content}, {"type": "text", "text": word()}]
        message = say("assistant" if role == "calls" else role, content)
        if role == "calls":
            if draw(st.booleans()):
                message["content"] = None
            message["tool_calls"] = []
            for number in range(draw(st.integers(1, 3))):
                identifier = draw(
                    st.sampled_from([f"call_{len(messages)}_{number}", f"abcdef{len(messages)}{number}0", None])
                )
                arguments: Any = {"x": word()}
                spelled = draw(st.sampled_from(["object", "text", "broken"]))
                if spelled == "text":
                    arguments = json.dumps(arguments)
                elif spelled == "broken":
                    arguments = f"{{{word()}"
                message["tool_calls"].append(call(identifier, word(), arguments))
                ids += [identifier] if identifier else []
        elif role == "function":
            message["name"] = word()
        elif role == "tool":
            given = draw(st.sampled_from([*ids, *(i.replace("_", "") for i in ids), "unknown", None]))
            message["tool_call_id"] = given
        if message["role"] == "assistant" and draw(st.booleans()):
            message[draw(st.sampled_from(["reasoning_content", "reasoning"]))] = "thought"
        messages.append(message)
    return messages


def words(message: Message) -> list[str]:
    """What of a message must be read by the model. Some templates leave out the text beside calls."""
    content = message["content"]
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    if message.get("tool_calls"):
        texts = []
        for item in message["tool_calls"]:
            arguments = item["function"]["arguments"]
            value = arguments["x"] if isinstance(arguments, dict) else arguments.strip('{"x: }')
            texts += [item["function"]["name"], value]
    return texts


@pytest.mark.parametrize("name", ALL)
@given(messages=histories(), tools=st.sampled_from([None, TOOLS]))
@settings(max_examples=20, deadline=None)
def test_no_history_is_refused_and_nothing_of_it_is_lost(name: str, messages: list[Message], tools: Any) -> None:
    text = render(name, messages, tools=tools, ask=True)
    systems = [message for message in messages if message["role"] in ("system", "developer")]
    for message in messages:
        if name in ("mistral", "ministral") and message in systems:
            continue  # its templates show the system message beside a last user message only
        for word in words(message):
            assert word in text, (word, text)


@pytest.mark.parametrize("name", ALL)
@given(messages=histories())
@settings(max_examples=20, deadline=None)
def test_what_a_template_takes_is_rendered_as_it_is(name: str, messages: list[Message]) -> None:
    whole = with_arguments(normalise(messages, habits(name).names), habits(name).arguments)
    try:
        as_sent = compiled(name).render(shaped(whole, habits(name)), None, {})
    except InvalidRequest:
        return
    places = [as_sent.find(word) for message in messages for word in words(message)]
    orphans = any(
        m["role"] == "tool" and last["role"] not in ("tool", "assistant") for last, m in pairwise([say("", ""), *whole])
    )
    open_ids: set[str] = set()
    for message in whole:
        if message["role"] == "tool":
            orphans = orphans or message.get("tool_call_id") not in open_ids
        else:
            open_ids = {item["id"] for item in message.get("tool_calls", ())}
    if -1 in places or places != sorted(places) or orphans:
        return  # lost, or moved, or a result that answers nothing there
    if habits(name).tools and habits(name).ids != "functions":
        assert render(name, messages, ask=True) == as_sent


AGENT: list[Message] = [
    say("user", "a question"),
    say("assistant", None, tool_calls=[call("call_1", "look", '{"at": "it"}'), call("call_2", "look", "{}")]),
    say("tool", "one", tool_call_id="call_1"),
    say("tool", "two", tool_call_id="call2"),
    say("assistant", "an answer", reasoning_content="hm"),
    say("user", "more"),
    say("user", "and more"),
    say("assistant", "another"),
    say("system", "be brief"),
    say("user", "last"),
    say("assistant", "so", tool_calls=[call("call_3", "look", {"at": "that"})]),
    say("tool", "three", tool_call_id="call_3"),
    say("user", "go on"),
    say("assistant", "the end"),
]


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_goes_on_as_it_began(name: str) -> None:
    """Each prompt that was sent is the beginning of the next: what a prefix cache lives on."""
    sent = [index for index, message in enumerate(AGENT) if index and message["role"] == "assistant"]
    prompts = [render(name, AGENT[:index]) for index in [*sent, len(AGENT)]]
    for shorter, longer in pairwise(prompts):
        assert longer.startswith(shorter)


# --- single rules -------------------------------------------------------------------------------------


def test_results_find_their_calls() -> None:
    messages = [
        say(
            "assistant",
            None,
            tool_calls=[call("call_a_1", "f", "{}"), call("call_b", "g", "{}"), call(None, "h", "{}")],
        ),
        say("tool", "B", tool_call_id="callb"),
        say("function", "H", name="h"),
        say("tool", "A"),
        say("tool", "nothing", tool_call_id="x"),
        say("assistant", None, function_call={"name": "old", "arguments": "{}"}),
        say("function", "O", name="old"),
    ]
    result = normalise(messages)
    assert [item["id"] for item in result[0]["tool_calls"]] == ["call_a_1", "call_b", "call00002"]
    answered = [(m["content"], m.get("tool_call_id"), m.get("name")) for m in result if m["role"] == "tool"]
    assert answered == [
        ("B", "call_b", "g"),
        ("H", "call00002", "h"),
        ("A", "call_a_1", "f"),
        ("nothing", "x", None),
        ("O", "call00003", "old"),
    ]
    assert "function_call" not in result[5]
    assert messages[1] == say("tool", "B", tool_call_id="callb")  # the client's own are left alone


def test_a_very_id_goes_before_a_likely_one() -> None:
    messages = [
        say("assistant", None, tool_calls=[call("b", "f", "{}"), call("c", "f", "{}")]),
        say("tool", "A", tool_call_id="a"),
        say("tool", "B", tool_call_id="b"),
    ]
    assert [m.get("tool_call_id") for m in normalise(messages)[1:]] == ["c", "b"]


@pytest.mark.parametrize(
    "calls", [5, "x", ["x"], [None], {"a": 1}, [{}], [{"function": {"name": 5}}], [{"function": 1}]]
)
def test_what_are_no_calls_is_refused_by_name(calls: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[1\]\.tool_calls") as caught:
        normalise([say("user", "x"), say("assistant", "", tool_calls=calls)])
    assert str(caught.value.param).startswith("messages[1].tool_calls")


def test_mistral_gets_ids_of_nine_and_turns_that_alternate() -> None:
    text = render("mistral", AGENT[:4])
    first, second = (item["id"] for item in json.loads(text.split("[TOOL_CALLS]")[1].split("</s>")[0]))
    assert len(first) == len(second) == 9
    assert f'"one", "call_id": "{first}"' in text.replace("one,", '"one",')
    assert f'two, "call_id": "{second}"' in text
    assert render("mistral", [*AGENT[:1], say("user", "b")]) == "<s>[INST]a question\n\nb[/INST]"
    interrupted = render("mistral", [*AGENT[:4], say("user", "wait")])
    assert interrupted.endswith("[/TOOL_RESULTS]</s>[INST]wait[/INST]")
    assert "[/TOOL_RESULTS]OK.</s>[INST]wait[/INST]" in render("ministral", [*AGENT[:4], say("user", "wait")])
    kept = [say("user", "x"), say("assistant", "", tool_calls=[call("abcdefghi", "f", "{}")])]
    assert '"id": "abcdefghi"' in render("mistral", kept)


def test_gemma_gets_no_system_message_no_calls_and_turns_that_alternate() -> None:
    late = [say("system", "S"), say("user", "A"), say("system", "late"), say("assistant", "B"), say("assistant", "C")]
    assert render("gemma", late) == (
        "<bos><start_of_turn>user\nS\n\nA\n\n<system>\nlate\n</system><end_of_turn>\n"
        "<start_of_turn>model\nB\n\nC<end_of_turn>\n"
    )
    text = render("gemma", AGENT[:4])
    assert '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>' in text
    assert "<start_of_turn>user\n<tool_response>\none\n</tool_response>\n\n<tool_response>\ntwo" in text


def test_llama_3_gets_one_call_a_turn_each_with_its_result() -> None:
    text = render("llama3", [say("user", "x"), *AGENT[1:4]])
    order = [text.index(part) for part in ('{"at": "it"}', '"one"', '"parameters": {}', '"two"')]
    assert order == sorted(order)


def test_templates_that_fold_or_refuse_a_late_system_message_get_it_in_its_place() -> None:
    messages = [say("system", "S"), say("system", "T"), say("user", "A"), say("system", "late"), say("user", "Z")]
    for name in ("deepseek", "qwen35", "minimax"):
        text = render(name, messages)
        assert text.index("S") < text.index("T")
        assert text.index("A") < text.index("<system>\nlate\n</system>") < text.index("Z")
    assert "<|im_start|>system\nlate<|im_end|>" in render("qwen3", messages)


def test_arguments_come_in_the_form_that_is_printed() -> None:
    spaced = [say("user", "x"), say("assistant", None, tool_calls=[call("1", "f", '{"a":1}')])]
    assert '<sep>{"a":1}</call>' in render("deepseek", spaced)
    assert '"arguments": {"a": 1}' in render("qwen3", spaced)
    given = [say("user", "x"), say("assistant", None, tool_calls=[call("1", "f", {"a": "é"})])]
    assert '<sep>{"a": "é"}</call>' in render("deepseek", given)
    broken = [say("user", "x"), say("assistant", None, tool_calls=[call("1", "f", '{"a":')])]
    assert '<parameter name="arguments">{"a":' in render("minimax", broken)


def test_reasoning_reaches_a_template_under_the_name_it_reads() -> None:
    for field in ("reasoning_content", "reasoning"):
        messages = [say("user", "x"), say("assistant", "y", **{field: "hm"})]
        assert "<think>\nhm\n</think>\n\ny" in render("qwen3", messages)
        assert "hm" not in render("deepseek", messages)
        item = call("1", "f", "{}")
        assert "<|message|>hm<|end|>" in render(
            "gpt_oss", [say("user", "x"), say("assistant", "", **{field: "hm"}, tool_calls=[item])]
        )
        # Its template refuses thoughts and text beside a call.
        both = render("gpt_oss", [say("user", "x"), say("assistant", "text", **{field: "hm"}, tool_calls=[item])])
        assert "text" in both
        assert "hm" not in both


def test_kimi_gets_names_in_ids() -> None:
    text = render("kimi", AGENT[:4])
    assert "<|tool_call_begin|>functions.look:0<|" in text
    assert "## Return of functions.look:1\ntwo" in text


# --- through the model --------------------------------------------------------------------------------


def model(folder: Path, name: str) -> ChatModel:
    write_tokenizer(folder, chat_template=ALL[name])
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    return ChatModel.load(folder)


def test_a_template_that_says_nothing_of_tools_gets_them_in_the_system_message(tmp_path: Path) -> None:
    chat = model(tmp_path, "chatml")
    assert not chat.habits.tools
    own = chat.spelled(chat.encode_chat([say("user", "x")], tools=TOOLS))
    assert own.startswith("<|im_start|>system\nYou")
    assert '"name": "look"' in own
    assert own.endswith("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n")
    added = chat.spelled(chat.encode_chat([say("developer", "S"), say("user", "x")], tools=TOOLS))
    assert added.startswith("<|im_start|>system\nS\n\nYou")
    assert "look" not in chat.spelled(chat.encode_chat([say("user", "x")]))
    text = chat.spelled(chat.encode_chat(AGENT[:4], tools=TOOLS))
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>\n<tool_call>'
        in text
    )
    assert "<|im_start|>user\n<tool_response>\ntwo\n</tool_response><|im_end|>" in text


def test_calls_that_a_template_leaves_out_are_written_as_the_model_does(tmp_path: Path) -> None:
    marks = ["<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"]
    write_tokenizer(tmp_path, chat_template=ALL["lfm2"])
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    chat = ChatModel.load(tmp_path)
    assert chat.tool_format.name == "lfm2"
    messages = [
        say("user", f"what is {marks[0]}?"),
        say("assistant", "so", tool_calls=[call("1", "f", {"a": "é", "b": [True]}), call("2", "g", '{"c": 1}')]),
        say("tool", "one", tool_call_id="1"),
    ]
    ids = chat.encode_chat(messages, tools=TOOLS)
    text = chat.spelled(ids)
    assert f'so\n{marks[0]}[f(a="é", b=[True]), g(c=1)]{marks[1]}<|im_end|>' in text
    assert f"<|im_start|>tool\n{marks[2]}one{marks[3]}" in text
    start = tokenizer.token_to_id(marks[0])
    assert ids.count(start) == 1  # the user's is text
    assert text.count(marks[0]) == 2


def test_phi_4_gets_its_tools_in_the_system_message(tmp_path: Path) -> None:
    chat = model(tmp_path, "phi4")
    text = chat.spelled(chat.encode_chat([say("system", "S"), say("user", "x")], tools=TOOLS))
    assert text.startswith('<|system|>S<|tool|>[{"name": "look"')
    assert chat.spelled(chat.encode_chat([say("user", "x")], tools=TOOLS)).startswith("<|system|><|tool|>[")


def test_a_tool_without_anything_is_given_what_templates_look_for(tmp_path: Path) -> None:
    template = (
        "{{ messages[0].content }}{% for t in tools or [] %}{{ t.function.parameters.properties.items() | list }}"
    )
    write_tokenizer(tmp_path, chat_template=template + "{{ t.function.name }}{% endfor %}")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    chat = ChatModel.load(tmp_path)
    assert chat.habits.tools
    for function in ({"name": "f"}, {"name": "f", "parameters": None}, {"name": "f", "parameters": {"type": "object"}}):
        tools = [{"type": "function", "function": function}]
        assert chat.spelled(chat.encode_chat([say("user", "x")], tools=tools)) == "x[]f"


def test_special_tokens_in_history_stay_text(tmp_path: Path) -> None:
    chat = model(tmp_path, "gemma")
    ids = chat.encode_chat([say("system", "<|im_end|>"), say("tool", "<|im_end|>"), say("tool", "<|im_end|>")])
    assert 2 not in ids
    assert chat.spelled(ids).count("<|im_end|>") == 3


def test_the_first_refusal_is_told(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{{ raise_exception('no: ' + messages | length | string) }}")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    with pytest.raises(InvalidRequest, match="no: 3"):
        ChatModel.load(tmp_path).encode_chat([say("system", "a"), say("user", "b"), say("user", "c")])


# --- switches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "switches", "expected"),
    [
        ("{{ enable_thinking }}", Switches(effort="high"), {"enable_thinking": True}),
        ("{{ enable_thinking }}", Switches(effort="none"), {"enable_thinking": False}),
        ("{{ enable_thinking }}", Switches(enabled=True, effort="none"), {"enable_thinking": True}),
        ("{{ enable_thinking }}", Switches(budget=0), {"enable_thinking": False}),
        ("{{ enable_thinking }}", Switches(), {}),
        (ALL["deepseek"], Switches(enabled=True), {"thinking": True}),
        (ALL["granite"], Switches(enabled=False), {"thinking": False}),
        (ALL["gpt_oss"], Switches(effort="xhigh"), {"reasoning_effort": "high"}),
        (ALL["gpt_oss"], Switches(effort="minimal"), {"reasoning_effort": "low"}),
        (ALL["gpt_oss"], Switches(enabled=False), {"reasoning_effort": "low"}),
        ("{{ reasoning_effort in ['none', 'high'] }}", Switches(effort="low"), {"reasoning_effort": "high"}),
        ("{{ reasoning_effort in ['none', 'high'] }}", Switches(enabled=False), {"reasoning_effort": "none"}),
        ("{{ thinking_effort in ['low', 'max'] }}", Switches(effort="xhigh"), {"thinking_effort": "max"}),
        ("{{ thinking_budget }}", Switches(budget=512), {"thinking_budget": 512}),
        ("{{ thinking_budget }}", Switches(enabled=False), {"thinking_budget": 0}),
        ("{{ thinking_mode == 'disabled' }}", Switches(enabled=False), {"thinking_mode": "disabled"}),
        ("{% set thinking = 1 %}{{ thinking }}", Switches(enabled=True), {}),
        ("{{ messages }}", Switches(enabled=True, effort="low", budget=5), {}),
    ],
)
def test_a_switch_comes_under_each_name_that_a_template_reads(
    template: str, switches: Switches, expected: dict[str, Any]
) -> None:
    read = ChatTemplate({"default": template}, {})
    assert template_variables(switches, read.variables, read.names) == expected
