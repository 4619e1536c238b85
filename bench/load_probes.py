"""What the probes at load cost, in a process of its own for each model: the device's alone should stay below 0.3 s. The
baseline is reading the weights."""

import json
import subprocess
import sys
import time
from pathlib import Path

from bench.models import NAMES, folder
from bench.result import Result, Row


def run(quick: bool) -> Result:
    rows: list[Row] = []
    for name in NAMES[-1:] if quick else NAMES:
        told = subprocess.run(
            [sys.executable, "-m", "bench.load_probes", str(folder(name))], check=True, capture_output=True, text=True
        )
        rows.append({"model": name, **json.loads(told.stdout)})
    return Result("probes at load, seconds", rows)


def _measure(path: Path) -> Row:
    from lmx.engine.mlx import blas

    blas.load("auto", sum(file.stat().st_size for file in path.glob("*.safetensors")))
    from lmx.engine.mlx import adapter, device, probe

    times = [time.perf_counter()]

    def lap() -> float:
        times.append(time.perf_counter())
        return times[-1] - times[-2]

    loaded = adapter.load(path)
    load_s = lap()
    write, _ = device.choose_write()
    write_s = lap()
    found = probe.run(loaded, write)
    model_s = lap()
    facts = device.measure(loaded, found.kinds, write)
    device_s = lap()
    share = float(facts.words["launch"].partition("%")[0].rsplit(" ", 1)[-1]) / 100
    return {
        "load": load_s,
        "model probe": model_s,
        "device probes": write_s + device_s,
        "path": found.path,
        "launch share": share,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]))))
