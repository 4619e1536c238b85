"""``python -P -m lmx.engine.mlx.about [OPENBLAS]``: what MLX can do on this machine, as one JSON object.

For ``lmx doctor``, whose own process does not load MLX; with the BLAS that engines get. Loads no model.
"""

import json
import sys
import time

from lmx.engine.mlx import blas

SIZE = 512
"""Of the matrices of the product that is timed."""
RUNS = 8
"""The first ones wake threads."""
BIG_BYTES = 1024**3
"""As for a model that is worth several threads."""


def main() -> int:
    library = blas.load(sys.argv[1] if len(sys.argv) > 1 else "auto", BIG_BYTES)
    import mlx.core as mx

    device = mx.default_device()
    info = mx.device_info() if device == mx.gpu else {}
    kinds = {}
    for kind in (mx.float32, mx.float16, mx.bfloat16):
        a = mx.ones((SIZE, SIZE), dtype=kind)
        mx.eval(a, a @ a)  # the first one pays for kernels
        times = []
        for _ in range(RUNS if kind == mx.float32 else 1):  # the others take 20 times as long on a CPU
            started = time.perf_counter()
            result = a @ a
            mx.eval(result)
            times.append(time.perf_counter() - started)
        right = bool(mx.all(result == SIZE).item())
        kinds[str(kind).rpartition(".")[2]] = {"gflops": 2 * SIZE**3 / min(times) / 1e9, "right": right}
    print(
        json.dumps(
            {
                "device": "gpu" if device == mx.gpu else "cpu",
                "name": info.get("device_name", ""),
                "working_set_bytes": int(info.get("max_recommended_working_set_size", 0)),
                "buffer_bytes": int(info.get("max_buffer_length", 0)),
                "blas": library,
                "kinds": kinds,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
