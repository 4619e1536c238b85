"""What loaded models say to fixed prompts, token by token, beside what they said last time."""

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from typing import Any

from lmx import __version__
from lmx.cli.client import Client
from lmx.cli.doctor.finding import Finding, Patient
from lmx.cli.errors import CommandError
from lmx.hub.state import State

ANSWER_S = 300.0
"""For 24 tokens of a large model on a busy machine."""
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time there was a small",
)
"""Changed ones make all stored fingerprints worthless."""
TOKENS = 24
KEPT = 20
"""Fingerprints of a model."""


def check_coherence(patient: Patient) -> Iterator[Finding]:
    """What loaded models say to fixed prompts, token by token, beside what they said last time."""
    if not patient.serves or patient.state is None:
        return
    try:
        with Client(patient.address, patient.key, timeout_s=ANSWER_S) as client:
            models = client.get("/admin/models")["models"]
            ready = [one for one in models if one["state"] == "ready" and one["kind"] == "llm"]
            if not ready:
                text = "no text model is loaded, so nobody is asked"
                yield Finding("coherence", "ok", text, "`lmx load MODEL`, and again.")
            for model in ready:
                yield _coherence(client, patient.state, model)
    except CommandError as error:
        yield Finding("coherence", "warn", f"models cannot be asked: {error}", "--key KEY, or LMX_API_KEY.")


def _coherence(client: Client, state: State, model: Mapping[str, Any]) -> Finding:
    name = str(model["id"])
    try:
        answers = [_answer(client, name, prompt) for prompt in PROMPTS]
    except CommandError as error:
        return Finding("coherence", "fail", f"{name} does not answer: {error}", "`lmx log` and `lmx show` may say why.")
    # What makes other answers right: another model, or other arithmetic.
    about = {key: model.get(key) for key in ("format", "quantization", "size_bytes", "backend")}
    about["kv_bits"] = ((model.get("settings") or {}).get("kv_bits") or {}).get("value")
    result = {"prompts": list(PROMPTS), "answers": answers, "about": about, "version": __version__}
    try:
        before = _stored(state, name)
        _store(state, name, result)
    except sqlite3.Error as error:
        return Finding("coherence", "warn", f"{name}: what it said cannot be stored: {error}", "See the disk above.")
    return _compare(name, result, before)


def _answer(client: Client, model: str, prompt: str) -> list[str]:
    """The likeliest tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "seed": 0}
    choice = client.post("/v1/completions", body)["choices"][0]
    return [str(token) for token in choice["logprobs"]["tokens"]]


def _stored(state: State, model: str) -> tuple[float, dict[str, Any]] | None:
    """The last one of the same prompts, and when it was taken."""
    with state.connection() as db:
        rows = db.execute("SELECT at, result FROM fingerprints WHERE model = ? ORDER BY at DESC", (model,)).fetchall()
    for at, text in rows:
        found = json.loads(text)
        if isinstance(found, dict) and found.get("prompts") == list(PROMPTS):
            return at, found
    return None


def _store(state: State, model: str, result: Mapping[str, Any]) -> None:
    with state.connection() as db:
        db.execute("INSERT INTO fingerprints VALUES (?, ?, ?)", (model, time.time(), json.dumps(result)))
        db.execute(
            "DELETE FROM fingerprints WHERE model = ? AND rowid NOT IN "
            "(SELECT rowid FROM fingerprints WHERE model = ? ORDER BY at DESC LIMIT ?)",
            (model, model, KEPT),
        )


def _compare(name: str, now: Mapping[str, Any], before: tuple[float, dict[str, Any]] | None) -> Finding:
    if any(len(set(answer)) == 1 < len(answer) for answer in now["answers"]):
        way = (
            "Its files may be damaged, or of a kind that its engine gets wrong: `lmx pull` it anew, or another backend."
        )
        return Finding("coherence", "fail", f"{name} says one token for ever", way)
    if before is None:
        return Finding("coherence", "ok", f"{name}: asked for the first time, and stored")
    at, old = before
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
    if now["answers"] == old["answers"]:
        return Finding("coherence", "ok", f"{name}: the same tokens as on {since}")
    parts = [
        f"prompt {number} from token {_first_difference(one, other)} on"
        for number, (one, other) in enumerate(zip(now["answers"], old["answers"], strict=True), 1)
        if one != other
    ]
    text = f"{name}: other tokens than on {since}: {', '.join(parts)}"
    changed = [key for key in now["about"] if now["about"][key] != old["about"].get(key)]
    if changed:
        return Finding("coherence", "ok", f"{text}; its {' and '.join(changed)} changed, and this is stored")
    way = "Late differences may be near ties. Early ones are not: compare its files' checksums, and the log's probes."
    if now["version"] != old["version"]:
        way = f"lmx was {old['version']} then. {way}"
    return Finding("coherence", "warn", text, way)


def _first_difference(one: list[str], other: list[str]) -> int:
    """Counted from 1."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False), 1) if a != b), min(len(one), len(other)) + 1
    )
