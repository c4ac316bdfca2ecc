"""Rules for object keys that are valid on every backend.

Every child process imports the module at start-up, with `task_context`, so it needs the standard
library only.

Invariant: all checks agree on the endings that a key must not have.
"""

from __future__ import annotations

import re

CONTROL = re.compile(r"[\x00-\x1f\x7f]")

STAGED = re.compile(r"#\d+$")
"""Ending of the local store's files that are still being written."""

NEVER_EMPTY = ("code/", "grid/", "jobs/", "logs/.workers/", "reports/")
"""Prefixes of documents and archives. An empty file there is the remains of a power cut."""

VOLATILE = re.compile(r"^(logs/(\.workers|[^/]+/\.tails)/|jobs/[^/]+/[^/]+/(running|starts)/)")
"""Keys of data about running workers, which does not need to survive a power cut: markers, their
environment, and live logs."""


def check_key(key: str) -> None:
    """Raise ValueError if some backend cannot store the key."""
    if CONTROL.search(key):
        raise ValueError(f"object key {key!r} holds a control character")
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            raise ValueError(f"object key {key!r} has an empty, '.' or '..' segment")
    if STAGED.search(key):
        raise ValueError(f"object key {key!r} ends like a file that is still being written")


def check_prefix(prefix: str) -> None:
    """Raise ValueError if no key can have the prefix."""
    check_key(f"{prefix}x")
