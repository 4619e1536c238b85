"""Reasoning: which format a model has, how an answer is read at every split, and what its grammar enforces."""

import json
import random
from collections.abc import Sequence
from itertools import product

import llguidance
import pytest

from lmx.chat.answer import AnswerParser
from lmx.chat.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from lmx.chat.forms.grammar import Choice, answer_grammar, literal
from lmx.chat.reasoning import FORMATS, ReasoningFormat, find, rules
from lmx.chat.tools.base import Tool
from lmx.chat.tools.hermes import HERMES
from tests.chat_templates import ALL
from tests.models import SPECIAL_TOKENS, train_tokenizer

BY_NAME = {form.name: form for form in FORMATS}
THINK, GEMMA, GRANITE, APRIEL = (BY_NAME[name] for name in ("think", "gemma4", "granite", "apriel"))
KIMI, COMMAND_R = BY_NAME["kimi_k3"], BY_NAME["command_r"]
TOOL = Tool("f", {"type": "object"})
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</think>"}}\n</tool_call>'


def put_together(events: Sequence[Event]) -> list[Event]:
    """Neighbouring pieces of one kind as one."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            result[-1] = CallArguments(last.index, last.json + event.json)
        else:
            result.append(event)
    return result


def read(form: ReasoningFormat | None, pieces: Sequence[str], *, opened: bool, calls: bool) -> list[Event]:
    parser = AnswerParser(form, opened=opened, calls=HERMES.parser([TOOL]) if calls else None)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    assert not any(event in (Content(""), Reasoning("")) for event in events)
    return put_together(events)


CASES: list[tuple[ReasoningFormat | None, bool, str, list[Event]]] = [
    (None, False, "<think>a</think>b", [Content("<think>a</think>b")]),
    (THINK, False, "<think>\na\n</think>\n\nb\n", [Reasoning("a"), Content("b\n")]),
    (THINK, False, "\n<think>a</think> b", [Reasoning("a"), Content(" b")]),
    (THINK, False, "<thin>a", [Content("<thin>a")]),
    (THINK, False, " \n<thin", [Content(" \n<thin")]),
    (THINK, False, "\n\nhello <think>a</think>", [Content("\n\nhello <think>a</think>")]),
    (THINK, False, "<think></think>b", [Content("b")]),
    (THINK, False, "<think>\n\n</think>\n\nb", [Content("b")]),
    (
        THINK,
        True,
        "a\n\nb </thin </think\n></think>\r\n\nc</think>",
        [Reasoning("a\n\nb </thin </think\n>"), Content("c</think>")],
    ),
    (THINK, True, "\n\na <think> b</think>c", [Reasoning("a <think> b"), Content("c")]),
    (THINK, True, "cut off\n\n", [Reasoning("cut off\n\n")]),
    (THINK, True, "cut off\n</thi", [Reasoning("cut off\n</thi")]),
    (THINK, True, "</think>", []),
    (THINK, True, "a</think>\n\n", [Reasoning("a")]),
    (THINK, True, "", []),
    (GEMMA, False, "<|channel>thought\na<channel|>b", [Reasoning("a"), Content("b")]),
    (GEMMA, False, "<|channel>thou", [Content("<|channel>thou")]),
    (GRANITE, False, "<think>a</think>\n<response>b</response>", [Reasoning("a"), Content("b")]),
    (GRANITE, False, "<think>a</think><response>\n\nb\n</response>\n", [Reasoning("a"), Content("b\n")]),
    (
        GRANITE,
        False,
        "<think>a</think> x <response>b</response>",
        [Reasoning("a"), Content(" x <response>b</response>")],
    ),
    (GRANITE, False, "<response>b</respons", [Content("b</respons")]),
    (GRANITE, False, "b</response>", [Content("b</response>")]),
    (APRIEL, True, "\na\n[BEGIN FINAL RESPONSE]\nb\n[END FINAL RESPONSE]", [Reasoning("a"), Content("b")]),
    (
        KIMI,
        True,
        "a<|close|>think<|sep|><|open|>response<|sep|>b<|close|>response<|sep|>",
        [Reasoning("a"), Content("b")],
    ),
    (COMMAND_R, False, "<|START_RESPONSE|>b<|END_RESPONSE|>", [Content("b")]),
    (
        THINK,
        True,
        f"I could {CALL}\n</think>\n\nsee {CALL}",
        [
            Reasoning('I could <tool_call>\n{"name": "f", "arguments": {"a": "'),
            Content('"}}\n</tool_call>\n</think>\n\nsee '),
            CallStart(0, "f"),
            CallArguments(0, '{"a": "</think>"}'),
            CallEnd(0),
        ],
    ),
]


@pytest.mark.parametrize(("form", "opened", "text", "expected"), CASES)
def test_every_split_reads_the_same(
    form: ReasoningFormat | None, opened: bool, text: str, expected: list[Event]
) -> None:
    calls = CALL in text
    whole = read(form, [text], opened=opened, calls=calls)
    if calls:  # what stands between text and calls is the call format's matter
        strip = [Content(event.text.rstrip()) if isinstance(event, Content) else event for event in whole]
        assert strip == [Content(event.text.rstrip()) if isinstance(event, Content) else event for event in expected]
    else:
        assert whole == expected
    assert read(form, list(text), opened=opened, calls=calls) == whole
    for first in range(len(text)):
        assert read(form, [text[:first], text[first:]], opened=opened, calls=calls) == whole
    draw = random.Random(len(text))
    for _ in range(30):
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(4))
        pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(form, pieces, opened=opened, calls=calls) == whole


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("opened", [False, True])
def test_every_format_gives_thoughts_and_then_the_answer(form: ReasoningFormat, opened: bool) -> None:
    begin = "" if opened else form.begin
    text = f"{begin}\nhm, {form.end[:-1]}\n{form.end}\n{form.wrap[0]}the answer{form.wrap[1]}"
    assert read(form, list(text), opened=opened, calls=False) == [
        Reasoning(f"hm, {form.end[:-1]}"),
        Content("the answer"),
    ]


def test_calls_in_reasoning_are_no_calls_and_those_behind_it_are() -> None:
    inside = CALL.replace("</think>", "x")
    events = read(THINK, list(f"<think>perhaps {inside}</think>\n{inside}"), opened=False, calls=True)
    assert events[0] == Reasoning(f"perhaps {inside}")
    assert [event for event in events[1:] if not isinstance(event, Content)] == [
        CallStart(0, "f"),
        CallArguments(0, '{"a": "x"}'),
        CallEnd(0),
    ]


def test_thoughts_are_given_as_they_come() -> None:
    parser = AnswerParser(THINK, opened=True)
    assert parser.thinking
    assert parser.feed("one ") == [Reasoning("one ")]
    assert parser.feed("two<") == [Reasoning("two")]
    assert parser.feed("3\n") == [Reasoning("<3")]
    assert parser.thinking
    assert parser.feed("</think>a") == [Content("a")]
    assert not parser.thinking


# --- which format -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "special", "name"),
    [
        (ALL["qwen3"], {}, "think"),
        (ALL["deepseek"], {}, "think"),
        (ALL["granite"], {}, "granite"),
        (ALL["command_r"], {}, "command_r"),
        (ALL["minimax"], {}, "think"),
        (ALL["mistral"], {"[THINK]": 34, "[/THINK]": 35}, "mistral"),
        ("<|turn>{{ m }}<|channel>thought\\n<channel|>", {}, "gemma4"),
        ("{% set begin = '<seed:think>' %}", {}, "seed"),
        ("{{ open_tag('think' if thinking else 'response') }}", {}, "kimi_k3"),
        ("Here is my thought process: and Here is my response:", {}, "granite_phrases"),
        ("Here are my reasoning steps:\\n [BEGIN FINAL RESPONSE]", {}, "apriel"),
        (ALL["chatml"], {}, None),
        (ALL["gpt_oss"], {}, None),
        ("", {}, None),
    ],
)
def test_a_template_or_vocabulary_tells_the_format(template: str, special: dict[str, int], name: str | None) -> None:
    form, reason = find(template, special)
    assert (form.name if form else None) == name
    assert reason


def test_the_format_can_be_set() -> None:
    assert find(ALL["qwen3"], {}, "none")[0] is None
    assert find("", {}, "reka") == (BY_NAME["reka"], "it is set by reasoning_format")
    with pytest.raises(ValueError, match=r"'x' is unknown; known are gemma4.*and none"):
        find("", {}, "x")


def test_a_prompt_may_have_opened_or_closed_it() -> None:
    assert THINK.opened("<|im_start|>assistant\n<think>\n")
    assert not THINK.opened("what is <think>?<|im_end|>\n<|im_start|>assistant\n")
    assert not THINK.opened("<think>\n\n</think>\n\n")
    assert THINK.closed("<think>\n\n</think>\n\n")
    assert THINK.closed("<Assistant></think>")
    assert not THINK.closed("<think>\n")
    assert BY_NAME["seed"].opened("<seed:bos>assistant\n<seed:think><seed:cot_budget_reflect>")
    assert THINK.opened("<think>\nso far", "so far")
    assert THINK.opened("assistant\n<think>so far", "<think>so far")
    assert not THINK.opened("<think>\nso far</think>and", "so far</think>and")
    assert not THINK.opened("assistant\nand", "and")


# --- the grammar --------------------------------------------------------------------------------------


class Words:
    """The tokenizer of our small models, for llguidance."""

    def __init__(self) -> None:
        from lmx.chat.pieces import read_pieces

        self.tokenizer = train_tokenizer()
        self.tokens = list(read_pieces(self.tokenizer).all)
        self.special = {token: self.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        self.special_token_ids = list(self.special.values())
        self.eos_token_id = 2
        self.bos_token_id = None

    def __call__(self, text: bytes | str) -> list[int]:
        spelled = text.decode() if isinstance(text, bytes) else text
        ids: list[int] = self.tokenizer.encode(spelled, add_special_tokens=False).ids
        return ids


WORDS = Words()
TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(WORDS))
MARKED = ReasoningFormat("marked", "<|im_start|>", "<|endoftext|>")
"""Its markers are special tokens of our small vocabulary."""
EXTRA = '{"a": 1}'


def grammar(form: ReasoningFormat, answer: str, *, opened: bool, budget: int | None, forbid: bool = False) -> str:
    before = rules(form, WORDS.special, opened, budget, forbid=forbid)
    text = "/(?s:.*)/" + (" & ~REASONING_BEGUN" if "REASONING_BEGUN" in before else "")
    return f"start: reasoning {answer}\nobject: /\\s*/ %json {{}}\nTEXT: {text}\n{before}"


def taken(lark: str, text: str) -> tuple[int, bool]:
    """How many of the text's tokens the grammar takes, and whether it may end there."""
    assert llguidance.LLMatcher.validate_grammar(lark) == ""
    matcher = llguidance.LLMatcher(TOKENIZER, lark)
    count = 0
    for token in TOKENIZER.tokenize_str(text, parse_special=True):
        if not allowed(matcher, token):
            return count, False
        assert matcher.consume_token(token), matcher.get_error()
        count += 1
    return count, matcher.is_accepting()


def allowed(matcher: llguidance.LLMatcher, token: int) -> bool:
    return bool(matcher.compute_logit_bias()[token])


def tokens(text: str) -> int:
    return len(TOKENIZER.tokenize_str(text, parse_special=True))


@pytest.mark.parametrize("form", [THINK, MARKED, BY_NAME["granite_phrases"]], ids=lambda form: form.name)
def test_thinking_ends_when_its_budget_is_spent(form: ReasoningFormat) -> None:
    """Random tokens that the grammar allows: the answer comes within the budget, and reads as one."""
    for opened, budget in product((True, False), (1, 3, 20)):
        lark = grammar(form, "object", opened=opened, budget=budget).replace("object: /\\s*/ %json {}", 'object: "yes"')
        longest = budget + tokens(form.begin) + 2 * len(form.end) + 4
        for seed in range(6):
            draw = random.Random(seed)
            matcher = llguidance.LLMatcher(TOKENIZER, lark)
            ids: list[int] = []
            while not matcher.is_stopped():
                bias = matcher.compute_logit_bias()
                ids.append(draw.choice([token for token, value in enumerate(bias) if value]))
                assert matcher.consume_token(ids[-1]), matcher.get_error()
                assert len(ids) <= longest
            text = b"".join(WORDS.tokens[token] for token in ids).decode(errors="replace")
            assert read(form, [text], opened=opened, calls=False)[-1] == Content("yes")


@pytest.mark.parametrize("form", [THINK, MARKED], ids=lambda form: form.name)
def test_a_budget_is_kept_to_the_token_or_one_beside_it(form: ReasoningFormat) -> None:
    words = " the" * 30
    for budget in (1, 5, 20):
        count, _ = taken(grammar(form, "object", opened=True, budget=budget), words)
        assert abs(count - budget) <= 1
    assert taken(grammar(form, "object", opened=True, budget=None), words)[0] == tokens(words)
    assert taken(grammar(form, "object", opened=True, budget=20), f" a{form.end}{EXTRA}")[1]


@pytest.mark.parametrize("form", [THINK, MARKED], ids=lambda form: form.name)
def test_no_thinking_means_the_end_marker_or_nothing(form: ReasoningFormat) -> None:
    for budget, forbid in ((0, False), (None, True), (9, True)):
        opened = grammar(form, "object", opened=True, budget=budget, forbid=forbid)
        assert taken(opened, f"{form.end}{EXTRA}")[1]
        assert taken(opened, "the")[0] == 0
        closed = grammar(form, "object", opened=False, budget=budget, forbid=forbid)
        assert taken(closed, EXTRA)[1]
        free = grammar(form, "TEXT", opened=False, budget=budget, forbid=forbid)
        for lark in (closed, free):
            assert taken(lark, f"{form.begin}the")[0] < tokens(form.begin)
        assert taken(free, "the answer")[1]


@pytest.mark.parametrize("form", [THINK, MARKED], ids=lambda form: form.name)
def test_a_model_may_skip_thinking_but_what_it_begins_it_ends(form: ReasoningFormat) -> None:
    thought = f"{form.begin}a < b </thin{form.end}"
    forced = grammar(form, "object", opened=False, budget=None)
    assert taken(forced, EXTRA)[1]
    assert taken(forced, f"{thought}\n\n{EXTRA}")[1]
    assert not taken(forced, f"{form.begin}{EXTRA}")[1]
    free = grammar(form, "TEXT", opened=False, budget=4)
    assert taken(free, "the answer is < and </think>")[1]
    assert taken(free, f"{form.begin} the{form.end} and an answer")[1]
    assert not taken(free, f"{form.begin} the")[1]
    assert taken(free, form.begin + " the" * 30)[0] <= tokens(form.begin) + 5


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_the_rules_of_every_format_are_a_grammar(form: ReasoningFormat) -> None:
    special = {token: 1400 + index for index, token in enumerate(form.markers)}
    for known, opened, budget in product(({}, special), (True, False), (None, 0, 7)):
        lark = "start: reasoning /x/\n" + rules(form, known, opened, budget)
        assert llguidance.LLMatcher.validate_grammar(lark) == "", lark
    assert json.loads(json.dumps(form.markers))
    assert literal(form.end, special).startswith("<[")


def test_a_call_that_is_thought_of_is_none_in_the_answers_grammar_either() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    choices: tuple[Choice, ...] = ("auto", "required")
    for opened, choice in product((True, False), choices):
        before = rules(THINK, {}, opened, None)
        lark = answer_grammar(
            special={}, reasoning_rules=before, format=HERMES, tools=[TOOL], choice=choice, parallel=True
        )
        thought = f"{'' if opened else '<think>'}Is <tool_call> the way?</think>\n\n"
        assert taken(lark, thought + call)[1]
        assert taken(lark, f"{thought}Hello.")[1] == (choice == "auto")
        assert not taken(lark, thought[:-10])[1]
        assert not taken(lark, f"{thought}<tool_call> the")[1]


def test_what_is_put_around_an_answer_is_let_through() -> None:
    special = {"<|START_THINKING|>": 1400, "<|END_THINKING|>": 1401, "<|START_RESPONSE|>": 1402}
    for opened, budget in product((True, False), (None, 0)):
        assert "(<[1402]>)?" in rules(COMMAND_R, special, opened, budget).splitlines()[0]
