"""Builds the compiled scheduler, and on Linux the names by which MLX finds OpenBLAS. Everything else about the package
stands in pyproject.toml.

``LMX_SCHED_DEBUG=1`` builds it with bounds and division checks and C assertions (CI tests the scheduler so, too).
"""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

debug = os.environ.get("LMX_SCHED_DEBUG") == "1"
extension = Extension(
    "lmx._sched",
    ["lmx/_sched.pyx"],
    depends=["lmx/_sched.pxd", "lmx/_order.pxd", "lmx/_cost.pxd", "lmx/_depth.pxd"],
    # -ffp-contract=off: the same floats as the Python reference also where the CPU fuses multiply and add (arm64).
    extra_compile_args=["-ffp-contract=off", *(["-O1", "-g", "-UNDEBUG"] if debug else ["-O3"])],
)
directives = {
    "language_level": 3,
    "boundscheck": debug,
    "wraparound": False,
    "cdivision": not debug,
    "initializedcheck": debug,
    "embedsignature": True,
}
modules = cythonize([extension], compiler_directives=directives, force=debug)
if sys.platform == "linux":
    modules.append(Extension("lmx._blas", ["lmx/_blas.c"]))
setup(ext_modules=modules)
