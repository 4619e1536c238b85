"""How many operations MLX puts into one Metal command buffer, for the engine's environment.

MLX commits a command buffer after 20 to 50 operations or as many megabytes of inputs, by chip, and lets ten be in
flight (its ``metal/device.cpp`` and ``transforms.cpp``). A decode step of a model of experts then takes 45 to 90 of
them, so launching it blocks until most of it is done, and each one costs. With larger ones an M3 Ultra ran 5 to 8 %
faster (mlx#4521) and an M1 Ultra 1.6 times as fast (vllm-metal#637); an M5 ran slower (mlxcel#360). The engine's probe
tells what came of it. MLX reads the variables once, so they must be there when the engine starts; called once by
``lmx.serving.models``. Blocking.
"""

import subprocess
from collections.abc import Mapping

_OPS, _MB = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
_AUTOMATIC = {_OPS: 1000, _MB: 400}


def buffer_limits(ops: int, mb: int, environ: Mapping[str, str], platform: str, chip: str) -> dict[str, str]:
    """The variables to add to ``environ``. ``ops``, ``mb``: the settings, 0: what suits the chip. A variable that the
    user has set stays."""
    limits = {name: value for name, value in ((_OPS, ops), (_MB, mb)) if value}
    if platform == "darwin" and "M5" not in chip.split():
        limits = {**_AUTOMATIC, **limits}
    return {name: str(value) for name, value in limits.items() if name not in environ}


def chip_name(platform: str) -> str:
    """Of this machine, as "Apple M3 Ultra"; "" where nobody says."""
    if platform != "darwin":
        return ""
    try:
        told = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.stdout.strip()
