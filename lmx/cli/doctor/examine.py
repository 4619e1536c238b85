"""All checks, one after the other."""

from collections.abc import Iterator

from lmx.cli.doctor.coherence import check_coherence
from lmx.cli.doctor.finding import Check, Finding, Patient
from lmx.cli.doctor.installation import check_packages, check_settings
from lmx.cli.doctor.machine import check_disk, check_machine, check_memory, check_mlx
from lmx.cli.doctor.models import check_models, check_state
from lmx.cli.doctor.server import check_hub, check_server

CHECKS: tuple[Check, ...] = (
    check_settings,
    check_packages,
    check_machine,
    check_mlx,
    check_memory,
    check_disk,
    check_server,
    check_hub,
    check_state,
    check_models,
    check_coherence,
)


def examine(patient: Patient) -> Iterator[Finding]:
    """All findings, as they are made."""
    try:
        for check in CHECKS:
            name = check.__name__.removeprefix("check_")
            try:
                yield from check(patient)
            except Exception as error:
                text = f"could not be looked at: {type(error).__name__}: {error}"
                yield Finding(name, "fail", text, "This is a bug of lmx doctor; the other findings hold.")
    finally:
        if patient.state is not None:
            patient.state.close()
