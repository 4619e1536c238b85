"""Sources of drafts: what they offer is what stood there before, and how they follow an answer."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.engine.backend import Sequence
from lmx.engine.drafts import Drafts
from lmx.engine.drafts.index import GROUP, Index, common
from lmx.engine.drafts.lookup import Lookup
from lmx.engine.drafts.prediction import Prediction
from lmx.protocol import Load, Sampling, Submit, pack_tokens
from tests.sim import Device, Simulation

MOST = 8
TEXTS = st.lists(st.integers(0, 3), max_size=120)


def sequence(prompt: list[int], answer: list[int] | None = None) -> Sequence:
    return Sequence(1, [*prompt, *(answer or [])], len(prompt), 100, Sampling(0), False)


@given(TEXTS, st.lists(st.integers(1, 7), min_size=1))
def test_an_index_that_grew_finds_what_a_whole_one_does(text: list[int], pieces: list[int]) -> None:
    whole, grown = Index(), Index()
    whole.extend(text, len(text))
    while grown.size < len(text):
        for piece in pieces:
            grown.extend(text, min(grown.size + piece, len(text)))
    for end in range(GROUP, len(text) + 1):
        tail = text[:end]
        right = [place for place in range(len(text), GROUP - 1, -1) if text[place - GROUP : place] == tail[-GROUP:]]
        assert list(whole.places(tail)) == list(grown.places(tail)) == right


@given(TEXTS)
@settings(max_examples=200)
def test_what_the_text_offers_followed_its_last_tokens_before(text: list[int]) -> None:
    grown = sequence(text[:1])
    source = Lookup(MOST)
    for token in text[1:]:
        grown.tokens.append(token)
        offered = source.offer(grown)
        if not offered:
            continue
        drafts = source.take(grown, offered)
        assert len(drafts) == offered == MOST
        tail = grown.tokens[-GROUP:]
        continued = [*grown.tokens, *drafts]
        assert any(
            grown.tokens[place - GROUP : place] == tail and continued[place : place + MOST] == drafts
            for place in range(GROUP, len(grown.tokens))
        )


def test_the_longest_of_the_latest_matches_is_followed() -> None:
    text = [9, 1, 2, 3, 4, 50, 8, 1, 2, 3, 60, 9, 1, 2, 3]
    source = Lookup(MOST)
    assert source.offer(sequence(text))
    assert source.take(sequence(text), 3) == [4, 50, 8]


def test_a_text_that_repeats_itself_is_thought_to_go_on_so() -> None:
    source = Lookup(MOST)
    text = sequence([5, 1, 2, 1, 2, 1, 2])
    assert source.offer(text) == MOST
    assert source.take(text, 5) == [1, 2, 1, 2, 1]


def test_a_match_that_was_wrong_must_be_longer_next_time() -> None:
    text = sequence([1, 2, 3, 4, 7, 1, 2, 3])
    source = Lookup(MOST)
    assert source.offer(text)
    source.told(4, 0)
    assert not source.offer(text)
    text.tokens += [4, 7, 1]
    assert source.offer(text), "six tokens are the same by now"
    source.told(4, 3)
    fresh = sequence([1, 2, 3, 4, 7, 1, 2, 3])
    assert Lookup(MOST).offer(fresh)


def test_a_long_prompt_is_taken_in_over_some_steps() -> None:
    text = sequence([*range(100_000), 10, 11, 12])
    source = Lookup(MOST)
    asked = 0
    while not source.offer(text):
        asked += 1
    assert 20 < asked < 40
    assert source.take(text, 3) == [13, 14, 15]


def test_a_prediction_goes_on_beside_the_answer_and_after_a_change() -> None:
    predicted = list(range(100, 130))
    answer = sequence([1, 2, 3])
    source = Prediction(predicted, MOST)
    assert source.offer(answer) == MOST
    assert source.take(answer, 3) == [100, 101, 102]
    answer.tokens += [100, 101, 7, 8]
    assert source.offer(answer) == 0
    answer.tokens += [105, 106]
    assert source.offer(answer) == 0, "two tokens are no match"
    answer.tokens.append(107)
    assert source.offer(answer) == MOST
    assert source.take(answer, 2) == [108, 109]
    answer.tokens += range(108, 128)
    assert source.offer(answer) == 2, "no more of it is left"


def test_of_places_that_are_alike_the_one_behind_where_the_answer_parted_is_taken() -> None:
    predicted = [1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8, 9]
    answer = sequence([0], [1, 2, 3, 4, 99, 1, 2, 3])
    source = Prediction(predicted, MOST)
    assert source.offer(answer)
    assert source.take(answer, 2) == [7, 8]


@given(TEXTS, TEXTS)
def test_a_prediction_follows_in_pieces_as_at_once(predicted: list[int], answer: list[int]) -> None:
    source, growing = Prediction(predicted, MOST), sequence([5])
    source.offer(growing)
    for token in answer:
        growing.tokens.append(token)
        offered = source.offer(growing)
        drafts = source.take(growing, offered) if offered else []
        assert len(drafts) == offered
        if drafts and growing.generated_tokens > len(predicted):
            assert any(common(predicted, place, growing.tokens, 3) >= GROUP for place in range(len(predicted) + 1))


class _Model:
    """Stands where the draft model does: says which rows it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def draft(self, sequences: list[Sequence], depths: list[int]) -> list[list[int]]:
        self.asked += [(one.seq, depth) for one, depth in zip(sequences, depths, strict=True)]
        return [[77] * depth for depth in depths]


def drafts_of(*, load: str = "auto", draft_model: str = "", max_depth: int = MOST) -> tuple[Drafts, _Model]:
    facts = Simulation(Device(), max_rows=2).backend.facts
    facts = replace(facts, max_depth=max_depth, draft_model=draft_model)
    model = _Model()
    return Drafts(Load("", speculation=load), facts, model), model  # type: ignore[arg-type]


REPEATS = [1, 2, 3, 4, 1, 2, 3]


@pytest.mark.parametrize(
    ("load", "asked", "prediction", "model", "expected"),
    [
        ("auto", "auto", [4, 9], "draft", "prediction"),
        ("auto", "auto", [], "draft", "lookup"),
        ("auto", "lookup", [], "", "lookup"),
        ("off", "auto", [4, 9], "draft", ""),
        ("auto", "off", [4, 9], "draft", ""),
    ],
)
def test_who_is_asked(load: str, asked: str, prediction: list[int], model: str, expected: str) -> None:
    drafts, _ = drafts_of(load=load, draft_model=model)
    row = sequence(REPEATS)
    drafts.enter(row, Submit(1, b"", 9, Sampling(0), speculation=asked, prediction=pack_tokens(prediction)))
    tokens, kind = drafts.offer(row)
    assert (tokens > 0) is bool(expected)
    assert kind == 0
    if expected:
        assert drafts.source_of(row) == expected
        assert drafts.take([row], [1]) == [[4]]


def test_the_draft_model_is_asked_once_for_all_rows_that_have_nothing_else() -> None:
    drafts, model = drafts_of(draft_model="draft")
    rows = [replace(sequence(text), seq=seq) for seq, text in enumerate((REPEATS, [1, 2], [5, 6]))]
    for row in rows:
        drafts.enter(row, Submit(row.seq, b"", 9, Sampling(0)))
    assert [drafts.offer(row) for row in rows] == [(MOST, 0), (MOST, 1), (MOST, 1)]
    assert drafts.take(rows, [2, 3, 0]) == [[4, 1], [77] * 3, []]
    assert model.asked == [(1, 3)]
    assert drafts.source_of(rows[1]) == "model"
    drafts.leave(rows[1])
    assert drafts.offer(rows[1]) == (0, 0)


def test_only_the_text_is_asked_where_the_request_says_so() -> None:
    drafts, _ = drafts_of(draft_model="draft")
    row = sequence([1, 2])
    drafts.enter(row, Submit(1, b"", 9, Sampling(0), speculation="lookup"))
    assert drafts.offer(row) == (0, 0)


def test_a_model_that_verifies_nothing_gets_no_offers() -> None:
    drafts, _ = drafts_of(max_depth=0, draft_model="draft")
    row = sequence(REPEATS)
    drafts.enter(row, Submit(1, b"", 9, Sampling(0)))
    assert drafts.offer(row) == (0, 0)
