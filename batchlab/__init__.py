"""batchlab: batch work on AWS, the same grid on a laptop, in a simulator and in production.

Names are imported on first use: every task's child process imports this package, and must be up
in milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchlab.grid import Grid
    from batchlab.task import Context, File

__version__ = "0.1.0"
__all__ = ["Context", "File", "Grid", "__version__"]

_HOMES = {"Context": "batchlab.task", "File": "batchlab.task", "Grid": "batchlab.grid"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'batchlab' has no attribute {name!r}")
