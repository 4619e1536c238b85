"""The tests. Those that run models in this process get the engine's BLAS, which must come before MLX."""

from lmx.engine.mlx import blas

blas.load()
