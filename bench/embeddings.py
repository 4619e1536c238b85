"""Texts a second through /v1/embeddings, against sentence-transformers on the same cores: all-MiniLM-L6-v2, float32.

Where sentence-transformers is not installed (`pip install --group sentence-transformers`: it brings torch), lmx's own
figures are shown alone. SENTENCE_TRANSFORMERS_PYTHON may name the Python of another environment that has it.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import httpx

from bench.models import folder
from bench.result import Result, Row, alternate, median_ratio
from lmx.bench.server import running_server
from tests.models import unpack_minilm

TARGET = 1.0
WORDS = {"short": (5, 15), "mixed": (5, 130), "long": (100, 140)}
"""Of each text, from and to; MiniLM takes 256 tokens."""
TEXTS = 256
THE_OTHER = """
import json, sys, time
import torch
torch.set_num_threads(int(sys.argv[2]))
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
for line in sys.stdin:
    texts = json.loads(line)
    started = time.perf_counter()
    model.encode(texts)
    print(time.perf_counter() - started, flush=True)
"""


def run(quick: bool) -> Result:
    rows: list[Row] = []
    note = ""
    with tempfile.TemporaryDirectory() as place:
        minilm = unpack_minilm(Path(place))
        environment = {"LMX_MODEL_EMBEDDING": str(minilm)}
        with (
            running_server(str(folder("llama-4x128")), environment) as server,
            httpx.Client(base_url=server.url, timeout=600) as client,
            _sentence_transformers(minilm) as other,
        ):
            note = "" if other else " (sentence-transformers is not installed: nothing to compare with)"
            for name, (least, most) in WORDS.items():
                texts = _texts(TEXTS // 4 if quick else TEXTS, least, most)
                measures = [partial(_through_http, client, texts)]
                if other is not None:
                    measures.append(partial(_by_the_other, other, texts))
                for measure in measures:
                    measure()
                ours, *theirs = alternate(3 if quick else 5, *measures)
                ratio = median_ratio(ours, theirs[0]) if theirs else None
                rows.append(
                    {
                        "texts": name,
                        "lmx texts/s": max(ours),
                        "sentence-transformers texts/s": max(theirs[0]) if theirs else None,
                        "ratio": ratio,
                        "target": TARGET,
                        "ok": None if ratio is None else ratio >= TARGET,
                    }
                )
    return Result(f"texts a second (best of each; ratio: median){note}", rows)


def _texts(count: int, least: int, most: int) -> list[str]:
    draw = random.Random(least * most)
    corpus = (Path(__file__).parents[1] / "tests" / "data" / "corpus.txt").read_text(encoding="utf-8")
    words = [word for word in corpus.split() if word.isascii() and word.isalpha()]
    return [" ".join(draw.choices(words, k=draw.randint(least, most))) for _ in range(count)]


def _through_http(client: httpx.Client, texts: list[str]) -> float:
    started = time.perf_counter()
    answer = client.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"})
    elapsed_s = time.perf_counter() - started
    assert len(answer.raise_for_status().json()["data"]) == len(texts)
    return len(texts) / elapsed_s


Other = tuple[IO[str], IO[str]]


@contextmanager
def _sentence_transformers(model: Path) -> Iterator[Other | None]:
    python = os.environ.get("SENTENCE_TRANSFORMERS_PYTHON", sys.executable)
    if python == sys.executable and importlib.util.find_spec("sentence_transformers") is None:
        yield None
        return
    command = [python, "-c", THE_OTHER, str(model), str(os.cpu_count() or 1)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdin, process.stdout
        finally:
            process.kill()


def _by_the_other(other: Other, texts: list[str]) -> float:
    to, back = other
    to.write(json.dumps(texts) + "\n")
    to.flush()
    return len(texts) / float(back.readline())
