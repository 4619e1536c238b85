"""The models on this machine's disks: which there are, what they can do, what each is called.

``Library`` is what the server and the command line know of it. Nothing here loads a model, imports MLX or NumPy, or
uses the network; ``lmx.hub.inventory.find`` makes an entry loadable.
"""

from lmx.hub.library.entry import Entry, Source
from lmx.hub.library.library import Library

__all__ = ["Entry", "Library", "Source"]
