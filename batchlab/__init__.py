"""batchlab runs batch jobs on the same kind of grid on AWS, on a laptop, or in a simulator.

The names of the package are imported on first use, because every task's child process imports the package and must
start in milliseconds.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from batchlab.client.executor import GridExecutor
    from batchlab.client.grid import Grid
    from batchlab.client.http import Client
    from batchlab.client.results import JobResult
    from batchlab.core.errors import BatchlabError, JobFailed, TaskFailed
    from batchlab.core.model import JobState, Pool
    from batchlab.core.retry_rule import RetryRule
    from batchlab.core.shared_values import Shared
    from batchlab.core.task_context import Context, File

__version__ = "0.1.0"
__all__ = [
    "BatchlabError",
    "Client",
    "Context",
    "File",
    "Grid",
    "GridExecutor",
    "JobFailed",
    "JobResult",
    "JobState",
    "Pool",
    "RetryRule",
    "Shared",
    "TaskFailed",
    "__version__",
]

_HOMES = {
    "BatchlabError": "batchlab.core.errors",
    "Client": "batchlab.client.http",
    "Context": "batchlab.core.task_context",
    "File": "batchlab.core.task_context",
    "Grid": "batchlab.client.grid",
    "GridExecutor": "batchlab.client.executor",
    "JobFailed": "batchlab.core.errors",
    "JobResult": "batchlab.client.results",
    "JobState": "batchlab.core.model",
    "Pool": "batchlab.core.model",
    "RetryRule": "batchlab.core.retry_rule",
    "Shared": "batchlab.core.shared_values",
    "TaskFailed": "batchlab.core.errors",
}

_PUBLISHED = {
    "batchlab.errors": "batchlab.core.errors",
    "batchlab.grid": "batchlab.client.grid",
    "batchlab.grid.executor": "batchlab.client.executor",
    "batchlab.grid.joblib": "batchlab.client.joblib",
    "batchlab.grid.result": "batchlab.client.results",
    "batchlab.jobdef": "batchlab.core.job_definition",
    "batchlab.model": "batchlab.core.model",
    "batchlab.task": "batchlab.core.task_context",
}
"""Map of module names of release 0.1.0, which programs and stored pickles may use, to the current module names."""


class _PublishedModules:
    """Importer of the module names of release 0.1.0."""

    def find_spec(self, fullname: str, _path: object, _target: object = None) -> ModuleSpec | None:
        if fullname not in _PUBLISHED:
            return None
        loader: Any = self
        return ModuleSpec(fullname, loader, is_package=fullname == "batchlab.grid")

    def create_module(self, _spec: ModuleSpec) -> None:
        """Return None, so that the import system creates the module."""

    def exec_module(self, module: ModuleType) -> None:
        found = vars(import_module(_PUBLISHED[module.__name__]))
        vars(module).update({n: one for n, one in found.items() if not n.startswith("__")})


_importer: Any = _PublishedModules()
sys.meta_path.append(_importer)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        if sys.platform in ("win32", "cygwin"):
            # The check comes first, because Windows lacks modules of the standard library that the import needs.
            from batchlab.core.installation import check_platform

            check_platform()
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'batchlab' has no attribute {name!r}")
