"""What `doctor` looks at of a stack on AWS: who calls, what is there, and the way to its manager.

Invariant: nothing is asked that changes something or costs money.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from batchlab.cli.findings import Finding, Level
from batchlab.errors import BackendError, UsageError

if TYPE_CHECKING:
    from batchlab.backends import Backend
    from batchlab.home import Home


def stack(home: Home, backend: Backend) -> Iterator[Finding]:
    """A finding for each; BackendError where no stack is known in this home."""
    from batchlab.adapters.awsgrid import access
    from batchlab.connection import VARIABLE

    at = backend.stack(home)
    try:
        instance = access.manager_instance(at)
    except BackendError as error:
        yield Finding("stack", Level.FAIL, error.message, error.remedy)
    else:
        text = f"{at.stack} in {at.region}: its manager runs on {instance}"
        yield Finding("stack", Level.OK, text)
    if named := os.environ.get(VARIABLE):
        yield Finding("session", Level.OK, f"the manager is reached at {named}")
        return
    try:
        yield Finding("session", Level.OK, f"sessions are carried by {access.find_plugin()}")
    except UsageError as error:
        yield Finding("session", Level.FAIL, error.message, error.remedy)
