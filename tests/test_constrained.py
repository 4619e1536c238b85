"""Constrained output in the engine process: every answer matches its grammar, whatever runs beside it."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from lmx.chat.pieces import read_pieces
from lmx.protocol import Sampling
from tests.backends import needs_llama
from tests.engine_client import GREEDY, EngineClient, engine
from tests.models import build_gguf

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
JSON = f"start: %json {json.dumps(SCHEMA)}"
CHOICE = 'start: "yes" | "no" | "maybe"'
ANYTHING = "start: /(.|\\n)*/"
LARGE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(20_000)}}
PROMPT = list(range(10, 40))


@pytest.fixture(scope="module", params=["mlx overlapped", "mlx plain", pytest.param("llama plain", marks=needs_llama)])
def client(request, tmp_path_factory):
    path = build_gguf(tmp_path_factory.mktemp("constrained") / "model.gguf")
    backend, loop = request.param.split()
    words = path.with_suffix(".mlx")
    options = {"lookahead": "on" if loop == "overlapped" else "off", "max_rows": 6, "context_length": 2048}
    with engine(path if backend == "llama" else words, backend=backend, words=str(words), **options) as client:
        client.pieces = read_pieces(Tokenizer.from_file(str(words / "tokenizer.json"))).all
        yield client
        stats = client.idle_stats()
        assert (stats.queued, stats.decoding, stats.kv_used_bytes) == (0, 0, 0)


def text_of(client: EngineClient, seq: int) -> str:
    answer = client.answers[seq]
    assert answer.failed is None, answer.failed
    tokens = answer.tokens[:-1] if answer.finish == "stop" else answer.tokens
    return b"".join(client.pieces[token] for token in tokens).decode(errors="replace")


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_every_answer_matches_its_own_grammar(client: EngineClient, temperature: float) -> None:
    """Random weights: without the masks no answer would. Rows of several grammars, and free ones, share each step."""
    sampling = [Sampling(seed=seed, temperature=temperature, top_k=40 * (seed % 2)) for seed in range(9)]
    grammars = [JSON, CHOICE, "", JSON, CHOICE, "", JSON, ANYTHING, JSON]
    seqs = [
        client.submit(PROMPT, 400 if grammar == JSON else 12, each, grammar=grammar)
        for grammar, each in zip(grammars, sampling, strict=True)
    ]
    client.wait_freed(*seqs)
    for seq, grammar in zip(seqs, grammars, strict=True):
        text, finish = text_of(client, seq), client.answers[seq].finish
        if grammar == JSON:
            assert finish in ("stop", "complete")
            Draft202012Validator(SCHEMA).validate(json.loads(text))
        elif grammar == CHOICE:
            assert (text in ("yes", "no", "maybe"), finish) == (True, "complete")
        else:
            assert finish == "length" or grammar == ANYTHING


def test_a_grammar_that_allows_what_comes_changes_nothing(client: EngineClient) -> None:
    end = client.ready.eos_ids[0]
    free, held = (
        client.submit(PROMPT, 20, Sampling(seed=5, logit_bias={end: -1000.0}), grammar=grammar)
        for grammar in ("", "start: A\nA: /[^\\x00-\\x{10ffff}]|(.|\\n)*/")
    )
    client.wait_freed(free, held)
    assert client.answers[held].failed is None
    same = [a == b for a, b in zip(client.answers[free].tokens, client.answers[held].tokens, strict=False)]
    assert all(same) or text_of(client, free).find("\ufffd") >= 0  # what is not UTF-8 no grammar takes


@pytest.mark.parametrize(
    ("grammar", "code"),
    [
        ("start: nonsense", "grammar_invalid"),
        ("start: /(/", "grammar_invalid"),
        ("start: start", "grammar_invalid"),
        ('start: %json {"type": "strange"}', "grammar_invalid"),
        (f"start: %json {json.dumps(LARGE)}", "grammar_too_complex"),
        ('start: "' + "ab" * 600_000 + '"', "grammar_too_complex"),
    ],
)
def test_one_that_cannot_be_compiled_fails_alone(client: EngineClient, grammar: str, code: str) -> None:
    beside = client.submit(PROMPT, 30, GREEDY)
    seq = client.submit(PROMPT, 4, GREEDY, grammar=grammar)
    client.wait_freed(beside, seq)
    assert client.answers[beside].finish == "length"
    failed = client.answers[seq].failed
    assert failed.code == code
    assert len(failed.message) < 1000


def test_thousands_of_alternatives(client: EngineClient) -> None:
    seq = client.submit(PROMPT, 30, GREEDY, grammar="start: " + " | ".join(f'"w{n} x"' for n in range(4900)))
    client.wait_freed(seq)
    assert text_of(client, seq).endswith(" x")


def test_cancelled_while_it_compiles_or_runs(client: EngineClient) -> None:
    slow = json.dumps({"type": "object", "properties": {f"field{i}": SCHEMA for i in range(500)}})
    compiling = client.submit(PROMPT, 400, GREEDY, grammar=f"start: %json {slow}")
    running = client.submit(PROMPT, 400, GREEDY, grammar=f'start: "[" item+ "]"\nitem: %json {json.dumps(SCHEMA)}')
    client.cancel(compiling)
    client.wait(lambda: len(client.answers[running].tokens) > 3)
    client.cancel(running)
    client.wait_freed(compiling, running)
    assert client.answers[compiling].tokens == []


def test_no_end_before_min_tokens_and_stop_ids_end(client: EngineClient) -> None:
    end, other = client.ready.eos_ids[0], 200
    wants_end = Sampling(seed=1, temperature=0.0, logit_bias={end: 1000.0, other: 900.0})
    seq = client.submit(PROMPT, 30, wants_end, ignore_eos=False, min_tokens=5)
    client.wait_freed(seq)
    assert client.answers[seq].tokens == [other] * 5 + [end]
    seq = client.submit(PROMPT, 30, wants_end, ignore_eos=False, min_tokens=3, stop_ids=(other,))
    client.wait_freed(seq)
    assert len(client.answers[seq].tokens) == 4
    assert client.answers[seq].tokens[-1] == end
    seq = client.submit(PROMPT, 30, Sampling(seed=1, temperature=0.0, logit_bias={other: 900.0}), stop_ids=(other,))
    client.wait_freed(seq)
    assert (client.answers[seq].tokens, client.answers[seq].finish) == ([other], "stop")
    failed = client.submit(PROMPT, 30, GREEDY, stop_ids=(10**6,))
    client.wait_freed(failed)
    assert client.answers[failed].failed.code == "invalid_request"


def test_a_bias_lifts_nothing_over_the_mask(client: EngineClient) -> None:
    sampling = Sampling(seed=1, temperature=0.0, logit_bias={300: 1e4}, logprobs=2)
    seq = client.submit(PROMPT, 30, sampling, grammar=CHOICE)
    client.wait_freed(seq)
    assert text_of(client, seq) in ("yes", "no", "maybe")
    assert len(client.answers[seq].logprobs) == len(client.answers[seq].tokens)


def test_a_model_without_a_tokenizer_serves_what_is_free(tmp_path: Path) -> None:
    path = build_gguf(tmp_path / "model.gguf").with_suffix(".mlx")
    with engine(path, context_length=256) as client:  # no words
        free, held = client.submit(PROMPT, 3, GREEDY), client.submit(PROMPT, 3, GREEDY, grammar=CHOICE)
        client.wait_freed(free, held)
        assert client.answers[free].finish == "length"
        assert client.answers[held].failed.code == "grammar_invalid"
