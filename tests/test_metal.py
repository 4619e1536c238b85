"""The environment that an engine gets for Metal: the settings, the chip, and the user's own variables."""

import sys

import pytest

from lmx.serving.metal import buffer_limits, chip_name

OPS, MB = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"


@pytest.mark.parametrize(
    ("ops", "mb", "environ", "platform", "chip", "added"),
    [
        (0, 0, {}, "darwin", "Apple M3 Ultra", {OPS: "1000", MB: "400"}),
        (0, 0, {}, "darwin", "", {OPS: "1000", MB: "400"}),
        (0, 0, {}, "darwin", "Apple M5", {}),
        (0, 0, {}, "darwin", "Apple M5 Max", {}),
        (0, 0, {}, "linux", "", {}),
        (200, 0, {}, "darwin", "Apple M1", {OPS: "200", MB: "400"}),
        (200, 0, {}, "darwin", "Apple M5", {OPS: "200"}),
        (200, 100, {}, "linux", "", {OPS: "200", MB: "100"}),
        (200, 100, {OPS: "7"}, "darwin", "Apple M1", {MB: "100"}),
        (0, 0, {OPS: "7", MB: ""}, "darwin", "Apple M1", {}),
    ],
)
def test_limits_of_a_command_buffer(ops, mb, environ, platform, chip, added):
    assert buffer_limits(ops, mb, environ, platform, chip) == added


def test_the_chip_is_named_by_macos_alone():
    assert chip_name("linux") == ""
    assert ("Apple" in chip_name("darwin")) == (sys.platform == "darwin")
