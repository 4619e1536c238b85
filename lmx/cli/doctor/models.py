"""The state database, and the models on the disk."""

from collections.abc import Iterator

from lmx.cli.doctor.finding import Finding, Level, Patient, warnings
from lmx.errors import LmxError
from lmx.hub.library import Library
from lmx.hub.state import State
from lmx.serving.memory import size


def check_state(patient: Patient) -> Iterator[Finding]:
    path = patient.state_path
    if not path.exists() and not patient.serves:
        patient.state = State(None)
        yield Finding("state", "ok", f"{path} will be begun by the first server")
        return
    with warnings() as heard:
        patient.state = State(path)
    for text in heard:
        yield Finding("state", "warn", text, "Jobs, benches and uses of the past may be lost; models are not.")
    if not heard:
        yield Finding("state", "ok", f"{path}, {size(path.stat().st_size)}")


def check_models(patient: Patient) -> Iterator[Finding]:
    settings, state = patient.settings, patient.state or State(None)
    with warnings() as heard:
        library = Library(settings, state)
        library.scan()
    for text in heard:
        yield Finding("models", "warn", text, "Mount it, or change [hub] in lmx.toml.")
    whole = [entry for entry in library.entries if not entry.problem]
    total = size(sum(entry.size_bytes for entry in whole))
    if whole:
        yield Finding("models", "ok", f"{len(whole)} that can be loaded, {total}")
    else:
        yield Finding("models", "warn", "there is none that can be loaded", "`lmx pull NAME` downloads one.")
    for entry in library.entries:
        if entry.problem:
            yield Finding(
                "models", "warn", f"{entry.id}: {entry.problem}", f"`lmx pull` it again, or lmx rm {entry.id}"
            )
    model = settings.model
    named = [("default", model.default), ("embedding", model.embedding), *(("preload", name) for name in model.preload)]
    for key, name in named:
        try:
            if name:
                library.find(model.aliases.get(name, name))
        except LmxError as error:
            level: Level = "warn" if key == "preload" else "fail"
            yield Finding(
                "models", level, f"[model] {key}: {error.message}", f"Change [model] {key}, or `lmx pull` it."
            )
