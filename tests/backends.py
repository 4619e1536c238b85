"""Both back ends as pytest parameters; llama.cpp is an extra."""

import importlib.util

import pytest

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp is not installed: pip install 'lmx[gguf]'"
)
BACKENDS = ("mlx", pytest.param("llama", marks=needs_llama))
