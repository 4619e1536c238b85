"""What constraining costs: decode tok/s of 8 rows that all follow a JSON schema, against the same rows free, on both
engines; and seconds until the grammars of 200 tools are compiled, one by one and all in one, cold and warm.

    python -m bench constrained
"""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.models import CACHE, folder
from bench.result import Result, Row, alternate, median_ratio
from lmx.engine.grammar import Constraint, Grammars
from lmx.hub.inventory import EMBEDDED_ID, resolve
from lmx.protocol import Sampling
from tests.engine_client import EngineClient, engine

ROWS = 8
PROMPT_TOKENS = 64
TOOLS = 200
DECODE_TARGET, COLD_TARGET_S, WARM_TARGET_S = 0.9, 1.0, 0.1

# A list of records that never ends before the tokens do, each of the kinds of values that agents ask for.
RECORD = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 99_999},
        "name": {"type": "string", "minLength": 3, "maxLength": 40},
        "kind": {"enum": ["book", "film", "song", "article"]},
        "rating": {"type": "number", "minimum": 0, "maximum": 5},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "published": {"type": ["string", "null"], "format": "date"},
    },
    "required": ["id", "name", "kind", "rating", "tags", "published"],
    "additionalProperties": False,
}
RECORDS = {
    "type": "array",
    "items": RECORD,
    "minItems": 1000,
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
}


def run(quick: bool) -> Result:
    model = folder("smollm2")
    rows = [*_decoding(quick, model), *_compiling(model)]
    return Result("constrained output (decode: by unconstrained; compiling: seconds)", rows)


# --- decoding ---------------------------------------------------------------------------------------------------------


def _engines(model: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    small = folder("llama-4x128")
    yield "SmolLM2, MLX", {"folder": model, "words": str(model)}
    gguf = resolve(EMBEDDED_ID, CACHE, "llama").path
    yield "SmolLM2, llama.cpp", {"folder": gguf, "backend": "llama", "words": str(model)}
    yield "llama of 4 × 128, MLX", {"folder": small, "words": str(small)}


def _decoding(quick: bool, model: Path) -> Iterator[Row]:
    tokens, rounds = (24, 3) if quick else (64, 7)
    grammar = f"start: %json {json.dumps(RECORDS)}"
    for name, options in _engines(model):
        with engine(**options, max_rows=ROWS) as client:
            for draws, sampling in {"greedy": Sampling(0, temperature=0.0), "temperature 1": Sampling(0)}.items():
                measure = partial(_tokens_per_s, client, tokens, sampling)
                measure(grammar)
                held, free = alternate(rounds, partial(measure, grammar), partial(measure, ""))
                ratio = median_ratio(held, free)
                ok = ratio >= DECODE_TARGET
                yield _row(f"{name}, {draws}: tok/s", max(held), max(free), ratio, DECODE_TARGET, ok)


def _tokens_per_s(client: EngineClient, tokens: int, sampling: Sampling, grammar: str) -> float:
    """Between the first and the last step in which all rows decode."""
    vocabulary = client.ready.vocab_size if client.ready else 0
    prompts = [[random.randrange(5, vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(ROWS)]
    # The first rows decode while the last are in prefill, so that they need more tokens.
    seqs = [
        client.submit(prompt, tokens + ROWS + 2, replace(sampling, seed=seed), grammar=grammar)
        for seed, prompt in enumerate(prompts)
    ]
    times: list[float] = []
    client.steps.clear()
    while not all(client.answers[seq].freed for seq in seqs):
        seen = len(client.steps)
        client.wait(lambda seen=seen: len(client.steps) > seen or all(client.answers[seq].freed for seq in seqs))
        now = time.perf_counter()
        times += [now for step in client.steps[seen:] if len(step.rows) == ROWS]
    assert all(client.answers[seq].finish == "length" for seq in seqs), [client.answers[seq].failed for seq in seqs]
    return ROWS * (len(times) - 1) / (times[-1] - times[0])


# --- compiling --------------------------------------------------------------------------------------------------------


def _compiling(model: Path) -> Iterator[Row]:
    compiled = threading.Event()
    vocabulary = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab_size()
    grammars = Grammars(str(model), vocabulary, (2,), wake=compiled.set)
    _taken_s(grammars, compiled, 'start: "a"')  # the tokenizer is read
    tools = list(tool_schemas(TOOLS))
    one_by_one = [f"start: %json {json.dumps(tool['parameters'])}" for tool in tools]
    together = _any_call(tools)
    for name, texts in {f"{TOOLS} tools, each alone": one_by_one, f"{TOOLS} tools in one grammar": [together]}.items():
        cold = [_taken_s(grammars, compiled, text) for text in texts]
        warm_s = sum(_taken_s(grammars, compiled, text) for text in texts)
        yield _row(f"{name}: cold, the slowest", max(cold), None, None, COLD_TARGET_S, max(cold) < COLD_TARGET_S)
        yield _row(f"{name}: warm, all", warm_s, None, None, WARM_TARGET_S, warm_s < WARM_TARGET_S)
    grammars.close()


def _taken_s(grammars: Grammars, compiled: threading.Event, text: str) -> float:
    """From asking for a grammar to the first mask's matcher being there."""
    started = time.perf_counter()
    found: Constraint | None = None
    while found is None:
        compiled.clear()
        found = grammars.compile(text)
        if found is None:
            compiled.wait(60)
    return time.perf_counter() - started


def _any_call(tools: list[dict[str, Any]]) -> str:
    """Text, then calls of any of the tools as Hermes' models write them."""
    calls = [
        f'call{i}: "<tool_call>\\n{{\\"name\\": \\"{tool["name"]}\\", \\"arguments\\": " args{i} "}}\\n</tool_call>"\n'
        f"args{i}: %json {json.dumps(tool['parameters'])}"
        for i, tool in enumerate(tools)
    ]
    names = " | ".join(f"call{i}" for i in range(len(tools)))
    return f"start: text (call text)*\ntext: /[^<]*/\ncall: {names}\n" + "\n".join(calls)


ENTITIES = (
    "issue", "pull_request", "calendar_event", "contact", "invoice", "document", "customer", "order", "ticket",
    "deployment", "server", "database", "page", "message", "channel", "file", "repository", "payment", "shipment",
    "task",
)  # fmt: skip


def tool_schemas(count: int) -> Iterator[dict[str, Any]]:
    """Functions as agents' tool servers offer them: ten verbs over twenty kinds of things."""
    for number in range(count):
        thing = ENTITIES[number % len(ENTITIES)]
        make = _VERBS[number // len(ENTITIES) % len(_VERBS)]
        name, properties, required = make(thing)
        parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        yield {"name": name, "parameters": parameters}


_Made = tuple[str, dict[str, Any], list[str]]


def _text(what: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": what, **more}


def _get(thing: str) -> _Made:
    fields = {"type": "array", "items": {"type": "string"}, "description": "The fields to return; all by default."}
    return (
        f"get_{thing}",
        {f"{thing}_id": _text(f"The {thing}'s id.", format="uuid"), "fields": fields},
        [f"{thing}_id"],
    )


def _list(thing: str) -> _Made:
    properties = {
        "query": _text(f"Words that the {thing} must contain."),
        "status": {"type": "string", "enum": ["open", "closed", "archived", "all"], "default": "open"},
        "sort_by": {"type": "string", "enum": ["created_at", "updated_at", "name", "priority"]},
        "descending": {"type": "boolean", "default": False},
        "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
        "cursor": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "created_after": _text("Only those made after this.", format="date-time"),
    }
    return f"list_{thing}s", properties, []


def _create(thing: str) -> _Made:
    person = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "email": {"type": "string", "format": "email"}},
        "required": ["email"],
        "additionalProperties": False,
    }
    properties = {
        "title": _text(f"The {thing}'s title.", minLength=1, maxLength=200),
        "body": _text("Markdown."),
        "labels": {"type": "array", "items": {"type": "string", "maxLength": 50}, "maxItems": 10},
        "assignees": {"type": "array", "items": person, "minItems": 0, "maxItems": 5},
        "priority": {"type": "integer", "enum": [1, 2, 3, 4, 5]},
        "due": {"type": ["string", "null"], "format": "date"},
        "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
    }
    return f"create_{thing}", properties, ["title", "body"]


def _update(thing: str) -> _Made:
    value = {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}]}
    change = {
        "type": "object",
        "properties": {
            "op": {"enum": ["set", "unset", "append"]},
            "path": _text("As /a/b.", pattern="^(/[a-z_]+)+$"),
            "value": value,
        },
        "required": ["op", "path"],
        "additionalProperties": False,
    }
    properties = {
        f"{thing}_id": {"type": "integer", "minimum": 1},
        "changes": {"type": "array", "items": change, "minItems": 1},
        "dry_run": {"type": "boolean"},
    }
    return f"update_{thing}", properties, [f"{thing}_id", "changes"]


def _delete(thing: str) -> _Made:
    properties = {
        f"{thing}_ids": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        "force": {"type": "boolean"},
    }
    return f"delete_{thing}s", properties, [f"{thing}_ids"]


def _search(thing: str) -> _Made:
    clause = {
        "type": "object",
        "properties": {
            "field": _text("The column."),
            "operator": {"enum": ["=", "!=", "<", ">", "in", "like"]},
            "operand": {
                "anyOf": [{"type": "string"}, {"type": "number"}, {"type": "array", "items": {"type": "string"}}]
            },
        },
        "required": ["field", "operator", "operand"],
    }
    properties = {
        "where": {
            "anyOf": [
                clause,
                {"type": "object", "properties": {"all": {"type": "array", "items": clause}}, "required": ["all"]},
            ]
        },
        "offset": {"type": "integer", "minimum": 0},
        "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
    }
    return f"search_{thing}s", properties, ["where"]


def _comment(thing: str) -> _Made:
    properties = {
        f"{thing}_url": _text("Where it is.", format="uri"),
        "text": _text("What to say."),
        "reply_to": {"type": ["integer", "null"]},
    }
    return f"comment_on_{thing}", properties, [f"{thing}_url", "text"]


def _share(thing: str) -> _Made:
    properties = {
        f"{thing}_id": _text("Which one.", pattern="^[A-Z]{2,5}-[0-9]{1,6}$"),
        "with": {"type": "array", "items": {"type": "string", "format": "email"}, "minItems": 1, "maxItems": 20},
        "role": {"const": "viewer"},
        "expires_in_days": {"type": "integer", "exclusiveMinimum": 0, "maximum": 365},
    }
    return f"share_{thing}", properties, [f"{thing}_id", "with", "role"]


def _export(thing: str) -> _Made:
    csv = {
        "type": "object",
        "properties": {"type": {"const": "csv"}, "delimiter": {"enum": [",", ";", "\t"]}},
        "required": ["type"],
    }
    pdf = {
        "type": "object",
        "properties": {"type": {"const": "pdf"}, "landscape": {"type": "boolean"}},
        "required": ["type"],
    }
    properties = {
        "format": {"anyOf": [csv, pdf]},
        "path": _text("The file to write."),
        "columns": {"type": "array", "items": {"type": "string"}},
    }
    return f"export_{thing}s", properties, ["format", "path"]


def _schedule(thing: str) -> _Made:
    properties = {
        "at": _text("When.", format="date-time"),
        "every": {
            "type": "object",
            "properties": {
                "unit": {"enum": ["hour", "day", "week"]},
                "count": {"type": "integer", "minimum": 1, "maximum": 52},
            },
            "required": ["unit", "count"],
        },
        "channels": {"type": "array", "items": {"enum": ["email", "sms", "push"]}, "maxItems": 3},
        "message": _text("What is sent.", maxLength=1000),
    }
    return f"schedule_{thing}_reminder", properties, ["at", "message"]


_VERBS: tuple[Callable[[str], _Made], ...] = (
    _get, _list, _create, _update, _delete, _search, _comment, _share, _export, _schedule,
)  # fmt: skip


def _row(measure: str, constrained: float, free: float | None, ratio: float | None, target: float, ok: bool) -> Row:
    return {"measure": measure, "constrained": constrained, "free": free, "ratio": ratio, "target": target, "ok": ok}
