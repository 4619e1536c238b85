"""GPU buffers of this process, of which Metal gives each only so many: 499,000 on most Macs, and an allocation beyond
that ends the process.

MLX counts them and does not tell, so they are estimated by the arrays that Python refers to. What a graph holds that
was not evaluated yet, and what MLX's pool keeps, is not among them. Used by the back ends' ``memory``.
"""

import gc

import mlx.core as mx


def arrays() -> int:
    """Those that are alive, but for what ``gc.freeze()`` took out of the collector's list."""
    return sum(type(found) is mx.array for found in gc.get_objects())


def most() -> int:
    """As many as the system gives a process; 0: any number."""
    return int(mx.device_info().get("resource_limit", 0)) if mx.metal.is_available() else 0
