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


def _caller(region: str | None) -> Finding:
    """Whose credentials AWS's tools find, and in which region."""
    from batchlab.cli.deploying import tries
    from batchlab.deploy.account import Account

    try:
        with Account.open(region, notes=tries) as account:
            text = f"{account.id} in {account.region}, as {account.who}"
            place = "" if account.is_real else ", at what AWS_ENDPOINT_URL puts in AWS's place"
            return Finding("account", Level.OK, text + place)
    except (BackendError, UsageError) as error:
        return Finding("account", Level.FAIL, error.message, error.remedy)


def _manager(home: Home, backend: Backend) -> Finding:
    """The stack that this home knows, and the instance of its manager."""
    from batchlab.adapters.awsgrid import access

    try:
        at = backend.stack(home)
        instance = access.manager_instance(at)
    except BackendError as error:
        return Finding("stack", Level.FAIL, error.message, error.remedy)
    text = f"{at.stack} in {at.region}: its manager runs on {instance}"
    return Finding("stack", Level.OK, text)


def stack(home: Home, backend: Backend) -> Iterator[Finding]:
    """A finding for each."""
    from batchlab.adapters.awsgrid import access, deployment
    from batchlab.connection import VARIABLE

    try:
        known = deployment.read(home)
    except BackendError:
        known = None  # told below
    yield (caller := _caller(known.region if known else None))
    # Without credentials the rest would only say so again.
    if caller.level is Level.OK or not known:
        yield _manager(home, backend)
    if named := os.environ.get(VARIABLE):
        yield Finding("session", Level.OK, f"the manager is reached at {named}")
        return
    try:
        yield Finding("session", Level.OK, f"sessions are carried by {access.find_plugin()}")
    except UsageError as error:
        yield Finding("session", Level.FAIL, error.message, error.remedy)
