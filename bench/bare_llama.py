"""The baselines on llama.cpp: ``llama_cpp.Llama``'s own loop, and a bare loop over ``llama_decode``, both greedy.

``BareLlama`` runs them in a process of its own (``python -m bench.bare_llama GGUF``): a job as a JSON line in, its
figures as a JSON line out.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

CELLS = 8192


class BareLlama:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def _job(self, **job: Any) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return float(json.loads(self._process.stdout.readline()))

    def decode_tokens_per_s(self, batch: int, prompt_tokens: int, tokens: int) -> float:
        """Of one ``llama_decode`` a step over ``batch`` sequences, and the largest logit of each."""
        return self._job(batch=batch, prompt_tokens=prompt_tokens, tokens=tokens)

    def stream_tokens_per_s(self, prompt: str, tokens: int) -> float:
        """Of ``Llama.generate``, from its first token to its last."""
        return self._job(stream=prompt, tokens=tokens)

    def load_s(self) -> float:
        """Of ``Llama(...)`` with ``CELLS`` tokens of context; the file is in the page cache."""
        return self._job(load=True)


@contextmanager
def bare_llama(path: Path) -> Iterator[BareLlama]:
    command = [sys.executable, "-m", "bench.bare_llama", str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield BareLlama(process)
        finally:
            process.kill()


def _serve(path: str) -> None:
    from lmx.engine.llama.backend import default_threads
    from lmx.engine.llama.native import Context, Model
    from tests.llama_oracle import llama

    threads = default_threads()
    model = Model(path, gpu_layers=-1, mmap=True)
    context = Context(
        model,
        cells=CELLS,
        slots=8,
        streams=True,
        batch_tokens=512,
        forward_tokens=512,
        kv_bits=16,
        threads=threads,
    )

    make_llama = partial(llama, path, n_ctx=CELLS, n_threads=threads, n_threads_batch=threads, n_gpu_layers=-1)
    high_level = make_llama()

    def decode(batch: int, prompt_tokens: int, tokens: int) -> float:
        slots = list(range(batch))
        for slot in slots:
            prompt = [(slot * 7919 + i * 104729) % model.vocab_size for i in range(prompt_tokens)]
            context.decode(prompt, range(prompt_tokens), [slot] * prompt_tokens, [False] * prompt_tokens)
        following = slots
        started = time.perf_counter()
        for position in range(prompt_tokens, prompt_tokens + tokens):
            logits = context.decode(following, [position] * batch, slots, [True] * batch)
            following = logits.argmax(-1).tolist()
        elapsed_s = time.perf_counter() - started
        for slot in slots:
            context.forget(slot)
        return batch * tokens / elapsed_s

    def stream(prompt: str, tokens: int) -> float:
        drawn = high_level.generate(high_level.tokenize(prompt.encode()), temp=0.0)
        times = [time.perf_counter() for _ in islice(drawn, tokens)]
        return (tokens - 1) / (times[-1] - times[0])

    def load() -> float:
        started = time.perf_counter()
        make_llama().close()
        return time.perf_counter() - started

    # llama.cpp's own prints must not get between the figures.
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        match job:
            case {"load": _}:
                figure = load()
            case {"stream": prompt, "tokens": tokens}:
                figure = stream(prompt, tokens)
            case _:
                figure = decode(**job)
        print(json.dumps(figure), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
