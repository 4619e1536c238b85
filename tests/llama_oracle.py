"""llama-cpp-python's own ``Llama``, what llama.cpp behind lmx is held against, made so that it computes on every
processor: see ``lmx.engine.llama.native.AMX``."""

from typing import Any
from unittest.mock import patch

import llama_cpp

from lmx.engine.llama.native import AMX


def llama(path: str, **options: Any) -> llama_cpp.Llama:
    """``Llama(path, ...)``, which has no argument for the layout of the weights."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def parameters() -> Any:
        chosen = defaults()
        chosen.use_extra_bufts = not AMX
        return chosen

    with patch.object(llama_cpp.llama_cpp, "llama_model_default_params", parameters):
        return llama_cpp.Llama(path, verbose=False, **options)
