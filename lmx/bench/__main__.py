"""The command ``python -m lmx.bench``; see ``--help``."""

import argparse
import contextlib
import json
import secrets
import sys
import urllib.request
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from lmx import __version__
from lmx.bench.client import BenchError, Client, Request
from lmx.bench.figures import Figures, figures
from lmx.bench.prompts import Prompts
from lmx.bench.report import document, table
from lmx.bench.server import running_server


def main() -> int:
    options = _parser().parse_args()
    console = Console(stderr=True)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    try:
        with contextlib.ExitStack() as stack:
            url = options.url
            if options.model_path:
                console.print(f"starting a server of {options.model_path} ...")
                url = stack.enter_context(running_server(options.model_path)).url
            model = options.model or _first_model(url)
            results = _measure(url, model, options, seed, console)
    except (BenchError, ValueError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 1
    console.print(table(results, f"{model} at {url}"))
    if options.json:
        text = document(results, {"version": __version__, "url": url, "model": model, "seed": seed})
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lmx.bench",
        description="Prompt and generation speed, time to first token and inter-token latency of an OpenAI-compatible "
        "server, through /v1/completions. Lists of lengths and streams are swept.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default="http://127.0.0.1:1234", help="the running server (default: %(default)s)")
    where.add_argument("--model-path", metavar="PATH_OR_ID", help="start an lmx server of this model and measure that")
    parser.add_argument("--model", help="model to ask for (default: the first that the server lists)")
    parser.add_argument("--prompt-tokens", type=_positive_list, default=[128], metavar="N[,N...]")
    parser.add_argument("--max-tokens", type=_positive_list, default=[64], metavar="N[,N...]", help="length of answers")
    parser.add_argument("--concurrency", type=_positive_list, default=[1, 4, 8], metavar="N[,N...]", help="streams")
    parser.add_argument("--requests", type=_positive, metavar="N", help="for each load (default: twice the streams)")
    parser.add_argument("--seed", type=int, help="repeats the prompts of another run (default: new ones)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON; -: to standard output")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _positive_list(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _first_model(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/').removesuffix('/v1')}/v1/models", timeout=10) as response:
            return str(json.load(response)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise BenchError(f"{url} does not list its models ({error}); is a server running there?") from None


def _measure(url: str, model: str, options: Any, seed: int, console: Console) -> list[Figures]:
    prompts = Prompts(seed)
    results = []
    with Client(url, model) as client:
        # Warms the server up and tells how its tokenizer counts.
        [warm_up] = client.run([Request(prompts.calibration(), 8)], 1)
        prompts.calibrate(warm_up.prompt_tokens)
        for length, max_tokens, streams in product(options.prompt_tokens, options.max_tokens, options.concurrency):
            count = options.requests or 2 * streams
            console.print(f"{count} requests of {length} + {max_tokens} tokens, {streams} at a time ...")
            requests = [Request(prompts.tokens(length), max_tokens) for _ in range(count)]
            results.append(figures(client.run(requests, streams), streams))
    return results


if __name__ == "__main__":
    sys.exit(main())
