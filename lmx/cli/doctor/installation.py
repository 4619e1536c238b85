"""lmx itself: its settings, and the packages it runs on."""

import importlib.metadata
import ipaddress
import platform
import stat
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from lmx import __version__
from lmx.cli.doctor.finding import Finding, Level, Patient, warnings
from lmx.config import Sources
from lmx.errors import ConfigError
from lmx.hub.backends import has_gpu


def check_settings(patient: Patient) -> Iterator[Finding]:
    where = str(patient.file.absolute()) if patient.file else "defaults and variables: there is no lmx.toml here"
    with warnings() as heard:
        try:
            patient.settings = Sources.read(patient.file, patient.environ).settings()
        except ConfigError as error:
            yield Finding("settings", "fail", error.message, "Until then nothing starts; what follows is of defaults.")
        else:
            yield Finding("settings", "ok", where)
    for text in heard:
        yield Finding("settings", "warn", text, "Unset it, or spell it as lmx.toml does.")
    server = patient.settings.server
    if not server.inference_keys and not _is_loopback(server.host):
        text = f"everybody who reaches {server.host} port {server.port} may use the models"
        yield Finding("settings", "warn", text, "Set [server] inference_keys, or host to 127.0.0.1.")
    if patient.file and (server.inference_keys or server.admin_keys):
        try:
            open_to_others = patient.file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
        except OSError:
            return
        if open_to_others:
            text = f"{patient.file} holds keys, and other users of this machine can read it"
            yield Finding("settings", "warn", text, f"chmod 600 '{patient.file}'")


def check_packages(patient: Patient) -> Iterator[Finding]:
    yield Finding("lmx", "ok", f"{__version__}, Python {platform.python_version()} ({sys.executable})")
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("lmx") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "warn", "lmx runs from its source and is not installed", "make install")
        return
    found, problems = [], []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
            continue
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}, and lmx needs {requirement.specifier}")
    if problems:
        yield Finding("packages", "fail", "; ".join(problems), "make install, or pip install -e .")
    else:
        yield Finding("packages", "ok", ", ".join(found))
    try:
        version = importlib.metadata.version("llama-cpp-python")
        yield Finding("llama.cpp", "ok", f"llama-cpp-python {version}")
    except importlib.metadata.PackageNotFoundError:
        level: Level = "ok" if has_gpu() else "warn"
        text = "llama-cpp-python is not installed: GGUF files run on MLX" + (
            ", slower on a CPU" if not has_gpu() else ""
        )
        yield Finding("llama.cpp", level, text, "pip install -e '.[gguf]'")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
