"""Grammars as the engine holds them: compiled beside the loop, kept, refused; and the masks of rows."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmx.chat.forms.schema import complaint
from lmx.chat.stack import on_a_large_stack
from lmx.engine import grammar as module
from lmx.engine.backend import Sequence
from lmx.engine.grammar import Constraint, Grammars, Masker
from lmx.engine.requests import Refused
from lmx.protocol import Sampling
from tests.models import train_tokenizer, write_tokenizer

VOCAB = train_tokenizer().get_vocab_size()
OUTPUTS = VOCAB + 77
"""A model's output is often padded."""
START, END, OTHER_END = 1, 2, 0
MOST_MS = 20.0
Compile = Callable[[str], Constraint]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder)
    return folder


class Compiler:
    """Waits for what ``Grammars`` promises to say."""

    def __init__(self, words: str, vocab_size: int = OUTPUTS, end_ids: tuple[int, ...] = (END,)) -> None:
        self._woken = threading.Semaphore(0)
        self.grammars = Grammars(words, vocab_size, end_ids, wake=self._woken.release)

    def __call__(self, grammar: str) -> Constraint:
        while True:
            found = self.grammars.compile(grammar)
            if found:
                return found
            assert self._woken.acquire(timeout=60)


@pytest.fixture(scope="module")
def compile_(words: Path) -> Compiler:
    return Compiler(str(words))


def row(constraint: Constraint | None = None, generated: int = 0, **fields: object) -> Sequence:
    fields = {"ignore_eos": False, **fields}
    return Sequence(1, [5] * (3 + generated), 3, 100, Sampling(0), constraint=constraint, **fields)  # type: ignore[arg-type]


def allowed(masks: "module.Masks | None", i: int = 0) -> set[int]:
    assert masks is not None
    return set(np.flatnonzero(np.unpackbits(masks[i].view(np.uint8), bitorder="little")).tolist())


def ids(text: str) -> list[int]:
    return list(train_tokenizer().encode(text).ids)


def advance(constraint: Constraint, text: str) -> None:
    for token in ids(text):
        assert constraint.advance(token), constraint.refusal


# --- compiling --------------------------------------------------------------------------------------------------------


def test_each_answer_has_a_matcher_of_its_own(compile_: Compile) -> None:
    first = compile_('start: "ab" | "cd"')
    advance(first, "ab")
    assert first.complete
    second = compile_('start: "ab" | "cd"')
    assert not second.complete
    assert allowed(Masker(OUTPUTS, (END,), MOST_MS).masks([row(second)])) >= {ids("a")[0], ids("c")[0]}


def test_tokens_can_be_taken_back(compile_: Compile) -> None:
    constraint, masker = compile_('start: "ab" /[0-9]{3}/'), Masker(OUTPUTS, (END,), MOST_MS)
    before = allowed(masker.masks([row(constraint)]))
    advance(constraint, "ab")
    advance(constraint, "1")
    constraint.rollback(len(ids("ab")) + 1)
    assert allowed(masker.masks([row(constraint)])) == before
    with pytest.raises(ValueError, match="cannot be taken back"):
        constraint.rollback(1)


def test_what_is_asked_for_twice_is_compiled_once_also_when_it_is_wrong(
    words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    real = module._compile

    def counting(tokenizer: object, grammar: str) -> "Constraint | Refused":
        compiled.append(grammar)
        return real(tokenizer, grammar)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_compile", counting)
    compile_ = Compiler(str(words))
    for _ in range(3):
        compile_('start: "a"')
        with pytest.raises(Refused) as refused:
            compile_("start: nobody")
        assert refused.value.code == "grammar_invalid"
    assert compiled == ['start: "a"', "start: nobody"]


def test_few_are_kept_and_those_asked_for_last(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 3)
    monkeypatch.setattr(module, "_KEPT_CHARACTERS", 100)
    compile_ = Compiler(str(words))
    texts = [f'start: "{letter}"' for letter in "abcd"]
    for text in (*texts[:3], texts[0], texts[3]):
        compile_(text)
    assert list(compile_.grammars._compiled) == [texts[2], texts[0], texts[3]]
    long = f'start: "{"x" * 150}"'
    compile_(long)
    assert list(compile_.grammars._compiled) == [long]
    compile_(texts[0])
    assert list(compile_.grammars._compiled) == [texts[0]]


@pytest.mark.parametrize(
    ("grammar", "code"),
    [
        ('start: "' + "x" * 2**20 + '"', "grammar_too_complex"),
        (
            "start: R0" + "".join(f'\nR{i}: "x" R{i + 1}' for i in range(20_000)) + '\nR20000: "a"',
            "grammar_too_complex",
        ),
        (
            "start: A\nA: " + " & ".join(f"/(.|\\n)*[{chr(97 + i)}](.|\\n){{{i + 5}}}/" for i in range(12)),
            "grammar_too_complex",
        ),
        ("start: /(?=a)b/", "grammar_invalid"),
        ('start: "\ud800"', "grammar_invalid"),
        ('start: %json {"type": ["object", 5]}', "grammar_invalid"),
        ("\0", "grammar_invalid"),
    ],
)
def test_refused(compile_: Compile, grammar: str, code: str) -> None:
    with pytest.raises(Refused) as refused:
        compile_(grammar)
    assert refused.value.code == code
    assert str(refused.value)


@pytest.mark.parametrize("name", ["r", "R"])
def test_rules_one_behind_the_other_overflow_no_stack(compile_: Compile, name: str) -> None:
    """8 MB are enough for about 3,000. (Lower case is a rule of the parser, upper case one of the lexer.)"""
    count = 4000
    chain = "\n".join(f'{name}{n}: "a" {name}{n + 1}' for n in range(count))
    constraint = compile_(f'start: {name}0\n{chain}\n{name}{count}: "b"')
    assert allowed(Masker(OUTPUTS, (END,), MOST_MS).masks([row(constraint)]))


def test_references_one_behind_the_other_overflow_no_stack() -> None:
    """In the server, which validates what an engine is given."""
    definitions = {f"d{n}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(2000)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**definitions, "d2000": {"type": "string"}}}
    assert complaint(f"start: %json {json.dumps(schema)}") == ""


def test_what_fails_on_a_large_stack_fails_here() -> None:
    def fail() -> None:
        raise KeyError("x")

    usual = threading.stack_size()
    with pytest.raises(KeyError):
        on_a_large_stack(fail)
    assert on_a_large_stack(lambda: 5) == 5
    assert threading.stack_size() == usual


@pytest.mark.parametrize("broken", ["missing", "no JSON", "no words"])
def test_without_a_tokenizer_each_grammar_is_refused(tmp_path: Path, broken: str) -> None:
    if broken == "no JSON":
        (tmp_path / "tokenizer.json").write_text("{")
    compile_ = Compiler("" if broken == "no words" else str(tmp_path))
    for _ in range(2):
        with pytest.raises(Refused, match="tokenizer") as refused:
            compile_('start: "a"')
        assert refused.value.code == "grammar_invalid"


def test_a_model_without_an_end_token_cannot_be_constrained(words: Path) -> None:
    with pytest.raises(Refused, match="no token that ends an answer"):
        Compiler(str(words), end_ids=(OUTPUTS + 5,))('start: "a"')


# --- masks ------------------------------------------------------------------------------------------------------------


def test_ids_that_are_no_tokens_are_never_allowed(compile_: Compile) -> None:
    found = allowed(Masker(OUTPUTS, (END,), MOST_MS).masks([row(compile_("start: /(.|\\n)*/"))]))
    assert END in found
    assert START not in found
    assert max(found) < VOCAB


def test_a_model_with_fewer_outputs_than_there_are_tokens(words: Path) -> None:
    for outputs in (1000, 1024):
        found = allowed(Masker(outputs, (END,), MOST_MS).masks([row(Compiler(str(words), outputs)("start: /[a-z]*/"))]))
        assert max(found) < outputs


def test_every_end_token_ends(words: Path) -> None:
    ends = (OTHER_END, END)
    constraint = Compiler(str(words), end_ids=ends)('start: "a"*')
    masks = Masker(OUTPUTS, ends, MOST_MS).masks([row(constraint)])
    assert allowed(masks) >= set(ends)
    assert START not in allowed(masks)


def test_only_masked_rows_are_masked(compile_: Compile) -> None:
    masker = Masker(OUTPUTS, (END,), MOST_MS)
    assert masker.masks([row(), None]) is None
    masks = masker.masks([row(), None, row(compile_('start: "a"'))])
    assert allowed(masks, 0) == allowed(masks, 1) >= set(range(OUTPUTS))
    assert allowed(masks, 2) == {ids("a")[0]}
    ended = row(compile_('start: "a"'))
    ended.ended = True
    assert masker.masks([ended]) is None


def test_min_tokens(compile_: Compile) -> None:
    masker, stop = Masker(OUTPUTS, (END,), MOST_MS), 300
    assert {END, stop} & allowed(masker.masks([row(generated=1, min_tokens=2, stop_ids=(stop,))])) == set()
    assert masker.masks([row(generated=2, min_tokens=2, stop_ids=(stop,))]) is None
    constraint = compile_('start: "a"*')
    assert END not in allowed(masker.masks([row(constraint, generated=0, min_tokens=2)]))
    assert END in allowed(masker.masks([row(constraint, generated=2, min_tokens=2)]))
    complete = compile_('start: "a"')
    advance(complete, "a")
    assert allowed(masker.masks([row(complete, generated=1, min_tokens=5)])) == {END}, "the grammar wins"


def test_stop_ids_may_come_where_the_answer_may_end(compile_: Compile) -> None:
    masker, constraint = Masker(OUTPUTS, (END,), MOST_MS), compile_('start: "a" "b"*')
    assert START not in allowed(masker.masks([row(constraint, stop_ids=(START,))]))
    advance(constraint, "a")
    assert allowed(masker.masks([row(constraint, stop_ids=(START,))])) >= {START, END, ids("b")[0]}


def test_ignored_ends_come_only_where_nothing_else_can(compile_: Compile) -> None:
    masker, constraint = Masker(OUTPUTS, (END,), MOST_MS), compile_('start: "a" "b"?')
    advance(constraint, "a")
    assert allowed(masker.masks([row(constraint)])) == {ids("b")[0], END}
    assert allowed(masker.masks([row(constraint, ignore_eos=True)])) == {ids("b")[0]}
    advance(constraint, "b")
    assert allowed(masker.masks([row(constraint, ignore_eos=True)])) == {END}


def test_a_step_that_is_too_much_is_told_of_its_row(compile_: Compile) -> None:
    """Found only while it steps: more ways to go on than llguidance follows."""
    constraint = compile_(
        "start: " + " | ".join(f'"w" r{i}' for i in range(10_500)) + "".join(f'\nr{i}: "{i}"' for i in range(10_500))
    )
    masks = Masker(OUTPUTS, (END,), MOST_MS).masks([row(constraint), row(compile_('start: "a"'))])
    assert allowed(masks, 1) == {ids("a")[0]}
    assert not constraint.advance(ids("w")[0])
    assert constraint.refusal.code == "grammar_too_complex"
    assert not constraint.complete


def test_masks_that_take_too_long_fail_their_row(compile_: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 400 kB that must be written as it is: a tenth of a second for each mask."""
    monkeypatch.setattr(module, "_FREE_S", 0.0)
    slow, fast = compile_(f'start: "{"ab" * 200_000}"'), compile_("start: /(ab)*/")
    for _ in range(3):
        masks = Masker(OUTPUTS, (END,), 1e-6 if slow.tokens else 1e6).masks([row(slow)])
        assert masks is not None
        Masker(OUTPUTS, (END,), 1e6).masks([row(fast)])
        went_on = slow.advance(ids("ab")[0])
        assert fast.advance(ids("ab")[0])
    assert not went_on
    assert slow.refusal.code == "grammar_too_complex"
    assert "took" in str(slow.refusal)


def test_what_one_answer_exhausted_the_next_one_has_anew(words: Path) -> None:
    """Answers of one grammar share the lexer, and what it may take."""
    compile_, draw = Compiler(str(words)), np.random.default_rng(0)

    def walk(constraint: Constraint) -> int:
        for count in range(100):
            masks = Masker(OUTPUTS, (END,), MOST_MS).masks([row(constraint)])
            if not constraint.advance(int(draw.choice(sorted(allowed(masks))))):
                return count
        return 100

    grammar = "start: /(.{1,1000}){1,1000}z/"
    first = compile_(grammar)
    assert 0 < walk(first) < 100
    assert first.refusal.code == "grammar_too_complex"
    assert walk(compile_(grammar)) == 0, "it is kept as it is"
    compile_.grammars.forget(grammar)
    assert walk(compile_(grammar)) > 0
