"""The hardware, MLX on it, memory and disk."""

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from lmx.cli.doctor.finding import Finding, Patient
from lmx.hub import disk
from lmx.serving.memory import Memory, size

MLX_S = 120.0
"""A machine that has nothing to do answers in two seconds."""
LEAST_FILES = 4096


def check_machine(patient: Patient) -> Iterator[Finding]:
    chip = _sysctl("machdep.cpu.brand_string") if patient.platform == "darwin" else _linux_chip()
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    text = f"{chip or platform.processor() or 'unknown'}, {cores} cores, {platform.platform()}"
    if patient.platform == "darwin" and _sysctl("sysctl.proc_translated") == "1":
        way = "Install a Python for arm64 and make the environment anew: MLX needs it."
        yield Finding("machine", "fail", f"{text}; Python is one for Intel, under Rosetta", way)
    else:
        yield Finding("machine", "ok", text)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        text = f"a process may open {hard} files, and each connection is one"
        yield Finding("open files", "warn", text, "ulimit -Hn 65536, or `lmx service install`, which sets it.")
    else:
        yield Finding("open files", "ok", "unlimited" if hard == resource.RLIM_INFINITY else f"up to {hard}")


def check_mlx(patient: Patient) -> Iterator[Finding]:
    command = [sys.executable, "-P", "-m", "lmx.engine.mlx.about", patient.settings.engine.openblas]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=MLX_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        text = f"MLX does not answer within {MLX_S:.0f} s"
        yield Finding("mlx", "fail", text, "Is the machine busy or swapping? Else restart it: its GPU may hang.")
        return
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        yield Finding("mlx", "fail", f"MLX does not run: {said}", "make install; GGUF models still run on llama.cpp.")
        return
    about = json.loads(ended.stdout.splitlines()[-1])
    yield from _about_mlx(patient, about)


def _about_mlx(patient: Patient, about: Mapping[str, Any]) -> Iterator[Finding]:
    gpu = about["device"] == "gpu"
    kinds = about["kinds"]
    rates = ", ".join(f"{name} {kind['gflops']:.0f} GFLOP/s" for name, kind in kinds.items())
    text = f"{importlib.metadata.version('mlx')} on {about['device']} {about['name']}".rstrip() + f" ({rates})"
    if wrong := [name for name, kind in kinds.items() if not kind["right"]]:
        way = "Restart the machine; if it stays, reinstall mlx. Until then no answer can be trusted."
        yield Finding("mlx", "fail", f"{text}: products of {' and '.join(wrong)} come out wrong", way)
    elif patient.platform == "darwin" and not gpu:
        yield Finding("mlx", "fail", f"{text}: not on the GPU", "MLX needs Apple Silicon and a Python for arm64.")
    elif not gpu and Path("/proc/driver/nvidia/version").exists():
        yield Finding("mlx", "warn", f"{text}: the NVIDIA GPU is not used", "pip install -e '.[cuda]'")
    else:
        yield Finding("mlx", "ok", text)
    if not gpu:
        slow = about["blas"].startswith("MLX's own")
        way = "pip install scipy-openblas32 and build lmx with a C compiler there, or set [engine] openblas."
        yield Finding("blas", "warn" if slow else "ok", about["blas"], way if slow else "")
    if working := about["working_set_bytes"]:
        budget = Memory.of_system(patient.settings.memory).budget_bytes
        text = f"Metal keeps {size(working)} resident, {size(about['buffer_bytes'])} in one piece"
        if budget > working:
            text += f"; the budget for models is {size(budget)}"
            way = "Raise it (`sudo sysctl iogpu.wired_limit_mb=MB`), or lower [memory] limit_bytes."
            yield Finding("residency", "warn", text, way)
        else:
            yield Finding("residency", "ok", text)


def check_memory(patient: Patient) -> Iterator[Finding]:
    memory = Memory.of_system(patient.settings.memory)
    total, available, budget = memory.total(), memory.available(), memory.budget_bytes
    text = f"{size(budget)} for models of {size(total)}, {size(available)} available now"
    if budget > total:
        yield Finding("memory", "fail", text, "Lower [memory] limit_bytes: it is more than there is.")
    elif available < total // 20:
        yield Finding("memory", "warn", text, "Unload models (`lmx ps`, `lmx unload`), or close what takes it.")
    else:
        yield Finding("memory", "ok", text)
    if patient.platform == "darwin":
        limit = int(_sysctl("iogpu.wired_limit_mb") or 0) * 1024**2
        if not limit:
            yield Finding("wired limit", "ok", "the system's own (iogpu.wired_limit_mb = 0)")
        elif limit > 0.95 * total:
            way = f"sudo sysctl iogpu.wired_limit_mb={int(0.9 * total) // 1024**2}"
            text = f"iogpu.wired_limit_mb leaves the system {size(max(total - limit, 0))}: it may freeze"
            yield Finding("wired limit", "warn", text, way)
        else:
            yield Finding("wired limit", "ok", f"{size(limit)} (iogpu.wired_limit_mb)")


def check_disk(patient: Patient) -> Iterator[Finding]:
    space = disk.space(patient.settings)
    text = f"{size(space.free_bytes)} of {size(space.total_bytes)} free at {patient.settings.hub.models_path}"
    if not os.access(space.path, os.W_OK):
        way = f"Give it to this user, or set [hub] models_dir ({space.path} is not writable)."
        yield Finding("disk", "fail", f"{text}, which this user cannot write", way)
    elif space.low:
        low = size(patient.settings.hub.low_disk_bytes)
        way = "`lmx cleanup` lists unused models, `lmx cache clear` empties the prefixes."
        yield Finding("disk", "warn", f"{text}, less than [hub] low_disk_bytes ({low}): downloads are refused", way)
    else:
        yield Finding("disk", "ok", text)


def _sysctl(name: str) -> str:
    """On macOS; "" where there is no such thing."""
    path = shutil.which("sysctl", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        return ""
    ended = subprocess.run([path, "-n", name], capture_output=True, text=True)
    return "" if ended.returncode else ended.stdout.strip()


def _linux_chip() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
