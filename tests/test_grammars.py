"""Grammars as the engine holds them: compiled beside the loop, kept, refused; and the masks of rows."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lmx.chat.schema import complaint
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
def compile_(words: Path) -> Iterator[Compiler]:
    compiler = Compiler(str(words))
    yield compiler
    compiler.grammars.close()


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
    assert allowed(Masker(OUTPUTS, (END,)).masks([row(second)])) >= {ids("a")[0], ids("c")[0]}


def test_tokens_can_be_taken_back(compile_: Compile) -> None:
    constraint, masker = compile_('start: "ab" /[0-9]{3}/'), Masker(OUTPUTS, (END,))
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
    assert allowed(Masker(OUTPUTS, (END,)).masks([row(constraint)]))


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
    found = allowed(Masker(OUTPUTS, (END,)).masks([row(compile_("start: /(.|\\n)*/"))]))
    assert END in found
    assert START not in found
    assert max(found) < VOCAB


def test_a_model_with_fewer_outputs_than_there_are_tokens(words: Path) -> None:
    for outputs in (1000, 1024):
        found = allowed(Masker(outputs, (END,)).masks([row(Compiler(str(words), outputs)("start: /[a-z]*/"))]))
        assert max(found) < outputs


def test_every_end_token_ends(words: Path) -> None:
    ends = (OTHER_END, END)
    constraint = Compiler(str(words), end_ids=ends)('start: "a"*')
    masks = Masker(OUTPUTS, ends).masks([row(constraint)])
    assert allowed(masks) >= set(ends)
    assert START not in allowed(masks)


def test_only_masked_rows_are_masked(compile_: Compile) -> None:
    masker = Masker(OUTPUTS, (END,))
    assert masker.masks([row(), None]) is None
    masks = masker.masks([row(), None, row(compile_('start: "a"'))])
    assert allowed(masks, 0) == allowed(masks, 1) >= set(range(OUTPUTS))
    assert allowed(masks, 2) == {ids("a")[0]}
    ended = row(compile_('start: "a"'))
    ended.ended = True
    assert masker.masks([ended]) is None


@pytest.mark.parametrize("slow", [False, True])
def test_masks_are_the_same_one_by_one_and_in_parallel(compile_: Compile, slow: bool) -> None:
    masker = Masker(OUTPUTS, (END,))
    masker._slow = slow
    grammars = ['start: "a"', "start: /[0-9]+/", 'start: "b" | "c"', "start: /(.|\\n)*/"]
    masks = masker.masks([row(compile_(grammar)) for grammar in grammars])
    for i, grammar in enumerate(grammars):
        assert allowed(masks, i) == allowed(Masker(OUTPUTS, (END,)).masks([row(compile_(grammar))]))


def test_min_tokens(compile_: Compile) -> None:
    masker, stop = Masker(OUTPUTS, (END,)), 300
    assert {END, stop} & allowed(masker.masks([row(generated=1, min_tokens=2, stop_ids=(stop,))])) == set()
    assert masker.masks([row(generated=2, min_tokens=2, stop_ids=(stop,))]) is None
    constraint = compile_('start: "a"*')
    assert END not in allowed(masker.masks([row(constraint, generated=0, min_tokens=2)]))
    assert END in allowed(masker.masks([row(constraint, generated=2, min_tokens=2)]))
    complete = compile_('start: "a"')
    advance(complete, "a")
    assert allowed(masker.masks([row(complete, generated=1, min_tokens=5)])) == {END}, "the grammar wins"


def test_stop_ids_may_come_where_the_answer_may_end(compile_: Compile) -> None:
    masker, constraint = Masker(OUTPUTS, (END,)), compile_('start: "a" "b"*')
    assert START not in allowed(masker.masks([row(constraint, stop_ids=(START,))]))
    advance(constraint, "a")
    assert allowed(masker.masks([row(constraint, stop_ids=(START,))])) >= {START, END, ids("b")[0]}


def test_ignored_ends_come_only_where_nothing_else_can(compile_: Compile) -> None:
    masker, constraint = Masker(OUTPUTS, (END,)), compile_('start: "a" "b"?')
    advance(constraint, "a")
    assert allowed(masker.masks([row(constraint)])) == {ids("b")[0], END}
    assert allowed(masker.masks([row(constraint, ignore_eos=True)])) == {ids("b")[0]}
    advance(constraint, "b")
    assert allowed(masker.masks([row(constraint, ignore_eos=True)])) == {END}


def test_a_step_that_is_too_much_is_told_of_its_row(compile_: Compile) -> None:
    """Found only while it steps: more ways to go on than llguidance follows."""
    constraint = compile_(
        "start: " + " | ".join(f'"w" r{i}' for i in range(6500)) + "".join(f'\nr{i}: "{i}"' for i in range(6500))
    )
    masks = Masker(OUTPUTS, (END,)).masks([row(constraint), row(compile_('start: "a"'))])
    assert allowed(masks, 1) == {ids("a")[0]}
    assert not constraint.advance(ids("w")[0])
    assert constraint.refusal.code == "grammar_too_complex"
    assert not constraint.complete


def test_one_whose_masks_take_too_long_is_refused(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody's next token waits for them. At first they may be quick."""
    compile_ = Compiler(str(words))
    constraint, beside = compile_("start: /[a-z]+/"), compile_("start: /[a-z ]+/")
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(module, "_MOST_SLOW_S", 0.0)
    Masker(OUTPUTS, (END,)).masks([row(constraint)])
    assert not constraint.advance(ids("a")[0])
    assert constraint.refusal.code == "grammar_too_complex"
    assert "takes too long" in str(constraint.refusal)
    assert beside.advance(ids("a")[0])
    with pytest.raises(Refused, match="takes too long"):
        compile_("start: /[0-9]+/")
    compile_.grammars.close()
