"""A decode step gives MLX hardly more operations than mlx-lm's own loop does, at full and at partial lanes: what can be
said of a GPU's speed without one."""

from pathlib import Path

import pytest

from bench.primitives import BUILT, DRAWS, ROWS, TARGET, back_end, built, count_ours, count_theirs, kernels


@pytest.mark.parametrize("kind", BUILT)
def test_a_step_has_no_more_operations_than_mlx_lms(kind: str, tmp_path: Path) -> None:
    loaded = built(kind, tmp_path)
    backend = back_end(loaded)
    for draw, (sampling, sampler) in DRAWS.items():
        theirs = count_theirs(loaded, sampler)
        for rows in ROWS if draw == "greedy" else ("5 of 8",):
            ours = count_ours(backend, rows, sampling)
            assert kernels(ours) <= TARGET * kernels(theirs), (draw, rows, ours - theirs)
            assert ours.total() <= TARGET * theirs.total(), (draw, rows, ours - theirs)
