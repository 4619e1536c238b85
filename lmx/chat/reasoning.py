"""How models write what they think before they answer: the table of formats, which one a model has, and its grammar.

Pure. A format is two markers at the beginning of an answer; formats in which thinking is one of several channels
(harmony) are read whole by ``lmx.chat.tools``. ``lmx.chat.answer`` reads answers by it, ``lmx.api.core.prepare`` puts
the rules before those of the answer. Called by ``lmx.chat.model``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lmx.chat.forms.grammar import literal


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    name: str
    """As in ``[model] reasoning_format``."""
    begin: str
    end: str
    wrap: tuple[str, str] = ("", "")
    """What a model may put around the answer that follows; no part of it."""
    hint: str = ""
    """What a chat template of these models has; as a rule one of the markers."""
    begun: tuple[str, ...] = ()
    """Further texts at a prompt's end that mean: it thinks."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Strings that mean something to the parser. Special tokens in them are shown to it as text."""
        return tuple(filter(None, (self.begin, self.end, *self.wrap)))

    def opened(self, prompt: str, prefill: str = "") -> bool:
        """Whether an answer to this prompt begins within the reasoning. ``prefill``: what of the prompt's end is the
        beginning of the answer, given by the client.
        """
        begin, end = prefill.rfind(self.begin), prefill.rfind(self.end)
        if begin != end:  # one of them is there
            return begin > end
        head = prompt[: len(prompt) - len(prefill)].rstrip()
        return head.endswith((self.begin, *self.begun))

    def closed(self, prompt: str) -> bool:
        """Whether the prompt says that there is nothing to think (``<think></think>``, or the end alone)."""
        return prompt.rstrip().endswith(self.end)


FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat("gemma4", "<|channel>thought", "<channel|>"),
    ReasoningFormat(
        "kimi_k3",
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        ("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
        hint="open_tag('think'",
    ),
    ReasoningFormat(
        "command_r",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("seed", "<seed:think>", "</seed:think>", begun=("<seed:think><seed:cot_budget_reflect>",)),
    ReasoningFormat(
        "apriel",
        "Here are my reasoning steps:",
        "[BEGIN FINAL RESPONSE]",
        ("", "[END FINAL RESPONSE]"),
        hint="[BEGIN FINAL RESPONSE]",
    ),
    ReasoningFormat("granite", "<think>", "</think>", ("<response>", "</response>"), hint="<response></response>"),
    ReasoningFormat("granite_phrases", "Here is my thought process:", "Here is my response:"),
    ReasoningFormat("hunyuan", "<think>", "</think>", ("<answer>", "</answer>"), hint="</answer>"),
    ReasoningFormat(
        "openthinker",
        "<|begin_of_thought|>",
        "<|end_of_thought|>",
        ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ),
    ReasoningFormat("apertus", "<|inner_prefix|>", "<|inner_suffix|>"),
    ReasoningFormat("minimax_m3", "<mm:think>", "</mm:think>"),
    ReasoningFormat("kimi_vl", "◁think▷", "◁/think▷"),
    ReasoningFormat("exaone_deep", "<thought>", "</thought>"),
    ReasoningFormat("reka", "<reasoning>", "</reasoning>"),
    ReasoningFormat("think", "<think>", "</think>"),
)
"""A format that another one's markers contain comes after it."""


def find(template: str, special: Mapping[str, int], override: str = "") -> tuple[ReasoningFormat | None, str]:
    """How a model with this chat template and these special tokens (text → id) thinks, and why we think so.

    ``override``: the name of one of ``FORMATS``, or "none". Raises ValueError for an unknown one.
    """
    if override == "none":
        return None, "it is set by reasoning_format"
    if override:
        for form in FORMATS:
            if form.name == override:
                return form, "it is set by reasoning_format"
        names = ", ".join(form.name for form in FORMATS)
        raise ValueError(f"reasoning_format {override!r} is unknown; known are {names} and none.")
    for form in FORMATS:
        if form.hint:
            if form.hint in template:
                return form, f"its chat template has {form.hint}"
            continue
        shown = next((marker for marker in (form.begin, form.end) if marker in template), None)
        if shown:
            return form, f"its chat template has {shown}"
    for form in FORMATS:
        if not form.hint and form.begin in special and form.end in special:
            return form, f"its vocabulary has {form.begin}"
    return None, "neither its chat template nor its special tokens are those of a known format"


def rules(
    form: ReasoningFormat, special: Mapping[str, int], opened: bool, budget: int | None, *, forbid: bool = False
) -> str:
    """Lark rules that define ``reasoning``, all their names beginning so: what comes before the answer.

    opened: the prompt has begun it, so it must end; otherwise it may be missing. budget: after so many tokens (one
    more or less) the end marker is the only thing allowed; 0, or forbid: no thinking at all. Where free text could be
    taken for reasoning, they also define ``REASONING_BEGUN``, to be taken away from it: what begins so is no answer.
    """
    end, begin = literal(form.end, special), literal(form.begin, special)
    opening = literal(form.wrap[0], special)
    opening = f" ({opening})?" if opening.startswith("<[") else ""  # other openings are text
    guard = ""
    if not opened and not begin.startswith("<["):
        guard = rf"REASONING_BEGUN: /[ \t\r\n]*{''.join(map(_regex, form.begin))}(?s:.*)/" + "\n"
    if forbid or budget == 0:
        return f"reasoning: {end if opened else ''}{opening}\n{guard}"
    limit = "" if budget is None else f"[max_tokens={budget}]"
    if end.startswith("<["):  # a special token is in no text
        body = f"reasoning_text{limit}: /(?s:.*)/\n"
    else:
        # One lexeme would swallow the marker's beginning, and a lazy one cannot be cut: so two kinds of lexemes, what
        # cannot begin the marker and what began it and is none. A grammar of its own has a limit over all of them.
        first = form.end[0]
        begun = ""
        for character in reversed(form.end[1:-1]):
            begun = f"({_regex(character)}{begun})?"
        limit = "" if budget is None else f"[max_tokens={max(budget - 1, 0)}]"
        body = (
            f"reasoning_text{limit}: %lark {{\nstart: (OTHER | BEGUN)*\nOTHER: /[^{_regex(first)}]+/\n"
            f"BEGUN: /{_regex(first)}{begun}/\n}}\n"
        )
    whole = f"reasoning_text {end}"
    if not opened:
        whole = f"({begin} {whole})?"
    return f"reasoning: {whole}{opening}\n{body}{guard}"


def _regex(character: str) -> str:
    """One character of a marker, for a regular expression between slashes, also within brackets."""
    return re.escape(character).replace("/", r"\/")
