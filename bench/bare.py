"""The baseline: a model of mlx-lm in a bare batched loop, greedy, on mlx-lm's own KVCache, pipelined as mlx-lm does.

No scheduler, no server, no sampling options, all rows equally long: as fast as this model class goes. ``BareLoop`` runs
it in a process of its own (``python -m bench.bare FOLDER``): a job as a JSON line in, its figures as a JSON line out.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.models import with_openblas


class BareLoop:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def _job(self, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def decode_tokens_per_s(self, batch: int, prompt_tokens: int, tokens: int) -> float:
        """Of ``batch`` rows that each decode ``tokens`` after a prompt of ``prompt_tokens``."""
        answer = self._job(batch=batch, prompt_tokens=prompt_tokens, tokens=tokens)
        return float(answer["decode_tokens_per_s"])

    def step_ms(self, batch: int, prompt_tokens: int, tokens: int = 24) -> float:
        return 1e3 * batch / self.decode_tokens_per_s(batch, prompt_tokens, tokens)

    def stream_tokens_per_s(self, prompt: str, tokens: int) -> float:
        """Of ``mlx_lm.stream_generate``, from its first token to its last."""
        return float(self._job(stream=prompt, tokens=tokens)["decode_tokens_per_s"])


@contextmanager
def bare_loop(folder: Path) -> Iterator[BareLoop]:
    command = [sys.executable, "-m", "bench.bare", str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=with_openblas()
    ) as process:
        try:
            yield BareLoop(process)
        finally:
            process.kill()


def _serve(folder: str) -> None:
    import mlx.core as mx
    from mlx_lm import load, stream_generate
    from mlx_lm.models.cache import make_prompt_cache

    model, tokenizer = load(folder)

    def decode(batch: int, prompt_tokens: int, tokens: int) -> dict[str, float]:
        prompts = mx.random.randint(0, model.args.vocab_size, (batch, prompt_tokens))
        cache = make_prompt_cache(model)

        def step(y: Any) -> Any:
            y = mx.argmax(model(y, cache=cache)[:, -1], axis=-1)
            mx.async_eval(y)  # type: ignore[no-untyped-call]
            return y

        y = step(prompts)
        mx.eval(y)
        started = time.perf_counter()
        for _ in range(tokens):
            following = step(y[:, None])
            y.tolist()
            y = following
        y.tolist()
        return {"decode_tokens_per_s": batch * tokens / (time.perf_counter() - started)}

    def stream(prompt: str, tokens: int) -> dict[str, float]:
        times = [time.perf_counter() for _ in stream_generate(model, tokenizer, prompt, max_tokens=tokens)]
        assert len(times) == tokens, "an answer ended early"
        return {"decode_tokens_per_s": (tokens - 1) / (times[-1] - times[0])}

    for line in sys.stdin:
        job = json.loads(line)
        answer = stream(job["stream"], job["tokens"]) if "stream" in job else decode(**job)
        mx.clear_cache()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
