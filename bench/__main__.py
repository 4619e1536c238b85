"""``python -m bench``: runs benchmarks by name, all of them without one."""

import argparse
import importlib
import sys
import time
from typing import cast

from bench.result import Result, show

NAMES = {
    "sched": "microseconds of a scheduling decision, against the tests' reference in Python",
    "sched_policy": "what the scheduling policy gives, on a simulated device",
    "engine_vs_bare": "decode tok/s of the engine process, against a bare batched loop over mlx-lm's model",
    "http_vs_bare": "decode tok/s through HTTP, against the same loop",
    "http_null": "events a second of the HTTP path, with an engine that costs nothing",
    "cancel_latency": "from the client's close to freed KV, against the step time",
    "long_prompt": "worst gap of running streams while a long prompt arrives, against the target",
    "vs_mlx_lm": "side by side with mlx_lm.server and mlx_lm.stream_generate",
    "vs_llama": "llama.cpp behind lmx, against llama.cpp's own faces, and MLX on the same file",
    "memory_mix": "KV buffers against the KV in them, in a mix of short and long sequences that never idles",
    "constrained": "decode tok/s of 8 rows under a JSON schema, against free ones; compiling 200 tools",
    "sampling": "milliseconds of a draw for 8 rows, by sampling parameters",
    "primitives": "operations that MLX is given for a decode step, against mlx_lm's generate_step",
    "compiled": "milliseconds of a decode step, eager against compiled, by rows",
    "load_probes": "seconds that the probes at load take",
    "prefill": "prompt tok/s by chunk size",
    "loop_sim": "the step loop on simulated devices: idle share, late tokens, gaps, TTFT",
    "embeddings": "texts a second through /v1/embeddings, against sentence-transformers on the same cores",
    "agents": "whole-run seconds of agents that share a system prompt, against peers and without the prefix store",
    "prefix": "TTFT with a prefix in memory, and from the disk after a restart; what keeping costs",
    "memory_estimates": "what a model is estimated to take, against its process",
    "kv_quality": "what KV in 8 and 4 bits changes: KL and top-1 on real text, bytes, step time",
    "library": "milliseconds of looking for models on the disk, first and again",
    "lookahead": "lookahead forced on against off: first and second prompt, bursts",
    "speculation": "decode tok/s with speculation against without, on text that repeats and text that does not",
    "switch": "seconds from one model to another that does not fit beside it, against a bare engine's start",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:16} {what}" for name, what in NAMES.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *NAMES], help="default: all")
    parser.add_argument("--quick", action="store_true", help="smaller sizes: minutes for all together, and more noise")
    options = parser.parse_args()
    for name in options.names or NAMES:
        started = time.monotonic()
        print(f"{name} ...", file=sys.stderr)
        module = importlib.import_module(f"bench.{name}")
        result = cast(Result, module.run(options.quick))
        show(name, result, time.monotonic() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
