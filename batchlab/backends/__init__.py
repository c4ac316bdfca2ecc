"""The one composition root: a backend's descriptor, and the adapters it names.

A backend is a named choice of adapters, written down as data in `backends/<name>/backend.toml`.
Adapters are imported in this package and nowhere else, each only when it is named: descriptor.py
reads what is written down, placed.py finds the grid's parts, opening.py opens the adapters.
"""

from batchlab.backends.descriptor import Image, capabilities_of, names, with_pools
from batchlab.backends.endpoint import VARIABLE, fresh_bucket
from batchlab.backends.launchers import open_asg_launcher
from batchlab.backends.opening import Backend, load, patience
from batchlab.backends.placed import client_environment

__all__ = [
    "VARIABLE",
    "Backend",
    "Image",
    "capabilities_of",
    "client_environment",
    "fresh_bucket",
    "load",
    "names",
    "open_asg_launcher",
    "patience",
    "with_pools",
]
